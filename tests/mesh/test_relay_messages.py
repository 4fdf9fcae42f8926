"""The bytes of circuit relay and DCUtR: as written in the specification, by the library's own
protobuf, and anything at all."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage as LibraryHop
from libp2p.relay.circuit_v2.pb.circuit_pb2 import StopMessage as LibraryStop
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch

from promptmesh.mesh.frames import RemoteProtocolError
from promptmesh.mesh.relay_messages import (
    MAX_ADDRESSES,
    MAX_FIELDS,
    Hop,
    HopMessage,
    Punch,
    PunchMessage,
    Status,
    Stop,
    StopMessage,
)

ADDRESS = bytes.fromhex("0401020304061cf4")

#: By hand from the specification: a varint of the length, then each field's tag and value.
FIXTURES = [
    (HopMessage(kind=Hop.RESERVE), "02 0800"),
    (HopMessage(kind=Hop.CONNECT, peer=b"\xaa\xbb"), "08 0801 1204 0a02aabb"),
    (
        HopMessage(kind=Hop.STATUS, status=Status.OK, expire=300, addresses=(b"\x04\x05",)),
        "0d 0802 1a07 08ac02 12020405 2864",
    ),
    (
        HopMessage(kind=Hop.STATUS, status=Status.OK, max_seconds=120, max_bytes=131072),
        "0c 0802 2206 0878 10808008 2864",
    ),
    (HopMessage(kind=Hop.STATUS, status=Status.NO_RESERVATION), "05 0802 28cc01"),
    (StopMessage(kind=Stop.CONNECT, peer=b"\xaa\xbb"), "08 0800 1204 0a02aabb"),
    (StopMessage(kind=Stop.STATUS, status=Status.OK), "04 0801 2064"),
    (
        PunchMessage(kind=Punch.CONNECT, addresses=(ADDRESS, ADDRESS)),
        "16 0864 12080401020304061cf4 12080401020304061cf4",
    ),
    (PunchMessage(kind=Punch.SYNC), "03 08ac02"),
]

Message = HopMessage | StopMessage | PunchMessage
numbers = st.integers(1, 2**32 - 1)
addresses = st.lists(st.binary(min_size=1, max_size=40), max_size=MAX_ADDRESSES).map(tuple)
peers = st.binary(max_size=64)
statuses = st.sampled_from(Status)


@pytest.mark.parametrize(("message", "hexes"), FIXTURES, ids=lambda value: str(value)[:30])
def test_the_bytes_are_those_of_the_specification(message: Message, hexes: str) -> None:
    data = bytes.fromhex(hexes)
    assert message.encode() == data
    assert type(message).decode(data[1:]) == message


def body(message: Message) -> bytes:
    """Without the length, which is a varint of one or two bytes."""
    data = message.encode()
    return data[1:] if data[0] < 128 else data[2:]


@given(kind=st.sampled_from(Hop), peer=peers, expire=numbers, addresses=addresses, status=statuses)
def test_the_library_reads_what_a_relay_says(
    kind: Hop, peer: bytes, expire: int, addresses: tuple[bytes, ...], status: Status
) -> None:
    message = HopMessage(
        kind=kind, peer=peer, expire=expire, addresses=addresses, status=status, max_seconds=9
    )
    read = LibraryHop.FromString(body(message))
    assert (int(read.type), read.peer.id, int(read.status)) == (kind, peer, status)
    assert (read.reservation.expire, tuple(read.reservation.addrs)) == (expire, addresses)
    assert (read.limit.duration, read.limit.data) == (9, 0)
    assert HopMessage.decode(read.SerializeToString()) == message


@given(kind=st.sampled_from(Stop), peer=peers, status=statuses, limit=numbers)
def test_the_library_reads_how_a_circuit_is_brought(
    kind: Stop, peer: bytes, status: Status, limit: int
) -> None:
    message = StopMessage(kind=kind, peer=peer, status=status, max_bytes=limit)
    read = LibraryStop.FromString(body(message))
    assert (int(read.type), read.peer.id, int(read.status)) == (kind, peer, status)
    assert read.limit.data == limit
    assert StopMessage.decode(read.SerializeToString()) == message


@given(kind=st.sampled_from(Punch), addresses=addresses)
def test_the_library_reads_how_peers_agree(kind: Punch, addresses: tuple[bytes, ...]) -> None:
    message = PunchMessage(kind=kind, addresses=addresses)
    read = HolePunch.FromString(body(message))
    assert (int(read.type), tuple(read.ObsAddrs)) == (kind, addresses)
    assert PunchMessage.decode(read.SerializeToString()) == message


@given(st.binary(max_size=300))
def test_anything_else_is_a_protocol_error(data: bytes) -> None:
    for form in (HopMessage, StopMessage, PunchMessage):
        with suppress(RemoteProtocolError):
            form.decode(data)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no known type"),
        (b"\x08\x07", "no known type"),
        (b"\x08\x01\x12\x43\x0a\x41" + b"a" * 65, "a peer id of 65 bytes"),
        (b"\x08\x01" * (MAX_FIELDS + 1), "too many elements"),
        (b"\x08\x01\x12\x09\x0a", "cut"),
    ],
)
def test_what_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        HopMessage.decode(data)


def test_further_addresses_are_not_looked_at() -> None:
    message = PunchMessage(kind=Punch.CONNECT, addresses=(ADDRESS,) * (MAX_ADDRESSES + 5))
    assert len(PunchMessage.decode(body(message)).addresses) == MAX_ADDRESSES


def test_the_senders_record_of_the_library_is_skipped() -> None:
    sent = LibraryHop(type=LibraryHop.RESERVE, senderRecord=b"x" * 200)
    assert HopMessage.decode(sent.SerializeToString()) == HopMessage(kind=Hop.RESERVE)
