"""What the real `claude` command said, recorded, cut anywhere, and what it never said."""

import contextlib
import json
from typing import Any

import pytest
from faults import PARTIAL, WHOLE
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import recordings

from promptmesh.providers.base import (
    Completion,
    CompletionBuilder,
    ContextTooLong,
    FinishReason,
    GenerateError,
    ProviderRefused,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
    Usage,
)
from promptmesh.providers.claude_output import ClaudeOutput
from promptmesh.providers.openai_errors import ErrorReader

RECORDED = recordings("claude")
KEY = "sk-ant-abcdef0123456789"


def output(case: str) -> bytes:
    """What was written to standard output."""
    return "".join(line for stream, line in RECORDED[case].lines if stream == "out").encode()


def read(out: bytes, errors: str = "", code: int | None = 0) -> Completion:
    """The whole answer of a run. Raises what it ends in."""
    decoder, builder = ClaudeOutput(ErrorReader("claude", [KEY])), CompletionBuilder()
    for line in out.splitlines():
        decoder.event("", line)
        for chunk in decoder.take():
            builder.add(chunk)
        if decoder.finished or decoder.failure is not None:
            break  # the program is killed now
    else:
        decoder.ended(code, errors, "")
        for chunk in decoder.take():
            builder.add(chunk)
    if decoder.failure is not None:
        assert not builder.finished
        raise decoder.failure
    assert decoder.finished
    return builder.completion()


def failure(case: str) -> GenerateError:
    with pytest.raises(GenerateError) as caught:
        read(output(case))
    return caught.value


def lines(*values: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": "stream_event", "event": {"type": kind, **fields}}


START = event("message_start", message={"usage": {"input_tokens": 3, "output_tokens": 1}})
TEXT = event("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hi"})
DELTA = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 2})
STOP = event("message_stop")
RESULT = {"type": "result", "subtype": "success", "is_error": False, "num_turns": 1, "result": "Hi"}


def test_an_answer() -> None:
    assert read(output("ok")) == Completion(
        text=WHOLE, finish_reason="stop", usage=Usage(prompt_tokens=11, completion_tokens=5)
    )
    assert read(output("echo")).text == "Tell me a tale."
    assert read(output("reason")).reasoning
    assert read(lines(START, TEXT, DELTA, STOP, RESULT)).text == "Hi"


@pytest.mark.parametrize(("case", "reason"), [("truncate", "length"), ("filter", "content_filter")])
def test_an_answer_that_was_cut_ends_at_the_first_sign(case: str, reason: FinishReason) -> None:
    """The command would ask for more, and at last call it an error."""
    found = read(output(case))
    assert (found.text, found.finish_reason) == (PARTIAL, reason)


@pytest.mark.parametrize(
    ("case", "kind", "said"),
    [
        ("e400", RequestRejected, "a field that is wrong"),
        ("e401", ProviderRefused, "Incorrect API key"),
        ("badkey", ProviderRefused, "Incorrect API key"),
        ("e402", ProviderRefused, "no credit left"),
        ("e403", ProviderRefused, "may not use this model"),
        ("e404", ProviderRefused, "may not exist"),
        ("e429", ProviderRefused, "429"),
        ("e500", ProviderUnavailable, "500"),
        ("e503", ProviderUnavailable, "503"),
        ("html", ProviderUnavailable, "502"),
        ("context", ContextTooLong, "too long"),
        ("empty", ProviderUnavailable, "an empty answer"),
        ("badjson", ProviderUnavailable, "without receiving any events"),
        ("drop", ProviderUnavailable, "Connection to the API was lost"),
        ("reset", ProviderUnavailable, "Connection to the API was lost"),
        ("streamerr", StreamInterrupted, "the engine has died"),
        ("stall", StreamInterrupted, "without a result"),
        ("hang", ProviderUnavailable, "without a result"),
    ],
)
def test_failures(case: str, kind: type[GenerateError], said: str) -> None:
    found = failure(case)
    assert type(found) is kind
    assert said in found.message
    assert found.partial == (PARTIAL if kind is StreamInterrupted else "")


def test_every_cut_is_noticed() -> None:
    """Only its own result makes an answer whole."""
    whole = output("ok")
    at_result = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    for end in range(at_result + 1):
        with pytest.raises(GenerateError) as caught:
            read(whole[:end])
        assert WHOLE.startswith(caught.value.partial)


@pytest.mark.parametrize(
    "result",
    [
        {**RESULT, "is_error": True, "result": "API Error: no"},
        {**RESULT, "num_turns": 0, "result": "/help isn't available in this environment."},
        {"type": "result"},
    ],
)
def test_a_result_that_is_none(result: dict[str, Any]) -> None:
    with pytest.raises(ProviderUnavailable):
        read(lines(result))
    with pytest.raises(StreamInterrupted) as caught:
        read(lines(START, TEXT, DELTA, STOP, result))
    assert caught.value.partial == "Hi"


def test_a_second_try_of_its_own_ends_it() -> None:
    """Its text would be doubled."""
    retry = {"type": "system", "subtype": "api_retry", "error_status": 529, "error": "overloaded"}
    with pytest.raises(ProviderUnavailable, match="overloaded"):
        read(lines(retry, START, TEXT, DELTA, STOP, RESULT))
    with pytest.raises(StreamInterrupted, match="a second time") as caught:
        read(lines(START, TEXT, START, TEXT, DELTA, STOP, RESULT))
    assert caught.value.partial == "Hi"


def test_who_is_not_logged_in_is_told_how() -> None:
    told = "Not logged in · Please run /login"
    with pytest.raises(ProviderUnavailable, match="type `/login`"):
        read(lines({**RESULT, "is_error": True, "result": told}))


def test_the_end_of_its_complaints_is_told_without_a_key() -> None:
    with pytest.raises(ProviderUnavailable) as caught:
        read(b"", errors=f"first\nbad key {KEY}\n", code=1)
    assert "bad key" in caught.value.message
    assert KEY not in caught.value.message


@given(st.lists(st.binary(max_size=60), max_size=6), st.integers(0, 8))
def test_random_lines_among_others_do_no_harm(noise: list[bytes], place: int) -> None:
    said = [START, TEXT, DELTA, STOP, RESULT]
    good = [json.dumps(value).encode() for value in said]
    mixed = good[:place] + [line.replace(b"\n", b"") for line in noise] + good[place:]
    with contextlib.suppress(GenerateError):
        assert read(b"\n".join(mixed)).text == "Hi"


@settings(max_examples=25)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists))
def test_values_of_any_kind_do_no_harm(value: Any) -> None:
    for field in ("event", "is_error", "num_turns", "result", "api_error_status", "subtype"):
        with contextlib.suppress(GenerateError):
            read(lines(START, TEXT, DELTA, STOP, {**RESULT, field: value}))
        with contextlib.suppress(GenerateError):
            read(lines(START, {**TEXT, field: value}, RESULT))
