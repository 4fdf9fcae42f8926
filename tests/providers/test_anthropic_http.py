"""`AnthropicHttp` against the stub of the vendors, and against replies written by the test."""

from __future__ import annotations

from typing import Any

import pytest
from asking import ask, asked
from fakes_http import Script, always, json_reply, reply
from vendor_http import CLAUDE
from vendors import vendors

from promptmesh.providers.anthropic_http import AnthropicHttp
from promptmesh.providers.anthropic_messages import ClaudeOptions
from promptmesh.providers.base import (
    ModelOffer,
    ProviderUnavailable,
    RequestRejected,
    Sampling,
)
from promptmesh.providers.claude_settings import ClaudeSettings


async def test_what_is_asked() -> None:
    async with CLAUDE.at_stub() as (server, provider):
        await ask(provider)
    (seen,) = server.of("ok")
    sent = seen.request
    assert sent.headers["x-api-key"] == CLAUDE.key
    assert sent.headers["anthropic-version"] == "2023-06-01"
    assert sent.path == "/m/ok/v1/messages"
    assert sent.json["messages"][0]["content"] == [{"type": "text", "text": "Tell me a tale."}]


async def test_gateway_with_a_token_and_headers() -> None:
    fields: dict[str, Any] = {
        "api_key": None,
        "environment": {"ANTHROPIC_AUTH_TOKEN": CLAUDE.key},
        "headers": {"X-Team": "red"},
    }
    async with vendors() as server, CLAUDE.at(server.base() + "/v1/", **fields) as provider:
        await ask(provider)
    (asked,) = server.of("ok")
    assert asked.request.headers["authorization"] == f"Bearer {CLAUDE.key}"
    assert asked.request.headers["x-team"] == "red"
    assert "x-api-key" not in asked.request.headers
    assert asked.request.path == "/m/ok/v1/messages"


async def test_field_that_a_model_refuses_is_left_out() -> None:
    refusal = {
        "type": "error",
        "error": {
            "type": "invalid_request_error",
            "message": "`temperature` is deprecated for this model.",
        },
    }
    whole = {"type": "message", "content": [{"type": "text", "text": "a"}]}
    good = json_reply(200, whole | {"stop_reason": "end_turn"})

    async def script(side: Any) -> None:
        while (received := await side.request_or_end()) is not None:
            refused = "temperature" in received.json
            await side.send(json_reply(400, refusal) if refused else good)

    request = asked(model="m", sampling=Sampling(temperature=0.2))
    async with CLAUDE.scripted(script) as (server, provider):
        assert (await ask(provider, request)).text == "a"
        assert (await ask(provider, request)).text == "a"
    assert ["temperature" in r.json for r in server.requests] == [True, False, False]


# --- options -------------------------------------------------------------------------------------


async def test_options_of_the_table_and_of_a_request() -> None:
    usual = ClaudeOptions(effort="low", thinking=2000)
    request = asked(model="m", dialect="openai", extra={"effort": "max", "user": "u"})
    async with CLAUDE.at_stub(options=usual, max_tokens=100) as (server, provider):
        await ask(provider)
        await ask(provider, request)
        wrong = asked(model="m", extra={"efort": "low"})
        with pytest.raises(RequestRejected, match="did you mean 'effort'"):
            await ask(provider, wrong)
    usual_body, other_body = (asked.request.json for asked in server.of("ok"))
    assert usual_body["output_config"] == {"effort": "low"}
    assert usual_body["max_tokens"] == 2100
    assert other_body["output_config"] == {"effort": "max"}
    assert other_body["thinking"]["budget_tokens"] == 2000


# --- models and health ---------------------------------------------------------------------------


def listed(*models: dict[str, Any]) -> Script:
    return always(json_reply(200, {"data": list(models), "has_more": False}))


async def test_models() -> None:
    script = listed(
        {
            "type": "model",
            "id": "claude-opus-4-6",
            "max_input_tokens": 200_000,
            "max_tokens": 4000,
            "capabilities": {"image_input": {"supported": False}},
        },
        {"type": "model", "id": "claude-sonnet-4-5", "display_name": "Claude"},
    )
    async with CLAUDE.scripted(script) as (server, provider):
        assert provider.models() == ()
        assert (await provider.check()).state == "ready"
        opus, sonnet = provider.models()
    assert opus == ModelOffer(id="claude-opus-4-6", context_length=200_000, tools=True, egress=True)
    assert (sonnet.context_length, sonnet.modalities) == (None, ("text", "image"))
    assert (sonnet.can_continue, sonnet.egress) == (True, True)
    assert server.requests[0].path == "/v1/models?limit=1000"


async def test_an_answer_is_no_longer_than_the_model_can() -> None:
    async def script(side: Any) -> None:
        while (received := await side.request_or_end()) is not None:
            if received.method == "GET":
                await side.send(json_reply(200, {"data": [{"id": "m", "max_tokens": 4000}]}))
            else:
                assert received.json["max_tokens"] == 4000
                await side.send(reply(529))

    async with CLAUDE.scripted(script) as (_, provider):
        await provider.check()
        request = asked(model="m")
        with pytest.raises(ProviderUnavailable):
            await ask(provider, request)


async def test_a_base_url_may_be_the_fault() -> None:
    async with CLAUDE.at_stub("e500") as (_, provider):
        assert "it ends before /v1" in (await provider.check()).hint


# --- the key -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"base_url": "ftp://x", "api_key": CLAUDE.key}, "base_url"),
        ({"api_key": "two words"}, "api_key"),
        ({"environment": {"ANTHROPIC_AUTH_TOKEN": "two\nlines"}}, "ANTHROPIC_AUTH_TOKEN"),
        ({}, "ANTHROPIC_API_KEY"),
    ],
)
def test_wrong_settings(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        AnthropicHttp(ClaudeSettings(**({"name": "claude"} | fields)))
    assert "words" not in str(caught.value)


def test_a_key_is_not_shown() -> None:
    assert CLAUDE.key not in repr(ClaudeSettings(name="claude", api_key=CLAUDE.key))
