"""The network over py-libp2p: TCP, noise, yamux and gossipsub, as a `Transport`.

    async with open_host(HostSettings(seed=seed, psk=key, topics=frozenset({"/news"}))) as host:
        await host.connect(peer, addresses)

Each connection is a task. Leaving the context ends them all, within a second whatever they do.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import psutil  # type: ignore[import-untyped, unused-ignore]
import trio
from libp2p.abc import INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID

from . import gossipsub, patches
from .identity import Identity, verify
from .patches import LibraryHost, Network
from .streams import LibraryStream
from .transport import (
    BLOCKED,
    ConnectionHandler,
    GossipHandler,
    PeerId,
    Stream,
    StreamHandler,
    Transport,
    TransportError,
)
from .yamux import YamuxStream

log = logging.getLogger(__name__)

#: Seconds after which the next address is dialled beside the one before.
STAGGER = 0.3
#: Addresses of one peer that are dialled.
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
            place = _parse(address)
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
        self._library = LibraryHost(
            self.network, agent=settings.agent, addresses=lambda: self.addresses
        )
        self.gossip = gossipsub.Gossip(self._library, settings.topics)
        self._told: list[ConnectionHandler] = []
        self._dials: dict[PeerId, _Dial] = {}

    @property
    def addresses(self) -> Sequence[str]:
        at, addresses = self._addresses
        if trio.current_time() - at > ADDRESSES_AGE:
            places = _reachable(self._bound, _machine_addresses())
            addresses = tuple(f"{place}/p2p/{self.peer_id}" for place in places)
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
        with trio.move_on_after(timeout):
            while True:
                known = self.connected().get(peer)
                if known is not None:
                    return known
                dial = self._dials.get(peer)
                if dial is None:
                    return await self._dial(peer_id, addresses, timeout)
                await dial.over.wait()  # another task dials that peer: share what comes of it
                if dial.failure is not None:
                    raise TransportError(dial.failure)
        raise TransportError(f"cannot reach {peer} within {timeout:g} s")

    async def _dial(self, peer_id: ID, addresses: Sequence[str], timeout: float) -> str:
        peer = peer_id.to_base58()
        dial = self._dials[peer] = _Dial(self.network, peer_id, addresses[:MAX_ADDRESSES])
        try:
            # A little earlier than the caller's own limit, so that each failure is told.
            with trio.move_on_after(timeout * 0.95):
                await dial.run()
            return dial.result()
        finally:
            del self._dials[peer]
            dial.over.set()

    async def disconnect(self, peer: PeerId) -> None:
        try:
            peer_id = _peer_id(peer)
        except TransportError:
            return
        await self.network.close_peer(peer_id)

    # --- streams ----------------------------------------------------------------------------------

    async def open_stream(self, peer: PeerId, *protocols: str) -> Stream:
        return await patches.open_stream(self.network.link(_peer_id(peer)), protocols)

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
    """Dialling all addresses of a peer, each a little after the one before; the first wins."""

    def __init__(self, network: Network, peer_id: ID, addresses: Sequence[str]) -> None:
        self._network = network
        self._peer_id = peer_id
        self._failures = dict.fromkeys(addresses, "no answer in time")
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
            place = _parse(address)
            if place.peer not in (None, self._peer_id.to_base58()):
                raise ValueError("it is another peer's address")
            await self._network.dial(place.host, place.port, self._peer_id, address=address)
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
            f"{address.partition('/p2p/')[0]}: {why}" for address, why in self._failures.items()
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


# --- addresses and peer ids -----------------------------------------------------------------------


class _Place(NamedTuple):
    host: str
    port: int
    peer: PeerId | None


def _parse(address: str) -> _Place:
    """`/ip4/1.2.3.4/tcp/7412`, with or without `/p2p/PEERID`. Raises `ValueError`."""
    parts = address.split("/")
    if len(parts) not in (5, 7) or parts[0] or parts[3] != "tcp" or parts[5:6] not in ([], ["p2p"]):
        raise ValueError("not a TCP address")
    if parts[1] not in ("ip4", "ip6", "dns", "dns4", "dns6") or not parts[2]:
        raise ValueError(f"addresses of the kind {parts[1]} are not supported")
    if not parts[4].isdecimal() or int(parts[4]) > 65535:
        raise ValueError(f"{parts[4]} is no port")
    return _Place(parts[2], int(parts[4]), parts[6] if len(parts) == 7 else None)


def _peer_id(peer: PeerId) -> ID:
    try:
        return ID.from_base58(peer)
    except ValueError:
        raise TransportError(f"{peer!r} is no peer id") from None


def _machine_addresses() -> list[str]:
    """The IP addresses of this machine's network interfaces."""
    return [
        address.address.partition("%")[0]
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family.name in ("AF_INET", "AF_INET6")
    ]


def _reachable(bound: Iterable[tuple[str, int]], machine: Sequence[str]) -> list[str]:
    """Where others can dial what is bound to these places, on a machine with those addresses."""
    found: list[str] = []
    for host, port in bound:
        hosts = [host]
        if host in ("0.0.0.0", "::"):
            own = [a for a in machine if (":" in a) == (":" in host) and not _is_link_local(a)]
            hosts = [a for a in own if not _is_loopback(a)] or own
        found += [f"/{'ip6' if ':' in h else 'ip4'}/{h}/tcp/{port}" for h in hosts]
    return list(dict.fromkeys(found))


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _is_link_local(address: str) -> bool:
    return address.startswith(("169.254.", "fe80:"))
