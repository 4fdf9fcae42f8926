"""Whom to ask for a block, and for what of it. Pure: told the time.

As a Kubo does it: one peer is asked for the block, the others only whether they have it; who has it
is asked for the block when the one before does not deliver. Foreign peers come first: members of
the mesh have been heard of by their claims already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .transport import PeerId

#: Peers that are asked for one block at all.
MAX_ASKED = 64
#: Seconds for which a peer that was asked for the block is the only one.
PATIENCE = 1.0
#: Seconds for which only foreign peers are asked.
HEAD_START = 0.5


class Ask(NamedTuple):
    """Ask that peer for the block, or only whether it has it."""

    peer: PeerId
    have: bool


@dataclass(slots=True)
class _Asked:
    """What is known of a peer that was asked."""

    has: bool = False
    lacks: bool = False
    #: When it was asked for the block itself.
    block_at: float = -math.inf


class Search:
    """The search for one block."""

    def __init__(self, now: float) -> None:
        self._began = now
        self._asked: dict[PeerId, _Asked] = {}

    @property
    def asked(self) -> Sequence[PeerId]:
        """Who may remember the want."""
        return list(self._asked)

    def has(self, peer: PeerId) -> None:
        """It says that it has the block."""
        if peer in self._asked:
            self._asked[peer].has = True

    def lacks(self, peer: PeerId) -> None:
        """It does not have it, or cannot be asked."""
        if peer in self._asked:
            self._asked[peer].lacks = True

    def gone(self, peer: PeerId) -> None:
        """It is not connected any more; when it comes back it can be asked again."""
        self._asked.pop(peer, None)

    def next_asks(
        self, foreign: Sequence[PeerId], members: Sequence[PeerId], now: float
    ) -> Sequence[Ask]:
        """Whom to ask now, of these connected peers; the best come first."""
        wave = list(foreign)
        if now >= self._began + HEAD_START or all(map(self._lacks, foreign)):
            wave += members
        asks: list[Ask] = []
        taken = self._is_awaited(now)
        ready = [peer for peer, asked in self._asked.items() if asked.has and not asked.lacks]
        for peer in ready:
            if not taken and self._asked[peer].block_at == -math.inf:
                asks.append(self._ask(peer, have=False, now=now))
                taken = True
        for peer in wave:
            if peer not in self._asked and len(self._asked) < MAX_ASKED:
                asks.append(self._ask(peer, have=taken, now=now))
                taken = True
        return asks

    def is_hopeless(self, peers: Sequence[PeerId]) -> bool:
        """Does none of these connected peers have it?"""
        return all(map(self._lacks, peers)) or (
            len(self._asked) >= MAX_ASKED and all(asked.lacks for asked in self._asked.values())
        )

    def next_time(self, now: float) -> float:
        """When to look again, if nothing happens before."""
        times = [self._began + HEAD_START]
        times += [asked.block_at + PATIENCE for asked in self._asked.values()]
        return min((time for time in times if time > now), default=math.inf)

    def _ask(self, peer: PeerId, *, have: bool, now: float) -> Ask:
        asked = self._asked.setdefault(peer, _Asked())
        if not have:
            asked.block_at = now
        return Ask(peer, have)

    def _is_awaited(self, now: float) -> bool:
        """Is there a peer from which the block may still come soon?"""
        return any(not a.lacks and now < a.block_at + PATIENCE for a in self._asked.values())

    def _lacks(self, peer: PeerId) -> bool:
        return peer in self._asked and self._asked[peer].lacks
