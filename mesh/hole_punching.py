"""From a relayed connection to a direct one (DCUtR): both ends dial each other at the same time.

A router lets in what looks like the answer to a packet that went out. So each end sends a packet to
where the other is seen from outside, and each looks like an answer to the other's: for TCP that is
one connection that both have opened. It has to leave from the port whose outside is known, which is
that of the connection to the relay. It works where a router keeps that outside port for other
destinations too, as most do.

The end that the circuit came to begins. It first tries the addresses that the other tells; then
both tell where the relay sees them, and dial: the one that began when its message has just arrived,
half a round trip later. The other one counts as the client of the connection.

https://github.com/libp2p/specs/blob/master/relay/DCUtR.md
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import trio
from libp2p.peer.id import ID
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from .addresses import is_circuit, parse
from .frames import RemoteProtocolError
from .library_host import read_identify
from .link import Link, open_stream
from .patches import Network
from .relay_messages import DCUTR, MAX_MESSAGE, Punch, PunchMessage
from .sockets import connect, is_ip
from .streams import read_delimited
from .transport import PeerId, TransportError
from .yamux_stream import YamuxStream

log = logging.getLogger(__name__)

#: Tries, as the specification has it.
TRIES = 3
#: Seconds for the addresses that the peer tells; for a try; for a message.
DIRECT_TIME, PUNCH_TIME, MESSAGE_TIME = 5.0, 5.0, 10.0
#: Addresses that are dialled.
MAX_ADDRESSES = 4


class HolePunching:
    """Replaces relayed connections by direct ones where that can be done."""

    def __init__(
        self,
        network: Network,
        *,
        dial: Callable[[Link, Sequence[str]], Awaitable[None]],
    ) -> None:
        """`dial` makes a new connection to the peer of a link, at one of the addresses; raises
        `TransportError`."""
        self._network = network
        self._dial = dial
        self._upgrading: set[PeerId] = set()
        network.serve(DCUTR, self._serve)

    def began(self, link: Link) -> None:
        """A connection came through a relay."""
        if link.peer not in self._upgrading:
            self._upgrading.add(link.peer)
            self._network.background_nursery.start_soon(self._upgrade, link)

    async def _upgrade(self, link: Link) -> None:
        try:
            if not await self._dial_directly(link):
                await self._punch(link)
        except Exception as error:  # a relayed connection is good too; the log has it
            log.debug("%s stays behind its relay: %r", link.peer, error)
        finally:
            self._upgrading.discard(link.peer)

    async def _dial_directly(self, link: Link) -> bool:
        """Is there a direct connection, at the addresses that the peer tells?"""
        said = await read_identify(link)
        told = [_text_of(address) for address in said.listen_addrs]
        addresses = [a for a in told if a and not is_circuit(a)][:MAX_ADDRESSES]
        if self._is_direct(link):
            return True
        with trio.move_on_after(DIRECT_TIME):
            try:
                await self._dial(link, addresses)
            except TransportError as error:
                log.debug("%s", error)
        return self._is_direct(link)

    def _is_direct(self, link: Link) -> bool:
        return self._network.direct(link.muxed_conn.peer_id) is not None

    async def _punch(self, link: Link) -> None:
        """Begin what `_serve` answers. Raises whatever goes wrong."""
        for number in range(TRIES):
            stream = await open_stream(link, [DCUTR])
            try:
                with trio.fail_after(MESSAGE_TIME):
                    told = PunchMessage(kind=Punch.CONNECT, addresses=await self._outside(link))
                    began = trio.current_time()
                    await stream.send_all(told.encode())
                    answer = await _read(stream, Punch.CONNECT)
                    half = (trio.current_time() - began) / 2
                    await stream.send_all(PunchMessage(kind=Punch.SYNC).encode())
            finally:
                await stream.aclose()
            await trio.sleep(half)
            if await self._meet(link, answer, client=False):
                log.info("%s is reached directly (try %d)", link.peer, number + 1)
                return
        raise TransportError("the routers between let nothing through")

    async def _serve(self, link: Link, stream: YamuxStream) -> None:
        if not link.relay:
            raise TransportError(f"{link.peer} wants a direct connection on a direct connection")
        with trio.fail_after(2 * MESSAGE_TIME):
            asked = await _read(stream, Punch.CONNECT)
            told = PunchMessage(kind=Punch.CONNECT, addresses=await self._outside(link))
            await stream.send_all(told.encode())
            await _read(stream, Punch.SYNC)
        # The stream may end with the circuit as soon as this has worked.
        await self._meet(link, asked, client=True)

    async def _outside(self, link: Link) -> tuple[bytes, ...]:
        """Where the relay of that connection sees this node. Raises `TransportError`."""
        said = await read_identify(self._relay_of(link))
        return (said.observed_addr,) if said.observed_addr else ()

    def _relay_of(self, link: Link) -> Link:
        relay = self._network.direct(ID.from_base58(link.relay))
        if relay is None:
            raise TransportError("the relay is gone")
        return relay

    async def _meet(self, link: Link, message: PunchMessage, *, client: bool) -> bool:
        """Dial where the peer is seen from outside. Is it connected directly then?"""
        local = self._relay_of(link).local_address()
        addresses = dict.fromkeys(map(_text_of, message.addresses))
        with trio.move_on_after(PUNCH_TIME):
            async with trio.open_nursery() as nursery:
                for address in list(addresses)[:MAX_ADDRESSES]:
                    nursery.start_soon(self._dial_from, local, address, link, client)
        return self._is_direct(link)

    async def _dial_from(
        self, local: tuple[str, int], address: str, link: Link, client: bool
    ) -> None:
        try:
            place = parse(address)
            if not is_ip(place.host):
                raise ValueError("no name is looked up here")
            stream = await connect(place.host, place.port, local=local)
            wire = self._network.socket_wire(stream, initiator=client)
            await self._network.use(wire, link.muxed_conn.peer_id, address=address)
        except Exception as error:  # a router, or whoever is there; the next try is another one
            log.debug("%s was not met at %s: %r", link.peer, address, error)


async def _read(stream: YamuxStream, expected: Punch) -> PunchMessage:
    """Raises `TransportError`."""
    try:
        message = PunchMessage.decode(await read_delimited(stream, MAX_MESSAGE))
    except RemoteProtocolError as error:
        raise TransportError(f"{stream.peer} sent nonsense: {error}") from error
    if message.kind is not expected:
        raise TransportError(f"{stream.peer} sent {message.kind.name} for {expected.name}")
    return message


def _text_of(address: bytes) -> str:
    """A multiaddr as text; "" for what is none."""
    try:
        return str(Multiaddr(address)).partition("/p2p/")[0]
    except ValueError:
        return ""
