"""What each of the vendors' programs must give, in each case, and how it is asked for that.

`MATRIX` says it once for all of them; what one of them cannot tell, or does otherwise, stands in
`BUT`. A cell is asked through `generate_text` or `stream_text`, as a program does.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import pytest
from cli_programs import CLIS, KEY, KEY_VARIABLE, MODEL, PROGRAMS
from faults import PARTIAL, WHOLE
from recordings import playing_program
from vendors import VendorServer, vendors_in_a_thread

from promptmesh import RouterDeps, generate_text, get_last_generation_trace, stream_text
from promptmesh.providers.base import (
    ContentFiltered,
    ContextTooLong,
    DeadlineExceeded,
    GenerateError,
    ProviderRefused,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
)
from promptmesh.providers.openai_errors import TOO_OFTEN

Way = Literal["whole", "streamed"]
WAYS: tuple[Way, ...] = ("whole", "streamed")
#: Seconds for an answer that never comes, and for all others.
SOON, LATE = 1.0, 60.0
#: Cases in which it never comes.
ENDLESS = ("hang", "stall")
#: Cells that are asked at once: two cores, and programs of 0.3 GB.
AT_ONCE = 3


class Gives(NamedTuple):
    """What must come of a case."""

    error: type[GenerateError] | None = None
    #: The answer, or what came before the error.
    text: str = ""
    finish: str | None = None
    retry_after: float | None = None
    #: How often the vendor's server is asked: more than once would be a try that nobody sees.
    requests: int = 1

    def words(self) -> str:
        """It for people."""
        if self.error is None:
            return str(self.finish)
        wait = "" if self.retry_after is None else f", after {self.retry_after:g} s"
        return self.error.__name__ + (", partial" if self.text else "") + wait


#: Case, a mode of the vendors' stub -> what it gives.
MATRIX: Mapping[str, Gives] = {
    "ok": Gives(text=WHOLE, finish="stop"),
    "reason": Gives(text=WHOLE, finish="stop"),
    "nousage": Gives(text=WHOLE, finish="stop"),
    "truncate": Gives(text=PARTIAL, finish="length"),
    "e400": Gives(RequestRejected),
    "e401": Gives(ProviderRefused),
    "badkey": Gives(ProviderRefused),
    "e402": Gives(ProviderRefused),
    "e403": Gives(ProviderRefused),
    "e404": Gives(ProviderRefused),
    "e429-7": Gives(ProviderRefused, retry_after=7.0),
    "e429": Gives(ProviderRefused, retry_after=TOO_OFTEN),
    # Such a server is asked once more by us, where nobody else is left.
    "e500": Gives(ProviderUnavailable, requests=2),
    "e503": Gives(ProviderUnavailable, requests=2),
    "context": Gives(ContextTooLong),
    "filter": Gives(ContentFiltered, PARTIAL),
    "hang": Gives(DeadlineExceeded),
    "stall": Gives(DeadlineExceeded, PARTIAL),
    "drop": Gives(StreamInterrupted, PARTIAL),
    "reset": Gives(StreamInterrupted, PARTIAL),
    "streamerr": Gives(StreamInterrupted, PARTIAL),
    "empty": Gives(ProviderUnavailable),
    "badjson": Gives(ProviderUnavailable),
    "html": Gives(ProviderUnavailable, requests=2),
}
#: The cases in which a program that always runs for real is asked in every run.
CORE = ("ok", "truncate", "e401", "e429-7", "e500", "hang", "drop", "empty", "badjson")
#: It does not say how long the server wants to be left alone.
_CODEX = {"e429-7": Gives(ProviderRefused, retry_after=TOO_OFTEN)}
#: Program -> case -> what is otherwise with it.
BUT: Mapping[str, Mapping[str, Gives]] = {
    "claude": {
        # The command does not tell how long to wait, and drops the text of a connection that broke.
        "e429-7": Gives(ProviderRefused, retry_after=TOO_OFTEN),
        "drop": Gives(ProviderUnavailable),
        "reset": Gives(ProviderUnavailable),
        # It tries these again, before it tells.
        "e400": Gives(RequestRejected, requests=3),
        "e404": Gives(ProviderRefused, requests=2),
    },
    "codex": _CODEX,
    "codex-npm": _CODEX,
    # An answer that is not whole is not shown at all, but for one that its limit or a filter cut.
    "codex-exec": _CODEX
    | {"stall": Gives(DeadlineExceeded)}
    | dict.fromkeys(("drop", "reset", "streamerr"), Gives(ProviderUnavailable)),
    # It keeps `Retry-After` to itself, and is ended only when it has begun to go on with an answer
    # that its limit had cut.
    "copilot": {
        "e429-7": MATRIX["e429"],
        "truncate": MATRIX["truncate"]._replace(requests=3),
        # On a busy machine it may ask again before it is ended.
        "badjson": MATRIX["badjson"]._replace(requests=2),
    },
    "copilot_sdk": {
        "e429-7": MATRIX["e429"],
        "truncate": MATRIX["truncate"]._replace(requests=2),
        "badjson": MATRIX["badjson"]._replace(requests=2),
    },
}


#: Whether the command tells the text that it had when the connection broke is chance.
OR_ELSE = {("claude", "drop"): MATRIX["drop"]}


def expected(program: str, case: str) -> Gives:
    return BUT.get(program, {}).get(case, MATRIX[case])


def as_well(program: str, case: str) -> Gives:
    """What may come of it, too, by chance."""
    return OR_ELSE.get((program, case), expected(program, case))


@dataclass
class Bench:
    """A program's provider for each case, in a router of their own."""

    name: str
    #: All that it starts has this in its environment.
    folder: Path
    deps: RouterDeps
    #: None where a recording answers.
    server: VendorServer | None
    got: dict[tuple[str, Way], Gives] = field(default_factory=dict)
    messages: dict[tuple[str, Way], str] = field(default_factory=dict)

    def ask(self, case: str, way: Way, prompt: str = "Tell me a tale.") -> Gives:
        """Ask for one answer."""
        if case not in ENDLESS:
            return self._ask(case, way, prompt, LATE)
        seconds = SOON
        while True:
            got = self._ask(case, way, prompt, seconds)
            begun = got.text if expected(self.name, case).text else self._came(case)
            if begun or seconds > LATE / 2:
                return got
            seconds *= 4  # the machine was too busy for it to begin

    def processes(self) -> dict[int, list[str]]:
        """The arguments of each process that it has started, and that runs."""
        found = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if any(str(self.folder) in value for value in process.environ().values()):
                    found[process.pid] = process.cmdline()
        found.pop(os.getpid(), None)
        return found

    def left_behind(self) -> list[str]:
        """What is in its folder for temporary files."""
        return [path.name for path in (self.folder / "tmp").iterdir()]

    def _came(self, case: str) -> bool:
        return self.server is None or bool(self.server.of(case))

    def _ask(self, case: str, way: Way, prompt: str, timeout: float) -> Gives:
        asked: dict[str, Any] = {
            "provider": case,
            "model_name": MODEL,
            "deps": self.deps,
            "use_cache": False,
            "timeout": timeout,
        }
        pieces: list[str] = []
        try:
            if way == "whole":
                pieces.append(generate_text(prompt, **asked))
            else:
                pieces.extend(stream_text(prompt, **asked))
        except GenerateError as error:
            self.messages[case, way] = error.message
            return Gives(type(error), error.partial, None, error.retry_after)
        trace = get_last_generation_trace()
        assert trace is not None
        return Gives(None, "".join(pieces), trace["finish_reason"])

    def ask_all(self, cases: Iterable[str]) -> None:
        """Ask for each cell of these cases, some at once."""
        cells: list[tuple[str, Way]] = [(case, way) for case in cases for way in WAYS]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            self.got = dict(zip(cells, pool.map(lambda cell: self.ask(*cell), cells), strict=True))


@contextmanager
def bench(name: str, real: bool, folder: Path) -> Iterator[Bench]:
    """A bench with the real program, or with the recordings of it."""
    program = PROGRAMS[name]
    with ExitStack() as stack:
        server = stack.enter_context(vendors_in_a_thread()) if real else None
        path = program.path if real else playing_program(folder, name, program.path.name)
        home = folder / "home"
        home.mkdir()
        tables = [
            program.table(case, path, server.base(case) if server else _nowhere(case))
            for case in (*MATRIX, "echo")
        ]
        (home / "config.toml").write_text("\n".join(tables))
        stack.enter_context(_environment(folder))
        deps = stack.enter_context(RouterDeps(home=home))
        yield Bench(name, folder, deps, server)


def _nowhere(case: str) -> str:
    """An address at which nobody is: a program that asks has not played its recording."""
    return f"http://127.0.0.1:1/m/{case}"


@contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """A user who has nothing but those programs."""
    for name in ("user", "tmp"):
        (folder / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "user"))
        patch.setattr(tempfile, "tempdir", str(folder / "tmp"))
        patch.setenv(KEY_VARIABLE, KEY)
        patch.setenv("PATH", f"{CLIS}/bin:/usr/bin:/bin")
        for name in (
            "PROMPTMESH_HOME",
            "PROMPTMESH_LLM_PROVIDER",
            "IPFS_ACCELERATE_PY_LLM_PROVIDER",
        ):
            patch.delenv(name, raising=False)
        yield
