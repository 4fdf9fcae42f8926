"""Six nodes that are killed, stopped, cut off and restarted while they are asked."""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from chaos import KINDS, LOOPBACK_KINDS, NODES, Chaos, all_meet, nodes, questions, schedule
from lan import why_no_lan

pytestmark = pytest.mark.e2e

#: Requests, and the seconds over which they are asked.
COUNT, SECONDS = 200, 35.0
#: Requests once all is well again.
AFTERWARDS = 24


@pytest.mark.parametrize(
    "seed",
    [1, *(pytest.param(seed, marks=pytest.mark.interop) for seed in (2, 3, 4, 5))],
)
async def test_every_request_ends_whole_or_in_a_clear_error(tmp_path: Path, seed: int) -> None:
    rng = Random(seed)
    faults = schedule(rng, SECONDS, LOOPBACK_KINDS if why_no_lan() else KINDS)
    asked = questions(rng, COUNT, SECONDS)
    afterwards = [
        replace(question, leaves_after=None)
        for question in questions(rng, AFTERWARDS, 2.0, first=COUNT, ask=NODES)
    ]
    async with nodes(tmp_path, on_lan=not why_no_lan()) as (found, network):
        chaos, calm = Chaos(found, network), Chaos(found, network)
        await chaos.note_what_they_hold()
        try:
            await chaos.run(faults, asked)
            assert not chaos.wrong()
            # Not all: a node may be cut off from everybody.
            assert chaos.count()["whole"] >= COUNT // 2
            await chaos.check_who_answered()
            await all_meet(found)
            await calm.run([], afterwards)
            assert calm.count() == {"whole": AFTERWARDS}
            await chaos.check_nothing_leaks()
            assert await chaos.check_stores([*asked, *afterwards]) > 0
            chaos.check_logs()
        finally:
            print(f"seed {seed}", *map(str, (f for lane in faults for f in lane)), sep="\n")
            print(chaos.story(), *map(str, calm.unwell()), sep="\n")
