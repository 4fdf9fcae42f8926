"""Connects to the peers of the mesh, and to them again: bootstrap, found on the LAN, advertised.

Up to `FULL_MESH` nodes everyone is connected to everyone; above that, peers known by their adverts
are dialled when they are asked something. Of two nodes that know each other the one with the
smaller id dials first, the other only if that did not help; bootstrap addresses are dialled by all.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import trio

from .peers import PeerTable
from .transport import PeerId, Transport, TransportError

logger = logging.getLogger(__name__)

#: Nodes up to which everyone is connected to everyone.
FULL_MESH = 64
#: Seconds before the first and between the last tries to reach a peer again; doubled in between.
SHORTEST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
#: Seconds for which the side with the greater id lets the other one dial.
GRACE = 3.0
#: Dials at once.
MAX_DIALS = 8
#: Peers that are remembered for the next start; addresses of each.
MAX_KNOWN, MAX_ADDRESSES = 256, 16
#: Peers that are tried at all; it bounds what members can make us keep.
MAX_TARGETS = 4096
#: Seconds for which a peer is tried in vain before it is forgotten; if it was never met.
FORGET, FORGET_UNMET = 24 * 3600.0, 600.0
#: Seconds between two savings of the known peers.
SAVE_PAUSE = 1.0


def peer_of(address: str) -> PeerId:
    """The peer id at the end of a multiaddr. Raises `ValueError` if there is none."""
    _, found, peer = address.rpartition("/p2p/")
    if not found or not peer or "/" in peer:
        raise ValueError(f"the address {address} does not end in /p2p/PEERID")
    return peer


@dataclass(slots=True, eq=False)
class Target:
    """A peer to be connected to."""

    peer: PeerId
    addresses: tuple[str, ...] = ()
    bootstrap: tuple[str, ...] = ()
    #: Only known by its advert.
    advertised: bool = False
    #: It was connected once.
    met: bool = False
    failures: int = 0
    first_failure: float = 0.0
    next_try: float = math.inf
    #: It said that it goes: it comes back by itself.
    left: bool = False
    #: A dial is under way.
    dialling: bool = False

    @property
    def all_addresses(self) -> list[str]:
        """Where it may be, each once."""
        return list(dict.fromkeys((*self.bootstrap, *self.addresses)))[:MAX_ADDRESSES]


class Redials:
    """When to dial whom. Pure: told the time."""

    def __init__(self, own: PeerId, rng: Random) -> None:
        self._own = own
        self._rng = rng
        self._targets: dict[PeerId, Target] = {}

    def get(self, peer: PeerId) -> Target | None:
        return self._targets.get(peer)

    def add_bootstrap(self, address: str, now: float) -> None:
        """An address that a person gave. Raises `ValueError` if it names no peer."""
        target = self._target(peer_of(address))
        if target is not None:
            target.bootstrap = tuple(dict.fromkeys((*target.bootstrap, address)))
            target.next_try = min(target.next_try, now)

    def found(
        self, peer: PeerId, addresses: Sequence[str], now: float, *, advertised: bool = False
    ) -> bool:
        """A peer is, or was, at these addresses. Is that news worth remembering?"""
        new = peer not in self._targets
        target = self._target(peer)
        if target is None:
            return False
        target.left = False
        target.advertised = advertised and (new or target.advertised)
        moved = bool(set(addresses) - set(target.addresses))
        newest_first = dict.fromkeys((*addresses, *target.addresses))
        target.addresses = tuple(newest_first)[:MAX_ADDRESSES]
        if target.next_try == math.inf or moved:
            target.next_try = min(target.next_try, now + self._first_pause(target))
        return moved and target.met

    def known(self) -> dict[PeerId, list[str]]:
        """The peers to remember, the last met last."""
        met = {t.peer: t.all_addresses for t in self._targets.values() if t.met and t.all_addresses}
        return dict(list(met.items())[-MAX_KNOWN:])

    # --- what happened

    def connected(self, peer: PeerId) -> bool:
        """There is a connection. Is that news worth remembering?"""
        target = self._targets.pop(peer, None) or self._target(peer)
        if target is None:
            return False
        self._targets[peer] = target
        news = not target.met
        target.met, target.left, target.failures, target.next_try = True, False, 0, math.inf
        return news

    def disconnected(self, peer: PeerId, now: float) -> None:
        target = self._targets.get(peer)
        if target is not None and not target.left:
            target.next_try = now + self._first_pause(target)

    def failed(self, peer: PeerId, now: float) -> None:
        """It could not be reached."""
        target = self._targets.get(peer)
        if target is None:
            return
        if not target.failures:
            target.first_failure = now
        elif not target.bootstrap and now - target.first_failure > (
            FORGET if target.met else FORGET_UNMET
        ):
            del self._targets[peer]
            return
        pause = min(SHORTEST_PAUSE * 2.0 ** min(target.failures, 10), LONGEST_PAUSE)
        target.failures += 1
        target.next_try = now + pause * self._rng.uniform(0.75, 1.25)

    def left(self, peer: PeerId, now: float) -> None:
        """It said that it goes: it is not dialled any more, but for a bootstrap."""
        target = self._targets.get(peer)
        if target is not None:
            target.left = True
            target.next_try = now + LONGEST_PAUSE if target.bootstrap else math.inf

    def retry(self, peer: PeerId, now: float) -> None:
        """What kept it from being reached is over."""
        target = self._targets.get(peer)
        if target is not None and not target.left:
            target.failures, target.next_try = 0, now

    # --- what to do

    def due(self, now: float, connected: Iterable[PeerId], peers: int) -> list[Target]:
        """Whom to dial now, in a mesh of so many peers."""
        there = set(connected)
        return [
            target
            for target in self._targets.values()
            if now >= target.next_try
            and not target.dialling
            and target.peer not in there
            and target.all_addresses
            and (peers <= FULL_MESH or not target.advertised)
        ]

    def next_time(self, now: float) -> float:
        """When to look again."""
        waiting = (t.next_try for t in self._targets.values() if not t.dialling)
        return max(min((t for t in waiting if t > now), default=math.inf), now)

    def _first_pause(self, target: Target) -> float:
        if target.bootstrap or self._own < target.peer:
            return 0.0
        return GRACE

    def _target(self, peer: PeerId) -> Target | None:
        if peer == self._own:
            return None
        target = self._targets.get(peer)
        if target is None and self._has_room():
            target = self._targets[peer] = Target(peer)
        return target

    def _has_room(self) -> bool:
        """Room for one more, made by forgetting one that was never met where needed."""
        if len(self._targets) < MAX_TARGETS:
            return True
        for target in self._targets.values():
            if not (target.met or target.bootstrap or target.dialling):
                del self._targets[target.peer]
                return True
        return False


class Dialing:
    """Carries out what `Redials` says."""

    def __init__(
        self,
        transport: Transport,
        table: PeerTable,
        *,
        bootstrap: Sequence[str],
        known: Mapping[PeerId, Sequence[str]],
        save: Callable[[Mapping[PeerId, Sequence[str]]], None],
        rng: Random,
    ) -> None:
        self.redials = Redials(transport.peer_id, rng)
        self._transport = transport
        self._table = table
        self._save = save
        self._dials = trio.CapacityLimiter(MAX_DIALS)
        self._wake = trio.Event()
        self._unsaved = False
        for peer, addresses in known.items():
            self.redials.found(peer, addresses, -math.inf)
        for address in bootstrap:
            self.redials.add_bootstrap(address, -math.inf)

    # --- what happened

    def found(self, peer: PeerId, addresses: Sequence[str], *, advertised: bool = False) -> None:
        """A peer was found, on the LAN or by its advert."""
        self._unsaved |= self.redials.found(
            peer, addresses, trio.current_time(), advertised=advertised
        )
        self._wake.set()

    def connection(self, peer: PeerId, connected: bool) -> None:
        """A connection came or went."""
        if connected:
            self._unsaved |= self.redials.connected(peer)
        else:
            self.redials.disconnected(peer, trio.current_time())
        self._wake.set()

    def left(self, peer: PeerId) -> None:
        """A peer said that it goes."""
        self.redials.left(peer, trio.current_time())

    def retry(self, peer: PeerId) -> None:
        """Dial a peer again now."""
        self.redials.retry(peer, trio.current_time())
        self._wake.set()

    # --- what to do

    async def run(self) -> None:
        """Dial whoever is due, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._save_often)
            while True:
                now = trio.current_time()
                due = self.redials.due(now, self._transport.connected(), len(self._table))
                for target in due:
                    target.dialling = True
                    nursery.start_soon(self._dial, target)
                with trio.move_on_at(self.redials.next_time(now)):
                    await self._wake.wait()
                self._wake = trio.Event()

    async def reach(self, peer: PeerId) -> None:
        """Be connected to a peer that is about to be asked. Raises `TransportError`."""
        target = self.redials.get(peer)
        if target is None or not target.all_addresses:
            raise TransportError("no address of it is known")
        await self._connect(target)

    async def _dial(self, target: Target) -> None:
        try:
            async with self._dials:
                if target.peer not in self._transport.connected():
                    await self._connect(target)
        except TransportError as error:
            logger.debug("peer %s is not reachable: %s", target.peer, error)
        finally:
            target.dialling = False
            self._wake.set()

    async def _connect(self, target: Target) -> None:
        try:
            await self._transport.connect(target.peer, target.all_addresses)
        except TransportError as error:
            now = trio.current_time()
            self.redials.failed(target.peer, now)
            self._table.unreachable(target.peer, str(error), now)
            raise

    async def _save_often(self) -> None:
        try:
            while True:
                self._save_news()
                await trio.sleep(SAVE_PAUSE)
        finally:
            self._save_news()

    def _save_news(self) -> None:
        if self._unsaved:
            self._unsaved = False
            self._save(self.redials.known())
