"""What the real `gemini` command said, cut anywhere, and what it never said."""

import contextlib
import json
from typing import Any

import cli_output
import pytest
from cli_output import KEY, MODEL, RECORDED, output, play, report_of
from faults import WHOLE
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.providers.base import (
    Completion,
    GenerateError,
    ProviderRefused,
    ProviderUnavailable,
    StreamInterrupted,
)
from promptmesh.providers.openai_errors import DAY_USED_UP

OK = RECORDED["gemini"]["ok"]
OUT, REPORT = output(OK).encode(), report_of(OK)


def read(out: bytes, errors: str = "", report: str = "", code: int | None = 0) -> Completion:
    return cli_output.read("gemini", out, errors, report, code)


@pytest.mark.parametrize(("case", "wait"), [("e429-7", 7.0), ("e429", 2.0)])
def test_how_long_to_wait(case: str, wait: float) -> None:
    with pytest.raises(ProviderRefused) as caught:
        play("gemini", case)
    assert caught.value.retry_after == wait


def test_cut_at_every_byte_it_is_no_answer() -> None:
    """Only the last end of a line may be missing."""
    for cut in range(len(OUT) - 1):
        with pytest.raises((ProviderUnavailable, StreamInterrupted)):
            read(OUT[:cut], report=REPORT)
    assert read(OUT[:-1], report=REPORT).text == WHOLE


def test_telemetry_cut_at_every_byte() -> None:
    """It never makes another end of it; without it how the answer ended is not known."""
    for cut in range(len(REPORT) + 1):
        with contextlib.suppress(StreamInterrupted):
            assert read(OUT, report=REPORT[:cut]).finish_reason == "stop"
    with pytest.raises(StreamInterrupted, match="does not say how the answer ended"):
        read(OUT)


def line(type: str, **fields: Any) -> bytes:
    return json.dumps({"type": type, **fields}).encode() + b"\n"


def record(name: str, **fields: Any) -> str:
    return json.dumps({"attributes": {"event.name": f"gemini_cli.{name}", **fields}})


TEXT = line("message", role="assistant", content="some")
SUCCESS = line("result", status="success")


def test_another_model_is_never_taken_for_the_one_that_was_asked() -> None:
    report = REPORT.replace("stub-model", "another")
    with pytest.raises(StreamInterrupted, match="asked 'another' instead of 'stub-model'"):
        read(OUT, report=report)


def test_requests_beside_the_answer_do_not_count() -> None:
    report = (
        record("api_request", model=MODEL, role="main")
        + record("api_response", finish_reasons=["stop", "length"], role="main")
        + record("api_request", model="another", role="utility_summarizer")
        + record("api_response", finish_reasons=["stop"], role="utility_summarizer")
    )
    assert read(TEXT + SUCCESS, report=report).finish_reason == "length"


@pytest.mark.parametrize("reasons", [["error"], [], "stop", None, [["stop"]]])
def test_an_end_that_is_none(reasons: Any) -> None:
    with pytest.raises(StreamInterrupted):
        read(TEXT + SUCCESS, report=record("api_response", finish_reasons=reasons))


def test_no_answer_is_success_without_text() -> None:
    with pytest.raises(ProviderUnavailable, match="an empty answer"):
        read(SUCCESS, report=REPORT)


def test_a_tool_that_is_called_ends_it() -> None:
    with pytest.raises(StreamInterrupted, match="called a tool"):
        read(TEXT + line("tool_use", tool_name="x") + TEXT + SUCCESS, report=REPORT)


def test_not_logged_in() -> None:
    with pytest.raises(ProviderUnavailable, match="not logged in: start `gemini`"):
        read(b"", "Please set an Auth method", code=41)


def test_one_that_did_not_read_the_prompt_in_time_may_be_asked_again() -> None:
    said = "No input provided via stdin. Input can be provided by piping data into gemini ..."
    with pytest.raises(ProviderUnavailable, match="did not come to read") as caught:
        read(b"", said, code=42)
    assert caught.value.again


def test_what_it_complained_of_last() -> None:
    with pytest.raises(ProviderUnavailable, match="gemini: Unknown argument: x"):
        read(b"", "Usage: gemini\n\nUnknown argument: x\n", code=1)
    with pytest.raises(ProviderUnavailable, match=r"without a result \(None\)"):
        read(b"", code=None)


def test_the_quota_of_a_day() -> None:
    message = "[API Error: You have exhausted your daily quota on this model.]"
    out = line("result", status="error", error={"message": message})
    with pytest.raises(ProviderRefused) as caught:
        read(out, code=173)
    assert caught.value.retry_after == DAY_USED_UP


def test_a_long_error_is_read_soon() -> None:
    for message in ("]\n" * 1_000_000, "[API Error: " * 100_000, "x" * 1_000_000):
        with pytest.raises(ProviderUnavailable) as caught:
            read(line("result", status="error", error={"message": message}), code=244)
        assert len(caught.value.message) < 1000


def test_a_key_is_not_repeated() -> None:
    out = line("result", status="error", error={"message": f"[API Error: {KEY} is bad]"})
    with pytest.raises(ProviderRefused) as caught:
        read(out, code=145)
    assert KEY not in caught.value.message


@given(st.lists(st.binary(max_size=80), max_size=6), st.integers() | st.none(), st.binary())
def test_any_bytes_end_in_an_answer_or_an_error(
    lines: list[bytes], code: int | None, report: bytes
) -> None:
    with contextlib.suppress(GenerateError):
        read(b"\n".join(lines), report=report.decode("utf-8", "replace"), code=code)


KEYS = ["type", "role", "content", "status", "error", "message", "stats", "input_tokens"]
WORDS = ["message", "assistant", "result", "success", "error", "tool_use", "some", "total_tokens"]
values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from([*KEYS, "attributes", "finish_reasons"]), inner, max_size=4
        )
    ),
    max_leaves=10,
)


@given(st.lists(values, max_size=5), values, st.integers(0, 255))
def test_any_json_ends_in_an_answer_or_an_error(lines: list[Any], report: Any, code: int) -> None:
    out = b"\n".join(json.dumps(each).encode() for each in lines)
    with contextlib.suppress(GenerateError):
        read(out, report=json.dumps(report), code=code)
