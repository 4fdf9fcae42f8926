"""Bodies of the OpenAI dialect become requests, and what is wrong in one is named."""

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.node import openai_requests
from promptmesh.node.openai_requests import decode_chat
from promptmesh.providers.base import (
    GenerateRequest,
    Image,
    RequestRejected,
    Sampling,
    Text,
    TimeLimits,
    ToolCall,
    ToolChoice,
)

HELLO = [{"role": "user", "content": "hello"}]


def decode(**fields: Any) -> GenerateRequest:
    body = {"model": "m", "messages": HELLO} | fields
    return decode_chat(msgspec.json.encode(body), "req-1").request


def test_a_plain_call() -> None:
    call = decode_chat(msgspec.json.encode({"model": "m", "messages": HELLO}), "req-1")
    request = call.request
    assert (request.model, request.id, call.stream) == ("m", "req-1", False)
    assert request.messages[0].text == "hello"
    assert request.sampling == Sampling()
    assert request.extra == {}


def test_sampling_stop_and_limits() -> None:
    sampling = decode(
        temperature=0, top_p=0.5, max_tokens=5, max_completion_tokens=7, stop="END", seed=3
    ).sampling
    assert sampling == Sampling(temperature=0, top_p=0.5, max_tokens=7, stop=("END",), seed=3)


def test_parts_tools_and_calls() -> None:
    request = decode(
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "look"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                ],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "42"},
        ],
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        tool_choice={"type": "function", "function": {"name": "f"}},
    )
    user, assistant, tool = request.messages
    assert user.content == (Text(text="look"), Image(url="data:image/png;base64,AA=="))
    assert assistant.tool_calls == (ToolCall(id="c1", name="f", arguments="{}"),)
    assert tool.tool_call_id == "c1"
    assert request.tools[0].parameters == {"type": "object"}
    assert request.tool_choice == ToolChoice(mode="function", name="f")


def test_unknown_fields_travel_along_but_not_those_about_the_caller() -> None:
    assert decode(min_p=0.1, user="me", metadata={"a": "b"}).extra == {"min_p": 0.1}


def test_the_promptmesh_object() -> None:
    request = decode(
        promptmesh={
            "provider": "vllm",
            "policy": "least_loaded",
            "privacy": "mesh",
            "priority": "background",
            "deadline_s": 5,
            "deadlines": {"first_token_s": 30, "gap_s": 3},
            "cache": {"mode": "refresh", "ttl": 60},
        }
    )
    assert (request.provider, request.policy, request.privacy) == ("vllm", "least_loaded", "mesh")
    assert (request.deadline, request.priority) == (5, "background")
    assert request.limits == TimeLimits(first_token=30, gap=3)
    assert (request.cache.mode, request.cache.ttl) == ("refresh", 60)


@pytest.mark.parametrize(
    ("fields", "at"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"model": 1}, "model"),
        ({"model": "m" * 10_000}, "model"),
        ({"messages": [{"role": "k" * 10_000, "content": "x"}]}, "messages[0].role"),
        ({"promptmesh": {"peer": "p" * 10_000}}, "promptmesh.peer"),
        ({"promptmesh": {"provider": "p" * 10_000}}, "promptmesh.provider"),
        ({"promptmesh": {"cache": {"namespace": "n" * 10_000}}}, "promptmesh.cache.namespace"),
        ({"seed": 2**63}, "seed"),
        ({"top_k": 2**63}, "top_k"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"promptmesh": {"polcy": "x"}}, "promptmesh"),
        ({"promptmesh": {"deadlines": {"gap_s": 0}}}, "promptmesh.deadlines.gap_s"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], at: str) -> None:
    with pytest.raises(RequestRejected) as caught:
        decode(**fields)
    assert caught.value.field == at
    assert at in caught.value.message
    assert len(caught.value.message) < 1000


@given(st.binary(max_size=200))
def test_random_bytes_are_only_ever_rejected(body: bytes) -> None:
    with pytest.raises(RequestRejected):
        decode_chat(body, "req-1")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["model", "messages", "stop", "tools", "tool_choice", "stream_options", "promptmesh"]
        ),
        json_values,
    )
)
def test_any_json_is_decoded_or_rejected(fields: dict[str, Any]) -> None:
    with suppress(RequestRejected):
        decode(**fields)


@pytest.mark.parametrize("size", [10, 20_000])
def test_the_same_bytes_again_are_another_request(size: int) -> None:
    body = msgspec.json.encode(
        {"model": "m", "messages": [{"role": "user", "content": "x" * size}], "seed": 1}
    )
    first, again = decode_chat(body, "first"), decode_chat(body, "again")
    assert (first.request.id, again.request.id) == ("first", "again")
    assert msgspec.structs.replace(again.request, id="first") == first.request
    wrong = body.replace(b'"m"', b"7")
    for _ in range(2):
        with pytest.raises(RequestRejected, match="model"):
            decode_chat(wrong, "wrong")


def test_what_is_not_to_be_stored_is_not_remembered() -> None:
    for fields, remember in (({"promptmesh": {"cache": {"mode": "bypass"}}}, True), ({}, False)):
        body = msgspec.json.encode({"model": "m", "messages": HELLO, "user": "secret", **fields})
        decode_chat(body, "req-1", remember=remember)
        assert body not in openai_requests._remembered
    decode_chat(body, "req-1")
    assert body in openai_requests._remembered
