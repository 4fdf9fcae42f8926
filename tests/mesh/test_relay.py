"""Relays, with real hosts on loopback: those without a listening port can only be reached so."""

from __future__ import annotations

import pytest
import trio
from hosts import (
    ECHO,
    KEY,
    SOON,
    STRANGER,
    TOPIC,
    circuits,
    host,
    meet,
    port_of,
    reserve,
    says,
    until,
)
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from promptmesh.mesh import hole_punching, patches, relay, relay_client
from promptmesh.mesh.host import Libp2pTransport
from promptmesh.mesh.link import open_stream
from promptmesh.mesh.relay_messages import HOP, STOP, Hop, HopMessage, Status, Stop, StopMessage
from promptmesh.mesh.streams import read_delimited
from promptmesh.mesh.transport import TransportError


@pytest.fixture(autouse=True)
def no_punching(monkeypatch: pytest.MonkeyPatch) -> None:
    """On loopback two may meet halfway, by chance."""
    monkeypatch.setattr(hole_punching, "TRIES", 0)


# --- meeting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [KEY, None], ids=["private", "open"])
async def test_two_that_cannot_be_dialled_meet_by_a_relay(key: bytes | None) -> None:
    async with (
        host("r", offers=True, key=key) as r,
        host("a", listens=False, key=key) as a,
        host("b", listens=False, key=key) as b,
    ):
        states = [a.reachability]
        await reserve(a, r)
        assert [*states, a.reachability] == ["unknown", "unreachable"]
        (address,) = a.addresses
        assert address == f"{r.addresses[0]}/p2p-circuit/p2p/{a.peer_id}"
        assert await b.connect(a.peer_id, a.addresses) == address  # it connects to the relay too
        assert r.peer_id in b.connected()
        assert await says(b, a) == b"hello"
        assert await says(a, b) == b"hello"
        assert b.connected()[a.peer_id] == address
        assert a.connected()[b.peer_id].endswith(f"{r.peer_id}/p2p-circuit")
        assert circuits(r) == 1
        assert r.relaying == ([a.peer_id], {(b.peer_id, a.peer_id): 1})
        assert a.relaying is None
        assert await b.ping(a.peer_id) < SOON
        await b.disconnect(a.peer_id)
        await until(lambda: b.peer_id not in a.connected())
        await until(lambda: circuits(r) == 0)


async def test_a_circuit_carries_much() -> None:
    data = bytes(range(256)) * 20_000
    async with (
        host("r", offers=True) as r,
        host("a", listens=False) as a,
        host("b", listens=False) as b,
    ):
        await reserve(a, r)
        await b.connect(a.peer_id, a.addresses)
        with trio.fail_after(SOON):
            assert await says(b, a, data) == data


async def test_gossip_goes_over_a_circuit() -> None:
    heard: list[bytes] = []

    def hear(peer: str, data: bytes) -> bool:
        heard.append(data)
        return True

    async with (
        host("r", offers=True) as r,
        host("a", listens=False) as a,
        host("b", listens=False) as b,
    ):
        await b.subscribe(TOPIC, hear)
        await a.subscribe(TOPIC, lambda peer, data: False)
        await reserve(a, r)  # which is not interested in the topic
        await b.connect(a.peer_id, a.addresses)
        with trio.fail_after(SOON):
            while not heard:  # what is published before the other's subscription came is lost
                await a.publish(TOPIC, b"news")
                await trio.sleep(0.1)
        assert set(heard) == {b"news"}


async def test_who_can_be_dialled_has_no_place_at_a_relay() -> None:
    async with host("r", offers=True) as r, host("a") as a:
        await meet(a, r)
        await until(lambda: a.reachability == "reachable")
        assert a.traversal._client.relays == []
        assert all("p2p-circuit" not in address for address in a.addresses)


async def test_what_the_relay_offers_not_is_not_asked() -> None:
    async with host("r") as r, host("a", listens=False) as a:
        await meet(a, r)
        await until(lambda: a.reachability == "unreachable")
        assert a.addresses == []
        with pytest.raises(TransportError, match="does not speak"):
            await r.open_stream(a.peer_id, HOP)


async def test_a_relay_that_goes_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_client, "WANTED", 1)
    async with (
        host("b", listens=False) as b,
        host("r2", offers=True) as r2,
        host("a", listens=False) as a,
    ):
        async with host("r1", offers=True) as r1:
            await reserve(a, r1)
            await meet(a, r2)
            await b.connect(a.peer_id, a.addresses)
            assert await says(b, a) == b"hello"
        await until(lambda: a.peer_id not in b.connected())
        await until(lambda: any(r2.peer_id in address for address in a.addresses))
        await b.connect(a.peer_id, a.addresses)
        assert await says(b, a) == b"hello"


async def test_a_place_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_client, "SHORTEST_REFRESH", 0.0)
    monkeypatch.setattr(relay_client, "LONGEST_REFRESH", 0.0)
    async with host("r", offers=True) as r, host("a", listens=False) as a:
        await reserve(a, r)
        assert r.traversal.relay is not None
        first = dict(r.traversal.relay._reserved)
        await until(lambda: r.traversal.relay._reserved[a.peer_id] > first[a.peer_id])  # type: ignore[union-attr]
        assert len(a.addresses) == 1


async def test_a_place_is_asked_for_again_when_its_connection_ends() -> None:
    async with host("r", offers=True) as r, host("a", listens=False) as a:
        await reserve(a, r)
        assert r.traversal.relay is not None
        reserved = r.traversal.relay._reserved
        peer_id = ID.from_base58(r.peer_id)
        first = a.network.link(peer_id)
        await a.network.dial("127.0.0.1", port_of(r), peer_id, address=r.addresses[0])
        # The relay may have seen the end of the one before the other began.
        del reserved[a.peer_id]
        await first.close()
        await until(lambda: a.peer_id in reserved)
        assert len(a.addresses) == 1


# --- a direct way ---------------------------------------------------------------------------------


async def test_a_direct_connection_replaces_a_relayed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "RETIRE_GRACE", 0.0)
    monkeypatch.setattr(patches, "RETIRE_LOOK", 0.01)
    heard: list[bytes] = []

    def hear(peer: str, data: bytes) -> bool:
        heard.append(data)
        return True

    async with (
        host("r", offers=True) as r,
        host("a", listens=False) as a,
        host("b") as b,
    ):
        await a.subscribe(TOPIC, hear)
        await b.subscribe(TOPIC, hear)
        await reserve(a, r)
        # It can be dialled, which the other end tries as soon as it is asked through the relay.
        await b.connect(a.peer_id, a.addresses)
        old = await b.open_stream(a.peer_id, ECHO)
        await until(lambda: "p2p-circuit" not in a.connected()[b.peer_id])
        await until(lambda: "p2p-circuit" not in b.connected()[a.peer_id])
        assert circuits(r) == 1
        await old.send_all(b"what runs may finish")
        assert await old.receive_some() == b"what runs may finish"
        assert old.retired
        new = await b.open_stream(a.peer_id, ECHO)
        assert not new.retired
        await old.aclose()
        await until(lambda: circuits(r) == 0)
        assert await says(b, a) == b"hello"
        assert await says(a, b) == b"hello"
        for node in (a, b):  # gossip has moved too
            heard.clear()
            with trio.fail_after(SOON):
                while not heard:
                    await node.publish(TOPIC, b"news")
                    await trio.sleep(0.1)


# --- what a relay refuses -------------------------------------------------------------------------


async def ask(node: Libp2pTransport, relay: Libp2pTransport, data: bytes) -> HopMessage:
    stream = await node.open_stream(relay.peer_id, HOP)
    await stream.send_all(data)
    try:
        return HopMessage.decode(await read_delimited(stream, 4096))
    finally:
        await stream.reset()


def circuit_to(peer: str) -> bytes:
    return HopMessage(kind=Hop.CONNECT, peer=ID.from_base58(peer).to_bytes()).encode()


async def test_a_reservation_says_where_the_relay_is_and_that_nothing_is_limited() -> None:
    async with host("r", offers=True) as r, host("a") as a:
        await meet(a, r)
        answer = await ask(a, r, HopMessage(kind=Hop.RESERVE).encode())
        assert (answer.kind, answer.status) == (Hop.STATUS, Status.OK)
        assert [str(Multiaddr(address)) for address in answer.addresses] == r.addresses
        assert answer.max_bytes == answer.max_seconds == 0


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (circuit_to(STRANGER), "NO_RESERVATION"),
        (HopMessage(kind=Hop.STATUS, status=Status.OK).encode(), "UNEXPECTED_MESSAGE"),
        (HopMessage(kind=Hop.CONNECT).encode(), "NO_RESERVATION"),
        (b"\x02\xff\xff", "MALFORMED_MESSAGE"),
        (b"\x00", "MALFORMED_MESSAGE"),
    ],
)
async def test_a_relay_says_why_not(data: bytes, status: str) -> None:
    async with host("r", offers=True) as r, host("a") as a:
        await meet(a, r)
        assert (await ask(a, r, data)).status == Status[status]


async def test_places_and_circuits_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "MAX_RESERVATIONS", 1)
    monkeypatch.setattr(relay, "MAX_CIRCUITS_OF_PEER", 1)
    async with (
        host("r", offers=True) as r,
        host("a", listens=False) as a,
        host("b") as b,
        host("c", listens=False) as c,
    ):
        await reserve(a, r)
        await meet(b, r)
        refused = await ask(b, r, HopMessage(kind=Hop.RESERVE).encode())
        assert refused.status == Status.RESERVATION_REFUSED
        again = await ask(a, r, HopMessage(kind=Hop.RESERVE).encode())
        assert again.status == Status.OK
        await c.connect(a.peer_id, a.addresses)
        assert (await ask(b, r, circuit_to(a.peer_id))).status == Status.RESOURCE_LIMIT_EXCEEDED
        with pytest.raises(TransportError, match="the relay says resource limit exceeded"):
            await b.connect(a.peer_id, a.addresses)


async def test_a_place_ends_with_the_connection_and_with_its_time() -> None:
    async with host("r", offers=True) as r, host("a", listens=False) as a, host("b") as b:
        await reserve(a, r)
        await meet(b, r)
        assert r.traversal.relay is not None
        r.traversal.relay._clock = lambda: 1e12
        assert (await ask(b, r, circuit_to(a.peer_id))).status == Status.NO_RESERVATION
        await r.disconnect(a.peer_id)
        await until(lambda: not r.traversal.relay._reserved)  # type: ignore[union-attr]
        assert a.addresses == [] or not a.connected()


async def test_only_a_chosen_relay_may_bring_somebody() -> None:
    async with host("a") as a, host("liar") as liar:
        await meet(liar, a)
        stream = await liar.open_stream(a.peer_id, STOP)
        someone = ID.from_base58(STRANGER)
        call = StopMessage(kind=Stop.CONNECT, peer=someone.to_bytes())
        await stream.send_all(call.encode())
        answer = StopMessage.decode(await read_delimited(stream, 4096))
        assert (answer.kind, answer.status) == (Stop.STATUS, Status.PERMISSION_DENIED)


async def test_a_peer_that_does_not_take_a_circuit_is_not_reached() -> None:
    async with host("r", offers=True) as r, host("a", listens=False) as a, host("b") as b:
        await reserve(a, r)
        a.traversal._client._reserved.clear()  # it has forgotten
        with pytest.raises(TransportError, match="connection failed"):
            await b.connect(a.peer_id, [f"{r.addresses[0]}/p2p-circuit/p2p/{a.peer_id}"])
        await until(lambda: circuits(r) == 0)


async def test_who_is_not_who_the_relay_says_is_not_let_in() -> None:
    async with host("r", offers=True) as r, host("a", listens=False) as a:
        await reserve(a, r)
        stream = await open_stream(r.network.link(ID.from_base58(a.peer_id)), [STOP])
        call = StopMessage(kind=Stop.CONNECT, peer=ID.from_base58(STRANGER).to_bytes())
        await stream.send_all(call.encode())
        answer = StopMessage.decode(await read_delimited(stream, 4096))
        assert answer.status == Status.OK
        wire = r.network.circuit_wire(stream, initiator=True)
        with pytest.raises((BaseLibp2pError, TransportError)), trio.fail_after(SOON):
            await r.network.use(wire, ID.from_base58(a.peer_id), address="", relay=r.peer_id)
        assert list(a.connected()) == [r.peer_id]
