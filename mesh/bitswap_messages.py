"""The bytes of bitswap: messages of wants, blocks and presences, as Kubo and Helia send them.

Pure. A message is a protobuf (https://specs.ipfs.tech/bitswap-protocol/) behind a varint of its
length. It is taken apart here rather than by the protobuf library: a count is held before a value
is made of each element, and nothing else of the library's 7,000 lines of bitswap is needed.

A CID here is its bytes: 34 of a CIDv0, 36 or 37 of a CIDv1. Only sha2-256 is spoken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from .frames import RemoteProtocolError
from .protobuf import bytes_field, fields_of, read_fields, varint

#: The newest first. 1.2.0 knows HAVE and DONT_HAVE, 1.1.0 says of which kind a block is.
V120, V110, V100 = "/ipfs/bitswap/1.2.0", "/ipfs/bitswap/1.1.0", "/ipfs/bitswap/1.0.0"
PROTOCOLS = (V120, V110, V100)
#: Bytes of the largest message, and of the largest block: those of Kubo.
MAX_MESSAGE, MAX_BLOCK = 4 * 1024 * 1024, 2 * 1024 * 1024
#: Wants in one message, and blocks and presences; Kubo keeps 1,024 wants of a peer.
MAX_ELEMENTS = 4096
#: Fields of one of them; the largest, a want, has five.
MAX_FIELDS = 16
#: Bytes of a CID that are looked at; a longer one is of no hash that is spoken here.
MAX_CID = 64

#: Stands before the digest in every CID that is spoken: sha2-256, 32 bytes.
_SHA2_256 = b"\x12\x20"
_DIGEST = 32
#: Version 0 and dag-pb, which a CIDv0 leaves out.
_CIDV0_PREFIX = b"\x00\x70" + _SHA2_256


class Want(NamedTuple):
    """An entry of a wantlist."""

    cid: bytes
    #: It is enough to say whether the block is there.
    have: bool = False
    #: Say it also if it is not.
    send_dont_have: bool = False
    cancel: bool = False
    priority: int = 1


class Presence(NamedTuple):
    """Whether a block is there."""

    cid: bytes
    have: bool


@dataclass(slots=True)
class Message:
    """What one peer tells another."""

    wants: list[Want] = field(default_factory=list)
    #: The wants are all there are: forget those of before.
    full: bool = False
    #: In what is sent: the CID of each block; in what is received, `b""`.
    blocks: list[tuple[bytes, bytes]] = field(default_factory=list)
    presences: list[Presence] = field(default_factory=list)


def digest_of(cid: bytes) -> bytes | None:
    """The sha2-256 that a CID names; None if it is not one that is spoken."""
    if cid[-_DIGEST - 2 : -_DIGEST] != _SHA2_256:
        return None
    prefix = cid[: -_DIGEST - 2]
    if prefix and not (prefix[0] == 1 and _is_varint(prefix[1:])):
        return None
    return cid[-_DIGEST:]


def digest(block: bytes) -> bytes:
    """The sha2-256 of a block."""
    return hashlib.sha256(block).digest()


def as_v1(cid: bytes) -> bytes:
    """The same block's CID in version 1."""
    return b"\x01\x70" + cid if len(cid) == _DIGEST + 2 else cid


def _is_varint(data: bytes) -> bool:
    return 0 < len(data) < 5 and data[-1] < 128 and all(byte > 127 for byte in data[:-1])


# --- writing --------------------------------------------------------------------------------------


def encode(message: Message, protocol: str = V120) -> bytes:
    """The message with its length before it, as that version of the protocol has it."""
    data = b"".join(_fields(message, protocol))
    return varint(len(data)) + data


def _fields(message: Message, protocol: str) -> Iterator[bytes]:
    if message.wants or message.full:
        entries = b"".join(bytes_field(1, _entry(want, protocol)) for want in message.wants)
        yield bytes_field(1, entries + (_flag(2) if message.full else b""))
    for cid, block in message.blocks:
        if protocol == V100:
            yield bytes_field(2, block)
        else:
            yield bytes_field(3, bytes_field(1, _prefix(cid)) + bytes_field(2, block))
    if protocol == V120:
        for presence in message.presences:
            kind = b"" if presence.have else _flag(2)
            yield bytes_field(4, bytes_field(1, presence.cid) + kind)


def _entry(want: Want, protocol: str) -> bytes:
    entry = bytes_field(1, want.cid) + b"\x10" + varint(want.priority)
    if want.cancel:
        entry += _flag(3)
    if protocol == V120:
        entry += _flag(4) if want.have else b""
        entry += _flag(5) if want.send_dont_have else b""
    return entry


def _prefix(cid: bytes) -> bytes:
    """A CID without its digest."""
    return cid[:-_DIGEST] if len(cid) > _DIGEST + 2 else _CIDV0_PREFIX


def _flag(number: int) -> bytes:
    return bytes((number << 3, 1))


# --- reading --------------------------------------------------------------------------------------


class Reader:
    """Finds the messages in the bytes of a stream."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def __len__(self) -> int:
        """Bytes of a message that is not whole yet."""
        return len(self._buffer)

    def receive(self, data: bytes) -> Iterator[Message]:
        """The messages that are whole by now. Raises `RemoteProtocolError`."""
        self._buffer += data
        while (found := self._length()) is not None and len(self._buffer) >= sum(found):
            start, length = found
            body = bytes(memoryview(self._buffer)[start : start + length])
            del self._buffer[: start + length]
            yield decode(body)

    def _length(self) -> tuple[int, int] | None:
        """How long the varint at the beginning is and what it says, if it is there."""
        value = 0
        for position, byte in enumerate(self._buffer[:4]):
            value |= (byte & 127) << 7 * position
            if byte < 128:
                if value > MAX_MESSAGE:
                    raise RemoteProtocolError(f"a bitswap message of {value} bytes")
                return position + 1, value
        if len(self._buffer) >= 4:
            raise RemoteProtocolError("a bitswap message that is far too large")
        return None


def decode(data: bytes) -> Message:
    """A message without its length. Raises `RemoteProtocolError`."""
    message = Message()
    for number, value in read_fields(data, MAX_ELEMENTS):
        if isinstance(value, int):
            continue
        if number == 1:
            if message.wants:
                raise RemoteProtocolError("a bitswap message with two wantlists")
            _read_wantlist(value, message)
        elif number == 2:
            message.blocks.append((b"", value))
        elif number == 3:
            _, found = fields_of(value, MAX_FIELDS)
            message.blocks.append((b"", found.get(2, b"")))
        elif number == 4:
            numbers, found = fields_of(value, MAX_FIELDS)
            message.presences.append(Presence(found.get(1, b"")[:MAX_CID], not numbers.get(2)))
    return message


def _read_wantlist(data: bytes, message: Message) -> None:
    for number, value in read_fields(data, MAX_ELEMENTS):
        if number == 1 and not isinstance(value, int):
            message.wants.append(_read_want(value))
        elif number == 2 and isinstance(value, int):
            message.full = bool(value)


def _read_want(data: bytes) -> Want:
    numbers, found = fields_of(data, MAX_FIELDS)
    return Want(
        cid=found.get(1, b"")[:MAX_CID],
        have=numbers.get(4) == 1,
        send_dont_have=bool(numbers.get(5)),
        cancel=bool(numbers.get(3)),
        priority=numbers.get(2, 0),
    )
