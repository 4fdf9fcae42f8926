"""Whose load is asked before a choice, and what comes of it."""

import math
from collections import Counter
from typing import Any

import pytest
import trio
import trio.testing
from fakes import MemoryNetwork
from fakes_mesh import FakeProvider, Node, asking, mesh_of, wait_until

from promptmesh.mesh.backend_id import BackendId
from promptmesh.mesh.frames import AskLoads, Load, PresentLoads
from promptmesh.mesh.loads import Busy, Loads
from promptmesh.mesh.measure import Speed
from promptmesh.mesh.policies import Candidate, Work
from promptmesh.mesh.probing import MAX_PROBES, OLD_SHARE, PATIENCE_MOST, Probes, worth_probing
from promptmesh.mesh.transport import PeerId, TransportError
from promptmesh.providers.base import ModelOffer

#: A test names the clock itself: it works only for who does.
Clock = trio.testing.MockClock
NOW = 1000.0
WORK = Work(100, 100)


def candidate(peer: str, seconds: float = 2.0, **fields: Any) -> Candidate:
    """One whose answer takes so long, and whose load was told long ago."""
    defaults: dict[str, Any] = {
        "age": 60.0,
        "rtt": 0.01,
        "speed": Speed(ttft=seconds, at=NOW, answers=99),
    }
    return Candidate(
        peer=peer, node=peer, provider="p", offer=ModelOffer(id="m"), **defaults | fields
    )


def asked(*candidates: Candidate) -> list[str]:
    return [c.peer for c in worth_probing(candidates, WORK, NOW)]


def test_all_whose_load_is_old_and_who_may_be_the_best() -> None:
    assert asked(candidate("a"), candidate("b", 1.0)) == ["b", "a"]


def test_nobody_where_there_is_no_choice() -> None:
    assert asked(candidate("a")) == []


def test_nobody_whose_load_is_known_well_enough() -> None:
    fresh = candidate("fresh", age=OLD_SHARE * 2.0 / 2)
    assert asked(fresh, candidate("old")) == []
    busy = Busy(others=3, told=3, wait=5.0)
    assert asked(candidate("fresh", age=0.01, busy=busy), candidate("old")) == ["old"]


def test_nobody_who_is_slower_idle_than_another_is_now() -> None:
    assert asked(candidate("fresh", 2.0, age=0.01), candidate("slow", 9.0)) == []


def test_not_this_node_itself_and_nobody_who_is_not_connected() -> None:
    busy = Busy(in_flight=5)
    own = candidate("own", own=True, age=0.0, rtt=None, busy=busy)
    assert asked(own, candidate("far", rtt=None), candidate("there", 1.0)) == ["there"]


def test_nobody_so_far_away_that_asking_takes_longer_than_it_gains() -> None:
    near, far = candidate("near", 0.1, rtt=0.001), candidate("far", 0.1, rtt=0.05)
    assert asked(near, far) == ["near"]


def test_not_again_who_did_not_answer() -> None:
    assert asked(candidate("a"), candidate("b", silent=True, busy=Busy(others=9))) == ["a"]


def test_a_few_at_most() -> None:
    everyone = [candidate(str(i), 1.0 + i) for i in range(2 * MAX_PROBES)]
    assert asked(*everyone) == [str(i) for i in range(MAX_PROBES)]


# --- the asking


class Peers:
    """Peers that say how busy they are after a while; None: they do not say it."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.asked: list[tuple[PeerId, AskLoads]] = []

    async def probe(self, peer: PeerId, question: AskLoads, *, limit: float) -> PresentLoads:
        self.asked.append((peer, question))
        with trio.move_on_after(limit):
            await trio.sleep(math.inf if self.seconds is None else self.seconds)
            return PresentLoads(loads={"p": Load(running=4, slots=8), "unknown": Load()}, rivals=2)
        raise TransportError("it did not say it in time")


async def test_what_is_said_is_taken_over(autojump_clock: Clock) -> None:
    loads, peers, one = Loads(), Peers(0.01), candidate("a")
    loads.begin(one.backend)
    await Probes(loads, lambda peer: ["p"]).ask([one], peers.probe, trio.current_time())
    busy = loads.get(one.backend, Load())
    assert (busy.others, busy.in_flight, busy.rivals) == (3, 1, 2)
    assert busy.at == trio.current_time()
    assert not one.silent
    assert loads.told(BackendId("a", "unknown")) is None  # what it may say is bounded
    assert peers.asked == [("a", AskLoads(model="m", within=0.02))]


async def test_who_does_not_say_it_is_silent_and_costs_little_time(autojump_clock: Clock) -> None:
    started = trio.current_time()
    probes, there = Probes(Loads(), lambda peer: ["p"]), candidate("there", rtt=99.0)
    await probes.ask([there], Peers(None).probe, trio.current_time())
    assert there.silent
    assert trio.current_time() - started == pytest.approx(PATIENCE_MOST)


async def test_requests_at_once_share_a_question(autojump_clock: Clock) -> None:
    peers, loads = Peers(0.01), Loads()
    probes = Probes(loads, lambda peer: ["p"])
    candidates = [candidate("a") for _ in range(20)]
    async with trio.open_nursery() as nursery:
        for one in candidates:
            nursery.start_soon(probes.ask, [one], peers.probe, trio.current_time())
    assert len(peers.asked) == 1
    assert not any(one.silent for one in candidates)


async def test_who_shares_a_question_outlives_who_asked_it(autojump_clock: Clock) -> None:
    probes, peers = Probes(Loads(), lambda peer: ["p"]), Peers(0.01)
    late = candidate("a")
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as first:
            nursery.start_soon(probes.ask, [late], peers.probe, 0.0)
            first.cancel()
            await probes.ask([candidate("a")], peers.probe, 0.0)
    await probes.ask([late], peers.probe, trio.current_time())
    assert not late.silent


# --- in the mesh


async def test_the_idle_peer_is_found_though_the_adverts_are_old(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    network = MemoryNetwork(nursery, latency=0.001)
    busy = FakeProvider("busy", delay=1.0, gap=0.1, slots=1)
    idle = FakeProvider("idle", delay=1.0, gap=0.1, slots=1)
    a = Node(network, "a", policy="best_performance")
    b, c = Node(network, "b", busy), Node(network, "c", idle)
    await mesh_of(nursery, a, b, c)
    await wait_until(lambda: all((s := a.table.get(n.peer_id)) and s.rtt for n in (b, c)))
    for _ in range(6):  # until both are measured
        await a.ask()
    await trio.sleep(1.0)
    busy.running = 3  # others ask it, and nobody tells
    counts = Counter([(await a.ask())[1].provider for _ in range(5)])
    assert counts == {"idle": 5}


async def test_a_single_candidate_is_not_probed(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    network = MemoryNetwork(nursery, latency=0.001)
    a, b = Node(network, "a", policy="best_performance"), Node(network, "b", FakeProvider(delay=1))
    await mesh_of(nursery, a, b)
    await trio.sleep(5.0)
    probed: list[str] = []
    probe = a.network.probe

    async def counted(peer: PeerId, question: AskLoads, *, limit: float) -> PresentLoads:
        probed.append(peer)
        return await probe(peer, question, limit=limit)

    a.network.probe = counted  # type: ignore[method-assign]
    await a.ask()
    await a.ask(asking())
    assert probed == []
