"""What the real `claude` command said, cut anywhere, and what it never said."""

import contextlib
import json
from typing import Any

import cli_output
import pytest
from cli_output import KEY, RECORDED, output
from faults import WHOLE
from hypothesis import given, settings
from hypothesis import strategies as st

from promptmesh.providers.base import (
    Completion,
    GenerateError,
    ProviderUnavailable,
    StreamInterrupted,
)


def read(out: bytes, errors: str = "", code: int | None = 0) -> Completion:
    return cli_output.read("claude", out, errors, code=code)


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
    assert read(lines(START, TEXT, DELTA, STOP, RESULT)).text == "Hi"


def test_every_cut_is_noticed() -> None:
    """Only its own result makes an answer whole."""
    whole = output(RECORDED["claude"]["ok"]).encode()
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
