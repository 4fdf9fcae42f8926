"""Who is in the mesh: the table of peers, by their adverts and connections. Pure: does no I/O.

What is not newer in (epoch, seq) than the last advert of a peer is dropped. An advert lives for its
`ttl` after it was received, by the receiver's own clock; who passes it on says how old it is. So
neither a wrong clock nor gossip that goes round brings back a node that is gone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import msgspec

from ..providers.base import ModelOffer
from .addresses import is_circuit
from .adverts import MAX_TTL, MIN_TTL, VERSION, Advert, ProviderAdvert, SignedAdvert
from .transport import PeerId

#: Peers in the table. A mesh is small; this bounds what members can make us keep.
MAX_PEERS = 2048
#: Seconds for which a peer that is gone is remembered, so that its old adverts stay old.
MEMORY = 3600.0
#: Seconds for which a peer that cannot be reached is shown after the last try to reach it.
LINGER = 120.0
#: Share of its life that the advert of a peer has left whose connection was lost: it is there to
#: others only if one of its next two comes by way of them.
LOST = 4 / 7
#: Seconds after which a node that has begun a new epoch says nothing in the older one any more,
#: whatever way that takes; and for which it is said that there are two of a peer.
LATE, TWIN_SHOWN = 15.0, 120.0


@dataclass(slots=True, eq=False)
class PeerState:
    """What this node knows of a peer. Times are this node's monotonic seconds."""

    peer: PeerId
    #: What it says of itself; None: nothing that still holds.
    advert: Advert | None = None
    sealed: SignedAdvert | None = None
    #: When its advert was made, as far as we know, and when it ends.
    made: float = 0.0
    expires: float = 0.0
    connected: bool = False
    #: The address of the connection.
    address: str = ""
    #: Since when it is connected, or not.
    since: float = 0.0
    #: Round trip in seconds.
    rtt: float | None = None
    #: Why it cannot be reached; "": it was not tried, or is connected.
    reason: str = ""
    #: When it was last found unreachable.
    failed: float = 0.0
    #: It said that it goes.
    left: bool = False
    #: When it was last heard in two epochs at once: two nodes have its identity.
    twin: float = -math.inf
    #: The name that it said last.
    name: str = ""
    #: The program of a peer that does not speak the mesh's protocol, such as `kubo/0.22.0`.
    agent: str = ""

    @property
    def foreign(self) -> bool:
        """Is it in the private network and no member of the mesh, as a Kubo is?"""
        return bool(self.agent) and self.advert is None

    @property
    def ttl(self) -> float:
        """Seconds for which its advert holds."""
        return 0.0 if self.advert is None else min(max(self.advert.ttl, MIN_TTL), MAX_TTL)

    @property
    def via(self) -> Literal["direct", "relayed", ""]:
        """How it is reached; "": it is not connected."""
        if not self.connected:
            return ""
        return "relayed" if is_circuit(self.address) else "direct"

    @property
    def state(self) -> Literal["connected", "known", "unreachable"]:
        if self.connected:
            return "connected"
        return "unreachable" if self.reason else "known"

    @property
    def node(self) -> str:
        """Its name, if it ever said one."""
        return self.advert.node if self.advert else self.name

    @property
    def providers(self) -> Sequence[ProviderAdvert]:
        return self.advert.providers if self.advert else ()


class Offered(NamedTuple):
    """A model that a peer's provider offers."""

    peer: PeerState
    provider: ProviderAdvert
    offer: ModelOffer


class _Past(NamedTuple):
    """The newest advert ever seen of a peer, when it was made, and until when it is remembered."""

    stamp: tuple[int, int]
    sealed: SignedAdvert
    made: float
    until: float
    #: When its epoch was first heard of, and the newest stamp of the one before.
    since: float
    before: tuple[int, int] | None


class PeerTable:
    """The peers of this node. Every method that depends on time is told it."""

    def __init__(self, own: PeerId) -> None:
        self.own = own
        #: Rises with each change of who offers what.
        self.version = 0
        self._peers: dict[PeerId, PeerState] = {}
        self._past: dict[PeerId, _Past] = {}
        self._index: dict[str, list[Offered]] = {}
        self._indexed = -1

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[PeerState]:
        return iter(list(self._peers.values()))

    def clear(self) -> None:
        """Forget everybody: this node leaves, and may enter another mesh."""
        self._peers.clear()
        self.version += 1

    def get(self, peer: PeerId) -> PeerState | None:
        return self._peers.get(peer)

    def name_of(self, peer: PeerId) -> str:
        """The name of its node, if no other that is there goes by the same; else ""."""
        state = self._peers.get(peer)
        if state is None or state.advert is None or not state.node:
            return ""
        same = sum(
            other.advert is not None and other.node == state.node for other in self._peers.values()
        )
        return state.node if same == 1 else ""

    # --- adverts

    def is_news(self, advert: Advert) -> bool:
        """Would `observe` take it? (asked before its signature is checked, which costs more)"""
        past = self._past.get(advert.peer)
        return (
            advert.v == VERSION
            and advert.peer not in ("", self.own)
            and (past is None or advert.stamp > past.stamp)
        )

    def observe(self, advert: Advert, sealed: SignedAdvert, now: float, age: float = 0.0) -> bool:
        """Take an advert whose signature holds, made `age` seconds ago. Was it news?"""
        ttl = min(max(advert.ttl, MIN_TTL), MAX_TTL)
        if not self.is_news(advert) or age >= ttl or not self._has_room(advert.peer):
            return False
        self._remember(advert, sealed, now, age)
        if advert.leaving:
            self._leave(advert.peer)
            return True
        peer = self._peers.get(advert.peer) or self._add(advert.peer, now)
        peer.advert, peer.sealed, peer.left, peer.agent = advert, sealed, False, ""
        peer.name = advert.node
        peer.made, peer.expires = now - age, now - age + ttl
        self.version += 1
        return True

    def _remember(self, advert: Advert, sealed: SignedAdvert, now: float, age: float) -> None:
        past = self._past.pop(advert.peer, None)  # their order is that of their last advert
        since, before = now, None if past is None else past.stamp
        if past is not None and past.stamp[0] == advert.epoch:
            since, before = past.since, past.before
        self._past[advert.peer] = _Past(
            advert.stamp, sealed, now - age, now + MEMORY, since, before
        )

    def is_twin(self, advert: Advert, now: float) -> bool:
        """Does its subject go on in an older epoch, though it has begun a newer one long ago?

        Then it is two nodes. For what comes by gossip: that is not passed on late.
        """
        past = self._past.get(advert.peer)
        return (
            past is not None
            and advert.epoch < past.stamp[0]
            and now > past.since + LATE
            and (past.before is None or advert.stamp > past.before)
        )

    def twin(self, peer: PeerId, now: float) -> bool:
        """Two nodes have the identity of that peer. Is that news?"""
        state = self._peers.get(peer)
        if state is None:
            return False
        news = now > state.twin + TWIN_SHOWN
        state.twin = now
        return news

    def expire(self, now: float) -> list[PeerId]:
        """Forget what has ended. Returns the peers that are out of the table."""
        gone = []
        for peer in self:
            if peer.advert is not None and now >= peer.expires:
                self._silence(peer)
            if peer.advert or peer.connected or (peer.reason and now < peer.failed + LINGER):
                continue
            del self._peers[peer.peer]
            gone.append(peer.peer)
        for name in [name for name, past in self._past.items() if now >= past.until]:
            if name not in self._peers:
                del self._past[name]
        return gone

    def relayed(self, asker: PeerId, now: float) -> list[SignedAdvert]:
        """The adverts to tell a peer that asks, each with its age.

        Its own newest one is among them though it may have ended: a node whose clock went back
        learns from it which epoch it must exceed, and one that has a twin that there is one.
        """
        adverts = [
            msgspec.structs.replace(peer.sealed, age=max(now - peer.made, 0.0))
            for peer in self._peers.values()
            if peer.sealed is not None and peer.peer != asker
        ]
        past = self._past.get(asker)
        if past is not None:
            adverts.append(msgspec.structs.replace(past.sealed, age=max(now - past.made, 0.0)))
        return adverts

    def _leave(self, name: PeerId) -> None:
        peer = self._peers.get(name)
        if peer is None:
            return
        self._silence(peer)
        peer.left = True
        if not peer.connected:
            del self._peers[name]

    def _silence(self, peer: PeerState) -> None:
        peer.advert = peer.sealed = None
        self.version += 1

    def _add(self, peer: PeerId, now: float) -> PeerState:
        state = self._peers[peer] = PeerState(peer, since=now)
        return state

    def _has_room(self, peer: PeerId) -> bool:
        """Room for one more, made by dropping one that is not connected where needed."""
        if peer not in self._peers and len(self._peers) >= MAX_PEERS:
            for name, state in self._peers.items():
                if not state.connected:
                    del self._peers[name]
                    self.version += 1
                    break
            else:
                return False
        if peer not in self._past and len(self._past) >= 4 * MAX_PEERS:
            del self._past[next(iter(self._past))]
        return True

    # --- connections

    def connected(self, peer: PeerId, address: str, now: float) -> None:
        """There is a connection."""
        self._has_room(peer)  # a connection is not refused for the table's sake
        state = self._peers.get(peer) or self._add(peer, now)
        if not state.connected:
            state.connected, state.since, state.rtt, state.left = True, now, None, False
        state.address, state.reason = address, ""
        self.version += 1

    def moved(self, peer: PeerId, address: str) -> bool:
        """The connection in use is to that address now. Is it another way than before?

        Two direct connections are the same way: both sides may have dialled.
        """
        state = self._peers.get(peer)
        if state is None or not state.connected or state.address == address:
            return False
        if not (is_circuit(state.address) or is_circuit(address)):
            return False
        state.address = address
        return True

    def is_foreign(self, peer: PeerId, agent: str) -> None:
        """A connected peer does not speak the mesh's protocol, and says it is that program."""
        state = self._peers.get(peer)
        if state is not None and state.advert is None:
            state.agent = agent.rstrip("/") or "unknown"

    def is_member(self, peer: PeerId) -> bool:
        """Is it known to be a member of the mesh?"""
        state = self._peers.get(peer)
        return state is not None and state.advert is not None

    def members(self) -> int:
        """How many peers are no foreign ones."""
        return sum(not peer.foreign for peer in self._peers.values())

    def disconnected(self, peer: PeerId, reason: str, now: float) -> None:
        """The last connection is gone."""
        state = self._peers.get(peer)
        if state is None or not state.connected:
            return
        state.connected, state.since, state.rtt = False, now, None
        state.reason, state.failed, state.address = reason, now, ""
        if state.advert is not None:
            state.expires = min(state.expires, now + LOST * state.ttl)
        self.version += 1
        if state.left:
            del self._peers[peer]

    def unreachable(self, peer: PeerId, reason: str, now: float) -> None:
        """It could not be connected to."""
        if peer == self.own or (peer not in self._peers and not self._has_room(peer)):
            return
        state = self._peers.get(peer) or self._add(peer, now)
        if not state.connected:
            state.reason, state.failed = reason[:500], now
            self.version += 1

    def answered(self, peer: PeerId, rtt: float) -> None:
        """It answered a ping."""
        state = self._peers.get(peer)
        if state is not None:
            state.rtt = rtt if state.rtt is None else 0.8 * state.rtt + 0.2 * rtt

    # --- what can be asked

    def offers(self, model: str) -> Sequence[Offered]:
        """Who says it has that model, whether it can be reached or not."""
        return self._by_model().get(model, ())

    def models(self) -> Mapping[str, Sequence[Offered]]:
        """All models, with who says it has them."""
        return self._by_model()

    def _by_model(self) -> dict[str, list[Offered]]:
        if self._indexed != self.version:
            self._index = {}
            for offered in self._offered():
                self._index.setdefault(offered.offer.id, []).append(offered)
            self._indexed = self.version
        return self._index

    def _offered(self) -> Iterable[Offered]:
        for peer in self._peers.values():
            for provider in peer.providers:
                for offer in provider.models:
                    yield Offered(peer, provider, offer)
