"""Replies of OpenAI-compatible servers, as they really look, cut anywhere."""

import contextlib
import itertools
import json
from typing import Any

import pytest
from fakes_http import DONE, USAGE, answer, delta, event
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.providers import stream_decoder
from promptmesh.providers.base import (
    Chunk,
    Completion,
    CompletionBuilder,
    ContextTooLong,
    FinishReason,
    GenerateError,
    ProviderRefused,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from promptmesh.providers.openai_errors import ErrorReader
from promptmesh.providers.openai_stream import AnswerDecoder


def decoder() -> AnswerDecoder:
    return AnswerDecoder(ErrorReader("vllm", []))


def read(*pieces: bytes) -> list[Chunk]:
    """The chunks of a whole body. Raises what the body ends in."""
    reader = decoder()
    chunks = [chunk for piece in pieces for chunk in reader.feed(piece)]
    if not reader.finished and reader.failure is None:
        chunks += reader.end()
    if reader.failure is not None:
        raise reader.failure
    return chunks


def failure(*pieces: bytes) -> GenerateError:
    with pytest.raises(GenerateError) as caught:
        read(*pieces)
    return caught.value


def completion(chunks: list[Chunk]) -> Completion:
    builder = CompletionBuilder()
    for chunk in chunks:
        assert not builder.finished
        builder.add(chunk)
    return builder.completion()


def tool(index: int | None, id: str | None = None, name: str | None = None, args: str = "") -> Any:
    return {"index": index, "id": id, "function": {"name": name, "arguments": args}}


def call(*calls: Any) -> dict[str, Any]:
    return delta(tool_calls=list(calls))


def logprob(text: str) -> dict[str, Any]:
    value = delta(text)
    value["choices"][0]["logprobs"] = {"content": [{"token": text, "logprob": -0.5}]}
    return value


def test_all_that_arrived_together_is_one_chunk() -> None:
    assert read(answer("a", "b", "c")) == [
        Chunk(text="abc"),
        Chunk(finish_reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=2)),
    ]


def test_text_is_given_with_its_last_byte() -> None:
    reader = decoder()
    assert reader.feed(event(delta("a"))) == [Chunk(text="a")]
    assert reader.feed(event(delta("b"))[:-1]) == []
    assert reader.feed(b"\n" + event(delta("c"))) == [Chunk(text="bc")]
    assert not reader.finished


def test_kinds_keep_their_order() -> None:
    chunks = read(
        event(delta(role="assistant")),
        event(delta(reasoning_content="h"))
        + event(delta(reasoning="m"))
        + event(delta("a"))
        + event(delta("b"))
        + event(call(tool(0, "c1", "f")))
        + event(call(tool(0, args="{}")))
        + event(delta("z")),
        event(delta(finish="tool_calls")) + DONE,
    )
    assert chunks == [
        Chunk(reasoning="hm"),
        Chunk(text="ab"),
        Chunk(
            tool_calls=(
                ToolCallDelta(index=0, id="c1", name="f"),
                ToolCallDelta(index=0, arguments="{}"),
            )
        ),
        Chunk(text="z"),
        Chunk(finish_reason="tool_calls"),
    ]


def test_logprobs_stay_with_their_text() -> None:
    chunks = read(event(logprob("a")) + event(logprob("b")), answer("c"))
    assert chunks[0] == Chunk(
        text="ab", logprobs=({"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -0.5})
    )
    assert chunks[1] == Chunk(text="c")


def test_parallel_tool_calls() -> None:
    body = (
        event(call(tool(0, "c1", "f", '{"a"'), tool(1, "c2", "g")))
        + event(call(tool(1, args="{}")))
        + event(call(tool(0, args=":1}")))
        + event(delta(finish="tool_calls"))
    )
    assert completion(read(body)).tool_calls == (
        ToolCall(id="c1", name="f", arguments='{"a":1}'),
        ToolCall(id="c2", name="g", arguments="{}"),
    )


def test_tool_calls_without_an_index() -> None:
    body = (
        event(call(tool(None, "c1", "f", "{")))
        + event(call(tool(None, None, None, "}")))
        + event(call(tool(None, "c2", "g", "{}")))
        + event(delta(finish="tool_calls"))
    )
    assert completion(read(body)).tool_calls == (
        ToolCall(id="c1", name="f", arguments="{}"),
        ToolCall(id="c2", name="g", arguments="{}"),
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("stop", "stop"),
        ("eos", "stop"),
        ("STOP", "stop"),
        ("length", "length"),
        ("max_tokens", "length"),
        ("function_call", "tool_calls"),
        ("content_filter", "content_filter"),
    ],
)
def test_finish_reasons(theirs: str, ours: FinishReason) -> None:
    assert read(event(delta("a", finish=theirs)) + DONE)[-1].finish_reason == ours


@pytest.mark.parametrize("theirs", ["abort", "error", "insufficient_system_resource"])
def test_other_reasons_are_no_whole_answer(theirs: str) -> None:
    got = failure(event(delta("a")), event(delta(finish=theirs)) + DONE)
    assert isinstance(got, StreamInterrupted)
    assert theirs in str(got)
    assert got.partial == "a"


def test_empty_finish_reason_is_none() -> None:
    assert read(event(delta("a", finish="")), answer("b"))[:2] == [Chunk(text="a"), Chunk(text="b")]


@pytest.mark.parametrize(
    ("tail", "usage"),
    [
        (event(USAGE) + DONE, Usage(prompt_tokens=3, completion_tokens=2)),
        (event(USAGE), Usage(prompt_tokens=3, completion_tokens=2)),
        (DONE, None),
        (b"data: [DONE]", None),
        (b"", None),
        (event({"choices": []}) + DONE, None),
        (event({"choices": [], "usage": None}) + DONE, None),
        (event({"choices": [], "usage": {"prompt_tokens": 3}}) + DONE, Usage(prompt_tokens=3)),
    ],
)
def test_usage_comes_with_the_closing_chunk(tail: bytes, usage: Usage | None) -> None:
    chunks = read(event(delta("a")), event(delta(finish="stop")), tail)
    assert chunks == [Chunk(text="a"), Chunk(finish_reason="stop", usage=usage)]


def test_usage_in_every_chunk() -> None:
    """As OpenRouter and vLLM's `continuous_usage_stats` do: the last one counts."""
    first = delta("a") | {"usage": {"prompt_tokens": 3, "completion_tokens": 1}}
    last = delta("b", finish="stop") | {"usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    chunks = read(event(first) + event(last) + DONE)
    assert chunks[-1].usage == Usage(prompt_tokens=3, completion_tokens=2)


def test_closing_chunk_does_not_wait_for_done() -> None:
    reader = decoder()
    reader.feed(event(delta("a")) + event(delta(finish="stop")))
    assert not reader.finished
    (last,) = reader.feed(event(USAGE))
    assert last.finish_reason == "stop"
    assert reader.finished
    assert reader.feed(DONE + event(delta("late"))) == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        DONE,
        b"\n\n",
        b": nothing\n\n",
        b"hello",
        event({}),
        b"{}",
        b'{"choices":[]}',
        json.dumps({"choices": [{"message": {"content": ""}}]}).encode(),
    ],
)
def test_nothing_with_or_without_done_is_no_answer(body: bytes) -> None:
    got = failure(body)
    assert isinstance(got, StreamInterrupted)
    assert got.partial == ""


@pytest.mark.parametrize("tail", [b"", DONE, event(USAGE) + DONE, event(delta("c"))[:-9]])
def test_answer_without_its_end_marker(tail: bytes) -> None:
    got = failure(event(delta("a")) + event(delta("b")), tail)
    assert isinstance(got, StreamInterrupted)
    assert got.partial == "ab"


@pytest.mark.parametrize(
    "bad",
    [
        b"data: {\n\n",
        b"data: [1]\n\n",
        b'data: {"choices":[{"delta":{"content":7}}]}\n\n',
        b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n',
        b'data: {"choices":' + b"[" * 5000 + b"\n\n",
        b"data: <html>\n\n",
    ],
)
def test_what_cannot_be_read(bad: bytes) -> None:
    assert type(failure(bad)) is ProviderUnavailable
    got = failure(event(delta("a")) + bad)
    assert isinstance(got, StreamInterrupted)
    assert got.partial == "a"


def test_what_came_before_a_failure_is_given() -> None:
    reader = decoder()
    assert reader.feed(event(delta("a")) + b"data: {\n\n") == [Chunk(text="a")]
    assert isinstance(reader.failure, StreamInterrupted)


ERROR_EVENTS = {
    "openrouter": event(
        {
            "error": {"code": 502, "message": "it broke"},
            "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}],
        }
    ),
    "vllm": event({"error": {"object": "error", "message": "it broke", "code": 500}}),
    "old vllm": event({"object": "error", "message": "it broke", "code": 500}),
    "plain": event({"error": "it broke"}),
    "named": b"event: error\ndata: it broke\n\n",
    "named json": b'event: error\ndata: {"message": "it broke"}\n\n',
}


@pytest.mark.parametrize("name", ERROR_EVENTS)
def test_error_event(name: str) -> None:
    got = failure(ERROR_EVENTS[name])
    assert type(got) is ProviderUnavailable
    assert "it broke" in str(got)
    got = failure(event(delta("a")), ERROR_EVENTS[name] + DONE)
    assert type(got) is StreamInterrupted
    assert "it broke" in str(got)
    assert got.partial == "a"


def test_error_event_that_blames_the_request() -> None:
    bad = event({"error": {"message": "bad", "code": 400}})
    assert type(failure(bad)) is RequestRejected
    long = event({"error": {"message": "x", "code": "context_length_exceeded"}})
    got = failure(event(delta("a")), long)
    assert type(got) is ContextTooLong
    assert got.partial == "a"


def test_other_choices_are_ignored() -> None:
    other = {"choices": [{"index": 1, "delta": {"content": "no"}, "finish_reason": "stop"}]}
    assert read(event(other), answer("a"))[0] == Chunk(text="a")


def test_refusal_is_text() -> None:
    body = event(delta(refusal="I will not")) + event(delta(finish="stop")) + DONE
    assert completion(read(body)).text == "I will not"


def test_event_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    got = failure(b"data: " + b"a" * (9 << 20))
    assert type(got) is ProviderUnavailable
    assert "longer than" in str(got)


@pytest.mark.parametrize(
    "piece",
    [
        {"content": "abc"},
        {"reasoning_content": "abc"},
        {"tool_calls": [{"index": 0, "function": {"arguments": "abc"}}]},
        {"tool_calls": [{"id": "abc"}]},
        {"tool_calls": [{}]},
    ],
)
def test_answer_too_long(monkeypatch: pytest.MonkeyPatch, piece: dict[str, Any]) -> None:
    monkeypatch.setattr(stream_decoder, "MAX_ANSWER", 9)
    got = failure(*[event(delta(**piece))] * 20)
    assert isinstance(got, StreamInterrupted)
    assert "longer than 9 characters" in str(got)
    assert got.partial == ("abc" * 4 if "content" in piece else "")


# --- servers that do not stream ------------------------------------------------------------------

WHOLE = {
    "id": "c1",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "hello é",
                "reasoning_content": "hm",
                "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": "{}"}}],
            },
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("before", ["", "\r\n ", "\n" * 40])
def test_whole_answer(indent: int | None, before: str) -> None:
    body = (before + json.dumps(WHOLE, indent=indent)).encode()
    expected = Completion(
        text="hello é",
        reasoning="hm",
        tool_calls=(ToolCall(id="c1", name="f", arguments="{}"),),
        finish_reason="stop",
        usage=Usage(prompt_tokens=3, completion_tokens=2),
    )
    assert completion(read(body)) == expected
    assert completion(read(*(body[i : i + 1] for i in range(len(body))))) == expected


def test_whole_answer_that_is_cut() -> None:
    got = failure(json.dumps(WHOLE).encode()[:-1])
    assert type(got) is ProviderUnavailable


def test_whole_error() -> None:
    assert type(failure(b'{"error":{"message":"no","code":429}}')) is ProviderRefused


def test_whole_answer_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_decoder, "MAX_WHOLE", 50)
    got = failure(json.dumps(WHOLE).encode())
    assert "longer than 50 bytes" in str(got)


# --- cut anywhere --------------------------------------------------------------------------------

STREAM = (
    b": OPENROUTER PROCESSING\r\n\r\n"
    + event(delta(role="assistant", reasoning="hm"))
    + event(logprob("a"))
    + event(delta("é😀"))
    + event(call(tool(0, "c1", "f", '{"a":')))
    + event(call(tool(0, args="1}")))
    + event(delta("b", finish="length"))
    + event(USAGE)
    + DONE
)
WHOLE_STREAM = Completion(
    text="aé😀b",
    reasoning="hm",
    tool_calls=(ToolCall(id="c1", name="f", arguments='{"a":1}'),),
    logprobs=({"token": "a", "logprob": -0.5},),
    finish_reason="length",
    usage=Usage(prompt_tokens=3, completion_tokens=2),
)


def test_cut_at_every_byte() -> None:
    assert completion(read(STREAM)) == WHOLE_STREAM
    for cut in range(len(STREAM) + 1):
        assert completion(read(STREAM[:cut], STREAM[cut:])) == WHOLE_STREAM


@given(st.lists(st.integers(0, len(STREAM)), max_size=30))
def test_cut_anywhere(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in itertools.pairwise(places)]
    assert completion(read(*pieces)) == WHOLE_STREAM


@given(st.integers(0, len(STREAM) - 1))
def test_stream_that_ends_too_early(end: int) -> None:
    """Either it says so, or everything but the last marker was there."""
    reader = decoder()
    chunks = reader.feed(STREAM[:end])
    if not reader.finished:
        chunks += reader.end()
    text = "".join(chunk.text for chunk in chunks)
    if reader.finished:
        assert reader.failure is None
        assert text == WHOLE_STREAM.text
    else:
        assert reader.failure is not None
        assert reader.failure.partial == (text if reader.pieces else "")
        assert WHOLE_STREAM.text.startswith(text)


@given(st.lists(st.binary(max_size=60), max_size=6), st.booleans())
def test_random_bytes(pieces: list[bytes], framed: bool) -> None:
    body = [b"data: " + piece + b"\n\n" for piece in pieces] if framed else pieces
    with contextlib.suppress(GenerateError):
        read(*body)


FIELDS = sorted(
    {"choices", "delta", "content", "message", "finish_reason", "usage", "error", "index"}
    | {"tool_calls", "logprobs", "function", "arguments", "prompt_tokens", "object"}
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just("stop"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(FIELDS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)


@given(st.lists(json_values, max_size=4))
def test_random_events(values: list[Any]) -> None:
    with contextlib.suppress(GenerateError):
        read(*(event(value) for value in values))
