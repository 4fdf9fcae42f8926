"""A request in the words of Gemini."""

import base64
import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.providers import gemini_messages
from promptmesh.providers.base import (
    GenerateRequest,
    Image,
    Message,
    ProviderUnavailable,
    RequestRejected,
    ResponseFormat,
    Role,
    Sampling,
    Text,
    Tool,
    ToolCall,
    ToolChoice,
)
from promptmesh.providers.gemini_messages import (
    NO_SIGNATURE,
    Quirks,
    Signatures,
    encode_request,
)
from promptmesh.providers.gemini_options import GeminiOptions

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


def say(role: Role, *content: Text | Image | str, **fields: Any) -> Message:
    parts = tuple(Text(text=part) if isinstance(part, str) else part for part in content)
    return Message(role=role, content=parts, **fields)


def encode(
    *messages: Message,
    options: GeminiOptions | None = None,
    signatures: Signatures | None = None,
    quirks: Quirks | None = None,
    model: str = "m",
    **fields: Any,
) -> Any:
    request = GenerateRequest(model=model, messages=messages or (say("user", "hi"),), **fields)
    return json.loads(
        encode_request(
            request, options or GeminiOptions(), signatures or Signatures(), quirks or Quirks()
        )
    )


def config(**fields: Any) -> Any:
    return encode(**fields).get("generationConfig")


def call(id: str = "c1", name: str = "weather", arguments: str = '{"city": "Rome"}') -> ToolCall:
    return ToolCall(id=id, name=name, arguments=arguments)


def test_a_plain_question() -> None:
    assert encode() == {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}


def test_system_and_turns() -> None:
    body = encode(
        say("system", "be brief"),
        say("user", "one"),
        say("assistant", "two", reasoning="not sent back"),
        say("user", "three"),
        say("developer", "and kind"),
        say("user", "four"),
    )
    assert body["systemInstruction"] == {"parts": [{"text": "be brief"}, {"text": "and kind"}]}
    assert body["contents"] == [
        {"role": "user", "parts": [{"text": "one"}]},
        {"role": "model", "parts": [{"text": "two"}]},
        {"role": "user", "parts": [{"text": "three"}, {"text": "four"}]},
    ]


def test_a_request_with_nothing_but_a_system_message() -> None:
    with pytest.raises(ProviderUnavailable, match="nothing but a system message"):
        encode(say("system", "be brief"))


@given(st.text())
def test_any_text_arrives_as_it_is(text: str) -> None:
    assert encode(say("user", text))["contents"] == [{"role": "user", "parts": [{"text": text}]}]


# --- images --------------------------------------------------------------------------------------


def image(url: str) -> Any:
    return encode(say("user", "what is it?", Image(url=url)))["contents"][0]["parts"][1]


def test_images() -> None:
    data = base64.b64encode(b"\x89PNG").decode()
    assert image(f"data:image/png;base64,{data}") == {
        "inlineData": {"mimeType": "image/png", "data": data}
    }
    assert image(f"data:image/svg+xml;charset=utf-8;base64,{data}") == {
        "inlineData": {"mimeType": "image/svg+xml", "data": data}
    }
    assert image("data:image/svg+xml,%3Csvg%2F%3E") == {
        "inlineData": {
            "mimeType": "image/svg+xml",
            "data": base64.b64encode(b"<svg/>").decode(),
        }
    }
    assert image("https://a.example/b.jpg?size=1") == {
        "fileData": {"fileUri": "https://a.example/b.jpg?size=1", "mimeType": "image/jpeg"}
    }
    assert image("https://[a/b.WebP#c.png")["fileData"]["mimeType"] == "image/webp"
    assert image("https://a.example/b") == {"fileData": {"fileUri": "https://a.example/b"}}


def test_images_that_cannot_be_sent() -> None:
    with pytest.raises(RequestRejected, match="base64"):
        image("data:image/png;base64,???")
    with pytest.raises(ProviderUnavailable, match="https"):
        image("http://a.example/b.png")
    with pytest.raises(ProviderUnavailable, match="https"):
        image("file:///etc/passwd")
    with pytest.raises(ProviderUnavailable, match="result of a tool"):
        encode(
            say("assistant", tool_calls=(call(),)),
            say("tool", Image(url="https://a.example/b.png"), tool_call_id="c1"),
        )


@given(st.sampled_from(["https://", "data:", "data:image/png;base64,", ""]), st.text())
def test_any_url_is_an_image_or_refused(scheme: str, rest: str) -> None:
    with contextlib.suppress(RequestRejected, ProviderUnavailable):
        (kind,) = image(scheme + rest)
        assert kind in ("inlineData", "fileData")


# --- tools ---------------------------------------------------------------------------------------


def test_tools() -> None:
    tool = Tool(name="weather", description="How it is", parameters=SCHEMA)
    body = encode(tools=(tool, Tool(name="now")))
    assert body["tools"] == [
        {
            "functionDeclarations": [
                {"name": "weather", "description": "How it is", "parametersJsonSchema": SCHEMA},
                {"name": "now"},
            ]
        }
    ]
    assert body["toolConfig"] == {"functionCallingConfig": {"mode": "AUTO"}}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (ToolChoice(mode="auto"), {"mode": "AUTO"}),
        (ToolChoice(mode="none"), {"mode": "NONE"}),
        (ToolChoice(mode="required"), {"mode": "ANY"}),
        (
            ToolChoice(mode="function", name="now"),
            {"mode": "ANY", "allowedFunctionNames": ["now"]},
        ),
    ],
)
def test_tool_choice(choice: ToolChoice, expected: Any) -> None:
    body = encode(tools=(Tool(name="now"),), tool_choice=choice)
    assert body["toolConfig"]["functionCallingConfig"] == expected


def test_a_strict_tool() -> None:
    body = encode(tools=(Tool(name="now", strict=True),))
    assert body["toolConfig"]["functionCallingConfig"] == {"mode": "VALIDATED"}


def test_calls_and_their_results() -> None:
    body = encode(
        say("user", "Rome and Oslo?"),
        say("assistant", "I look.", tool_calls=(call(), call("c2", arguments=""))),
        say("tool", '{"sun": true}', tool_call_id="c1"),
        say("tool", "snow", tool_call_id="c2"),
        say("assistant", "Sun; snow."),
    )
    assert body["contents"][1:] == [
        {
            "role": "model",
            "parts": [
                {"text": "I look."},
                {"functionCall": {"id": "c1", "name": "weather", "args": {"city": "Rome"}}},
                {"functionCall": {"id": "c2", "name": "weather", "args": {}}},
            ],
        },
        {
            "role": "user",
            "parts": [
                {"functionResponse": {"id": "c1", "name": "weather", "response": {"sun": True}}},
                {
                    "functionResponse": {
                        "id": "c2",
                        "name": "weather",
                        "response": {"result": "snow"},
                    }
                },
            ],
        },
        {"role": "model", "parts": [{"text": "Sun; snow."}]},
    ]


@pytest.mark.parametrize("arguments", ["{", "[1]", "null", '"x"', "[" * 100_000])
def test_arguments_that_are_no_object(arguments: str) -> None:
    with pytest.raises(RequestRejected, match="'c1' are no JSON object"):
        encode(say("assistant", tool_calls=(call(arguments=arguments),)))


def test_a_result_of_no_call() -> None:
    with pytest.raises(RequestRejected, match="no tool call has the id 'c9'"):
        encode(say("tool", "snow", tool_call_id="c9"))
    body = encode(say("tool", "snow", tool_call_id="c9", name="weather"))
    assert body["contents"][0]["parts"][0]["functionResponse"]["name"] == "weather"


# --- signatures ----------------------------------------------------------------------------------


def call_parts(signatures: Signatures, quirks: Quirks) -> list[Any]:
    body = encode(
        say("assistant", tool_calls=(call("c1"), call("c2"))),
        signatures=signatures,
        quirks=quirks,
    )
    return [part.get("thoughtSignature") for part in body["contents"][0]["parts"]]


def test_a_signature_goes_back_with_its_call() -> None:
    signatures, quirks = Signatures(), Quirks()
    signatures.keep("c1", "signed")
    assert call_parts(signatures, quirks) == ["signed", None]


def test_a_model_that_wants_signatures_gets_one_where_there_is_none() -> None:
    quirks = Quirks()
    assert call_parts(Signatures(), quirks) == [None, None]
    assert quirks.learn("m", "Function call is missing a thought_signature in functionCall parts.")
    assert call_parts(Signatures(), quirks) == [NO_SIGNATURE, None]
    known = Signatures()
    known.keep("c2", "signed")
    assert call_parts(known, quirks) == [None, "signed"]


def test_a_refusal_is_learnt_from_once_for_each_model() -> None:
    quirks = Quirks()
    assert not quirks.learn("m", "temperature is too high")
    assert quirks.learn("m", "missing a thought_signature")
    assert not quirks.learn("m", "missing a thought_signature")
    assert quirks.learn("other", "missing a thought_signature")


def test_signatures_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemini_messages, "MAX_SIGNATURES", 3)
    monkeypatch.setattr(gemini_messages, "MAX_SIGNED", 10)
    signatures = Signatures()
    for number in range(5):
        signatures.keep(f"c{number}", "x")
    assert [signatures.of(f"c{n}") for n in range(5)] == [None, None, "x", "x", "x"]
    signatures.keep("c4", "y" * 9)
    assert [signatures.of(f"c{n}") for n in range(2, 5)] == [None, "x", "y" * 9]
    signatures.keep("long", "z" * 11)
    assert signatures.of("long") is None


# --- sampling, form and options -------------------------------------------------------------------


def test_sampling() -> None:
    sampling = Sampling(
        temperature=0.0,
        top_p=0.9,
        top_k=40,
        max_tokens=2000,
        stop=("END", "\n\n"),
        seed=2**31 + 5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logprobs=True,
        top_logprobs=3,
    )
    assert config(sampling=sampling) == {
        "temperature": 0.0,
        "topP": 0.9,
        "topK": 40,
        "maxOutputTokens": 2000,
        "stopSequences": ["END", "\n\n"],
        "seed": 5,
        "presencePenalty": 0.5,
        "frequencyPenalty": -0.5,
        "responseLogprobs": True,
        "logprobs": 3,
    }
    assert config() is None


def test_what_gemini_cannot_do() -> None:
    with pytest.raises(ProviderUnavailable, match="logit_bias"):
        encode(sampling=Sampling(logit_bias={"5": 1.0}))
    with pytest.raises(ProviderUnavailable, match="5 stop sequences"):
        encode(sampling=Sampling(stop=tuple("abcdef")))


def test_form() -> None:
    assert config(response_format=ResponseFormat(type="text")) is None
    assert config(response_format=ResponseFormat(type="json_object")) == {
        "responseMimeType": "application/json"
    }
    wanted = ResponseFormat(type="json_schema", name="place", schema=SCHEMA, strict=True)
    assert config(response_format=wanted) == {
        "responseMimeType": "application/json",
        "responseJsonSchema": SCHEMA,
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (GeminiOptions(thinking_budget=-1), {"thinkingBudget": -1}),
        (GeminiOptions(thinking_budget=0), {"thinkingBudget": 0}),
        (GeminiOptions(thinking_level="low"), {"thinkingLevel": "LOW"}),
        (GeminiOptions(reasoning_effort="none"), {"thinkingBudget": 0}),
        (
            GeminiOptions(reasoning_effort="high", include_thoughts=True),
            {"thinkingBudget": 24576, "includeThoughts": True},
        ),
    ],
)
def test_thinking(options: GeminiOptions, expected: Any) -> None:
    assert config(options=options) == {"thinkingConfig": expected}


@pytest.mark.parametrize(
    ("model", "limit", "expected"),
    [
        ("gemini-2.5-flash", 256, {"thinkingBudget": 0}),
        ("gemini-2.5-pro", 256, {"thinkingBudget": 128}),
        ("gemini-2.5-pro", 1024, None),
        ("gemini-2.5-pro", None, None),
    ],
)
def test_an_answer_that_must_be_short_has_no_room_for_thoughts(
    model: str, limit: int | None, expected: Any
) -> None:
    sampling = Sampling(max_tokens=limit, temperature=0)
    assert config(model=model, sampling=sampling).get("thinkingConfig") == expected
    options = GeminiOptions(include_thoughts=True)
    found = config(model=model, sampling=sampling, options=options)["thinkingConfig"]
    assert found == {"includeThoughts": True}


def test_a_model_that_refuses_to_think_less_is_not_asked_to() -> None:
    quirks = Quirks()
    assert quirks.learn("m", "Budget 0 is invalid. This model only works in thinking mode.")
    assert not quirks.learn("m", "Budget 0 is invalid. This model only works in thinking mode.")
    assert config(sampling=Sampling(max_tokens=9), quirks=quirks) == {"maxOutputTokens": 9}


def test_safety() -> None:
    settings = encode(options=GeminiOptions(safety="block_only_high"))["safetySettings"]
    assert {"category": "HARM_CATEGORY_HARASSMENT", "threshold": "BLOCK_ONLY_HIGH"} in settings
    assert len(settings) == 4


def test_what_cannot_be_written() -> None:
    with pytest.raises(RequestRejected, match="cannot be written as JSON"):
        encode(say("user", "\ud800"))
    with pytest.raises(RequestRejected, match="cannot be written as JSON"):
        encode(tools=(Tool(name="f", parameters={"x": object()}),))
