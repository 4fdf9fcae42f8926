"""py-libp2p 0.8.1, mended: what of it cannot be exposed to a network as it is.

The mends are subclasses, so that the library beside them stays as it was. What they are, and what
happens without them:

========================================  ======================================================
mend                                      without it
========================================  ======================================================
yamux*.py, streams.py: our own muxer      cancelling a task that reads or writes kills the
                                          connection; a peer fills our memory (see there)
pnet.py: our own socket layer, XSalsa20   a private network of Python nodes only; a stranger makes
                                          dials hang; two system calls and two locks a read
gossipsub.py                              a malformed message ends the host (see there)
link.py: a handler that fails resets its  one exception in any stream handler ends the host
stream
link.py: streams are negotiated here      a protocol id of any length is read into memory; four
                                          round trips of the scheduler for each of its bytes
link.py: ends with its handlers at once   fixed sleeps make each disconnection take 0.2 s; a
                                          stopped peer holds up leaving for ever
Network: each connection holds its own    the slot of a closed inbound connection is never freed:
task and nothing else                     the 251st in the life of a process is refused
Network: waiting handshakes are few, and  idle sockets keep everybody out for 10 s at a time
the oldest gives way
Network: dials an address at once, once   250 ms for each dial, only one address of a kind is
                                          tried, a failed peer is blocked for 60 s, a wrong peer
                                          id is tried four times
Network: noise only                       a client that offers only plaintext is taken
Network: no auto-connector, no dialling   dials what is merely known; the newest connection is not
in `new_stream`, no resource manager      the one that is used; the next stream above a limit waits
host.py: listens without SO_REUSEPORT     two nodes share a port, and each gets half of the peers
Network: no notice of each stream         a nursery and three tasks for nothing at each stream
library_host.py: identify in our nursery  runs in trio's system tasks: its failure ends the program;
and bounded                               what a peer says of itself is read however long it is
`install`: loggers                        raw text on stderr, and a handler on the root logger
========================================  ======================================================
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version
from typing import Any, cast

import trio
from libp2p.abc import INetConn, INetStream
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.config import ConnectionConfig
from libp2p.network.connection import swarm_connection
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.net_stream import NetStream
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.protocol_muxer.generic_selector import GenericMultistreamSelector
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.transport.upgrader import TransportUpgrader

from .link import Link
from .pnet import SocketWire, StreamWire, Wire
from .sockets import connect
from .streams import LibraryStream, SecureYamux
from .transport import BLOCKED, PeerId, TransportError
from .yamux_frames import PROTOCOL_ID as YAMUX
from .yamux_stream import YamuxStream

log = logging.getLogger(__name__)

MENDED_VERSION = "0.8.1"

#: Seconds for the handshake of an inbound connection.
HANDSHAKE_TIMEOUT = 5.0
#: Inbound connections that have not shown who they are. One more, and the oldest is closed.
MAX_HANDSHAKES = 128
#: Connections in all. The limit of open files is 1024 on most systems.
MAX_CONNECTIONS = 768
#: Connections to one peer: both may dial at once, and each may come back before it is missed.
MAX_CONNECTIONS_TO_PEER = 4
#: Seconds for which a relayed connection outlives the direct one that replaces it at least, and at
#: most; between two looks whether something is still asked on it.
RETIRE_GRACE, RETIRE_LIMIT, RETIRE_LOOK = 5.0, 600.0, 1.0


def install() -> None:
    """Check the version and quieten the library. Call it before any host is made."""
    installed = version("libp2p")
    if installed != MENDED_VERSION:
        raise RuntimeError(f"libp2p {installed} is installed; {MENDED_VERSION} is what is mended")
    _quieten()


def _quieten() -> None:
    """The library's records go where the program sends its own, and only the serious ones."""
    library = logging.getLogger("libp2p")
    if library.handlers and not isinstance(library.handlers[0], logging.NullHandler):
        return  # somebody asked for its own log (LIBP2P_DEBUG)
    if not library.handlers:
        library.addHandler(logging.NullHandler())  # else what nobody takes goes to stderr
    library.propagate = True
    library.setLevel(logging.CRITICAL)
    # It calls `logging.debug()`, which puts a handler on the root logger of the program.
    cast(Any, swarm_connection).logging = logging.getLogger(swarm_connection.__name__)


class Network(Swarm):
    """The connections of a host: TCP, noise, yamux; in a private network if there is a key."""

    def __init__(
        self,
        key_pair: KeyPair,
        *,
        key: bytes | None,
        nursery: trio.Nursery,
        admits: Callable[[PeerId], bool] = lambda peer: True,
    ) -> None:
        peer_id = ID.from_pubkey(key_pair.public_key)
        peerstore = PeerStore()
        peerstore.add_key_pair(peer_id, key_pair)
        noise = NoiseTransport(key_pair, noise_privkey=create_noise_key_pair().private_key)
        # The defaults would connect to whatever is known.
        config = ConnectionConfig(min_connections=0, low_watermark=0)
        upgrader = TransportUpgrader({NOISE: noise}, {})
        super().__init__(peer_id, peerstore, upgrader, [], connection_config=config)
        self.handlers: dict[str, Callable[[INetStream], Any]] = {}
        #: Called with (peer, connected?) at each first connection and last disconnection.
        self.on_change: list[Callable[[PeerId, bool], None]] = []
        #: Called with each connection that is over, or about to be, while another one is there.
        self.on_replaced: list[Callable[[Link], None]] = []
        self.background_nursery: trio.Nursery = nursery
        self._key = key
        #: May this peer be connected? Known once it has proved who it is.
        self._admits = admits
        self._muxers: GenericMultistreamSelector[type[SecureYamux]] = GenericMultistreamSelector()
        self._muxers.add_handler(TProtocol(YAMUX), SecureYamux)
        self._handshakes: dict[Wire, trio.CancelScope] = {}

    # --- connections ------------------------------------------------------------------------------

    def link(self, peer_id: ID) -> Link:
        """The connection to use: a direct one if there is, and the newest of those, as the peer may
        have lost those before. Raises `TransportError`.
        """
        found: Link | None = None
        for link in cast("Sequence[Link]", self.connections.get(peer_id, ())):
            if not link.is_closed and (found is None or found.relay or not link.relay):
                found = link
        if found is None:
            raise TransportError(f"not connected to {peer_id}")
        return found

    def direct(self, peer_id: ID) -> Link | None:
        """The newest connection that nobody relays."""
        try:
            link = self.link(peer_id)
        except TransportError:
            return None
        return None if link.relay else link

    async def accept(self, stream: trio.SocketStream) -> None:
        """Serve an inbound connection to its end. Never raises."""
        wire = SocketWire(stream, initiator=False, key=self._key)
        muxed = None
        try:
            muxed = await self._handshake(wire)
        except Exception as error:  # anybody can send anything here
            log.debug("an inbound connection from %s failed: %r", wire.get_remote_address(), error)
        if muxed is None or len(self.get_connections()) >= MAX_CONNECTIONS:
            wire.abort()
            return
        addresses = wire.get_transport_addresses()
        await self._live(self._link(muxed, str(addresses[0]) if addresses else ""))

    async def _handshake(self, wire: Wire) -> SecureYamux | None:
        """Who is it? None if it did not say in time, or had to give way to others."""
        scope = trio.CancelScope(deadline=trio.current_time() + HANDSHAKE_TIMEOUT)
        self._handshakes[wire] = scope
        if len(self._handshakes) > MAX_HANDSHAKES:
            self._handshakes.pop(next(iter(self._handshakes))).cancel()
        try:
            with scope:
                return await self._upgrade(wire, None)
            return None
        except BaseException:
            wire.abort()
            raise
        finally:
            self._handshakes.pop(wire, None)

    async def dial(self, host: str, port: int, peer_id: ID, *, address: str) -> Link:
        """Connect to that peer there. Raises whatever went wrong; has no time limit of its own."""
        stream = await connect(host, port)
        return await self.use(self.socket_wire(stream), peer_id, address=address)

    def socket_wire(self, stream: trio.SocketStream, *, initiator: bool = True) -> SocketWire:
        """A new connection, in this network."""
        return SocketWire(stream, initiator=initiator, key=self._key)

    def circuit_wire(self, stream: YamuxStream, *, initiator: bool) -> StreamWire:
        """A stream through a relay, in this network: the relay reads nothing of it."""
        return StreamWire(stream, initiator=initiator, key=self._key)

    async def use(self, wire: Wire, peer_id: ID, *, address: str, relay: PeerId = "") -> Link:
        """Be connected to that peer over the wire. Raises whatever went wrong."""
        link = await self._join(wire, peer_id, address=address, relay=relay)
        await self.background_nursery.start(self._live, link)
        return link

    async def serve_circuit(
        self, wire: Wire, peer_id: ID, *, address: str, relay: PeerId, began: Callable[[Link], None]
    ) -> None:
        """Serve a connection that comes through a relay to its end. Raises whatever went wrong."""
        with trio.fail_after(HANDSHAKE_TIMEOUT):
            link = await self._join(wire, peer_id, address=address, relay=relay)
        if len(self.get_connections()) >= MAX_CONNECTIONS:
            wire.abort()
            return
        began(link)
        await self._live(link)

    async def _join(self, wire: Wire, peer_id: ID, *, address: str, relay: PeerId) -> Link:
        try:
            return self._link(await self._upgrade(wire, peer_id), address, relay)
        except BaseException:
            wire.abort()
            raise

    def _link(self, muxed: SecureYamux, address: str, relay: PeerId = "") -> Link:
        return Link(
            muxed, self, handlers=self.handlers, over=self.forget, address=address, relay=relay
        )

    async def prove(self, wire: Wire, peer_id: ID) -> None:
        """See that this peer is at the other end, and hang up. Raises if it is not."""
        try:
            await self.upgrader.upgrade_security(wire, True, peer_id)
        finally:
            wire.abort()

    async def _upgrade(self, wire: Wire, peer_id: ID | None) -> SecureYamux:
        secured = await self.upgrader.upgrade_security(wire, wire.is_initiator, peer_id)
        if peer_id is not None and secured.get_remote_peer() != peer_id:
            raise TransportError("another peer is there")
        _, muxer = await self._muxers.select(secured, wire.is_initiator)
        if not self._admits(secured.get_remote_peer().to_base58()):
            raise TransportError(BLOCKED)
        return muxer(secured, secured.get_remote_peer())

    async def _live(self, link: Link, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        links = self.connections.setdefault(link.muxed_conn.peer_id, [])
        links.append(link)
        if len(links) > MAX_CONNECTIONS_TO_PEER:
            oldest = next((each for each in cast(list[Link], links) if each.relay), links[0])
            self.background_nursery.start_soon(oldest.close)
        if len(links) == 1:
            self._tell(link.peer, True)
        elif self.direct(link.muxed_conn.peer_id) is not None:
            for each in cast(list[Link], links):
                if each.relay and not each.muxed_conn.session.retired:
                    self.background_nursery.start_soon(self._retire, each)
        task_status.started()
        try:
            await link.run()
        except Exception:  # a bug of ours: the log has it, and this connection ends
            log.exception("the connection to %s failed", link.peer)
        finally:
            self.forget(link)
            await link.muxed_conn.close()

    async def _retire(self, link: Link) -> None:
        """End a relayed connection that a direct one replaces, once nothing is asked on it."""
        session = link.muxed_conn.session
        session.retired = True
        self._replaced(link)
        until = trio.current_time() + RETIRE_LIMIT
        await trio.sleep(RETIRE_GRACE)
        # Streams end in many ways, and tell nobody when the last one does.
        while link.in_use and trio.current_time() < until:  # noqa: ASYNC110
            await trio.sleep(RETIRE_LOOK)
        if self.direct(link.muxed_conn.peer_id) is not None:
            await link.close()
        else:
            session.retired = False  # the direct one was lost meanwhile

    def forget(self, link: Link) -> None:
        """The connection is over."""
        peer_id = link.muxed_conn.peer_id
        links = self.connections.get(peer_id, [])
        if link not in links:
            return
        links.remove(link)
        if not links:
            del self.connections[peer_id]
            self._tell(link.peer, False)
        else:
            self._replaced(link)
        self.background_nursery.start_soon(self._notify, "disconnected", link)

    def _tell(self, peer: PeerId, connected: bool) -> None:
        for told in list(self.on_change):
            try:
                told(peer, connected)
            except Exception:  # the log has it; the connection is as it is
                log.exception("a connection handler failed")

    def _replaced(self, link: Link) -> None:
        for told in list(self.on_replaced):
            told(link)

    async def close_peer(self, peer_id: ID) -> None:
        """Close every connection to that peer."""
        async with trio.open_nursery() as nursery:
            for link in self.get_connections(peer_id):
                nursery.start_soon(link.close)

    async def close(self) -> None:
        """Close every connection, within `streams.LINGER`."""
        async with trio.open_nursery() as nursery:
            for link in self.get_connections():
                nursery.start_soon(link.close)

    def serve(self, protocol: str, handler: Callable[[Link, YamuxStream], Awaitable[None]]) -> None:
        """Serve a protocol that is about connections themselves."""

        async def served(shown: INetStream) -> None:
            muxed = cast(LibraryStream, cast(NetStream, shown).muxed_stream)
            links = cast("Sequence[Link]", self.get_connections(muxed.muxed_conn.peer_id))
            await handler(next(x for x in links if x.muxed_conn is muxed.muxed_conn), muxed.stream)

        self.handlers[TProtocol(protocol)] = served

    # --- what the library asks for ----------------------------------------------------------------

    async def new_stream(self, peer_id: ID) -> INetStream:
        try:
            link = self.link(peer_id)
            return link.library_stream(link.muxed_conn.session.open())
        except TransportError as error:
            raise SwarmException(str(error)) from error

    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        links = self.get_connections(peer_id)
        if not links:
            raise SwarmException(f"not connected to {peer_id}; nothing here dials by itself")
        return links

    async def notify_opened_stream(self, stream: INetStream) -> None:
        """Nobody listens to it."""

    async def notify_closed_stream(self, stream: INetStream) -> None:
        """Nobody listens to it."""
