"""What two peers say before they dial each other at the same time, and from which port they do.

That it gets through routers is shown with real ones: `tests/e2e/test_nat.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from hosts import SOON, circuits, host, meet, reserve, says, until
from libp2p.peer.id import ID
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from promptmesh.mesh import hole_punching, patches
from promptmesh.mesh.host import Libp2pTransport
from promptmesh.mesh.link import Link
from promptmesh.mesh.relay_messages import DCUTR, Punch, PunchMessage
from promptmesh.mesh.streams import read_delimited
from promptmesh.mesh.transport import Stream, TransportError


@asynccontextmanager
async def relayed() -> AsyncIterator[tuple[Libp2pTransport, Libp2pTransport, Libp2pTransport]]:
    """A relay, who has a place at it, and who reached that one so."""
    async with (
        host("r", offers=True) as r,
        host("a", listens=False) as a,
        host("b", listens=False) as b,
    ):
        await reserve(a, r)
        await b.connect(a.peer_id, a.addresses)
        await until(lambda: b.peer_id in a.connected())
        yield r, a, b


def address_of(port: int) -> bytes:
    return bytes(Multiaddr(f"/ip4/127.0.0.1/tcp/{port}").to_bytes())


def connect(*addresses: bytes) -> bytes:
    return PunchMessage(kind=Punch.CONNECT, addresses=addresses).encode()


async def read(stream: Stream) -> PunchMessage:
    return PunchMessage.decode(await read_delimited(stream, 4096))


async def answer_to(stream: Stream, data: bytes) -> bytes:
    await stream.send_all(data)
    return await stream.receive_some()


def port_to_relay(node: Libp2pTransport, relay: Libp2pTransport) -> int:
    """From which port it is connected to the relay."""
    return node.network.link(ID.from_base58(relay.peer_id)).local_address()[1]


async def test_who_is_asked_dials_as_the_client_from_the_port_that_the_relay_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hole_punching, "TRIES", 0)
    monkeypatch.setattr(patches, "RETIRE_GRACE", 0.0)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, relayed() as (r, a, b):
        stream = await a.open_stream(b.peer_id, DCUTR)
        await stream.send_all(connect(address_of(listener.socket.getsockname()[1])))
        answer = await read(stream)
        assert answer.kind is Punch.CONNECT
        assert answer.addresses == (address_of(port_to_relay(b, r)),)
        await stream.send_all(PunchMessage(kind=Punch.SYNC).encode())
        with trio.fail_after(SOON):
            met = await listener.accept()
            assert met.socket.getpeername()[1] == port_to_relay(b, r)
            wire = a.network.socket_wire(met, initiator=False)
            await a.network.use(wire, ID.from_base58(b.peer_id), address="met")
        await until(lambda: "p2p-circuit" not in b.connected()[a.peer_id])
        assert a.connected()[b.peer_id] == "met"
        await until(lambda: circuits(r) == 0)
        assert await says(a, b) == b"hello"


async def test_who_was_reached_begins_and_tries_three_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hole_punching, "PUNCH_TIME", 0.1)
    seen: list[PunchMessage] = []
    async with (
        host("r", offers=True) as r,
        host("a", listens=False) as a,
        host("b", listens=False) as b,
    ):

        async def answer(link: Link, stream: Stream) -> None:
            seen.append(await read(stream))
            await stream.send_all(connect(address_of(1)))
            seen.append(await read(stream))

        b.network.serve(DCUTR, answer)
        await reserve(a, r)
        await b.connect(a.peer_id, a.addresses)
        await until(lambda: len(seen) == 6)
        asked = PunchMessage(kind=Punch.CONNECT, addresses=(address_of(port_to_relay(a, r)),))
        assert seen == [asked, PunchMessage(kind=Punch.SYNC)] * 3
        assert await says(b, a) == b"hello"  # it stays with the relay


async def test_names_are_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hole_punching, "TRIES", 0)
    looked_up: list[object] = []

    async def look(*asked: object, local: object) -> None:
        looked_up.append(asked)

    async with relayed() as (_, a, b):
        monkeypatch.setattr(hole_punching, "connect", look)
        stream = await a.open_stream(b.peer_id, DCUTR)
        named = Multiaddr("/dns4/example.com/tcp/1").to_bytes()
        await stream.send_all(connect(named, b"\xff\xff", b""))
        await read(stream)
        await stream.send_all(PunchMessage(kind=Punch.SYNC).encode())
        assert await stream.receive_some() == b""
        assert looked_up == []
        assert await says(a, b) == b"hello"


@pytest.mark.parametrize(
    "data", [PunchMessage(kind=Punch.SYNC).encode(), b"\x02\x08\x07", b"\x00", b"\xff\xff\xff\x7f"]
)
async def test_nonsense_ends_the_conversation(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hole_punching, "TRIES", 0)
    async with relayed() as (_, a, b):
        stream = await a.open_stream(b.peer_id, DCUTR)
        with trio.fail_after(SOON), pytest.raises(TransportError, match="reset"):
            await answer_to(stream, data)
        assert await says(a, b) == b"hello"


async def test_a_direct_connection_is_not_made_direct() -> None:
    async with host("a") as a, host("b") as b:
        await meet(a, b)
        stream = await a.open_stream(b.peer_id, DCUTR)
        with trio.fail_after(SOON), pytest.raises(TransportError, match="reset"):
            await answer_to(stream, connect(address_of(1)))
