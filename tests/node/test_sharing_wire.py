"""Sharing over the real protocol: frames on streams, gossip, and peers that break the rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable

import msgspec
import pytest
import trio
import trio.testing
from fakes import MemoryNetwork
from fakes_mesh import Node, mesh_of, wait_until
from fakes_sharing import SWARM, Member, asking, find, now

from promptmesh.cache import homes
from promptmesh.cache.claims import MAX_ENTRIES
from promptmesh.mesh.frames import Block, End, Items, encode_value
from promptmesh.mesh.gossip import CLAIMS
from promptmesh.mesh.protocol import PROTOCOL
from promptmesh.mesh.serving import Services
from promptmesh.mesh.transport import Stream
from promptmesh.node.claiming import PATIENCE

#: A test names the clock itself: it works only for who does.
Clock = trio.testing.MockClock


class SharingNode(Node):
    """A node whose claims and blocks are those of a `Member`."""

    def __init__(self, network: MemoryNetwork, name: str) -> None:
        self.member = Member(name)
        super().__init__(network, name, on_met=self.member.sharing.meet)
        assert self.peer_id == self.member.peer

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            self.member.sharing.attach(self.network, SWARM)
            nursery.start_soon(self.member.sharing.run)
            await super().run()
            nursery.cancel_scope.cancel()

    def _services(self) -> Services:
        sharing = self.member.sharing
        return dataclasses.replace(
            super()._services(),
            block=sharing.block,
            claims=sharing.since,
            put_claims=sharing.put_claims,
            find_claims=sharing.find_claims,
        )

    def _hear_claims(self, peer: str, batch: bytes) -> bool:
        return self.member.sharing.hear(peer, batch)


@pytest.fixture
def network(nursery: trio.Nursery) -> MemoryNetwork:
    return MemoryNetwork(nursery, latency=0.02)


async def nodes(nursery: trio.Nursery, network: MemoryNetwork, names: str) -> list[SharingNode]:
    """Nodes that all know each other."""
    found = [SharingNode(network, name) for name in names]
    await mesh_of(nursery, *found)
    return found


async def test_by_gossip_and_a_late_joiner_by_asking(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, b = await nodes(nursery, network, "ab")
    await a.member.make(asking(), "hello")
    await wait_until(lambda: bool(b.member.claims(asking())))
    assert await find(b.member, asking()) == ("hello", a.peer_id)
    late = SharingNode(network, "late")
    nursery.start_soon(late.run)
    await late.transport.connect(b.peer_id, b.transport.addresses)
    assert await wait_until(lambda: bool(late.member.claims(asking()))) < 1
    await late.transport.connect(a.peer_id, a.transport.addresses)
    assert await find(late.member, asking()) == ("hello", a.peer_id)


async def test_by_homes(
    autojump_clock: Clock,
    nursery: trio.Nursery,
    network: MemoryNetwork,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(homes, "MAX_GOSSIPED", 5)
    found = await nodes(nursery, network, "abcdefgh")
    await trio.sleep(15)
    producer = found[0]
    await producer.member.make(asking(), "hello")
    await trio.sleep(10)
    holders = [node for node in found if node.member.claims(asking())]
    assert len(holders) == homes.COUNT
    asker = next(node for node in found[1:] if node not in holders)
    assert await find(asker.member, asking()) == ("hello", producer.peer_id)
    # Again few: what the homes had, all have.
    for node in found[4:]:
        await node.stop()
    await trio.sleep(homes.SETTLED + 120)
    assert all(node.member.claims(asking()) for node in found[1:4])


async def test_a_copy_serves_when_its_producer_is_gone(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, b, c = await nodes(nursery, network, "abc")
    await a.member.make(asking(), "hello")
    await wait_until(lambda: bool(b.member.claims(asking())))
    assert await find(b.member, asking()) is not None
    await wait_until(lambda: len(c.member.claims(asking())) == 2, timeout=PATIENCE + 60)
    await a.kill()
    await trio.sleep(5)
    assert await find(c.member, asking()) == ("hello", b.peer_id)


# --- peers that break the rules -------------------------------------------------------------------


def sends(data: bytes) -> Callable[[Stream], Awaitable[None]]:
    """A peer that answers whatever it is asked with these bytes, and nothing more."""

    async def handle(stream: Stream) -> None:
        while await stream.receive_some():
            await stream.send_all(data)

    return handle


BREACHES = {
    "other bytes": encode_value(Block(block=b"other bytes")),
    "too large": encode_value(Block(block=bytes(10_000_000))),
    "unasked items": encode_value(Items(items=(b"unasked",))),
    "unasked end": encode_value(End()),
    "two blocks": encode_value(Block(block=b"one")) + encode_value(Block(block=b"two")),
    "nonsense": b"\xc1\xc1\xc1\xc1",
    "an endless text": b"\x81\xa4kind\xdb\x7f\xff\xff\xff" + b"x" * 5_000_000,
    "nothing": b"",
}


@pytest.mark.parametrize("breach", BREACHES)
async def test_what_a_peer_breaks_costs_no_answer(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork, breach: str
) -> None:
    a, b, c = await nodes(nursery, network, "abc")
    for number in range(12):
        for node in (a, b):
            await node.member.make(asking(str(number)), f"answer {number}")
    await wait_until(lambda: len(c.member.claims(asking("11"))) == 2)
    a.transport.handle(PROTOCOL, sends(BREACHES[breach]))
    await a.transport.disconnect(c.peer_id)  # its kept streams go
    await c.transport.connect(a.peer_id, a.transport.addresses)
    for number in range(12):
        started = trio.current_time()
        assert await find(c.member, asking(str(number))) == (f"answer {number}", b.peer_id)
        assert trio.current_time() - started < 3
    if breach in ("other bytes", "nothing"):
        assert c.member.conduct.silence(a.peer_id, now()) is not None


async def test_ten_thousand_claims_a_second(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, b, c = await nodes(nursery, network, "abc")
    flooder = network.transport("flooder")
    for node in (a, b):
        await flooder.connect(node.peer_id, node.transport.addresses)
    source = Member("flooder")
    for _ in range(156):
        message = msgspec.msgpack.encode([source.seal(MAX_ENTRIES)])
        await flooder.publish(CLAIMS, message)
        await trio.sleep(1 / 156)
    for node in (a, b):
        assert node.member.conduct.silence(flooder.peer_id, now()) is not None
        assert node.member.checked <= 3 + 1
        assert node.member.index.live(now()) == 3 * MAX_ENTRIES
    # What the two passed on was no flood, so c has nothing against it.
    assert c.member.conduct.silence(flooder.peer_id, now()) is None
    await a.member.make(asking(), "still heard")
    await wait_until(lambda: bool(b.member.claims(asking()) and c.member.claims(asking())))
    source.database.close()
