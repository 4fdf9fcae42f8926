"""What the mesh needs of a network, as a Protocol: the rest of `mesh` knows nothing more.

`mesh/host.py` fulfils it over py-libp2p; `tests/fakes.py` in memory. The same contract tests
(`tests/mesh/test_transport_contract.py`) run on both.

A peer is named by its peer id as text (`12D3Koo...`), an address by its multiaddr as text.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

PeerId = str
#: Can others dial this node? "unknown": nobody has tried yet.
Reach = Literal["reachable", "unreachable", "unknown"]
#: Why there is no connection to a peer that this node's owner does not want.
BLOCKED = "it is blocked on this node (`promptmesh peers allow`)"


class TransportError(Exception):
    """The network failed: not reachable, refused, reset, closed. The message says how."""


class NotSpoken(TransportError):
    """The peer is there, and speaks none of the protocols that were asked for."""


class Stream(Protocol):
    """An ordered byte stream to one authenticated peer. One reader and one writer at a time."""

    @property
    def peer(self) -> PeerId: ...

    @property
    def protocol(self) -> str:
        """What is spoken on it."""
        ...

    @property
    def retired(self) -> bool:
        """Is its connection about to end, because a better one replaces it? What runs on it may
        finish; what is new should have a new stream."""
        ...

    async def send_all(self, data: bytes) -> None:
        """Send it all. Raises `TransportError` if the peer is gone, reset the stream, or took
        nothing for some seconds.

        A send that does not finish, cancelled or failed, breaks the stream.
        """
        ...

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        """1 to `max_bytes` bytes, or `b""` at the end. Raises `TransportError` on a reset.

        Cancelled, it loses nothing, and the stream may be used on.
        An end proves nothing: a killed peer looks the same as a finished one.
        """
        ...

    async def aclose(self) -> None:
        """Finish sending and let the stream go; what the peer still sends, resets it.

        Never raises; safe while cancelled.
        """
        ...

    async def reset(self) -> None:
        """Abort in both directions, so that the peer stops. Never raises; safe while cancelled."""
        ...


StreamHandler = Callable[[Stream], Awaitable[None]]
#: (who signed the message, its bytes) -> may it be passed on? Must not block and must not raise.
GossipHandler = Callable[[PeerId, bytes], bool]
#: (peer, connected?) -> None, called on each change of being connected to a peer at all.
ConnectionHandler = Callable[[PeerId, bool], None]


class Relaying(NamedTuple):
    """What this node does as a relay: for whom it keeps a place, and the circuits through it."""

    places: Sequence[PeerId]
    #: From whom to whom, and how many of the same.
    circuits: Mapping[tuple[PeerId, PeerId], int]


class Transport(Protocol):
    """This node's end of the network. Opened and closed by who made it."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def addresses(self) -> Sequence[str]:
        """Where others can dial this node, each with `/p2p/PEERID`; also through relays."""
        ...

    @property
    def reachability(self) -> Reach:
        """Can others dial this node directly, as far as members have found?"""
        ...

    @property
    def relaying(self) -> Relaying | None:
        """What goes through this node; None: it is no relay."""
        ...

    def connected(self) -> Mapping[PeerId, str]:
        """The connected peers, each with the address of the connection (`""`: not known)."""
        ...

    def on_connection(self, handler: ConnectionHandler) -> None:
        """Call the handler at each first connection to, and last disconnection from, a peer."""
        ...

    async def connect(self, peer: PeerId, addresses: Sequence[str], *, timeout: float = 8.0) -> str:
        """Be connected to that peer: dials each address until one works, and returns it.

        Raises `TransportError` that names each address with its failure.
        """
        ...

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection to that peer. Never raises."""
        ...

    async def open_stream(self, peer: PeerId, *protocols: str) -> Stream:
        """A new stream to a connected peer, with the first of the protocols that it speaks.

        Raises `TransportError`; `NotSpoken` if it speaks none of them.
        """
        ...

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Serve that protocol. The stream is reset if the handler raises, else closed.

        The handler is cancelled when its connection is lost.
        """
        ...

    async def agent(self, peer: PeerId) -> str:
        """Which program a connected peer says it is: `promptmesh`, `kubo/0.22.0`; `""`: it says
        nothing. Raises `TransportError`."""
        ...

    async def ping(self, peer: PeerId) -> float:
        """The round trip in seconds. Raises `TransportError`; the caller sets the time limit."""
        ...

    async def subscribe(self, topic: str, handler: GossipHandler) -> None:
        """Hear a topic. The handler sees each message of others once, before it is passed on."""
        ...

    async def publish(self, topic: str, data: bytes) -> None:
        """Send to every subscriber. May be lost: gossip carries whole states, never changes.

        Raises `ValueError` for more than 64 KiB.
        """
        ...

    async def flush(self) -> None:
        """Wait until the connected peers have what was published; the caller sets the limit."""
        ...

    def sign(self, data: bytes) -> bytes:
        """This node's Ed25519 signature."""
        ...

    def verify(self, peer: PeerId, data: bytes, signature: bytes) -> bool:
        """Did that peer sign these bytes? False for anything malformed."""
        ...
