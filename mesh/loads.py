"""How busy the peers' providers are, and who is about to choose one. Pure.

Times are monotonic seconds, told by the caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from .backend_id import BackendId
from .frames import Load
from .transport import PeerId

#: Seconds for which a peer may say that it is about to choose.
LONGEST_CHOICE = 0.5


class Busy(NamedTuple):
    """Requests of others (running and waiting), our own in flight, and how many run at once."""

    others: int = 0
    in_flight: int = 0
    slots: int = 1
    #: What it said last: how many were there, and the seconds until another would begin.
    told: int = 0
    wait: float | None = None
    #: Other nodes that were about to choose when it was told, and when that was.
    rivals: int = 0
    at: float = -math.inf

    @property
    def all(self) -> int:
        """How many are there now."""
        return self.others + self.in_flight


@dataclass(slots=True)
class _Seen:
    #: What others have running and waiting there, by the last report.
    others: int = 0
    slots: int = 1
    in_flight: int = 0
    #: How many it said were there, and how long another would wait.
    told: int = 0
    wait: float | None = None
    #: Other nodes that had just asked for its load when it was reported, and may choose it too.
    rivals: int = 0
    #: When it was reported; None: never.
    at: float | None = None


@dataclass(slots=True)
class Loads:
    """How busy the peers' providers are: what they said last, and this node's requests since.

    A peer counts our requests too, so those that were in flight when it spoke are taken off what it
    said, and those that are in flight now are counted by ourselves.
    """

    _seen: dict[BackendId, _Seen] = field(default_factory=dict)

    def begin(self, backend: BackendId) -> None:
        """A request of ours is sent."""
        self._of(backend).in_flight += 1

    def end(self, backend: BackendId) -> None:
        """Its last byte came, or it was given up."""
        self._of(backend).in_flight -= 1

    def report(
        self,
        backend: BackendId,
        load: Load,
        now: float,
        *,
        known: int | None = None,
        rivals: int = 0,
    ) -> None:
        """The peer said how busy it is.

        Of our requests it knew at most `known`: those sent after it was asked came too late.
        """
        seen = self._of(backend)
        ours = seen.in_flight if known is None else min(known, seen.in_flight)
        seen.told, seen.wait = load.running + load.waiting, load.wait
        seen.others = max(seen.told - ours, 0)
        seen.slots, seen.rivals, seen.at = load.slots, rivals, now

    def told(self, backend: BackendId) -> float | None:
        """When it was last reported; None: never."""
        seen = self._seen.get(backend)
        return seen.at if seen else None

    def in_flight(self, backend: BackendId) -> int:
        """Our own requests there."""
        seen = self._seen.get(backend)
        return seen.in_flight if seen else 0

    def get(self, backend: BackendId, advertised: Load) -> Busy:
        """How busy it is now; as advertised if it never said otherwise."""
        seen = self._seen.get(backend)
        if seen is None or seen.at is None:
            others = advertised.running + advertised.waiting
            return Busy(others, seen.in_flight if seen else 0, advertised.slots)
        return Busy(
            seen.others, seen.in_flight, seen.slots, seen.told, seen.wait, seen.rivals, seen.at
        )

    def any_full(self) -> bool:
        """Does any of those that said how busy they are have no free slot?"""
        return any(
            seen.others + seen.in_flight >= seen.slots
            for seen in self._seen.values()
            if seen.at is not None
        )

    def forget(self, peer: PeerId) -> None:
        """The peer is gone: what it said holds no more."""
        for backend in [b for b in self._seen if b.peer == peer]:
            if not self._seen[backend].in_flight:
                del self._seen[backend]

    def _of(self, backend: BackendId) -> _Seen:
        seen = self._seen.get(backend)
        if seen is None:
            seen = self._seen[backend] = _Seen()
        return seen


# --- others who choose --------------------------------------------------------------------------


class Choosing:
    """Peers that have asked how busy this node is, and are about to choose whom to ask.

    Nodes that look at the same moment see the same, and would all go to the same place. So each is
    told how many looked before it and may not have chosen yet.
    """

    def __init__(self) -> None:
        #: The model each asks for, and until when it may be choosing.
        self._askers: dict[PeerId, tuple[str, float]] = {}

    def enter(self, asker: PeerId, model: str, within: float, now: float) -> int:
        """It will have chosen within so many seconds. Returns how many others are choosing."""
        self._askers = {p: entry for p, entry in self._askers.items() if entry[1] > now}
        others = sum(entry[0] == model for p, entry in self._askers.items() if p != asker)
        self._askers[asker] = model, now + min(within, LONGEST_CHOICE)
        return others

    def chose(self, asker: PeerId) -> None:
        """Its request is here: it is counted as such."""
        self._askers.pop(asker, None)
