"""The Messages dialect outwards: what a request becomes."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.providers.anthropic_messages import (
    ClaudeOptions,
    Quirks,
    encode_count,
    encode_request,
    takes_prefix,
)
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
from promptmesh.providers.options import read_options

OLD, NEW = "claude-sonnet-4-5", "claude-opus-4-6"


def say(role: Role, text: str, **fields: Any) -> Message:
    return Message(role=role, content=(Text(text=text),), **fields)


def ask(*messages: Message, model: str = OLD, **fields: Any) -> GenerateRequest:
    return GenerateRequest(model=model, messages=messages or (say("user", "hi"),), **fields)


def encoded(request: GenerateRequest, quirks: Quirks | None = None, **options: Any) -> Any:
    body = encode_request(request, ClaudeOptions(**options), quirks or Quirks(), 8192)
    return json.loads(body)


def test_the_least() -> None:
    assert encoded(ask()) == {
        "model": OLD,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "max_tokens": 8192,
        "stream": True,
    }


def test_system_texts_go_to_the_top_and_turns_alternate() -> None:
    body = encoded(
        ask(
            say("system", "be brief"),
            say("user", "a"),
            say("user", "b"),
            say("developer", "in Latin"),
            say("assistant", "c", reasoning="hm"),
            say("user", ""),
            say("user", "d"),
        )
    )
    assert body["system"] == "be brief\n\nin Latin"
    texts = [(m["role"], [b["text"] for b in m["content"]]) for m in body["messages"]]
    assert texts == [("user", ["a", "b"]), ("assistant", ["c"]), ("user", ["d"])]


def test_images() -> None:
    parts = (
        Image(url="data:image/png;base64,aGk="),
        Image(url="https://host/cat.jpg"),
        Text(text="what is this?"),
    )
    (turn,) = encoded(ask(Message(role="user", content=parts)))["messages"]
    assert turn["content"] == [
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": "aGk="},
        },
        {"type": "image", "source": {"type": "url", "url": "https://host/cat.jpg"}},
        {"type": "text", "text": "what is this?"},
    ]


def test_tools_and_their_results() -> None:
    calls = (
        ToolCall(id="1", name="add", arguments='{"a":1}'),
        ToolCall(id="2", name="now", arguments=""),
    )
    request = ask(
        say("user", "go"),
        say("assistant", "I look", tool_calls=calls),
        say("tool", "3", tool_call_id="1"),
        say("tool", "noon", tool_call_id="2"),
        tools=(
            Tool(name="add", description="adds", parameters={"properties": {}}, strict=True),
            Tool(name="now"),
        ),
        tool_choice=ToolChoice(mode="function", name="add"),
        parallel_tool_calls=False,
    )
    body = encoded(request)
    assert body["tools"] == [
        {
            "name": "add",
            "description": "adds",
            "input_schema": {"type": "object", "properties": {}},
            "strict": True,
        },
        {"name": "now", "input_schema": {"type": "object"}},
    ]
    assert body["tool_choice"] == {
        "type": "tool",
        "name": "add",
        "disable_parallel_tool_use": True,
    }
    _, used, told = body["messages"]
    assert used["content"][1:] == [
        {"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}},
        {"type": "tool_use", "id": "2", "name": "now", "input": {}},
    ]
    assert told == {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "3"}]},
            {
                "type": "tool_result",
                "tool_use_id": "2",
                "content": [{"type": "text", "text": "noon"}],
            },
        ],
    }


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        (None, None),
        (ToolChoice(), {"type": "auto"}),
        (ToolChoice(mode="none"), {"type": "none"}),
        (ToolChoice(mode="required"), {"type": "any"}),
    ],
)
def test_tool_choice(choice: ToolChoice | None, wanted: Any) -> None:
    body = encoded(ask(tools=(Tool(name="now"),), tool_choice=choice))
    assert body.get("tool_choice") == wanted


def test_sampling() -> None:
    sampling = Sampling(
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        max_tokens=7,
        stop=("a", "\n", " b"),
        seed=1,
        logit_bias={},
    )
    body = encoded(ask(sampling=sampling))
    assert {k: body[k] for k in body if k not in ("model", "messages", "stream")} == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "max_tokens": 7,
        "stop_sequences": ["a", " b"],
    }


def test_what_a_model_refused_is_left_out_for_it() -> None:
    quirks, sampling = Quirks(), Sampling(temperature=0.5, top_p=0.9)
    assert quirks.learn(OLD, "`temperature` and `top_p` cannot both be specified for this model.")
    body = encoded(ask(sampling=sampling), quirks)
    assert (body.get("temperature"), body.get("top_p")) == (0.5, None)
    assert quirks.learn(OLD, "temperature is deprecated for this model.")
    assert "temperature" not in encoded(ask(sampling=sampling), quirks)
    assert "temperature" in encoded(ask(sampling=sampling, model=NEW), quirks)
    assert not quirks.learn(OLD, "temperature is deprecated for this model.")
    assert not quirks.learn(OLD, "temperature: must be at most 1")


def test_thinking() -> None:
    sampling = Sampling(temperature=0.2, top_k=3, max_tokens=100)
    body = encoded(ask(sampling=sampling), thinking=2000)
    assert body["thinking"] == {"type": "enabled", "budget_tokens": 2000}
    assert body["max_tokens"] == 2100
    assert not body.keys() & {"temperature", "top_k"}
    assert encoded(ask(), thinking="adaptive")["thinking"] == {"type": "adaptive"}
    after_a_tool = ask(say("user", "a"), say("tool", "b", tool_call_id="1"))
    assert "thinking" not in encoded(after_a_tool, thinking=2000)


def test_effort_and_form() -> None:
    form = ResponseFormat(type="json_schema", schema={"type": "object"})
    assert encoded(ask(response_format=form), effort="low")["output_config"] == {
        "effort": "low",
        "format": {"type": "json_schema", "schema": {"type": "object"}},
    }


@pytest.mark.parametrize(
    ("model", "takes"),
    [
        ("claude-3-5-sonnet-20241022", True),
        ("claude-sonnet-4-20250514", True),
        ("claude-opus-4-1", True),
        ("claude-haiku-4-5-20251001", True),
        ("us.anthropic.claude-sonnet-4-5-v1:0", True),
        ("claude-opus-4-6", False),
        ("claude-sonnet-4-6-20260101", False),
        ("claude-opus-4-10", False),
        ("claude-sonnet-5", False),
        ("gpt-4", False),
    ],
)
def test_prefix(model: str, takes: bool) -> None:
    assert takes_prefix(model) is takes
    request = ask(model=model, prefix="Once upon \n")
    if takes:
        assert encoded(request)["messages"][-1] == {"role": "assistant", "content": "Once upon"}
    else:
        with pytest.raises(ProviderUnavailable, match="cannot continue an answer"):
            encoded(request)


@pytest.mark.parametrize(
    ("fields", "options", "words"),
    [
        ({"prefix": "a"}, {"thinking": 2000}, "continue an answer and think"),
        ({"tool_choice": ToolChoice(mode="required")}, {"thinking": 2000}, "made to call"),
        ({"sampling": Sampling(logprobs=True)}, {}, "log probabilities"),
        ({"sampling": Sampling(temperature=1.5)}, {}, "temperature above 1"),
        ({"response_format": ResponseFormat(type="json_object")}, {}, "without a schema"),
    ],
)
def test_what_another_provider_may_do(fields: Any, options: Any, words: str) -> None:
    with pytest.raises(ProviderUnavailable, match=words):
        encoded(ask(**fields), **options)


def test_arguments_that_are_no_object() -> None:
    calls = (ToolCall(id="1", name="add", arguments="[1"),)
    with pytest.raises(ProviderUnavailable, match="'1' are not a JSON object"):
        encoded(ask(say("assistant", "", tool_calls=calls)))


@pytest.mark.parametrize(
    "message",
    [
        say("system", "only this"),
        say("user", ""),
        say("tool", "3"),
        Message(role="user", content=(Image(url="data:image/png,raw"),)),
        say("user", "\ud800"),
    ],
)
def test_requests_that_nobody_could_answer(message: Message) -> None:
    with pytest.raises(RequestRejected):
        encoded(ask(message))


def test_count_of_tokens_asks_of_the_question_alone() -> None:
    request = ask(say("system", "s"), say("user", "u"), sampling=Sampling(temperature=0))
    assert json.loads(encode_count(request)).keys() == {"model", "messages", "system"}


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"efort": "low"}, "did you mean 'effort'"),
        ({"effort": "enormous"}, "effort"),
        ({"thinking": 10}, "thinking"),
        ({"thinking": "lots"}, "thinking"),
    ],
)
def test_options_are_checked(extra: Any, words: str) -> None:
    with pytest.raises(RequestRejected, match=words):
        read_options(ClaudeOptions, extra)


@given(st.text())
def test_any_prompt_arrives_as_it_is(prompt: str) -> None:
    request = ask(say("user", "x" + prompt))
    (turn,) = encoded(request)["messages"]
    assert turn["content"][0]["text"] == "x" + prompt
