"""`promptmesh ask`: through a node, in this process, and every way in which it can fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fakes_cli import Cut, FakeNode, Problem, made, run

from promptmesh.node import cli_ask
from promptmesh.node.config_sections import Config
from promptmesh.node.home import Home
from promptmesh.node.openai_answers import StreamEncoder
from promptmesh.providers.base import (
    Completion,
    GenerateRequest,
    Origin,
    ProviderUnavailable,
    Usage,
)

MAIN = "import sys; from promptmesh.node.cli import main; sys.exit(main())"
PATH = "POST /v1/chat/completions"
#: A moment that is long enough for any machine.
LONG = 120
ORIGIN = {
    "request_id": "req-1",
    "peer": "12D3KooWPeer",
    "node": "alpha",
    "provider": "local_hf",
    "model": "smol",
    "cache": "miss",
    "attempts": 1,
    "policy": "round_robin",
}
USAGE: dict[str, Any] = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def delta(text: str, **more: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}}], "usage": None, **more})


def answer(*pieces: str, finish_reason: str = "stop", cid: str = "bafyanswer") -> Iterator[bytes]:
    """A whole answer, as the node streams it."""
    yield delta("", promptmesh=ORIGIN)
    yield from (delta(piece) for piece in pieces)
    closing = {"index": 0, "delta": {}, "finish_reason": finish_reason}
    yield event({"choices": [closing], "promptmesh": {**ORIGIN, "cid": cid}, "usage": None})
    yield event({"choices": [], "usage": USAGE})
    yield b"data: [DONE]\n\n"


def node(*pieces: str, **more: Any) -> FakeNode:
    return FakeNode({PATH: lambda: answer(*pieces, **more)})


def test_the_answer_goes_to_stdout_and_who_gave_it_to_stderr(tmp_path: Path) -> None:
    with node("The capital", " is Paris.").running(made(tmp_path)):
        ran = run(tmp_path, "ask", "What is the capital of France?")
    assert (ran.code, ran.out) == (0, "The capital is Paris.\n")
    assert ran.err.startswith("alpha · local_hf · smol · miss · bafyanswer · 12 + 3 tokens · ")
    assert ran.err.endswith(" s\n")


def test_tokens_that_nobody_counted_are_about_so_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(USAGE, "estimated", True)
    with node("Hi").running(made(tmp_path)):
        ran = run(tmp_path, "ask", "Hello")
    assert " · about 12 + 3 tokens · " in ran.err


def test_it_understands_what_a_node_really_sends(tmp_path: Path) -> None:
    origin = Origin(peer="12D3KooWPeer", node="\u00e4lpha", provider="echo", model="m", attempts=2)
    chunks = Completion(
        text="hi", finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=2)
    ).chunks()

    def events() -> Iterator[bytes]:
        encoder = StreamEncoder(origin, "req-1", 0, include_usage=True)
        yield encoder.first()
        for chunk in chunks:
            yield encoder.chunk(chunk)

    with FakeNode({PATH: events}).running(made(tmp_path)):
        ran = run(tmp_path, "ask", "x", "--json")
    assert json.loads(ran.out) == {
        "text": "hi",
        "model": "m",
        "provider": "echo",
        "peer": "12D3KooWPeer",
        "node": "\u00e4lpha",
        "cid": None,
        "cache": "miss",
        "attempts": 2,
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        "finish_reason": "stop",
    }


def test_what_is_asked(tmp_path: Path) -> None:
    with node("x").running(made(tmp_path)) as fake:
        flags = "-m beta:vllm/m --provider p --peer q --policy least_loaded --max-tokens 9"
        run(tmp_path, "ask", "hi", *flags.split(), "--temperature", "0", "--system", "be brief")
        run(tmp_path, "ask", "hi")
    assert fake.asked[0].body == {
        "model": "beta:vllm/m",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi"},
        ],
        "max_tokens": 9,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "promptmesh": {
            "provider": "p",
            "peer": "q",
            "policy": "least_loaded",
            "cache": {"any_sample": True},
        },
    }
    assert fake.asked[1].body == {
        "model": "auto",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "promptmesh": {"cache": {"any_sample": True}},
    }


def test_json_is_one_stable_value(tmp_path: Path) -> None:
    with node("a", "b").running(made(tmp_path)):
        ran = run(tmp_path, "ask", "x", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out) == {
        "text": "ab",
        "model": "smol",
        "provider": "local_hf",
        "peer": "12D3KooWPeer",
        "node": "alpha",
        "cid": "bafyanswer",
        "cache": "miss",
        "attempts": 1,
        "usage": USAGE,
        "finish_reason": "stop",
    }


@pytest.mark.parametrize("arguments", [("ask", "-"), ("ask",)])
def test_the_prompt_from_standard_input(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with node("x").running(made(tmp_path)) as fake:
        run(tmp_path, *arguments, stdin="line\nline\n")
    assert fake.asked[0].body["messages"] == [{"role": "user", "content": "line\nline\n"}]


@pytest.mark.parametrize("stdin", ["", " \n", None])
def test_without_a_prompt(tmp_path: Path, stdin: str | None) -> None:
    ran = run(tmp_path, "ask", stdin=stdin)
    assert (ran.code, ran.out) == (2, "")
    assert "there is no prompt" in ran.err


def test_a_prompt_that_cannot_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_ask, "MAX_PROMPT", 3)
    ran = run(tmp_path, "ask", "-", stdin="four")
    assert (ran.code, ran.out) == (2, "")
    assert "more than 3 characters" in ran.err
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", MAIN, "--home", str(tmp_path), "ask"],
        input=b"\xff\xfe",
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == b"promptmesh: standard input is not text\n"


def test_a_cut_answer_says_so(tmp_path: Path) -> None:
    with node("x\n", finish_reason="length").running(made(tmp_path)):
        ran = run(tmp_path, "ask", "x")
    assert ran.out == "x\n"
    assert ran.err.endswith("· ended by length\n")


def test_a_terminal_obeys_no_answer(tmp_path: Path) -> None:
    text = "red \x1b[31m \x9b2J \u202e line\n"
    with node(text).running(made(tmp_path)):
        assert "\x1b[31m" not in run(tmp_path, "ask", "x", tty=True, NO_COLOR="1").out
        assert run(tmp_path, "ask", "x").out == text  # a file gets what was answered


def test_an_error_before_the_answer(tmp_path: Path) -> None:
    problem = Problem(404, "nobody offers the model `x`; there are: `smol`", "req-7")
    with FakeNode({PATH: problem}).running(made(tmp_path)):
        ran = run(tmp_path, "ask", "x", "--json")
    assert (ran.code, ran.out) == (1, "")
    said, why = ran.err.splitlines()
    assert said == "promptmesh: nobody offers the model `x`; there are: `smol`"
    assert why == f"why: `promptmesh --home {tmp_path} explain req-7`"


def failed_half_way() -> Iterator[bytes]:
    yield delta("half an")
    yield event({"error": {"message": "the peer is gone", "code": "stream_interrupted"}})


def cut_half_way() -> Iterator[bytes]:
    yield delta("half an")
    raise Cut


def ended_half_way() -> Iterator[bytes]:
    yield delta("half an")


def without_finish_reason() -> Iterator[bytes]:
    yield delta("half an")
    yield b"data: [DONE]\n\n"


def not_json() -> Iterator[bytes]:
    yield delta("half an")
    yield b"data: {oops\n\n"


@pytest.mark.parametrize(
    ("events", "said"),
    [
        (failed_half_way, "the peer is gone"),
        (cut_half_way, "the answer broke off before its end"),
        (ended_half_way, "the answer broke off before its end"),
        (without_finish_reason, "the answer broke off before its end"),
        (not_json, "is not promptmesh"),
    ],
)
def test_half_an_answer_is_never_taken_for_a_whole_one(
    tmp_path: Path, events: Callable[[], Iterator[bytes]], said: str
) -> None:
    with FakeNode({PATH: events}).running(made(tmp_path)):
        shown = run(tmp_path, "ask", "x")
        whole = run(tmp_path, "ask", "x", "--json")
    assert (shown.code, shown.out) == (1, "half an\n")
    assert "the answer above is not complete" in shown.err
    assert said in shown.err
    assert shown.err.endswith(" explain req-1`\n")
    assert (whole.code, whole.out) == (1, "")


def test_text_comes_as_it_is_made_and_ctrl_c_stops_the_work(tmp_path: Path) -> None:
    """The first piece is on stdout while the second is not yet made; then the client leaves."""
    interrupted = threading.Event()

    def slowly() -> Iterator[bytes]:
        yield delta("first")
        assert interrupted.wait(LONG)
        while True:  # until a write fails, since the client has gone
            yield delta("more " * 10_000)

    fake = FakeNode({PATH: slowly})
    with (
        fake.running(made(tmp_path)),
        subprocess.Popen(
            [sys.executable, "-c", MAIN, "--home", str(tmp_path), "ask", "x"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        assert os.read(process.stdout.fileno(), 100) == b"first"
        process.send_signal(signal.SIGINT)
        assert process.wait(LONG) == 130
        interrupted.set()
        assert fake.left.wait(LONG)
        assert process.stderr.read() == b""


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands for answering in this process; what it was given is in the list."""
    given: list[Any] = []

    def ask(
        config: Config, home: Home, request: GenerateRequest, on_text: Callable[[str], None]
    ) -> dict[str, Any]:
        given.append((config, home, request))
        on_text("from ")
        if request.model == "broken":
            raise ProviderUnavailable("the model did not load")
        on_text("here")
        return {"text": "from here", **ORIGIN, "cid": "bafyhere", "usage": USAGE,
                "finish_reason": "stop"}  # fmt: skip

    module = ModuleType("promptmesh.node.local")
    module.ask = ask  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "promptmesh.node.local", module)
    return given


def test_without_a_node_this_process_answers(tmp_path: Path, here: list[Any]) -> None:
    ran = run(tmp_path, "ask", "hi", "--system", "s", "--temperature", "0.5", "--peer", "q")
    assert (ran.code, ran.out) == (0, "from here\n")
    assert "no node runs here" in ran.err
    ((config, home, request),) = here
    assert isinstance(config, Config)
    assert home.path == tmp_path
    assert [(m.role, m.text) for m in request.messages] == [("system", "s"), ("user", "hi")]
    assert request.sampling.temperature == 0.5
    assert (request.model, request.peer) == ("auto", "q")
    assert request.cache.any_sample
    assert json.loads(run(tmp_path, "ask", "hi", "--json").out)["cid"] == "bafyhere"


def test_also_when_the_node_was_killed(tmp_path: Path, here: list[Any]) -> None:
    gone = node("x")
    with gone.running():
        pass
    with made(tmp_path).announced(gone.http):
        assert run(tmp_path, "ask", "hi").out == "from here\n"


def test_an_answer_that_fails_in_this_process(tmp_path: Path, here: list[Any]) -> None:
    ran = run(tmp_path, "ask", "hi", "-m", "broken")
    assert (ran.code, ran.out) == (1, "from \n")
    assert "the answer above is not complete" in ran.err
    assert "promptmesh: the model did not load" in ran.err
