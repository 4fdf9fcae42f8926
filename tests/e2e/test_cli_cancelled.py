"""Calls that are cancelled at any moment leave nothing: no process, folder, descriptor or task.

And the key is in nobody's arguments.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import aclosing, suppress
from functools import partial
from itertools import islice
from random import Random, random
from typing import Any, NamedTuple

import psutil
import pytest
import trio
from cli_matrix import LATE, Bench, bench, expected
from cli_programs import KEY, MODEL, PROGRAMS
from cli_real import real_programs, recorded_programs
from daemons import until
from faults import PARTIAL, WHOLE

from promptmesh import astream_text
from promptmesh.providers.base import ProviderUnavailable, StreamInterrupted

pytestmark = pytest.mark.e2e

#: Calls of each program, and how many at once.
CALLS, AT_ONCE = 200, 4
#: Seconds in which no process of a call has begun to work.
UNBORN = 0.02
#: Descriptors that may come to be once, in 200 calls.
ONCE = 4


def _programs() -> Iterator[object]:
    """Their names, and whether they are real: one recording stands for all that start a process
    for each answer."""
    yield pytest.param((recorded_programs()[0], False), id="recorded")
    for real in real_programs():
        yield pytest.param((real.values[0], True), id=real.id, marks=real.marks)


@pytest.fixture(params=_programs())
def asked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    name, real = request.param
    with bench(name, real, tmp_path_factory.mktemp(name)) as made:
        yield made


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """The arguments of each process that was started, by its number, which is its session's."""
    found: dict[int, str] = {}
    start = trio.lowlevel.open_process

    async def note(command: list[str], **options: Any) -> trio.Process:
        process = await start(command, **options)
        found[process.pid] = " ".join(command)
        return process

    monkeypatch.setattr(trio.lowlevel, "open_process", note)
    return found


class Leave(NamedTuple):
    """Of which case a call is left, and when: after a time, or when that is its text."""

    case: str
    seconds: float = LATE
    text: str | None = None
    #: Are processes used that are kept?
    kept: bool = True


AT_THE_END = Leave("ok", text=WHOLE)


def in_the_middle(name: str, whole: float) -> Leave:
    """`whole`: the seconds that a call takes."""
    shows = expected(name, "stall").text  # others show nothing before the end
    return Leave("stall", text=PARTIAL) if shows else Leave("stall", whole / 2)


def moments(name: str, whole: float, kept: float) -> Iterator[Leave]:
    """Before there is a process, while it begins or soon after, in the middle, at the end, and at
    about the time of it. `whole`, `kept`: the seconds that a call takes with a process that is
    started for it, and with one that is kept."""
    at = Random(200)
    while True:
        yield Leave("ok", at.uniform(0, UNBORN), kept=False)
        yield Leave("stall", at.uniform(0, whole), kept=False)
        yield in_the_middle(name, whole)
        yield AT_THE_END
        yield Leave("ok", at.uniform(0.5, 1.2) * kept)


async def test_cancelled_calls_leave_nothing(asked: Bench, started: dict[int, str]) -> None:
    arguments: dict[int, list[str]] = {}
    see = partial(_see, asked, arguments)
    await call(asked, AT_THE_END)
    whole = await seconds_of(asked, AT_THE_END._replace(kept=False))
    await call(asked, in_the_middle(asked.name, whole), see)
    kept = await seconds_of(asked, AT_THE_END)
    await until(partial(at_rest, asked, started), "nothing runs but what is kept", LATE)
    allowed = await held(asked, started) + Counter(descriptors=ONCE)
    limit = trio.CapacityLimiter(AT_ONCE)

    async def leave(moment: Leave) -> None:
        async with limit:
            await call(asked, moment)

    async with trio.open_nursery() as nursery:
        for moment in islice(moments(asked.name, whole, kept), CALLS):
            nursery.start_soon(leave, moment)

    left: Counter[str] = Counter()

    async def nothing() -> bool:
        nonlocal left
        left = await held(asked, started) - allowed
        return not left

    try:
        await until(nothing, "all is gone", LATE)
    finally:
        assert not left
    await call(asked, AT_THE_END)
    assert KEY not in f"{arguments} {started}"


async def at_rest(asked: Bench, started: dict[int, str]) -> bool:
    """Does all run that is kept, one process for each case, and nothing else? What a busy machine
    did not let end in time is not kept, and is begun anew."""
    kept = len(("ok", "stall")) if PROGRAMS[asked.name].persistent else 0
    now = await held(asked, started)
    if now["sessions"] < kept:
        await call(asked, AT_THE_END)
        await call(asked, in_the_middle(asked.name, LATE))
    return now["sessions"] == now["folders"] == kept


async def seconds_of(asked: Bench, leave: Leave) -> float:
    begun = trio.current_time()
    await call(asked, leave)
    return trio.current_time() - begun


async def call(asked: Bench, leave: Leave, then: Callable[[], object] = bool) -> None:
    """Ask, and leave; at that text do something first, in a thread."""
    text = ""
    pieces = astream_text(
        f"Tell me the tale {random()}.",  # of which no answer is stored
        provider=leave.case,
        model_name=MODEL,
        deps=asked.deps,
        use_cache=leave.kept,
    )
    try:
        with trio.move_on_after(leave.seconds):
            async with aclosing(pieces):  # type: ignore[type-var] # it is a generator
                async for piece in pieces:
                    text += piece
                    if text == leave.text:
                        await trio.to_thread.run_sync(then)
                        return
    except (ProviderUnavailable, StreamInterrupted):
        # A machine too busy to end one call in time: all end that its process answered.
        if not (leave.kept and PROGRAMS[asked.name].persistent):
            raise
    else:
        assert leave.text is None


def _see(asked: Bench, arguments: dict[int, list[str]]) -> None:
    """What the programs that run were told."""
    arguments.update(asked.processes())
    assert arguments


async def held(asked: Bench, started: dict[int, str]) -> Counter[str]:
    """What the calls hold now."""
    found = await trio.to_thread.run_sync(_held, asked, started)
    found["tasks of the test"] = trio.lowlevel.current_statistics().tasks_living
    return found


def _held(asked: Bench, started: dict[int, str]) -> Counter[str]:
    async def tasks(_: object) -> int:
        return trio.lowlevel.current_statistics().tasks_living

    sessions = _sessions()
    return Counter(
        {
            "sessions": len(set(sessions.values()) & set(started)),
            "strays": sum(sessions.get(pid) not in started for pid in asked.processes()),
            "folders": len(asked.left_behind()),
            "descriptors": _descriptors(asked),
            "tasks": asked.deps.submit(tasks).future.result(LATE),
        }
    )


def _sessions() -> dict[int, int]:
    """The session of each process that runs, or has ended and this one did not ask how."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if process.status() != psutil.STATUS_ZOMBIE or process.ppid() == os.getpid():
                found[process.pid] = os.getsid(process.pid)
    return found


def _descriptors(asked: Bench) -> int:
    """Without those of the vendors' server, which is a thread of this process."""
    port = asked.server.port if asked.server else 0
    sockets = psutil.Process().net_connections("tcp")
    return len(os.listdir("/proc/self/fd")) - sum(s.laddr.port == port for s in sockets)
