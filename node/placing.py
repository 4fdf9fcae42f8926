"""Puts this node's claims at the homes of their keys: in a mesh of more than 64 members.

Each home gets batches with only what it is a home of. As members come and go, homes change: what a
new home lacks is put there too, after what is new. All of it keeps to a budget of messages.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import trio

from ..cache.claims import MAX_ENTRIES, Entry
from ..cache.conduct import RATE, Bucket
from ..cache.homes import homes, homes_after
from ..mesh.frames import RemoteProtocolError
from ..mesh.transport import PeerId, TransportError
from .claim_network import ClaimNetwork, Link
from .claiming import Claiming, Group
from .telling import TOLD_AT_ONCE

logger = logging.getLogger(__name__)

#: Seconds between two messages to homes: as many as gossip of a large mesh has for claims.
PAUSE = 0.4
#: Seconds for a home to take claims, and until a home that did not is tried again.
PUT_TIME, RETRY = 5.0, 30.0
#: Claims whose homes are found in a row without letting others work: 5 ms among 1,000 members.
STEPS = 16


@dataclass(slots=True)
class _Placed:
    """A claim and its homes."""

    tag: bytes
    entry: Entry
    homes: tuple[PeerId, ...]


@dataclass(slots=True)
class _Home:
    """What a home is still to be told, by key and CID; what is new apart from what moved there."""

    pace: Bucket
    new: dict[tuple[bytes, bytes], None] = field(default_factory=dict)
    moved: dict[tuple[bytes, bytes], None] = field(default_factory=dict)
    not_before: float = 0.0


class Placing:
    """This node's claims, at their homes."""

    def __init__(self, link: Link, claiming: Claiming) -> None:
        self._link = link
        self._claiming = claiming
        self._members: frozenset[PeerId] = frozenset()
        self._placed: dict[tuple[bytes, bytes], _Placed] = {}
        self._homes: dict[PeerId, _Home] = {}

    @property
    def waiting(self) -> int:
        """Claims that homes are still to be told of, counted for each home."""
        return sum(len(home.new) + len(home.moved) for home in self._homes.values())

    def begin(self) -> None:
        """Claims have homes from now on: all that hold are to be placed."""
        self._members = frozenset()
        self._homes.clear()
        self._placed = {
            (entry.key, entry.cid): _Placed(tag, entry, ()) for tag, entry in self._claiming.live()
        }

    async def place(self) -> None:
        """Put something at one home, and pause as the budget wants it, or until there is more."""
        network = self._link.network
        home: PeerId | None = None
        if network is not None:
            await self._follow(network)
            await self._take_new()
            home = self._next()
            if home is not None:
                await self._put(network, home)
        if home is not None or self.waiting:
            await trio.sleep(PAUSE)
        else:
            await self._claiming.wait()

    async def _follow(self, network: ClaimNetwork) -> None:
        """See who came and went, and what that moves."""
        # This node is no home of its own claims: they are to outlive it.
        members = frozenset(network.member_ids()) - {self._link.peer}
        joined = members - self._members
        if members == self._members:
            return
        self._members = members
        for gone in self._homes.keys() - members:
            del self._homes[gone]
        now = self._link.clock()
        for number, (name, placed) in enumerate(list(self._placed.items())):
            if placed.entry.expires_at <= now:
                del self._placed[name]
                continue
            before = placed.homes
            placed.homes = homes_after(placed.entry.key, before, members, joined)
            for home in set(placed.homes).difference(before):
                self._home(home).moved[name] = None
            if number % STEPS == STEPS - 1:
                await trio.lowlevel.checkpoint()

    async def _take_new(self) -> None:
        # Kept whole in batches, too: what is not at its homes yet must outlive this process.
        self._claiming.sign_waiting()
        while (signed := self._claiming.take_signed()) is not None:
            tag, entries = signed[1]
            for number, entry in enumerate(entries):
                name = entry.key, entry.cid
                found = homes(entry.key, self._members)
                self._placed[name] = _Placed(tag, entry, found)
                for home in found:
                    self._home(home).new[name] = None
                if number % STEPS == STEPS - 1:
                    await trio.lowlevel.checkpoint()

    def _home(self, peer: PeerId) -> _Home:
        home = self._homes.get(peer)
        if home is None:
            home = self._homes[peer] = _Home(Bucket(TOLD_AT_ONCE, self._link.clock()))
        return home

    def _next(self) -> PeerId | None:
        """The home that waits longest, of those for which there is something new if there is."""
        now = self._link.clock()
        ready = [
            (not home.new, peer)
            for peer, home in self._homes.items()
            if (home.new or home.moved) and home.not_before <= now and self._allowed(home) >= 1
        ]
        return min(ready, key=lambda each: each[0])[1] if ready else None

    def _allowed(self, home: _Home, taken: int = 0) -> int:
        return int(home.pace.take(taken, self._link.clock(), rate=RATE, burst=TOLD_AT_ONCE))

    async def _put(self, network: ClaimNetwork, peer: PeerId) -> None:
        """Tell a home what it lacks, as much as it believes now."""
        home = self._homes.pop(peer)
        self._homes[peer] = home  # to the end of the row
        names = [*home.new, *(name for name in home.moved if name not in home.new)]
        names = names[: min(self._allowed(home), MAX_ENTRIES)]
        by_tag: dict[bytes, list[Entry]] = {}
        for name in names:
            if (placed := self._placed.get(name)) is not None and peer in placed.homes:
                by_tag.setdefault(placed.tag, []).append(placed.entry)
        signed = [self._claiming.sign(Group(tag, entries)) for tag, entries in by_tag.items()]
        envelopes = [envelope for envelope in signed if envelope is not None]
        if envelopes and not await self._told(network, peer, envelopes):
            home.not_before = self._link.clock() + RETRY
            return
        self._allowed(home, len(names))
        for name in names:
            home.new.pop(name, None)
            home.moved.pop(name, None)

    async def _told(self, network: ClaimNetwork, peer: PeerId, envelopes: list[bytes]) -> bool:
        try:
            with trio.move_on_after(PUT_TIME):
                await network.put_claims(peer, envelopes)
                return True
            logger.debug("home %s did not take claims in time", peer)
        except (TransportError, RemoteProtocolError) as error:
            logger.debug("home %s did not take claims: %s", peer, error)
        return False
