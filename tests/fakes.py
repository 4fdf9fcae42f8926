"""A network in memory: the twin of `mesh/host.py`, held true by tests/mesh/test_transport_contract.

    async def test_something(nursery: trio.Nursery) -> None:
        network = MemoryNetwork(nursery)
        a, b = network.transport("a"), network.transport("b")
        await a.connect(b.peer_id, b.addresses)

The same name always gives the same peer id and keys. Nothing takes time but where a test asks for
it (`latency`) or somebody waits for a peer that does not answer (`cut`).
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import base58
import trio
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from promptmesh.mesh.transport import (
    ConnectionHandler,
    GossipHandler,
    NotSpoken,
    PeerId,
    Reach,
    Relaying,
    StreamHandler,
    TransportError,
)

log = logging.getLogger(__name__)

#: What a peer id holds before the 32 bytes of an Ed25519 public key.
ED25519_PEER_ID = bytes.fromhex("002408011220")
#: Bytes that one direction of a stream holds unread.
WINDOW = 256 * 1024
#: Bytes of the longest gossiped message.
MAX_MESSAGE = 64 * 1024
#: A reader that takes nothing for this long (s) is given up, as by yamux.
WINDOW_TIMEOUT = 5.0
#: Opening a stream to a peer that does not answer is given up after this long (s).
OPEN_TIMEOUT = 10.0


class MemoryNetwork:
    """Every node of a test. Stream handlers run in the nursery that the test gives."""

    def __init__(self, nursery: trio.Nursery, *, latency: float = 0.0) -> None:
        self.nursery = nursery
        #: Seconds from one node to another: connecting and a ping take twice that.
        self.latency = latency
        self._transports: dict[PeerId, MemoryTransport] = {}
        self._cut: set[frozenset[PeerId]] = set()
        self._change = trio.Event()
        self._numbers = itertools.count()

    def transport(self, name: str) -> MemoryTransport:
        """A new node. After `aclose` the name may be used again: the node has come back."""
        transport = MemoryTransport(self, name, number=len(self._transports) + 1)
        old = self._transports.get(transport.peer_id)
        if old is not None:
            assert old.closed, f"{name} is there already"
            transport.addresses = old.addresses
        self._transports[transport.peer_id] = transport
        self.nursery.start_soon(transport._hear)
        return transport

    def cut(self, a: MemoryTransport, b: MemoryTransport | None = None) -> None:
        """A black hole: nothing passes between the two (or `a` and anyone), and nobody is told."""
        self._cut.add(frozenset((a.peer_id, b.peer_id if b else "")))

    def heal(self, a: MemoryTransport, b: MemoryTransport | None = None) -> None:
        """End that `cut`. What was sent on streams meanwhile arrives."""
        self._cut.discard(frozenset((a.peer_id, b.peer_id if b else "")))
        for transport in self._transports.values():
            for end in list(transport._ends):
                end.link.settle()
        self._changed()

    def passes(self, a: PeerId, b: PeerId) -> bool:
        """Can the two hear each other?"""
        pairs = frozenset((a, b)), frozenset((a, "")), frozenset((b, ""))
        return self._cut.isdisjoint(pairs)

    async def _wait_passes(self, a: PeerId, b: PeerId, alive: Callable[[], bool]) -> None:
        while alive() and not self.passes(a, b):
            await self._change.wait()

    def _changed(self) -> None:
        self._change.set()
        self._change = trio.Event()

    def _at(self, address: str) -> MemoryTransport | None:
        """The node that listens there."""
        for transport in self._transports.values():
            if not transport.closed and _place(transport.addresses[0]) == _place(address):
                return transport
        return None


class MemoryTransport:
    """One node's end of a `MemoryNetwork`: a `Transport`."""

    def __init__(self, network: MemoryNetwork, name: str, *, number: int) -> None:
        self.network = network
        self.name = name
        self.closed = False
        #: Which program it says it is.
        self.program = "promptmesh"
        #: How often this node was dialled.
        self.dialled = 0
        self.reachability: Reach = "unknown"
        self.relaying: Relaying | None = None
        self._key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())
        public = self._key.public_key().public_bytes_raw()
        self.peer_id: PeerId = base58.b58encode(ED25519_PEER_ID + public).decode()
        self._ip = f"/ip4/10.0.{number // 250}.{number % 250 + 1}"
        self.addresses: Sequence[str] = (f"{self._ip}/tcp/7412/p2p/{self.peer_id}",)
        self._ends: list[_End] = []
        self._handlers: dict[str, StreamHandler] = {}
        self._handling: dict[trio.CancelScope, _End] = {}
        self._told: list[ConnectionHandler] = []
        self._topics: dict[str, GossipHandler] = {}
        self._heard: set[tuple[PeerId, int]] = set()
        self._gossip_in, self._gossip_out = trio.open_memory_channel[_Message](math.inf)

    def connected(self) -> Mapping[PeerId, str]:
        return {end.peer: end.address for end in reversed(self._ends)}

    def reroute(self, peer: PeerId, address: str) -> None:
        """A better connection to that peer replaces the one that there is."""
        self._end(peer).address = address

    def on_connection(self, handler: ConnectionHandler) -> None:
        self._told.append(handler)

    async def connect(self, peer: PeerId, addresses: Sequence[str], *, timeout: float = 8.0) -> str:
        await trio.lowlevel.checkpoint()
        known = self.connected().get(peer)
        if known is not None:
            return known
        failures: list[str] = []
        with trio.move_on_after(timeout):
            for address in addresses:
                failure = await self._dial(peer, address)
                if failure is None:
                    return address
                failures.append(f"{address}: {failure}")
        failures += [f"{address}: no answer in time" for address in addresses[len(failures) :]]
        raise TransportError(f"cannot reach {peer}: " + ("; ".join(failures) or "no addresses"))

    async def _dial(self, peer: PeerId, address: str) -> str | None:
        """Connect, or say what failed."""
        await trio.sleep(2 * self.network.latency)
        remote = self.network._at(address)
        if remote is None:
            return "connection refused"
        await self.network._wait_passes(self.peer_id, remote.peer_id, lambda: True)
        remote.dialled += 1
        if remote.closed or remote.peer_id != peer or self.peer_id == peer:
            return "another peer is there"
        link = _Link(self.network, self, remote, address)
        self._attach(link.ends[0])
        remote._attach(link.ends[1])
        return None

    async def disconnect(self, peer: PeerId) -> None:
        for end in [end for end in self._ends if end.peer == peer]:
            end.drop()
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def aclose(self) -> None:
        """Leave the network: its handlers are cancelled, and whom it was connected to sees it."""
        self.closed = True
        self._gossip_in.close()
        for end in list(self._ends):
            end.drop()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def _attach(self, end: _End) -> None:
        first = end.peer not in self.connected()
        self._ends.append(end)
        if first:
            self._tell(end.peer, True)

    def _detach(self, end: _End) -> None:
        self._ends.remove(end)
        for scope, handled in self._handling.items():
            if handled is end:
                scope.cancel()
        if end.peer not in self.connected():
            self._tell(end.peer, False)

    def _tell(self, peer: PeerId, connected: bool) -> None:
        for handler in list(self._told):
            handler(peer, connected)

    def _end(self, peer: PeerId) -> _End:
        for end in self._ends:
            if end.peer == peer:
                return end
        raise TransportError(f"not connected to {peer}")

    async def open_stream(self, peer: PeerId, *protocols: str) -> MemoryStream:
        await trio.lowlevel.checkpoint()
        end = self._end(peer)
        with trio.move_on_after(OPEN_TIMEOUT):
            await self.network._wait_passes(self.peer_id, peer, lambda: end.up)
            end.check()
            remote = end.other.owner
            protocol = next((p for p in protocols if p in remote._handlers), None)
            if protocol is None:
                raise NotSpoken(f"{peer} does not speak {' or '.join(protocols)}")
            mine, theirs = end.link.stream(end)
            mine.protocol = theirs.protocol = protocol
            self.network.nursery.start_soon(remote._serve, protocol, theirs)
            return mine
        raise TransportError(f"{peer} did not open a stream within {OPEN_TIMEOUT:g} s")

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        self._handlers[protocol] = handler

    async def _serve(self, protocol: str, stream: MemoryStream) -> None:
        finished = False
        try:
            with trio.CancelScope() as scope:
                self._handling[scope] = stream._end
                await self._handlers[protocol](stream)
                finished = True
        except Exception as error:  # the log shows it; the peer sees a reset
            log.warning("the handler of %s failed: %r", protocol, error)
        finally:
            self._handling.pop(scope, None)
            await (stream.aclose() if finished else stream.reset())

    async def agent(self, peer: PeerId) -> str:
        await trio.lowlevel.checkpoint()
        return self._end(peer).other.owner.program

    async def ping(self, peer: PeerId) -> float:
        started = trio.current_time()
        end = self._end(peer)
        await trio.sleep(2 * self.network.latency)
        await self.network._wait_passes(self.peer_id, peer, lambda: end.up)
        end.check()
        return trio.current_time() - started

    async def subscribe(self, topic: str, handler: GossipHandler) -> None:
        self._topics[topic] = handler
        await trio.lowlevel.checkpoint()

    async def publish(self, topic: str, data: bytes) -> None:
        if len(data) > MAX_MESSAGE:
            raise ValueError(f"{len(data)} bytes are too many for a gossiped message")
        # No number comes twice, also not after a restart.
        message = _Message(self.peer_id, next(self.network._numbers), topic, data)
        self._heard.add((message.origin, message.number))
        self._pass_on(message)
        await trio.lowlevel.checkpoint()

    async def flush(self) -> None:
        # What is published is in its receivers' queues already.
        await trio.lowlevel.checkpoint()

    def _pass_on(self, message: _Message) -> None:
        for peer in self.connected():
            remote = self._end(peer).other.owner
            if not remote.closed and self.network.passes(self.peer_id, peer):
                remote._gossip_in.send_nowait(message)

    async def _hear(self) -> None:
        """Give what is gossiped to the handlers, in order, and pass on what they accept."""
        async for message in self._gossip_out:
            handler = self._topics.get(message.topic)
            if handler is None or (message.origin, message.number) in self._heard:
                continue
            self._heard.add((message.origin, message.number))
            if handler(message.origin, message.data):
                self._pass_on(message)

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)

    def verify(self, peer: PeerId, data: bytes, signature: bytes) -> bool:
        try:
            raw = base58.b58decode(peer)
            if not raw.startswith(ED25519_PEER_ID):
                return False
            Ed25519PublicKey.from_public_bytes(raw[len(ED25519_PEER_ID) :]).verify(signature, data)
        except (ValueError, InvalidSignature):
            return False
        return True


class MemoryStream:
    """One end of a stream: a `Stream`."""

    def __init__(self, end: _End, *, outgoing: _Pipe, incoming: _Pipe) -> None:
        self._end = end
        self._outgoing = outgoing
        self._incoming = incoming
        self._sending = self._receiving = False
        self.protocol = ""
        self._address = end.address
        #: Why this end may not be used any more.
        self._over = ""

    @property
    def peer(self) -> PeerId:
        return self._end.peer

    @property
    def retired(self) -> bool:
        return self._end.address != self._address

    async def send_all(self, data: bytes) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task sends on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            await self._send(memoryview(data))
        except BaseException:  # a part may have gone: what follows would be garbage
            self._break("a send on this stream did not finish")
            raise
        finally:
            self._sending = False

    async def _send(self, rest: memoryview) -> None:
        pipe = self._outgoing
        while True:
            self._check(pipe)
            room = WINDOW - len(pipe.data)
            pipe.data += rest[:room]
            pipe.changed()
            rest = rest[room:]
            if not rest:
                return
            with trio.move_on_after(WINDOW_TIMEOUT) as limit:
                await pipe.wait()
            if limit.cancelled_caught:
                raise TransportError(f"the peer took nothing for {WINDOW_TIMEOUT:g} s")

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        if self._receiving:
            raise trio.BusyResourceError("another task receives from this stream")
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint()
            pipe = self._incoming
            while True:
                passes = self._end.link.passes
                if pipe.data and passes and not self._over:
                    taken = bytes(pipe.data[:max_bytes])
                    del pipe.data[:max_bytes]
                    pipe.changed()
                    return taken
                self._check(pipe)
                if pipe.finished and passes:
                    return b""
                await pipe.wait()
        finally:
            self._receiving = False

    def _check(self, pipe: _Pipe) -> None:
        if self._over:
            raise TransportError(self._over)
        self._end.check()
        if pipe.broken and self._end.link.passes:
            raise TransportError(f"{self.peer} reset the stream")

    async def aclose(self) -> None:
        if not self._over:
            self._over = "this stream was closed"
            self._outgoing.finished = True
            self._incoming.broken = True  # who sends to it learns that nobody listens
            self._wake()
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def reset(self) -> None:
        self._break("this stream was reset")
        await trio.lowlevel.cancel_shielded_checkpoint()

    def _break(self, why: str) -> None:
        self._over = self._over or why
        self._outgoing.broken = self._incoming.broken = True
        self._wake()

    def _wake(self) -> None:
        self._outgoing.changed()
        self._incoming.changed()


@dataclass(frozen=True)
class _Message:
    origin: PeerId
    number: int
    topic: str
    data: bytes


class _Pipe:
    """One direction of a stream."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.finished = False
        self.broken = False
        self._change = trio.Event()

    def changed(self) -> None:
        self._change.set()
        self._change = trio.Event()

    async def wait(self) -> None:
        await self._change.wait()


class _Link:
    """A connection. A `cut` holds back what its ends do, until it is healed."""

    def __init__(
        self, network: MemoryNetwork, a: MemoryTransport, b: MemoryTransport, address: str
    ) -> None:
        self._network = network
        self._pipes: list[_Pipe] = []
        near, far = _End(self, a, b, address), _End(self, b, a, f"{a._ip}/tcp/40000")
        near.other, far.other = far, near
        self.ends = near, far

    @property
    def passes(self) -> bool:
        return self._network.passes(self.ends[0].peer, self.ends[1].peer)

    def stream(self, opener: _End) -> tuple[MemoryStream, MemoryStream]:
        there, back = _Pipe(), _Pipe()
        self._pipes += there, back
        return (
            MemoryStream(opener, outgoing=there, incoming=back),
            MemoryStream(opener.other, outgoing=back, incoming=there),
        )

    def settle(self) -> None:
        """Let both ends see what they may see now."""
        near, far = self.ends
        if self.passes and near.up != far.up:
            (near if near.up else far).drop()
        for pipe in self._pipes:
            pipe.changed()


class _End:
    """One node's end of a connection."""

    other: _End

    def __init__(
        self, link: _Link, owner: MemoryTransport, remote: MemoryTransport, address: str
    ) -> None:
        self.link = link
        self.owner = owner
        self.peer = remote.peer_id
        self.address = address
        self.up = True

    def check(self) -> None:
        """Raises `TransportError` if this end is down."""
        if not self.up:
            raise TransportError(f"the connection to {self.peer} was lost")

    def drop(self) -> None:
        """Be down; the other end learns it as soon as it can hear."""
        if self.up:
            self.up = False
            self.owner._detach(self)
            self.link.settle()
            self.owner.network._changed()


def _place(address: str) -> str:
    return address.partition("/p2p/")[0]
