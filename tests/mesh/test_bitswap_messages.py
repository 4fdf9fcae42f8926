"""The bytes of bitswap: against the library's own protobuf, and against anything at all."""

from __future__ import annotations

import hashlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.bitswap.pb.bitswap_pb2 import Message as Protobuf

from promptmesh.mesh import protobuf
from promptmesh.mesh.bitswap_messages import (
    MAX_ELEMENTS,
    MAX_MESSAGE,
    PROTOCOLS,
    V100,
    V110,
    V120,
    Message,
    Presence,
    Reader,
    Want,
    as_v1,
    decode,
    digest_of,
    encode,
)
from promptmesh.mesh.frames import RemoteProtocolError

DIGEST = hashlib.sha256(b"block").digest()
RAW = b"\x01\x55\x12\x20" + DIGEST
DAG_JSON = b"\x01\xa9\x02\x12\x20" + DIGEST
V0 = b"\x12\x20" + DIGEST

cids = st.binary(min_size=32, max_size=32).flatmap(
    lambda digest: st.sampled_from([b"\x01\x71\x12\x20", b"\x01\x55\x12\x20", b"\x12\x20"]).map(
        lambda prefix: prefix + digest
    )
)
wants = st.builds(
    Want,
    cid=cids,
    have=st.booleans(),
    send_dont_have=st.booleans(),
    cancel=st.booleans(),
    priority=st.integers(0, 2**31 - 1),
)
messages = st.builds(
    Message,
    wants=st.lists(wants, max_size=5),
    full=st.booleans(),
    blocks=st.lists(st.tuples(cids, st.binary(max_size=300)), max_size=4),
    presences=st.lists(st.builds(Presence, cids, st.booleans()), max_size=5),
)


def body(message: Message, protocol: str = V120) -> bytes:
    """A message without its length, as the library reads one."""
    encoded = encode(message, protocol)
    size = next(i for i, byte in enumerate(encoded) if byte < 128) + 1
    assert int.from_bytes(encoded[:1]) & 127 == len(encoded[size:]) & 127
    return encoded[size:]


@given(messages)
def test_the_library_reads_what_we_write(message: Message) -> None:
    read = Protobuf.FromString(body(message))
    assert read.wantlist.full == message.full
    for entry, want in zip(read.wantlist.entries, message.wants, strict=True):
        assert (entry.block, entry.priority, entry.cancel) == (
            want.cid,
            want.priority,
            want.cancel,
        )
        assert (int(entry.wantType), entry.sendDontHave) == (int(want.have), want.send_dont_have)
    for payload, (cid, block) in zip(read.payload, message.blocks, strict=True):
        assert payload.data == block
        # A CIDv0 leaves out what its prefix says.
        assert payload.prefix in (cid[:-32], b"\x00\x70" + cid[:-32])
        assert payload.prefix != b"\x12\x20"
    for presence, told in zip(read.blockPresences, message.presences, strict=True):
        assert (presence.cid, presence.type) == (told.cid, 0 if told.have else 1)


@given(messages)
def test_we_read_what_the_library_writes(message: Message) -> None:
    written = Protobuf()
    if message.full:
        written.wantlist.full = True
    for want in message.wants:
        written.wantlist.entries.add(
            block=want.cid,
            priority=want.priority,
            cancel=want.cancel,
            wantType=Protobuf.Wantlist.Have if want.have else Protobuf.Wantlist.Block,
            sendDontHave=want.send_dont_have,
        )
    for cid, block in message.blocks:
        written.payload.add(prefix=cid[:-32], data=block)
    for presence in message.presences:
        kind = Protobuf.Have if presence.have else Protobuf.DontHave
        written.blockPresences.add(cid=presence.cid, type=kind)
    written.pendingBytes = 7
    read = decode(written.SerializeToString())
    assert (read.wants, read.full, read.presences) == (
        message.wants,
        message.full,
        message.presences,
    )
    assert [block for _, block in read.blocks] == [block for _, block in message.blocks]


@given(messages, st.sampled_from(PROTOCOLS), st.integers(1, 64))
def test_a_message_survives_the_road_in_any_pieces(
    message: Message, protocol: str, size: int
) -> None:
    data = encode(message, protocol) * 2
    reader = Reader()
    read = [m for i in range(0, len(data), size) for m in reader.receive(data[i : i + size])]
    assert len(read) == 2
    assert [block for _, block in read[1].blocks] == [block for _, block in message.blocks]
    assert [want.cid for want in read[0].wants] == [want.cid for want in message.wants]
    assert len(reader) == 0


def test_an_older_peer_gets_what_it_understands() -> None:
    message = Message(
        wants=[Want(RAW, have=True, send_dont_have=True)],
        blocks=[(RAW, b"block")],
        presences=[Presence(RAW, have=True)],
    )
    for protocol in (V100, V110):
        read = Protobuf.FromString(body(message, protocol))
        assert read.wantlist.entries[0].wantType == Protobuf.Wantlist.Block
        assert not read.wantlist.entries[0].sendDontHave
        assert not read.blockPresences
        assert list(read.blocks) == ([b"block"] if protocol == V100 else [])
        assert [payload.data for payload in read.payload] == (
            [] if protocol == V100 else [b"block"]
        )


@given(st.binary(max_size=200))
def test_nonsense_is_refused_or_ignored(data: bytes) -> None:
    for read in (decode, lambda data: list(Reader().receive(data))):
        with suppress(RemoteProtocolError):
            read(data)


@given(messages, st.data())
def test_a_damaged_message_breaks_nothing(message: Message, data: st.DataObject) -> None:
    damaged = bytearray(encode(message))
    place = data.draw(st.integers(0, len(damaged) - 1))
    damaged[place] = data.draw(st.integers(0, 255))
    reader = Reader()
    with suppress(RemoteProtocolError):
        for byte in damaged:
            for read in reader.receive(bytes((byte,))):
                assert isinstance(read, Message)


@pytest.mark.parametrize("length", [b"\xff\xff\xff\x7f", b"\x81\x80\x80\x02", b"\x80\x80\x80\x80"])
def test_a_message_that_is_too_large_is_refused_by_its_length(length: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match=r"bytes|large"):
        list(Reader().receive(length))


def test_the_largest_message_is_taken() -> None:
    reader = Reader()
    assert not list(reader.receive(b"\x80\x80\x80\x02"))  # 4 MiB will follow
    assert MAX_MESSAGE == 0x200000 * 2


@pytest.mark.parametrize(
    "message",
    [
        b"\x12\x00" * (MAX_ELEMENTS + 1),
        b"\x1a\x00" * (MAX_ELEMENTS + 1),
        b"\x08\x00" * (MAX_ELEMENTS + 1),
        b"\x0a\x04\x0a\x02\x0a\x00" * 2,
        b"\x0a"
        + protobuf.varint(3 * MAX_ELEMENTS)
        + b"\x10\x80\x00" * MAX_ELEMENTS
        + b"\x0a"
        + protobuf.varint(2 * MAX_ELEMENTS + 2)
        + b"\x10\x00" * (MAX_ELEMENTS + 1),
        b"\x0a\x24\x0a\x22" + b"\x10\x00" * 17,
    ],
    ids=["blocks", "payload", "unknown", "two wantlists", "entries", "fields"],
)
def test_more_elements_than_anybody_sends_are_refused(message: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match=r"elements|wantlists"):
        decode(message)


@pytest.mark.parametrize(
    ("cid", "digest"),
    [
        (RAW, DIGEST),
        (DAG_JSON, DIGEST),
        (V0, DIGEST),
        (DIGEST, None),
        (b"", None),
        (RAW[:-1], None),
        (b"\x01\x55\x13\x20" + DIGEST, None),  # sha2-512
        (b"\x02\x55\x12\x20" + DIGEST, None),  # no version of a CID
        (b"\x01\x12\x20" + DIGEST, None),  # no codec
        (b"\x01\xd5\x12\x20" + DIGEST, None),  # half a codec
        (b"\x01" + b"\x81" * 5 + b"\x01\x12\x20" + DIGEST, None),
    ],
)
def test_which_cids_are_spoken_of(cid: bytes, digest: bytes | None) -> None:
    assert digest_of(cid) == digest


def test_an_empty_block_may_be_left_out_of_its_place() -> None:
    written = Protobuf()
    written.payload.add(prefix=RAW[:-32])
    assert decode(written.SerializeToString()).blocks == [(b"", b"")]


def test_both_versions_of_a_cid_are_one() -> None:
    assert as_v1(V0) == b"\x01\x70" + V0
    assert as_v1(RAW) == RAW
    assert as_v1(DAG_JSON) == DAG_JSON
