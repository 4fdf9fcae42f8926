"""Reaching others through a relay, and being reached: the other side of mesh/relay.py.

A node that others cannot dial keeps a place at up to `WANTED` members that offer relaying, the
nearest of them, and tells the mesh addresses that lead through those. A place is asked for again
before it ends; one whose relay goes is replaced.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio
from libp2p.peer.id import ID
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from .addresses import CIRCUIT, Circuit, parse
from .frames import RemoteProtocolError
from .link import Link, open_stream
from .patches import Network
from .relay_messages import HOP, MAX_MESSAGE, STOP, Hop, HopMessage, Status, Stop, StopMessage
from .streams import read_delimited
from .transport import PeerId, TransportError
from .yamux_stream import YamuxStream

log = logging.getLogger(__name__)

#: Relays that a node has a place at, if it needs them. One may go without a word.
WANTED = 2
#: Addresses of a relay that are told, and the longest.
MAX_ADDRESSES, MAX_ADDRESS = 3, 200
#: Seconds for a question to a relay and its answer, which may wait for the other end.
ASK_TIME = 15.0
#: Relays that are pinged to find the nearest, and seconds for that.
MAX_PINGED, PING_TIME = 8, 2.0
#: Seconds between two requests for the same place; until a relay that refused is asked again.
SHORTEST_REFRESH, LONGEST_REFRESH, RETRY = 60.0, 1800.0, 60.0


@dataclass(frozen=True, slots=True)
class Reservation:
    """A place at a relay."""

    #: The connection on which it was given. With its end the relay may have forgotten the place,
    #: though another connection is there.
    link: Link
    #: When to ask for it again, in monotonic seconds.
    refresh: float
    #: Where this node is reached through it.
    addresses: tuple[str, ...]


class RelayClient:
    """The places of this node, and the circuits that begin or end here."""

    def __init__(
        self,
        network: Network,
        *,
        offers: Callable[[PeerId], bool],
        connect: Callable[[PeerId, Sequence[str]], Awaitable[str]],
        changed: Callable[[], None],
        began: Callable[[Link], None],
    ) -> None:
        """`offers`: does that peer offer relaying? `changed` is called when the addresses are
        others, `began` with each connection that comes through a relay."""
        self._network = network
        self._offers = offers
        self._connect = connect
        self._told = changed
        self._began = began
        self._own: PeerId = network.self_id.to_base58()
        self._wanted = False
        self._reserved: dict[PeerId, Reservation] = {}
        self._refused: dict[PeerId, float] = {}
        self._wake = trio.Event()
        network.serve(STOP, self._serve)
        network.on_change.append(self._changed)
        network.on_replaced.append(self._replaced)

    @property
    def addresses(self) -> list[str]:
        """Where this node is reached through relays."""
        return [address for place in self._reserved.values() for address in place.addresses]

    @property
    def relays(self) -> list[PeerId]:
        """Where this node has a place."""
        return list(self._reserved)

    def want(self, wanted: bool) -> None:
        """Does this node need relays?"""
        if wanted != self._wanted:
            self._wanted = wanted
            self._wake.set()

    def look(self) -> None:
        """There may be another relay."""
        self._wake.set()

    def _changed(self, peer: PeerId, connected: bool) -> None:
        if not connected:
            self._refused.pop(peer, None)
        if peer in self._reserved or not connected:
            self._wake.set()

    def _replaced(self, link: Link) -> None:
        if link.peer in self._reserved:
            self._wake.set()

    # --- places -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Have places where they are wanted, until cancelled."""
        while True:
            self._wake = trio.Event()
            before = self.addresses
            await self._tend()
            if self.addresses != before:
                self._told()
            with trio.move_on_at(self._next_time()):
                await self._wake.wait()

    def _next_time(self) -> float:
        due = [place.refresh for place in self._reserved.values()]
        if self._wanted and len(self._reserved) < WANTED:
            due += self._refused.values()
        return max(min(due, default=math.inf), trio.current_time() + 1.0)

    async def _tend(self) -> None:
        for relay, place in list(self._reserved.items()):
            link = self._network.direct(ID.from_base58(relay))
            if not self._wanted or link is None:
                del self._reserved[relay]
            elif place.link.is_closed or place.refresh <= trio.current_time():
                await self._reserve(link)
        if self._wanted and len(self._reserved) < WANTED:
            for link in await self._nearest():
                if len(self._reserved) < WANTED:
                    await self._reserve(link)

    async def _nearest(self) -> list[Link]:
        """The relays that may be asked for a place, the nearest first."""
        now = trio.current_time()
        self._refused = {peer: at for peer, at in self._refused.items() if at > now}
        links = [
            link
            for peer_id in list(self._network.connections)
            if (link := self._network.direct(peer_id)) is not None
            and link.peer not in self._reserved
            and link.peer not in self._refused
            and self._offers(link.peer)
        ][:MAX_PINGED]
        times: dict[PeerId, float] = {}

        async def ping(link: Link) -> None:
            try:
                times[link.peer] = await link.muxed_conn.session.ping()
            except TransportError as error:
                log.debug("a relay is gone: %s", error)

        with trio.move_on_after(PING_TIME):
            async with trio.open_nursery() as nursery:
                for link in links:
                    nursery.start_soon(ping, link)
        near = [link for link in links if link.peer in times]
        return sorted(near, key=lambda link: times[link.peer])

    async def _reserve(self, link: Link) -> None:
        """Have a place at that relay, or none and not ask again soon."""
        try:
            stream, answer = await _ask(link, HopMessage(kind=Hop.RESERVE))
            await stream.aclose()
            if answer.max_bytes or answer.max_seconds:
                raise TransportError("it limits what it relays")
            place = self._place(link, answer)
        except TransportError as error:
            log.info("no place at the relay %s: %s", link.peer, error)
            self._reserved.pop(link.peer, None)
            self._refused[link.peer] = trio.current_time() + RETRY
            return
        if link.peer not in self._reserved:
            log.info("reached through the relay %s", link.peer)
        self._reserved[link.peer] = place

    def _place(self, link: Link, answer: HopMessage) -> Reservation:
        # The relay's clock may go otherwise, so its time is not believed in either direction.
        left = (answer.expire - time.time()) / 2
        refresh = trio.current_time() + min(max(left, SHORTEST_REFRESH), LONGEST_REFRESH)
        known = [link.address] if link.muxed_conn.is_initiator else []
        found: list[str] = []
        for text in (*known, *map(_text_of, answer.addresses)):
            where = text.partition("/p2p/")[0]
            if _is_dialable(where) and where not in found:
                found.append(where)
        ways = [f"{where}/p2p/{link.peer}{CIRCUIT}/p2p/{self._own}" for where in found]
        if not ways:
            raise TransportError("it does not say where it is reached")
        return Reservation(link, refresh, tuple(ways[:MAX_ADDRESSES]))

    # --- circuits ---------------------------------------------------------------------------------

    async def dial(self, circuit: Circuit, peer_id: ID, *, address: str) -> None:
        """Connect to that peer through the relay. Raises whatever went wrong."""
        if circuit.relay == self._own:
            raise TransportError("this node is the relay, and not connected to it")
        relay_id = ID.from_base58(circuit.relay)
        if self._network.direct(relay_id) is None:
            if not circuit.relay_address:
                raise TransportError("not connected to the relay")
            await self._connect(circuit.relay, [circuit.relay_address])
        link = self._network.direct(relay_id)
        if link is None:
            raise TransportError("the relay itself is behind a relay")
        asked = HopMessage(kind=Hop.CONNECT, peer=peer_id.to_bytes())
        stream, _ = await _ask(link, asked)
        wire = self._network.circuit_wire(stream, initiator=True)
        await self._network.use(wire, peer_id, address=address, relay=circuit.relay)

    async def _serve(self, link: Link, stream: YamuxStream) -> None:
        """A relay brings a circuit. The connection over it ends with the stream."""
        with trio.fail_after(ASK_TIME):
            try:
                call = StopMessage.decode(await read_delimited(stream, MAX_MESSAGE))
                source = ID(call.peer)
                status = self._judge(link, call)
            except (RemoteProtocolError, ValueError) as error:
                raise TransportError(f"the relay {link.peer} sent nonsense: {error}") from error
            await stream.send_all(StopMessage(kind=Stop.STATUS, status=status).encode())
        if status is not Status.OK:
            return
        try:
            await self._network.serve_circuit(
                self._network.circuit_wire(stream, initiator=False),
                source,
                address=f"{link.address.partition('/p2p/')[0]}/p2p/{link.peer}{CIRCUIT}",
                relay=link.peer,
                began=self._began,
            )
        except Exception as error:  # anybody can send anything here; the stream's log has it
            raise TransportError(f"a circuit from {source} failed: {error!r}") from error

    def _judge(self, link: Link, call: StopMessage) -> Status:
        """Only relays that this node chose may bring somebody."""
        if call.kind is not Stop.CONNECT:
            return Status.UNEXPECTED_MESSAGE
        if link.relay or link.peer not in self._reserved:
            return Status.PERMISSION_DENIED
        return Status.OK


async def _ask(link: Link, message: HopMessage) -> tuple[YamuxStream, HopMessage]:
    """What the relay answers, if it is yes. Raises `TransportError`."""
    stream = await open_stream(link, [HOP])
    try:
        with trio.fail_after(ASK_TIME):
            await stream.send_all(message.encode())
            answer = HopMessage.decode(await read_delimited(stream, MAX_MESSAGE))
        if (answer.kind, answer.status) != (Hop.STATUS, Status.OK):
            raise TransportError(f"the relay says {_name(answer.status)}")
        return stream, answer
    except (RemoteProtocolError, trio.TooSlowError) as error:
        stream.abort()
        raise TransportError(f"the relay gave no answer: {error!r:.200}") from error
    except BaseException:
        stream.abort()
        raise


def _name(status: int) -> str:
    try:
        return Status(status).name.lower().replace("_", " ")
    except ValueError:
        return f"status {status}"


def _text_of(address: bytes) -> str:
    """A multiaddr as text; "" for what is none, or too long."""
    try:
        text = str(Multiaddr(address))
    except ValueError:
        return ""
    return text if len(text) <= MAX_ADDRESS else ""


def _is_dialable(address: str) -> bool:
    try:
        parse(address)
    except ValueError:
        return False
    return True
