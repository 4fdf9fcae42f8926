"""The bytes of circuit relay v2 and of DCUtR: what is said before a circuit, or a direct path, is.

Pure. Each message is a protobuf behind a varint of its length, as go-libp2p and js-libp2p send it.

https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md
https://github.com/libp2p/specs/blob/master/relay/DCUtR.md
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

from .frames import RemoteProtocolError
from .protobuf import bytes_field, fields_of, number_field, read_fields, varint

HOP = "/libp2p/circuit/relay/0.2.0/hop"
STOP = "/libp2p/circuit/relay/0.2.0/stop"
DCUTR = "/libp2p/dcutr"
#: Bytes of a message; its fields, of which addresses are the only ones that may be many.
MAX_MESSAGE, MAX_FIELDS = 4096, 64
#: Addresses of one message that are looked at, and bytes of a peer id.
MAX_ADDRESSES, MAX_PEER_ID = 16, 64

K = TypeVar("K", bound=IntEnum)


class Hop(IntEnum):
    """What a client asks of a relay, and the answer."""

    RESERVE = 0
    CONNECT = 1
    STATUS = 2


class Stop(IntEnum):
    """What a relay asks of who has a reservation, and the answer."""

    CONNECT = 0
    STATUS = 1


class Punch(IntEnum):
    """What two peers tell each other before they dial at the same time."""

    CONNECT = 100
    SYNC = 300


class Status(IntEnum):
    """How it went."""

    NONE = 0
    OK = 100
    RESERVATION_REFUSED = 200
    RESOURCE_LIMIT_EXCEEDED = 201
    PERMISSION_DENIED = 202
    CONNECTION_FAILED = 203
    NO_RESERVATION = 204
    MALFORMED_MESSAGE = 400
    UNEXPECTED_MESSAGE = 401


@dataclass(frozen=True, slots=True, kw_only=True)
class HopMessage:
    """Between a client and a relay. Peer ids and multiaddrs are their bytes."""

    kind: Hop
    #: To whom a circuit is wanted.
    peer: bytes = b""
    #: Of a reservation: when it ends (s since 1970), and where the relay is reached.
    expire: int = 0
    addresses: tuple[bytes, ...] = ()
    #: A circuit ends after so many seconds, or bytes in a direction. 0: it does not.
    max_seconds: int = 0
    max_bytes: int = 0
    status: int = Status.NONE

    def encode(self) -> bytes:
        fields = number_field(1, self.kind)
        if self.peer:
            fields += bytes_field(2, bytes_field(1, self.peer))
        if self.expire:
            fields += bytes_field(3, number_field(1, self.expire) + _repeated(2, self.addresses))
        return _delimited(fields + _limit_and_status(self, limit=4, status=5))

    @classmethod
    def decode(cls, data: bytes) -> HopMessage:
        """Raises `RemoteProtocolError`."""
        numbers, parts = fields_of(data, MAX_FIELDS)
        reservation = parts.get(3, b"")
        limit, _ = fields_of(parts.get(4, b""), MAX_FIELDS)
        return cls(
            kind=_kind(Hop, numbers),
            peer=_peer(parts),
            expire=fields_of(reservation, MAX_FIELDS)[0].get(1, 0),
            addresses=_addresses(reservation),
            max_seconds=limit.get(1, 0),
            max_bytes=limit.get(2, 0),
            status=numbers.get(5, Status.NONE),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StopMessage:
    """Between a relay and the peer that a circuit leads to."""

    kind: Stop
    #: From whom the circuit comes.
    peer: bytes = b""
    max_seconds: int = 0
    max_bytes: int = 0
    status: int = Status.NONE

    def encode(self) -> bytes:
        fields = number_field(1, self.kind)
        if self.peer:
            fields += bytes_field(2, bytes_field(1, self.peer))
        return _delimited(fields + _limit_and_status(self, limit=3, status=4))

    @classmethod
    def decode(cls, data: bytes) -> StopMessage:
        """Raises `RemoteProtocolError`."""
        numbers, parts = fields_of(data, MAX_FIELDS)
        limit, _ = fields_of(parts.get(3, b""), MAX_FIELDS)
        return cls(
            kind=_kind(Stop, numbers),
            peer=_peer(parts),
            max_seconds=limit.get(1, 0),
            max_bytes=limit.get(2, 0),
            status=numbers.get(4, Status.NONE),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PunchMessage:
    """Between two peers that share a circuit and want a direct connection."""

    kind: Punch
    #: Where others see the sender: multiaddrs.
    addresses: tuple[bytes, ...] = ()

    def encode(self) -> bytes:
        return _delimited(number_field(1, self.kind) + _repeated(2, self.addresses))

    @classmethod
    def decode(cls, data: bytes) -> PunchMessage:
        """Raises `RemoteProtocolError`."""
        return cls(kind=_kind(Punch, fields_of(data, MAX_FIELDS)[0]), addresses=_addresses(data))


def _kind(kinds: type[K], numbers: dict[int, int]) -> K:
    try:
        return kinds(numbers.get(1, -1))
    except ValueError:
        raise RemoteProtocolError(f"a {kinds.__name__} message of no known type") from None


def _peer(parts: dict[int, bytes]) -> bytes:
    peer = fields_of(parts.get(2, b""), MAX_FIELDS)[1].get(1, b"")
    if len(peer) > MAX_PEER_ID:
        raise RemoteProtocolError(f"a peer id of {len(peer)} bytes")
    return peer


def _addresses(data: bytes) -> tuple[bytes, ...]:
    """The first byte strings of field 2."""
    found = (v for number, v in read_fields(data, MAX_FIELDS) if number == 2)
    return tuple(v for v in found if isinstance(v, bytes))[:MAX_ADDRESSES]


def _repeated(number: int, values: Sequence[bytes]) -> bytes:
    return b"".join(bytes_field(number, value) for value in values)


def _limit_and_status(message: HopMessage | StopMessage, *, limit: int, status: int) -> bytes:
    fields = b""
    if message.max_seconds or message.max_bytes:
        limits = number_field(1, message.max_seconds) + number_field(2, message.max_bytes)
        fields = bytes_field(limit, limits)
    if message.status:
        fields += number_field(status, message.status)
    return fields


def _delimited(data: bytes) -> bytes:
    return varint(len(data)) + data
