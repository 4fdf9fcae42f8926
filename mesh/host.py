"""The network over py-libp2p: TCP, noise, yamux and gossipsub, as a `Transport`.

    async with open_host(HostSettings(seed=seed, psk=key, topics=frozenset({"/news"}))) as host:
        await host.connect(peer, addresses)

Each connection is a task. Leaving the context ends them all, within a second whatever they do.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

import trio
from libp2p.abc import INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID

from . import addresses as places
from . import gossipsub, patches
from .identity import Identity, verify
from .library_host import LibraryHost
from .link import open_stream
from .patches import Network
from .streams import LibraryStream
from .transport import (
    BLOCKED,
    ConnectionHandler,
    GossipHandler,
    PeerId,
    Reach,
    Relaying,
    Stream,
    StreamHandler,
    Transport,
    TransportError,
)
from .traversal import Traversal
from .yamux_stream import YamuxStream

log = logging.getLogger(__name__)

#: Seconds after which the next address is dialled beside the one before.
STAGGER = 0.3
#: Addresses of one peer that are dialled, and told of this one.
MAX_ADDRESSES = 16
#: Seconds for which the addresses of the machine are taken as they were.
ADDRESSES_AGE = 5.0


@dataclass(frozen=True, kw_only=True)
class HostSettings:
    """Who a host is and where it listens."""

    #: The seed of its Ed25519 identity: 32 secret bytes.
    seed: bytes
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    #: The key of the private network: 32 secret bytes. None: anybody may connect.
    psk: bytes | None = None
    #: The topics that may be used.
    topics: frozenset[str] = frozenset()
    agent: str = "promptmesh"
    #: May this peer be connected?
    admits: Callable[[PeerId], bool] = lambda peer: True
    #: Relay for members that cannot be reached.
    relay: bool = False
    #: Called when the addresses of this node are others.
    readdressed: Callable[[], None] = lambda: None

    def __repr__(self) -> str:  # the secrets stay out of logs
        return f"HostSettings(listen={self.listen}, private={self.psk is not None})"


@asynccontextmanager
async def open_host(settings: HostSettings) -> AsyncIterator[Transport]:
    """A host that listens. Raises `TransportError` if it cannot."""
    patches.install()
    listeners = await _listen(settings.listen)
    with _unwrapped():
        async with trio.open_nursery() as nursery:
            host = Libp2pTransport(settings, nursery, [bound.socket for bound in listeners])
            serving = trio.CancelScope()
            nursery.start_soon(_serve, host.network, listeners, nursery, serving)
            nursery.start_soon(host.traversal.run)
            with host.gossip.running(nursery):
                await host.gossip.wait_until_ready()
                try:
                    yield host
                finally:
                    serving.cancel()
                    with trio.CancelScope(shield=True):  # bounded: see Network.close
                        await host.network.close()
                    nursery.cancel_scope.cancel()


@contextmanager
def _unwrapped() -> Iterator[None]:
    """What the body raises comes out as it is, not in the group of the nursery around it."""
    try:
        yield
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from None


async def _listen(addresses: Sequence[str]) -> list[trio.SocketListener]:
    listeners: list[trio.SocketListener] = []
    try:
        for address in addresses:
            place = places.parse(address)
            listeners += await trio.open_tcp_listeners(place.port, host=place.host)
    except (OSError, ValueError) as error:
        for listener in listeners:
            listener.socket.close()
        raise TransportError(f"cannot listen on {address}: {error}") from error
    return listeners


async def _serve(
    network: Network,
    listeners: list[trio.SocketListener],
    nursery: trio.Nursery,
    scope: trio.CancelScope,
) -> None:
    with scope:
        if not listeners:  # a node that can only dial
            await trio.sleep_forever()
        await trio.serve_listeners(network.accept, listeners, handler_nursery=nursery)


class Libp2pTransport:
    """One node's end of the network: a `Transport`."""

    def __init__(
        self,
        settings: HostSettings,
        nursery: trio.Nursery,
        sockets: Sequence[trio.socket.SocketType],
    ) -> None:
        key_pair = create_new_key_pair(settings.seed)
        self._identity = Identity(settings.seed)
        self._bound = [socket.getsockname()[:2] for socket in sockets]
        self._addresses: tuple[float, tuple[str, ...]] = (float("-inf"), ())
        self._admits = settings.admits
        self.network = Network(key_pair, key=settings.psk, nursery=nursery, admits=settings.admits)
        self.network.on_change.append(self._changed)
        self.peer_id: PeerId = self.network.self_id.to_base58()
        self._library = LibraryHost(self.network, agent=settings.agent, addresses=self._listening)
        self.gossip = gossipsub.Gossip(self._library, settings.topics)
        self.network.on_replaced.append(lambda link: self.gossip.move(link.muxed_conn))
        self._told: list[ConnectionHandler] = []
        self._dials: dict[PeerId, _Dial] = {}
        self.traversal = Traversal(
            self.network,
            self._library,
            relay=settings.relay,
            listening=self._listening,
            connect=self.connect,
            dial=self._dial,
            readdressed=settings.readdressed,
        )
        self._library.addresses = self._direct

    @property
    def addresses(self) -> Sequence[str]:
        circuits = self.traversal.circuits
        return [*self._direct()[: MAX_ADDRESSES - len(circuits)], *circuits]

    @property
    def reachability(self) -> Reach:
        return self.traversal.state

    @property
    def relaying(self) -> Relaying | None:
        relay = self.traversal.relay
        return None if relay is None else relay.relaying

    def _direct(self) -> Sequence[str]:
        outside = self.traversal.outside
        return [*self._listening(), *(f"{place}/p2p/{self.peer_id}" for place in outside)]

    def _listening(self) -> Sequence[str]:
        """Where this node listens, as the network around it sees that."""
        at, addresses = self._addresses
        if trio.current_time() - at > ADDRESSES_AGE:
            found = places.reachable(self._bound, places.machine_addresses())
            addresses = tuple(f"{place}/p2p/{self.peer_id}" for place in found)
            self._addresses = trio.current_time(), addresses
        return addresses

    # --- connections ------------------------------------------------------------------------------

    def connected(self) -> Mapping[PeerId, str]:
        return {
            peer_id.to_base58(): self.network.link(peer_id).address
            for peer_id, links in self.network.connections.items()
            if any(not link.is_closed for link in links)
        }

    def on_connection(self, handler: ConnectionHandler) -> None:
        self._told.append(handler)

    def _changed(self, peer: PeerId, connected: bool) -> None:
        for handler in list(self._told):
            handler(peer, connected)

    async def connect(self, peer: PeerId, addresses: Sequence[str], *, timeout: float = 8.0) -> str:
        await trio.lowlevel.checkpoint()
        peer_id = _peer_id(peer)
        if peer == self.peer_id:
            raise TransportError("a node does not dial itself")
        if not self._admits(peer):
            raise TransportError(BLOCKED)
        started = trio.current_time()
        while True:
            left = started + timeout - trio.current_time()
            known = self.connected().get(peer)
            if known is not None:
                return known
            dial = self._dials.get(peer)
            if dial is None:
                return await self._dial(peer_id, addresses, left)
            with trio.move_on_after(max(left, 0.0)) as waiting:
                await dial.over.wait()  # another task dials that peer: share what comes of it
            if waiting.cancelled_caught:
                raise TransportError(f"cannot reach {peer} within {timeout:g} s")
            if dial.failure is not None:
                raise TransportError(dial.failure)

    async def _dial(self, peer_id: ID, addresses: Sequence[str], timeout: float) -> str:
        peer = peer_id.to_base58()
        dial = self._dials[peer] = _Dial(peer_id, addresses, self._dial_at)
        try:
            with trio.move_on_after(max(timeout, 0.0)):
                await dial.run()
            return dial.result()
        finally:
            if self._dials.get(peer) is dial:
                del self._dials[peer]
            dial.over.set()

    async def _dial_at(self, address: str, peer_id: ID) -> None:
        """Connect to that peer there. Raises whatever goes wrong."""
        place = _place_of(address)
        if place.peer not in (None, peer_id.to_base58()):
            raise ValueError("it is another peer's address")
        if isinstance(place, places.Circuit):
            await self.traversal.dial(place, peer_id, address=address)
        else:
            await self.network.dial(place.host, place.port, peer_id, address=address)

    async def disconnect(self, peer: PeerId) -> None:
        try:
            peer_id = _peer_id(peer)
        except TransportError:
            return
        await self.network.close_peer(peer_id)

    # --- streams ----------------------------------------------------------------------------------

    async def open_stream(self, peer: PeerId, *protocols: str) -> Stream:
        return await open_stream(self.network.link(_peer_id(peer)), protocols)

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        async def serve(shown: INetStream) -> None:
            await handler(_stream_of(shown))

        self._library.set_stream_handler(TProtocol(protocol), serve)

    async def agent(self, peer: PeerId) -> str:
        return await self._library.agent(_peer_id(peer))

    async def ping(self, peer: PeerId) -> float:
        """By a yamux ping, on the connection that new streams use."""
        return await self.network.link(_peer_id(peer)).muxed_conn.session.ping()

    # --- gossip and signatures --------------------------------------------------------------------

    async def subscribe(self, topic: str, handler: GossipHandler) -> None:
        await self.gossip.listen(topic, handler)

    async def publish(self, topic: str, data: bytes) -> None:
        """Raises `ValueError` for more than `gossipsub.MAX_MESSAGE` bytes."""
        if len(data) > gossipsub.MAX_MESSAGE:
            raise ValueError(f"{len(data)} bytes are too many for a gossiped message")
        await self.gossip.publish(topic, data)

    async def flush(self) -> None:
        await self.gossip.flush()
        async with trio.open_nursery() as nursery:
            for peer in self.connected():
                # Bytes of a connection keep their order: who answers has read what came before.
                nursery.start_soon(self._ping_if_there, peer)

    async def _ping_if_there(self, peer: PeerId) -> None:
        with suppress(TransportError):
            await self.ping(peer)

    def sign(self, data: bytes) -> bytes:
        return self._identity.sign(data)

    def verify(self, peer: PeerId, data: bytes, signature: bytes) -> bool:
        return verify(peer, data, signature)


class _Dial:
    """Dialling all addresses of a peer, each a little after the one before; the first wins.

    Those through relays come last.
    """

    def __init__(
        self,
        peer_id: ID,
        addresses: Sequence[str],
        dial: Callable[[str, ID], Awaitable[None]],
    ) -> None:
        self._peer_id = peer_id
        self._dial = dial
        tried = places.directly_first(addresses)[:MAX_ADDRESSES]
        self._failures = dict.fromkeys(tried, "no answer in time")
        self._reached: str | None = None
        self.over = trio.Event()
        #: What a task that waits for this dial raises; None if it was cancelled, or went well.
        self.failure: str | None = None

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for address in self._failures:
                failed = trio.Event()
                nursery.start_soon(self._try, address, failed, nursery.cancel_scope)
                with trio.move_on_after(STAGGER):
                    await failed.wait()

    async def _try(self, address: str, failed: trio.Event, dialling: trio.CancelScope) -> None:
        try:
            await self._dial(address, self._peer_id)
        except Exception as error:  # whoever listens there may answer anything; the caller is told
            self._failures[address] = _reason(error)
            failed.set()
        else:
            self._reached = self._reached or address
            dialling.cancel()

    def result(self) -> str:
        """The address that was reached. Raises `TransportError` that names each failure."""
        if self._reached is not None:
            return self._reached
        told = "; ".join(
            f"{address.removesuffix(f'/p2p/{self._peer_id}')}: {why}"
            for address, why in self._failures.items()
        )
        self.failure = f"cannot reach {self._peer_id}: {told or 'no addresses'}"
        raise TransportError(self.failure)


def _reason(error: BaseException) -> str:
    """The innermost cause: the library wraps what happened in what it was doing."""
    while isinstance(error, BaseExceptionGroup) or error.__cause__ or error.__context__:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        else:
            error = error.__cause__ or error.__context__ or error
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return str(error) or type(error).__name__


def _stream_of(shown: INetStream) -> YamuxStream:
    muxed = shown.muxed_stream  # type: ignore[attr-defined]
    assert isinstance(muxed, LibraryStream), muxed
    return muxed.stream


def _place_of(address: str) -> places.Place | places.Circuit:
    """Raises `ValueError`."""
    return places.parse_circuit(address) if places.is_circuit(address) else places.parse(address)


# --- peer ids -----------------------------------------------------------------------


def _peer_id(peer: PeerId) -> ID:
    try:
        return ID.from_base58(peer)
    except ValueError:
        raise TransportError(f"{peer!r} is no peer id") from None
