"""Calls that are cancelled leave nothing running, and the key is in nobody's arguments."""

import gc
import math
import os
from collections.abc import Iterator
from contextlib import aclosing
from functools import partial

import pytest
import trio
from cli_matrix import Bench, bench, expected
from cli_programs import KEY, MODEL, PROGRAMS
from cli_real import real_programs, recorded_programs
from daemons import until
from faults import PARTIAL

from promptmesh import astream_text

pytestmark = pytest.mark.e2e

#: Calls where a process is started for each: of the recorded program, and of a real one. Of one
#: that is kept.
RECORDED, REAL, KEPT = 200, 40, 100
#: How many at once.
AT_ONCE = 4
#: Seconds after which a call is cancelled.
LONGEST = 0.1


def _programs() -> Iterator[object]:
    """Their names, and whether they are real: one recording stands for all that start a process
    for each answer."""
    yield pytest.param((recorded_programs()[0], False), id="recorded")
    for real in real_programs():
        yield pytest.param((real.values[0], True), id=real.id, marks=real.marks)


@pytest.fixture(params=_programs())
def stalls(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    name, real = request.param
    with bench(name, real, tmp_path_factory.mktemp(name)) as made:
        yield made


async def test_cancelled_calls_leave_nothing(stalls: Bench) -> None:
    # One that shows nothing before the end is left by time alone.
    until_a_piece = math.inf if expected(stalls.name, "stall").text else LONGEST
    await _call(stalls, until_a_piece, {})  # what is made once is there
    before = _descriptors()
    arguments: dict[int, list[str]] = {}
    limit = trio.CapacityLimiter(AT_ONCE)
    kept = 1 if PROGRAMS[stalls.name].persistent else 0
    calls = KEPT if kept else REAL if stalls.server else RECORDED

    async def call(number: int) -> None:
        async with limit:
            # Some are cancelled before the program has started, and some while it does.
            await _call(
                stalls, until_a_piece if number % 4 == 0 else number / calls * LONGEST, arguments
            )

    async with trio.open_nursery() as nursery:
        for number in range(calls):
            nursery.start_soon(call, number)

    async def gone() -> bool:
        return len(stalls.processes()) <= kept and len(stalls.left_behind()) <= kept

    await until(gone, "all programs have ended", 60)
    gc.collect()
    assert _descriptors() < before + calls // 4
    assert arguments or until_a_piece == LONGEST
    assert not [argv for argv in arguments.values() if KEY in " ".join(argv)]


async def _call(stalls: Bench, seconds: float, arguments: dict[int, list[str]]) -> None:
    """Ask, and leave after some time, or when a piece has come."""
    ask = partial(astream_text, "Tell me a tale.", provider="stall", model_name=MODEL)
    with trio.move_on_after(seconds):
        async with aclosing(ask(deps=stalls.deps, use_cache=False)) as pieces:  # type: ignore[type-var] # it is a generator
            assert await anext(pieces) == PARTIAL
            if not arguments:
                arguments.update(await trio.to_thread.run_sync(stalls.processes))


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
