"""Peers that are gone without a word."""

from collections.abc import Callable

import pytest
import trio
import trio.testing
from fakes import MemoryNetwork, MemoryTransport
from fakes_mesh import wait_until

from promptmesh.mesh.liveness import MISSES, Liveness
from promptmesh.mesh.peers import PeerTable
from promptmesh.mesh.transport import PeerId, TransportError

#: A test names the clock itself: it works only for who does.
Clock = trio.testing.MockClock


class Watched:
    """A node that watches its one peer."""

    def __init__(self, nursery: trio.Nursery, *, latency: float = 0.0) -> None:
        self.network = MemoryNetwork(nursery, latency=latency)
        self.here: MemoryTransport = self.network.transport("here")
        self.there: MemoryTransport = self.network.transport("there")
        self.peer = self.there.peer_id
        self.lost: list[tuple[float, str]] = []
        self.table = PeerTable(self.here.peer_id)
        self.liveness = Liveness(self.here, self.table, lost=self._lost)

    async def start(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self.liveness.run)
        await self.connect()

    async def connect(self) -> None:
        await self.here.connect(self.peer, self.there.addresses)
        self.table.connected(self.peer, "", trio.current_time())

    async def _lost(self, peer: PeerId, reason: str) -> None:
        assert peer == self.peer
        self.lost.append((trio.current_time(), reason))
        await self.here.disconnect(peer)

    def ping_with(self, ping: Callable[[int], float]) -> list[float]:
        """Let the ping number n take so many seconds, or raise. Returns when they were sent."""
        sent: list[float] = []

        async def replaced(peer: PeerId) -> float:
            sent.append(trio.current_time())
            seconds = ping(len(sent))
            await trio.sleep(seconds)
            return seconds

        self.here.ping = replaced  # type: ignore[method-assign]
        return sent


async def test_a_peer_that_answers_stays_and_its_round_trip_is_known(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    watched = Watched(nursery, latency=0.05)
    await watched.start(nursery)
    await trio.sleep(100)
    assert watched.lost == []
    state = watched.table.get(watched.peer)
    assert state is not None
    assert state.rtt == pytest.approx(0.1)


async def test_a_black_hole_is_lost_after_two_misses(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    watched = Watched(nursery)
    await watched.start(nursery)
    await trio.sleep(10.3)
    watched.network.cut(watched.there)
    seconds = await wait_until(lambda: bool(watched.lost))
    assert seconds <= 3.01
    assert watched.lost[0][1] == f"it did not answer {MISSES} pings"
    await trio.sleep(10)
    assert len(watched.lost) == 1


async def test_one_miss_is_forgiven(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    watched = Watched(nursery)
    sent = watched.ping_with(lambda number: 5.0 if number % 2 else 0.0)
    await watched.start(nursery)
    await trio.sleep(20)
    assert watched.lost == []
    assert 18 <= len(sent) <= 21


async def test_a_ping_that_fails_at_once_is_a_miss(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    def fail(number: int) -> float:
        raise TransportError("no stream")

    watched = Watched(nursery)
    watched.ping_with(fail)
    await watched.start(nursery)
    await wait_until(lambda: bool(watched.lost), timeout=3)


async def test_a_peer_that_is_back_is_watched_again(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    watched = Watched(nursery)
    await watched.start(nursery)
    for count in (1, 2):
        watched.network.cut(watched.there)
        await wait_until(lambda count=count: len(watched.lost) == count)  # type: ignore[misc]
        watched.network.heal(watched.there)
        await watched.connect()
        await trio.sleep(5)
        assert len(watched.lost) == count


def test_a_node_that_was_held_up_itself_blames_nobody() -> None:
    clock = trio.testing.MockClock()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            watched = Watched(nursery)
            watched.ping_with(lambda number: 1e9)
            await watched.start(nursery)
            for _ in range(20):
                await trio.testing.wait_all_tasks_blocked()
                clock.jump(60.0)  # as after a suspend: every ping is long over
            await trio.testing.wait_all_tasks_blocked()
            assert watched.lost == []
            nursery.cancel_scope.cancel()

    trio.run(main, clock=clock)
