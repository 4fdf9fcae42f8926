"""Talks with the vendors' stub through the vendors' own SDKs: `vendor_sdks.py ORIGIN`.

Says as JSON what each of them understood. They are in a folder of their own (PYTHONPATH).
"""

import json
import sys
from typing import Any

import anthropic
from google import genai
from google.genai import errors, types

ASKED = "Tell me a tale."


def messages(base: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(api_key="k", base_url=base, max_retries=0)


def by_anthropic(origin: str) -> dict[str, Any]:
    client = messages(f"{origin}/m/ok")
    turn: Any = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": ASKED}]}
    whole = client.messages.create(**turn)
    with client.messages.stream(**turn) as stream:
        pieces = list(stream.text_stream)
        usage = stream.get_final_message().usage
    found = {
        "whole": whole.content[0].text,
        "pieces": pieces,
        "finish": whole.stop_reason,
        "tokens": [usage.input_tokens, usage.output_tokens],
        "models": [model.id for model in client.models.list()],
        "counted": client.messages.count_tokens(model="m", messages=turn["messages"]).input_tokens,
    }
    for mode in ("e401", "e429-7", "e529"):
        try:
            messages(f"{origin}/m/{mode}").messages.create(**turn)
        except anthropic.APIStatusError as error:
            waits = error.response.headers.get("retry-after")
            found[mode] = [type(error).__name__, error.status_code, waits]
    return found


def google(base: str) -> genai.Client:
    return genai.Client(api_key="k", http_options=types.HttpOptions(base_url=base))


def by_google(origin: str) -> dict[str, Any]:
    client = google(f"{origin}/m/ok")
    whole = client.models.generate_content(model="m", contents=ASKED)
    stream = client.models.generate_content_stream(model="m", contents=ASKED)
    usage = whole.usage_metadata
    found = {
        "whole": whole.text,
        "pieces": [piece.text for piece in stream if piece.text],
        "finish": whole.candidates[0].finish_reason.name,
        "tokens": [usage.prompt_token_count, usage.candidates_token_count],
        "models": [model.name for model in client.models.list()],
        "counted": client.models.count_tokens(model="m", contents=ASKED).total_tokens,
    }
    for mode in ("badkey", "e429-7", "e503"):
        failing = google(f"{origin}/m/{mode}")
        try:
            failing.models.generate_content(model="m", contents=ASKED)
        except errors.APIError as error:
            found[mode] = [type(error).__name__, error.code, error.status]
    return found


print(json.dumps({"anthropic": by_anthropic(sys.argv[1]), "google": by_google(sys.argv[1])}))
