"""The Messages dialect inwards, byte by byte."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.providers.anthropic_stream import MessageDecoder
from promptmesh.providers.base import (
    Chunk,
    Completion,
    CompletionBuilder,
    GenerateError,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from promptmesh.providers.openai_errors import ErrorReader

ERRORS = ErrorReader("claude", ["sk-ant-secret"])


def event(kind: str, **fields: Any) -> bytes:
    value = {"type": kind, **fields}
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), json.dumps(value).encode())


def start(**usage: int) -> bytes:
    message = {"id": "msg_1", "type": "message", "role": "assistant", "content": []}
    return event("message_start", message=message | {"usage": usage})


def block(index: int, empty: dict[str, Any], *deltas: dict[str, Any]) -> bytes:
    events = [event("content_block_start", index=index, content_block=empty)]
    events += [event("content_block_delta", index=index, delta=d) for d in deltas]
    return b"".join([*events, event("content_block_stop", index=index)])


def text(index: int, *pieces: str) -> bytes:
    deltas = [{"type": "text_delta", "text": piece} for piece in pieces]
    return block(index, {"type": "text", "text": ""}, *deltas)


def end(reason: str | None = "end_turn", **usage: int) -> bytes:
    delta = {"stop_reason": reason, "stop_sequence": None}
    return event("message_delta", delta=delta, usage=usage) + event("message_stop")


THOUGHT = block(
    0,
    {"type": "thinking", "thinking": "", "signature": ""},
    {"type": "thinking_delta", "thinking": "Let me "},
    {"type": "thinking_delta", "thinking": "see."},
    {"type": "signature_delta", "signature": "EqQBCgIYAhIM"},
)
CALL = block(
    2,
    {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {}},
    {"type": "input_json_delta", "partial_json": ""},
    {"type": "input_json_delta", "partial_json": '{"a": 1, "b"'},
    {"type": "input_json_delta", "partial_json": ": 2}"},
)
BARE_CALL = block(3, {"type": "tool_use", "id": "toolu_2", "name": "now", "input": {}})
EVERYTHING = (
    start(input_tokens=5, cache_creation_input_tokens=20, cache_read_input_tokens=300)
    + event("ping")
    + THOUGHT
    + event("a_new_kind", index=0)
    + text(1, "Hé", "llo")
    + CALL
    + BARE_CALL
    + end("tool_use", output_tokens=9)
)
WHOLE = Completion(
    text="Héllo",
    reasoning="Let me see.",
    tool_calls=(
        ToolCall(id="toolu_1", name="add", arguments='{"a": 1, "b": 2}'),
        ToolCall(id="toolu_2", name="now", arguments="{}"),
    ),
    finish_reason="tool_calls",
    usage=Usage(prompt_tokens=325, completion_tokens=9),
)


def decode(*pieces: bytes, prefix: str = "") -> tuple[list[Chunk], GenerateError | None]:
    decoder = MessageDecoder(ERRORS, prefix)
    chunks = [chunk for piece in pieces for chunk in decoder.feed(piece)]
    if not decoder.finished and decoder.failure is None:
        chunks += decoder.end()
    return chunks, decoder.failure


def completed(*pieces: bytes, prefix: str = "") -> Completion:
    chunks, failure = decode(*pieces, prefix=prefix)
    assert failure is None
    builder = CompletionBuilder()
    for chunk in chunks:
        builder.add(chunk)
    return builder.completion()


def failed(*pieces: bytes) -> GenerateError:
    _, failure = decode(*pieces)
    assert failure is not None
    return failure


def test_everything() -> None:
    chunks, _ = decode(EVERYTHING)
    assert completed(EVERYTHING) == WHOLE
    assert chunks[0] == Chunk(reasoning="Let me see.")
    assert chunks[1] == Chunk(text="Héllo")
    assert chunks[2].tool_calls[0] == ToolCallDelta(index=0, id="toolu_1", name="add")


def test_each_byte_by_itself() -> None:
    assert completed(*(EVERYTHING[i : i + 1] for i in range(len(EVERYTHING)))) == WHOLE


def test_cut_at_each_byte() -> None:
    """Never a shorter answer that looks whole."""
    told = EVERYTHING.index(b'"stop_reason": "tool_use"')
    for cut in range(len(EVERYTHING)):
        chunks, failure = decode(EVERYTHING[:cut])
        if failure is None:
            assert cut > told
            assert completed(EVERYTHING[:cut]) == WHOLE
        else:
            assert all(chunk.finish_reason is None for chunk in chunks)
            assert isinstance(failure, ProviderUnavailable | StreamInterrupted)


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("tool_use", "tool_calls"),
        ("refusal", "content_filter"),
    ],
)
def test_reasons(reason: str, finish: str) -> None:
    assert completed(start() + text(0, "a") + end(reason)).finish_reason == finish


@pytest.mark.parametrize("reason", ["pause_turn", "something new"])
def test_reason_that_is_no_end(reason: str) -> None:
    got = failed(start() + text(0, "a") + end(reason))
    assert (type(got), got.partial) == (StreamInterrupted, "a")


def test_end_without_a_reason() -> None:
    assert type(failed(start() + text(0, "a") + end(None))) is StreamInterrupted


def test_empty_answer() -> None:
    assert type(failed(start() + end())) is ProviderUnavailable
    assert type(failed(start() + text(0, "") + end())) is ProviderUnavailable
    assert completed(start() + end("refusal")).finish_reason == "content_filter"
    assert completed(start() + THOUGHT + end("max_tokens")).finish_reason == "length"
    assert completed(start() + end(), prefix="all said").text == ""


@pytest.mark.parametrize(
    ("prefix", "pieces", "given"),
    [
        ("a", [" b"], " b"),
        ("a ", [" b"], "b"),
        ("a ", ["b"], "b"),
        ("a\n\n", ["\n", "\n", "\nb"], "\nb"),
        ("a\n\n", ["\nb\n"], "b\n"),
        ("  ", ["  b"], "b"),
        ("a \n", ["\n b"], "\n b"),
    ],
)
def test_white_space_that_was_there_comes_once(prefix: str, pieces: list[str], given: str) -> None:
    assert completed(start() + text(0, *pieces) + end(), prefix=prefix).text == given


@pytest.mark.parametrize(
    ("pieces", "given"),
    [
        (["a", "b\n", "\nc"], "ab"),
        (["a\n", "b\n", "\n"], "a\nb"),
        (["\n\nb"], ""),
        (["a\nb"], "a\nb"),
        (["a\n"], "a\n"),
    ],
)
def test_stop_strings_of_white_space(pieces: list[str], given: str) -> None:
    """The API takes none of them."""
    decoder = MessageDecoder(ERRORS, stops=["\n\n"])
    body = start(input_tokens=5) + text(0, *pieces) + text(1, "") + end()
    chunks = [chunk for i in range(len(body)) for chunk in decoder.feed(body[i : i + 1])]
    assert decoder.failure is None
    assert "".join(chunk.text for chunk in chunks) == given
    assert chunks[-1].finish_reason == "stop"


def test_usage() -> None:
    assert decode(start() + text(0, "a") + end())[0][-1].usage is None
    body = start(input_tokens=1) + text(0, "a") + end(input_tokens=7, output_tokens=2)
    assert completed(body).usage == Usage(prompt_tokens=7, completion_tokens=2)


def test_error_inside_a_stream() -> None:
    error = event("error", error={"type": "overloaded_error", "message": "no sk-ant-secret left"})
    got = failed(start() + text(0, "a") + error)
    assert (type(got), got.partial) == (StreamInterrupted, "a")
    assert str(got) == "claude reported an error: no *** left"
    early = failed(start() + error)
    assert (type(early), early.again) == (ProviderUnavailable, True)
    rejected = event("error", error={"type": "invalid_request_error", "message": "no"})
    assert type(failed(rejected)) is RequestRejected


def test_error_event_that_is_no_json() -> None:
    assert "oh dear" in str(failed(b"event: error\ndata: oh dear\n\n"))


@pytest.mark.parametrize("data", [b"{", b"[]", b"17", b"nothing", b'{"index":"x"}'])
def test_event_that_cannot_be_read(data: bytes) -> None:
    broken = b"event: content_block_delta\ndata: %s\n\n" % data
    assert type(failed(start() + broken)) is ProviderUnavailable
    assert type(failed(start() + text(0, "a") + broken)) is StreamInterrupted


def test_server_that_does_not_stream() -> None:
    message = {
        "type": "message",
        "content": [
            {"type": "thinking", "thinking": "Hm."},
            {"type": "text", "text": "hello"},
            {"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}},
        ],
        "stop_reason": "tool_use",
        "usage": {"input_tokens": 3, "output_tokens": 2},
    }
    assert completed(json.dumps(message).encode()) == Completion(
        text="hello",
        reasoning="Hm.",
        tool_calls=(ToolCall(id="1", name="add", arguments='{"a":1}'),),
        finish_reason="tool_calls",
        usage=Usage(prompt_tokens=3, completion_tokens=2),
    )
    error = {"type": "error", "error": {"type": "api_error", "message": "no"}}
    assert type(failed(json.dumps(error).encode())) is ProviderUnavailable


def test_answer_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promptmesh.providers.stream_decoder.MAX_ANSWER", 9)
    assert type(failed(start() + text(0, "12345", "67890"))) is StreamInterrupted
    empty = [{"type": "tool_use", "id": "", "name": ""}] * 10
    calls = b"".join(
        event("content_block_start", index=i, content_block=b) for i, b in enumerate(empty)
    )
    assert "longer than 9" in str(failed(start() + calls))


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_random_bytes(pieces: list[bytes]) -> None:
    _, failure = decode(*pieces)
    assert failure is not None


_VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["type", "index", "delta", "content_block", "text", "usage", "input_tokens"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@given(
    st.lists(
        st.tuples(st.sampled_from(["content_block_delta", "message_delta", "error"]), _VALUES),
        max_size=5,
    )
)
def test_random_events(events: list[tuple[str, Any]]) -> None:
    body = b"".join(
        event(kind, **(value if isinstance(value, dict) else {"delta": value}) | {"x": 1})
        for kind, value in (
            (k, {n: x for n, x in v.items() if n != "type"} if isinstance(v, dict) else v)
            for k, v in events
        )
    )
    chunks, failure = decode(start(), body)
    assert failure is not None or chunks[-1].finish_reason is not None
