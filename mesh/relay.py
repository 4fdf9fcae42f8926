"""A relay: carries connections between members of which one cannot be reached (circuit relay v2).

Who cannot be reached reserves a place, over a connection that it keeps. Who wants to reach it asks
for a circuit; the relay opens a stream to it, and passes bytes on between the two. The two make
a whole connection of that, with the private network and noise inside, so a relay sees only that and
how much is said. It offers this when its owner wants it (`mesh.relay`).

The number of places and circuits is bounded. What a circuit carries is not, and no time ends it:
the members of a mesh know each other, and a relayed answer that is cut serves nobody.

https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

import trio
from libp2p.peer.id import ID
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from .frames import RemoteProtocolError
from .link import Link, open_stream
from .patches import Network
from .relay_messages import HOP, MAX_MESSAGE, STOP, Hop, HopMessage, Status, Stop, StopMessage
from .streams import read_delimited
from .transport import PeerId, Relaying, TransportError
from .yamux_stream import YamuxStream

log = logging.getLogger(__name__)

#: Seconds for which a place is kept; who wants it longer asks again.
RESERVED = 3600
#: Places; circuits; those of one peer. A mesh in which everyone is connected to everyone has 64
#: nodes, so one that cannot be reached needs 63.
MAX_RESERVATIONS, MAX_CIRCUITS, MAX_CIRCUITS_OF_PEER = 128, 512, 64
#: Seconds for a message of the protocol.
MESSAGE_TIME = 10.0
#: Seconds for which one half of a circuit may outlive the other.
HALF_TIME = 10.0


class Refused(Exception):
    """What was asked is not given, for the reason told by its status."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.name)
        self.status = status


class Relay:
    """What a relay has promised, and the circuits through it."""

    def __init__(
        self,
        network: Network,
        *,
        addresses: Callable[[], Sequence[str]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._network = network
        self._addresses = addresses
        #: Seconds since 1970, as the protocol has it.
        self._clock = clock
        #: Until when the places are kept.
        self._reserved: dict[PeerId, float] = {}
        #: From whom to whom.
        self._circuits: Counter[tuple[PeerId, PeerId]] = Counter()
        network.serve(HOP, self._serve)
        network.on_change.append(self._changed)

    @property
    def circuits(self) -> int:
        """How many there are now."""
        return self._circuits.total()

    @property
    def relaying(self) -> Relaying:
        """For whom it does what now."""
        now = self._clock()
        places = [peer for peer, until in self._reserved.items() if until > now]
        return Relaying(places, dict(self._circuits))

    def _circuits_of(self, peer: PeerId) -> int:
        return sum(count for ends, count in self._circuits.items() if peer in ends)

    def _changed(self, peer: PeerId, connected: bool) -> None:
        if not connected:
            self._reserved.pop(peer, None)

    async def _serve(self, link: Link, stream: YamuxStream) -> None:
        with trio.move_on_after(MESSAGE_TIME) as limit:
            asked = await _read_hop(stream)
            try:
                if link.relay:  # a relay behind a relay
                    raise Refused(Status.PERMISSION_DENIED)
                if asked.kind is Hop.CONNECT:
                    limit.deadline += MESSAGE_TIME  # for the other end
                    source, target = link.peer, _peer_of(asked.peer)
                    self._check_circuit(source, target)
                    await self._open(source, target, stream, limit)
                elif asked.kind is Hop.RESERVE:
                    answer = self._reserve(link)
                    await stream.send_all(answer.encode())
                else:
                    raise Refused(Status.UNEXPECTED_MESSAGE)
            except Refused as refused:
                log.debug("%s is refused: %s", link.peer, refused)
                status = HopMessage(kind=Hop.STATUS, status=refused.status)
                await stream.send_all(status.encode())

    def _reserve(self, link: Link) -> HopMessage:
        """Keep a place for who asks. Raises `Refused`."""
        now = self._clock()
        for peer, until in list(self._reserved.items()):
            if until <= now:
                del self._reserved[peer]
        if link.peer not in self._reserved and len(self._reserved) >= MAX_RESERVATIONS:
            raise Refused(Status.RESERVATION_REFUSED)
        self._reserved[link.peer] = now + RESERVED
        return HopMessage(
            kind=Hop.STATUS,
            status=Status.OK,
            expire=int(now) + RESERVED,
            addresses=tuple(Multiaddr(address).to_bytes() for address in self._addresses()),
        )

    def _check_circuit(self, source: PeerId, target: PeerId) -> None:
        """May there be a circuit between them? Raises `Refused`."""
        if self._reserved.get(target, 0.0) <= self._clock():
            raise Refused(Status.NO_RESERVATION)
        most = max(map(self._circuits_of, (source, target)))
        if self.circuits >= MAX_CIRCUITS or most >= MAX_CIRCUITS_OF_PEER:
            raise Refused(Status.RESOURCE_LIMIT_EXCEEDED)

    async def _open(
        self, source: PeerId, target: PeerId, near: YamuxStream, limit: trio.CancelScope
    ) -> None:
        """A circuit to a peer that has a place, until it is over. Raises `Refused`."""
        ends = (source, target)
        self._circuits[ends] += 1
        try:
            far = await self._call(source, target)
            try:
                opened = HopMessage(kind=Hop.STATUS, status=Status.OK)
                await near.send_all(opened.encode())
                limit.deadline = float("inf")
                await _bridge(near, far)
            finally:
                await far.reset()
        finally:
            self._circuits[ends] -= 1
            self._circuits = +self._circuits  # those that are not zero

    async def _call(self, source: PeerId, target: PeerId) -> YamuxStream:
        """A stream to a peer that takes a circuit from that source. Raises `Refused`."""
        link = self._network.direct(ID.from_base58(target))
        if link is None:
            raise Refused(Status.NO_RESERVATION)
        stream: YamuxStream | None = None
        try:
            stream = await open_stream(link, [STOP])
            call = StopMessage(kind=Stop.CONNECT, peer=ID.from_base58(source).to_bytes())
            await stream.send_all(call.encode())
            answer = StopMessage.decode(await read_delimited(stream, MAX_MESSAGE))
            if (answer.kind, answer.status) == (Stop.STATUS, Status.OK):
                return stream
            log.debug("%s does not take a circuit: %s", target, answer.status)
        except (TransportError, RemoteProtocolError) as error:
            log.debug("no circuit to %s: %s", target, error)
        except BaseException:
            if stream is not None:
                stream.abort()
            raise
        if stream is not None:
            stream.abort()
        raise Refused(Status.CONNECTION_FAILED)


async def _read_hop(stream: YamuxStream) -> HopMessage:
    """Raises `TransportError`."""
    try:
        return HopMessage.decode(await read_delimited(stream, MAX_MESSAGE))
    except RemoteProtocolError as error:
        status = HopMessage(kind=Hop.STATUS, status=Status.MALFORMED_MESSAGE)
        await stream.send_all(status.encode())
        raise TransportError(f"{stream.peer} asks a relay nonsense: {error}") from error


def _peer_of(data: bytes) -> PeerId:
    try:
        return ID(data).to_base58()
    except ValueError:
        raise Refused(Status.MALFORMED_MESSAGE) from None


async def _bridge(near: YamuxStream, far: YamuxStream) -> None:
    """Pass on what each says to the other, until both have finished or one is gone."""
    async with trio.open_nursery() as nursery:
        for source, sink in ((near, far), (far, near)):
            nursery.start_soon(_pass_on, source, sink, nursery.cancel_scope)


async def _pass_on(source: YamuxStream, sink: YamuxStream, bridge: trio.CancelScope) -> None:
    try:
        while data := await source.receive_some():
            await sink.send_all(data)
        await sink.send_eof()
        bridge.deadline = min(bridge.deadline, trio.current_time() + HALF_TIME)
    except TransportError as error:
        log.debug("a circuit ended: %s", error)
        source.abort()
        sink.abort()
        bridge.cancel()
