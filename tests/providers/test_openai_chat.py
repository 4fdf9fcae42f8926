"""A request in the OpenAI dialect."""

import json
from typing import Any

import msgspec
import pytest

from promptmesh.providers.base import (
    GenerateRequest,
    Image,
    Message,
    RequestRejected,
    ResponseFormat,
    Sampling,
    Text,
    Tool,
    ToolCall,
    ToolChoice,
)
from promptmesh.providers.openai_chat import Quirks, encode_request


def user(text: str) -> Message:
    return Message(role="user", content=(Text(text=text),))


def request(*messages: Message, **fields: Any) -> GenerateRequest:
    return GenerateRequest(model="m", messages=messages or (user("hi"),), **fields)


def body(request: GenerateRequest, *args: Any) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(encode_request(request, Quirks(), *args))
    return decoded


def test_the_least() -> None:
    assert body(request()) == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_messages() -> None:
    call = ToolCall(id="c1", name="f", arguments='{"a":1}')
    sent = body(
        request(
            Message(role="developer", content=(Text(text="be "), Text(text="brief"))),
            Message(role="user", name="ann", content=(Text(text="look"), Image(url="data:x"))),
            Message(role="user", content=(Image(url="https://x/y", detail="low"),)),
            Message(role="assistant", reasoning="hm", tool_calls=(call,)),
            Message(role="tool", tool_call_id="c1", content=(Text(text="42"),)),
            Message(role="assistant"),
        )
    )["messages"]
    assert sent == [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "name": "ann",
            "content": [
                {"type": "text", "text": "look"},
                {"type": "image_url", "image_url": {"url": "data:x"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "https://x/y", "detail": "low"}}
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "f", "arguments": '{"a":1}'},
                }
            ],
        },
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "assistant", "content": ""},
    ]


def test_sampling() -> None:
    sampling = Sampling(
        temperature=0.0,
        top_p=0.9,
        top_k=40,
        max_tokens=5,
        stop=("a", "b"),
        seed=0,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"7": -100},
        logprobs=True,
        top_logprobs=2,
    )
    sent = body(request(sampling=sampling))
    expected = msgspec.to_builtins(sampling) | {"stop": ["a", "b"], "temperature": 0, "seed": 0}
    assert {name: sent[name] for name in expected} == expected


def test_tools() -> None:
    tools = (
        Tool(name="f", description="does", parameters={"type": "object"}, strict=True),
        Tool(name="g"),
    )
    sent = body(request(tools=tools, parallel_tool_calls=False))
    assert sent["tools"] == [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "does",
                "parameters": {"type": "object"},
                "strict": True,
            },
        },
        {"type": "function", "function": {"name": "g", "parameters": {}}},
    ]
    assert sent["parallel_tool_calls"] is False
    assert "tool_choice" not in sent


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        (ToolChoice(), "auto"),
        (ToolChoice(mode="none"), "none"),
        (ToolChoice(mode="required"), "required"),
        (ToolChoice(mode="function", name="f"), {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_tool_choice(choice: ToolChoice, sent: Any) -> None:
    assert body(request(tool_choice=choice))["tool_choice"] == sent


@pytest.mark.parametrize(
    ("wanted", "sent"),
    [
        (ResponseFormat(), {"type": "text"}),
        (ResponseFormat(type="json_object"), {"type": "json_object"}),
        (
            ResponseFormat(type="json_schema", name="n", schema={"type": "object"}, strict=True),
            {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
            },
        ),
        (
            ResponseFormat(type="json_schema", schema={}),
            {"type": "json_schema", "json_schema": {"name": "answer", "schema": {}}},
        ),
    ],
)
def test_response_format(wanted: ResponseFormat, sent: Any) -> None:
    assert body(request(response_format=wanted))["response_format"] == sent


def test_unknown_fields_travel_in_their_own_dialect() -> None:
    extra = {"guided_regex": "a+", "n": 3, "stream": False, "model": "other"}
    sent = body(request(dialect="openai", extra=extra))
    assert sent["guided_regex"] == "a+"
    assert (sent["stream"], sent["model"]) == (True, "m")
    assert "n" not in sent
    assert "guided_regex" not in body(request(dialect="anthropic", extra=extra))


def test_what_is_not_the_models_business_stays_here() -> None:
    sent = body(request(id="r1", peer="p", provider="x", privacy="local", deadline=3.0))
    assert sent == body(request())


def test_continuing_an_answer() -> None:
    started = request(prefix="Once upon")
    last = {"role": "assistant", "content": "Once upon"}
    sent = body(started, "continue_final_message")
    assert sent["messages"][-1] == last
    assert (sent["continue_final_message"], sent["add_generation_prompt"]) == (True, False)
    sent = body(started, "assistant_prefill")
    assert sent["messages"][-1] == last
    assert "continue_final_message" not in sent


def test_quirks() -> None:
    quirks = Quirks()
    limited = request(sampling=Sampling(max_tokens=5))
    refusal = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    assert not quirks.learn("top_p is out of range")
    assert quirks.learn(refusal)
    assert not quirks.learn(refusal)
    sent = json.loads(encode_request(limited, quirks))
    assert sent["max_completion_tokens"] == 5
    assert "max_tokens" not in sent
    assert quirks.learn("unknown field: stream_options")
    assert not quirks.learn("unknown field: stream_options")
    assert "stream_options" not in json.loads(encode_request(limited, quirks))


def test_text_that_is_not_unicode() -> None:
    with pytest.raises(RequestRejected, match="JSON"):
        body(request(user("\ud800")))
