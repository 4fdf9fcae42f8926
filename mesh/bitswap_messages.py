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
    return _varint(len(data)) + data


def _fields(message: Message, protocol: str) -> Iterator[bytes]:
    if message.wants or message.full:
        entries = b"".join(_bytes_field(1, _entry(want, protocol)) for want in message.wants)
        yield _bytes_field(1, entries + (_flag(2) if message.full else b""))
    for cid, block in message.blocks:
        if protocol == V100:
            yield _bytes_field(2, block)
        else:
            yield _bytes_field(3, _bytes_field(1, _prefix(cid)) + _bytes_field(2, block))
    if protocol == V120:
        for presence in message.presences:
            kind = b"" if presence.have else _flag(2)
            yield _bytes_field(4, _bytes_field(1, presence.cid) + kind)


def _entry(want: Want, protocol: str) -> bytes:
    entry = _bytes_field(1, want.cid) + b"\x10" + _varint(want.priority)
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


def _bytes_field(number: int, data: bytes) -> bytes:
    return bytes((number << 3 | 2,)) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    written.append(value)
    return bytes(written)


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
    for number, value in _read(data, MAX_ELEMENTS):
        if isinstance(value, int):
            continue
        if number == 1:
            if message.wants:
                raise RemoteProtocolError("a bitswap message with two wantlists")
            _read_wantlist(value, message)
        elif number == 2:
            message.blocks.append((b"", value))
        elif number == 3:
            _, found = _fields_of(value)
            message.blocks.append((b"", found.get(2, b"")))
        elif number == 4:
            numbers, found = _fields_of(value)
            message.presences.append(Presence(found.get(1, b"")[:MAX_CID], not numbers.get(2)))
    return message


def _read_wantlist(data: bytes, message: Message) -> None:
    for number, value in _read(data, MAX_ELEMENTS):
        if number == 1 and not isinstance(value, int):
            message.wants.append(_read_want(value))
        elif number == 2 and isinstance(value, int):
            message.full = bool(value)


def _read_want(data: bytes) -> Want:
    numbers, found = _fields_of(data)
    return Want(
        cid=found.get(1, b"")[:MAX_CID],
        have=numbers.get(4) == 1,
        send_dont_have=bool(numbers.get(5)),
        cancel=bool(numbers.get(3)),
        priority=numbers.get(2, 0),
    )


def _fields_of(data: bytes) -> tuple[dict[int, int], dict[int, bytes]]:
    """The numbers and the byte strings of a small protobuf, the last of each kind."""
    numbers: dict[int, int] = {}
    strings: dict[int, bytes] = {}
    for number, value in _read(data, MAX_FIELDS):
        if isinstance(value, int):
            numbers[number] = value
        else:
            strings[number] = value
    return numbers, strings


def _read(data: bytes, most: int) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf, at most so many. Raises `RemoteProtocolError`."""
    position = 0
    while position < len(data):
        if not most:
            raise RemoteProtocolError("a bitswap message of too many elements")
        most -= 1
        tag, position = _read_varint(data, position)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, position = _read_varint(data, position)
            yield number, value
            continue
        if kind == 2:
            length, position = _read_varint(data, position)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise RemoteProtocolError(f"a protobuf field of type {kind}")
        end = position + length
        if end > len(data):
            raise RemoteProtocolError("a protobuf that is cut")
        if kind == 2:
            yield number, data[position:end]
        position = end


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """A varint and the place after it. Raises `RemoteProtocolError`."""
    value = 0
    for shift, byte in enumerate(data[position : position + 10]):
        value |= (byte & 127) << 7 * shift
        if byte < 128:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position + shift + 1
    raise RemoteProtocolError("a protobuf with a number that is cut")
