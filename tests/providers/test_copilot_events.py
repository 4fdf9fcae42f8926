"""What Copilot tells, as recorded from the real one, becomes chunks and errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cli_matrix import ENDLESS, MATRIX
from faults import PARTIAL, WHOLE
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import recordings

from promptmesh.providers.base import (
    Chunk,
    CompletionBuilder,
    ContentFiltered,
    ContextTooLong,
    GenerateError,
    ProviderRefused,
    ProviderUnavailable,
    StreamInterrupted,
)
from promptmesh.providers.copilot_events import CopilotEvents
from promptmesh.providers.copilot_output import NO_TELEMETRY, CopilotOutput
from promptmesh.providers.openai_errors import ErrorReader
from promptmesh.providers.stream_decoder import MAX_ANSWER

ERRORS = ErrorReader("copilot", ["sk-secret"], key="log in")
RUNS = recordings("copilot")
SESSIONS = {
    case: [json.loads(line) for _, line in recording.lines]
    for case, recording in recordings("copilot_sdk").items()
}


def session(*events: tuple[str, Any]) -> tuple[list[Chunk], CopilotEvents]:
    decoder = CopilotEvents(ERRORS, now=lambda: 0.0)
    chunks = []
    for kind, data in events:
        decoder.told(kind, data)
        chunks += decoder.take()
    return chunks, decoder


def delta(text: str, message: str = "m") -> tuple[str, Any]:
    return "assistant.message_delta", {"messageId": message, "deltaContent": text}


IDLE = ("session.idle", {"mode": "interactive"})


def failure(*events: tuple[str, Any]) -> GenerateError:
    _, decoder = session(*events)
    assert decoder.failure is not None
    assert decoder.over
    return decoder.failure


def answer(chunks: list[Chunk]) -> tuple[str, str | None]:
    builder = CompletionBuilder()
    for chunk in chunks:
        builder.add(chunk)
    return builder.text, builder.completion().finish_reason if builder.finished else None


@pytest.mark.parametrize("case", [case for case in MATRIX if case not in ENDLESS])
def test_each_case_of_the_runtime(case: str) -> None:
    chunks, decoder = session(*((e["type"], e["data"]) for e in SESSIONS[case]))
    wanted = MATRIX[case]
    if wanted.error is None:
        assert decoder.failure is None
        assert answer(chunks) == (wanted.text, wanted.finish)
        assert chunks[-1].usage is not None or case == "nousage"
    elif case == "filter":  # the router makes an error of it
        assert answer(chunks) == (wanted.text, "content_filter")
    else:
        assert isinstance(decoder.failure, wanted.error), decoder.failure
        assert decoder.failure.partial == wanted.text
        assert "sk-" not in decoder.failure.message


@pytest.mark.parametrize("case", sorted({*MATRIX, "echo"} & set(RUNS)))
def test_a_run_that_is_cut_anywhere_is_no_answer(case: str) -> None:
    """But one that the limit cut, which is known before the run has ended."""
    recording = RUNS[case]
    lines = [line.encode() for stream, line in recording.lines if stream == "out"]
    for end in range(len(lines)):
        decoder = CopilotOutput(ERRORS)
        for line in lines[:end]:
            decoder.event("", line.rstrip(b"\n"))
        decoder.ended(0, "", "")
        assert (decoder.failure is None) == decoder.finished
        if decoder.finished:
            assert decoder.take()[-1].finish_reason == "length"


@settings(max_examples=40)
@given(st.data())
def test_a_line_that_is_cut_or_changed_is_an_answer_or_an_error(data: st.DataObject) -> None:
    lines = [line.encode() for stream, line in RUNS["ok"].lines if stream == "out"]
    number = data.draw(st.integers(0, len(lines) - 1))
    line = lines[number]
    place = data.draw(st.integers(0, len(line)))
    lines[number] = line[:place] + data.draw(st.binary(max_size=4)) + line[place + 1 :]
    decoder = CopilotOutput(ERRORS)
    for each in lines:
        decoder.event("", each)
    decoder.ended(0, "", next(iter(RUNS["ok"].files.values())))
    assert decoder.finished != (decoder.failure is not None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
KINDS = st.sampled_from(sorted({e["type"] for told in SESSIONS.values() for e in told}))
FIELDS = st.sampled_from(
    [
        *("messageId", "deltaContent", "content", "turnId", "inputTokens", "outputTokens"),
        *("finishReason", "statusCode", "errorMessage", "errorType", "message", "reason"),
        *("aborted", "contentFilterTriggered"),
    ]
)


@settings(max_examples=40)
@given(st.lists(st.tuples(KINDS, st.dictionaries(FIELDS, JSON, max_size=4) | JSON), max_size=6))
def test_any_events_end_in_an_answer_or_an_error(events: list[tuple[str, Any]]) -> None:
    chunks, decoder = session(*events, IDLE, IDLE)
    assert decoder.finished != (decoder.failure is not None)
    if decoder.finished:
        text, reason = answer(chunks)
        assert reason
        assert text or reason == "content_filter"


@given(st.binary(max_size=200))
def test_any_bytes_are_read_as_a_line(data: bytes) -> None:
    decoder = CopilotOutput(ERRORS)
    decoder.event("", data)
    decoder.ended(0, "", "")
    assert isinstance(decoder.failure, GenerateError)


def test_what_was_not_streamed_is_told_with_the_whole_message() -> None:
    whole = ("assistant.message", {"messageId": "m", "content": "Once upon a time"})
    chunks, _ = session(delta("Once"), delta(" upon"), whole, IDLE)
    assert answer(chunks) == ("Once upon a time", "stop")
    other = ("assistant.message", {"messageId": "m", "content": "Twice"})
    error = failure(delta("Once"), other, IDLE)
    assert isinstance(error, StreamInterrupted)
    assert error.partial == "Once"


def test_messages_are_joined() -> None:
    one = ("assistant.message", {"messageId": "1", "content": "a"})
    two = ("assistant.message", {"messageId": "2", "content": "b"})
    assert answer(session(delta("a", "1"), one, two, IDLE)[0]) == ("ab", "stop")


def test_the_end_without_text_is_no_answer() -> None:
    assert type(failure(IDLE)) is ProviderUnavailable
    assert type(failure(("assistant.usage", {"finishReason": "length"}))) is ProviderUnavailable


def test_a_filter() -> None:
    used = {"finishReason": "content_filter", "contentFilterTriggered": True}
    assert answer(session(("assistant.usage", used))[0]) == ("", "content_filter")
    said = ("session.error", {"errorType": "query", "message": "flagged by the content filter"})
    assert isinstance(failure(said), ContentFiltered)


def test_an_answer_that_is_cut_ends_before_it_is_asked_to_go_on() -> None:
    turns = [("assistant.turn_start", {"turnId": "0"}), ("assistant.turn_start", {"turnId": "1"})]
    chunks, decoder = session(turns[0], delta("Once"), turns[1], delta(" more", "n"), IDLE)
    assert answer(chunks) == ("Once", "length")
    assert decoder.over


@pytest.mark.parametrize(
    ("kind", "data", "error", "words"),
    [
        ("assistant.turn_retry", {"reason": "rate_limit"}, ProviderRefused, "429"),
        ("assistant.turn_retry", {"reason": "transient_auth_error"}, ProviderRefused, "log in"),
        ("assistant.turn_retry", {"reason": "streaming_error"}, ProviderUnavailable, "anew"),
        ("assistant.turn_retry", {}, ProviderUnavailable, "no reason"),
        ("session.error", {"errorType": "quota", "message": "x"}, ProviderRefused, "credit"),
        ("session.error", {"errorType": "authorization"}, ProviderRefused, "log in"),
        (
            "session.error",
            {"errorType": "query", "message": "exceeds the model's prompt budget (1 tokens)"},
            ContextTooLong,
            "budget",
        ),
        ("session.error", {"errorType": "query", "message": "sk-secret"}, ProviderUnavailable, "*"),
        ("session.idle", {"aborted": True}, ProviderUnavailable, "ended in the middle"),
        ("abort", {"reason": "user_initiated"}, ProviderUnavailable, "ended in the middle"),
        ("model.call_failure", {"failureKind": "transport"}, ProviderUnavailable, "did not come"),
        ("session.error", {"message": 5}, ProviderUnavailable, "no sense"),
    ],
)
def test_failures(kind: str, data: Any, error: type[GenerateError], words: str) -> None:
    found = failure((kind, data))
    assert isinstance(found, error)
    assert words in found.message
    assert "sk-secret" not in found.message
    broken = failure(delta("Once"), (kind, data))
    assert broken.partial == "Once"


def test_an_answer_has_an_end() -> None:
    chunks, decoder = session(*[delta("x" * (MAX_ANSWER // 2 + 1))] * 2)
    assert isinstance(decoder.failure, StreamInterrupted)
    assert chunks


def test_a_run_without_telemetry_may_have_been_cut() -> None:
    decoder = CopilotOutput(ERRORS)
    for stream, line in RUNS["ok"].lines:
        if stream == "out":
            decoder.event("", line.encode())
    decoder.ended(0, "", "")
    assert decoder.failure is not None
    assert NO_TELEMETRY in decoder.failure.message
    assert decoder.failure.partial == WHOLE
    assert PARTIAL in WHOLE


@pytest.mark.parametrize(
    "complaint",
    [
        "Error: No authentication information found.\n\nTry `copilot login`",
        "Error: Authentication failed",
        "Error: Authentication token found but could not be validated.",
        "Error: Classic Personal Access Tokens (ghp_) are not supported",
    ],
)
def test_a_run_that_nobody_pays_for(complaint: str) -> None:
    decoder = CopilotOutput(ERRORS)
    decoder.ended(1, complaint, "")
    assert isinstance(decoder.failure, ProviderRefused)
    assert "log in" in decoder.failure.message
    assert "Try" not in decoder.failure.message
