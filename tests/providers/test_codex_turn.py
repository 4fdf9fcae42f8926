"""What Codex tells of a turn: recorded from 0.169.0, whole, cut, and with what nobody expects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from faults import PARTIAL, WHOLE
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.providers.base import (
    Chunk,
    ContentFiltered,
    ContextTooLong,
    GenerateError,
    ProviderRefused,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
)
from promptmesh.providers.codex_exec import CodexOutput
from promptmesh.providers.codex_turn import PLAN_USED_UP, CodexTurn
from promptmesh.providers.openai_errors import TOO_OFTEN, ErrorReader

TURNS = Path(__file__).parent.parent / "codex_turns"
KEY = "sk-nobody-may-see-this"


def decoder() -> CodexTurn:
    return CodexTurn(ErrorReader("codex_cli", [KEY]))


def recorded(case: str) -> list[tuple[str, bytes]]:
    """The notifications of a turn: method and parameters."""
    lines = map(json.loads, (TURNS / f"{case}.jsonl").read_text().splitlines())
    return [(line["method"], json.dumps(line["params"]).encode()) for line in lines]


def feed(turn: CodexTurn, told: list[tuple[str, bytes]]) -> list[Chunk]:
    chunks = []
    for method, params in told:
        turn.event(method, params)
        chunks += turn.take()
    return chunks


def tell(turn: CodexTurn, method: str, /, **params: Any) -> None:
    turn.event(method, json.dumps(params).encode())


def say(turn: CodexTurn, text: str) -> None:
    tell(turn, "item/agentMessage/delta", itemId="m1", delta=text)


def end(turn: CodexTurn, message: str = "", info: Any = None) -> None:
    """The end of the turn: a failure if there is a message."""
    failure = {"message": message, "codexErrorInfo": info} if message else None
    status = "failed" if message else "completed"
    tell(turn, "turn/completed", turn={"id": "t", "status": status, "error": failure})


@pytest.mark.parametrize(
    ("case", "text", "finish", "counted"),
    [
        ("ok", WHOLE, "stop", True),
        ("reason", WHOLE, "stop", True),
        ("nousage", WHOLE, "stop", False),
        ("truncate", PARTIAL, "length", True),
        ("filter", PARTIAL, "content_filter", False),
    ],
)
def test_answers(case: str, text: str, finish: str, counted: bool) -> None:
    turn = decoder()
    chunks = feed(turn, recorded(case))
    assert "".join(chunk.text for chunk in chunks) == text
    assert (turn.finished, turn.failure, turn.over) == (True, None, True)
    assert chunks[-1].finish_reason == finish
    assert (chunks[-1].usage is not None) is counted
    assert bool("".join(chunk.reasoning for chunk in chunks)) is (case == "reason")


FAILURES: list[tuple[str, type[GenerateError], str, float | None, bool]] = [
    ("e400", RequestRejected, "has a field that is wrong", None, False),
    ("e401", ProviderRefused, "Incorrect API key provided (check the key", None, False),
    ("e402", ProviderRefused, "no credit left", None, False),
    ("e404", ProviderRefused, "does not exist", None, False),
    ("e429", ProviderRefused, "429 Too Many Requests", TOO_OFTEN, False),
    ("e500", ProviderUnavailable, "high demand", None, True),
    ("e503", ProviderUnavailable, "the service is not available", None, True),
    ("html", ProviderUnavailable, "answered 502", None, True),
    ("context", ContextTooLong, "ran out of room", None, False),
    ("badjson", ProviderUnavailable, "stream closed before", None, False),
    ("empty", ProviderUnavailable, "an empty answer", None, False),
    ("drop", StreamInterrupted, "network error", None, False),
    ("streamerr", StreamInterrupted, "the engine has died", None, False),
    ("interrupted", ProviderUnavailable, "it was ended", None, False),
]


@pytest.mark.parametrize(("case", "kind", "words", "wait", "again"), FAILURES)
def test_failures(
    case: str, kind: type[GenerateError], words: str, wait: float | None, again: bool
) -> None:
    turn = decoder()
    feed(turn, recorded(case))
    failure = turn.failure
    assert type(failure) is kind
    assert words in failure.message
    assert "http://" not in failure.message
    assert (failure.retry_after, failure.again) == (wait, again)
    assert failure.partial == (PARTIAL if kind is StreamInterrupted else "")
    assert (turn.finished, turn.over) == (False, True)


@pytest.mark.parametrize("case", ["ok", "reason", "truncate", "filter"])
def test_a_turn_that_is_cut_anywhere_is_no_answer(case: str) -> None:
    told = recorded(case)
    for length in range(len(told)):
        turn = decoder()
        feed(turn, told[:length])
        assert not turn.finished
        assert not turn.over
        assert type(turn.broken("it died")) is (
            StreamInterrupted if turn.pieces else ProviderUnavailable
        )


#: Failures of which Codex only says some words, or that no stub makes.
@pytest.mark.parametrize(
    ("message", "info", "kind", "wait"),
    [
        ("You've hit your usage limit.", "usageLimitExceeded", ProviderRefused, PLAN_USED_UP),
        ("Quota exceeded. Check your plan.", "other", ProviderRefused, PLAN_USED_UP),
        ("rate limit exceeded: try again in 1.5s", "other", ProviderRefused, 1.5),
        ("no", "serverOverloaded", ProviderUnavailable, None),
        ("no", "cyberPolicy", ContentFiltered, None),
        ("no", "unauthorized", ProviderRefused, None),
        ("no", {"responseStreamDisconnected": {"httpStatusCode": None}}, ProviderUnavailable, None),
        ("Connection failed: refused", {"httpConnectionFailed": {}}, ProviderUnavailable, None),
        ("no", {"inANewerVersion": 3}, ProviderUnavailable, None),
        ("reason: content_filter", None, ContentFiltered, None),
        (
            f"{KEY} is wrong",
            {"httpConnectionFailed": {"httpStatusCode": 401}},
            ProviderRefused,
            None,
        ),
    ],
)
def test_more_failures(
    message: str, info: Any, kind: type[GenerateError], wait: float | None
) -> None:
    turn = decoder()
    end(turn, message, info)
    assert type(turn.failure) is kind
    assert turn.failure.retry_after == wait
    assert KEY not in turn.failure.message


def test_another_model_than_was_asked_for_is_an_error() -> None:
    turn = decoder()
    tell(turn, "model/rerouted", fromModel="large", toModel="small")
    say(turn, "I am small.")
    assert turn.failure is not None
    assert "it asked 'small' instead of 'large'" in turn.failure.message
    assert turn.take() == []


def test_a_try_of_its_own_is_an_error() -> None:
    turn = decoder()
    tell(turn, "error", error={"message": "Reconnecting... 1/5"}, willRetry=True)
    assert turn.failure is not None
    assert "try again by itself" in turn.failure.message


@pytest.mark.parametrize("kind", ["commandExecution", "mcpToolCall", "webSearch", "fileChange"])
def test_a_tool_is_an_error(kind: str) -> None:
    turn = decoder()
    say(turn, "Let me look. ")
    tell(turn, "item/started", item={"type": kind, "id": "i"})
    assert type(turn.failure) is StreamInterrupted
    assert kind in turn.failure.message


def test_what_is_said_to_those_who_watch_is_no_answer() -> None:
    turn = decoder()
    tell(turn, "item/started", item={"type": "agentMessage", "id": "m0", "phase": "commentary"})
    tell(turn, "item/agentMessage/delta", itemId="m0", delta="I think.")
    tell(turn, "item/completed", item={"type": "agentMessage", "id": "m0", "text": "I think."})
    say(turn, "Yes.")
    end(turn)
    chunks = turn.take()
    assert [(c.reasoning, c.text) for c in chunks] == [("I think.", ""), ("", "Yes."), ("", "")]


def test_thoughts_alone_are_no_answer() -> None:
    turn = decoder()
    tell(turn, "item/reasoning/summaryTextDelta", itemId="r", delta="Hm.")
    tell(turn, "item/completed", item={"type": "reasoning", "id": "r", "summary": ["Hm."]})
    end(turn)
    assert [chunk.reasoning for chunk in turn.take()] == ["Hm."]
    assert turn.failure is not None
    assert not turn.finished


def test_a_message_without_pieces_is_taken_whole() -> None:
    turn = decoder()
    tell(turn, "item/completed", item={"type": "agentMessage", "id": "m", "text": "All."})
    end(turn)
    assert [chunk.text for chunk in turn.take()] == ["All.", ""]


_METHODS = st.sampled_from(
    [
        "item/agentMessage/delta",
        "item/started",
        "item/completed",
        "turn/completed",
        "turn/started",
        "error",
        "model/rerouted",
        "thread/tokenUsage/updated",
        "item/reasoning/textDelta",
        "nobody/knows",
    ]
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.sampled_from(["item", "turn", "error", "type", "id", "text", "delta", "status", "x"])
            | st.text(),
            inner,
        )
    ),
    max_leaves=8,
)


@given(st.lists(st.tuples(_METHODS, st.binary() | _JSON.map(lambda v: json.dumps(v).encode()))))
def test_nothing_that_it_tells_breaks_the_decoder(told: list[tuple[str, bytes]]) -> None:
    turn = decoder()
    chunks = feed(turn, told)
    assert not (turn.finished and turn.failure is not None)
    closing = [chunk for chunk in chunks if chunk.finish_reason is not None]
    assert len(closing) == turn.finished


# --- `codex exec`


def run(*lines: Any, code: int | None = 0, errors: str = "") -> tuple[CodexOutput, list[Chunk]]:
    output = CodexOutput(ErrorReader("codex_cli", [KEY]))
    for line in lines:
        data = line if isinstance(line, bytes) else json.dumps(line).encode()
        output.event("", data)
    output.ended(code, errors, "")
    return output, output.take()


SAID = {"type": "item.completed", "item": {"type": "agent_message", "text": "Yes."}}
THOUGHT = {"type": "item.completed", "item": {"type": "reasoning", "text": "Hm."}}
WARNED = {"type": "item.completed", "item": {"type": "error", "message": "no metadata"}}
DONE = {"type": "turn.completed", "usage": {"input_tokens": 3, "output_tokens": 2}}


def failed(message: str) -> dict[str, Any]:
    return {"type": "turn.failed", "error": {"message": message}}


def test_a_run_for_one_answer() -> None:
    output, chunks = run({"type": "turn.started"}, WARNED, THOUGHT, SAID, b"noise", DONE)
    assert output.failure is None
    assert [(c.reasoning, c.text) for c in chunks] == [("Hm.", ""), ("", "Yes."), ("", "")]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 5


def test_the_last_message_is_the_answer() -> None:
    first = {"type": "item.completed", "item": {"type": "agent_message", "text": "Wait."}}
    _, chunks = run(first, SAID, DONE)
    assert "".join(chunk.text for chunk in chunks) == "Yes."


@pytest.mark.parametrize(
    ("lines", "code", "errors", "kind", "words"),
    [
        ((DONE,), 0, "", ProviderUnavailable, "empty"),
        ((SAID,), 0, "", ProviderUnavailable, "without a result"),
        ((SAID, DONE), 1, "", ProviderUnavailable, "code 1"),
        (
            (),
            2,
            f"warning\nerror: bad flag {KEY}\n",
            ProviderUnavailable,
            "error: bad flag *** (2)",
        ),
        ((), None, "", ProviderUnavailable, "None"),
        ((failed("Codex ran out of room in the model"),), 1, "", ContextTooLong, "room"),
        (
            (failed("We\u2019re currently experiencing high demand"),),
            1,
            "",
            ProviderUnavailable,
            "500",
        ),
        (
            (failed("unexpected status 403 Forbidden: no, url: x"),),
            1,
            "",
            ProviderRefused,
            "403: no",
        ),
        ((failed('{"error": {"message": "bad"}}'),), 1, "", RequestRejected, "400: bad"),
        (({"type": "turn.failed"},), 1, "", ProviderUnavailable, "does not say why"),
        (
            ({"type": "item.completed", "item": {"type": "command_execution"}}, DONE),
            0,
            "",
            ProviderUnavailable,
            "called a tool",
        ),
    ],
)
def test_runs_without_an_answer(
    lines: tuple[Any, ...], code: int | None, errors: str, kind: type[GenerateError], words: str
) -> None:
    output, _ = run(*lines, code=code, errors=errors)
    assert type(output.failure) is kind
    assert words in output.failure.message
    assert KEY not in output.failure.message


def test_a_run_that_was_cut_at_its_limit() -> None:
    output, chunks = run(SAID, failed("Incomplete response, reason: max_output_tokens"), code=1)
    assert output.failure is None
    assert chunks[-1].finish_reason == "length"
