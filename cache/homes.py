"""Which nodes keep the claims to a key, where the mesh is too large for all to keep all.

By rendezvous hash: each member has a score for each key, and the best are its homes. Everybody who
knows the same members finds the same homes without asking; where two know different ones, most of
the homes are still the same. One that joins takes over 3 of n keys, and one that leaves gives up
its own; nothing else moves.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Collection, Iterable

#: Members up to which everybody keeps every claim.
MAX_GOSSIPED = 64
#: Homes of a key.
COUNT = 3
#: Seconds for which a mesh must be small again before all keep all: members come and go.
SETTLED = 60.0


def homes(key: bytes, members: Iterable[str], count: int = COUNT) -> tuple[str, ...]:
    """The members that keep the claims to a key, the best first. Takes 0.4 us a member."""
    return tuple(heapq.nlargest(count, members, key=lambda member: _score(key, member)))


def homes_after(
    key: bytes,
    before: tuple[str, ...],
    members: Collection[str],
    joined: Iterable[str],
    count: int = COUNT,
) -> tuple[str, ...]:
    """`homes` of a key among these members, from what they were before some joined and left."""
    if len(before) < count or any(home not in members for home in before):
        return homes(key, members, count)
    return homes(key, (*before, *joined), count)


def _score(key: bytes, member: str) -> bytes:
    return hashlib.sha256(key + member.encode()).digest()


class Size:
    """Whether the mesh is so large that claims have homes. Told the time, in any seconds."""

    def __init__(self) -> None:
        self.large = False
        self._small_since: float | None = None

    def observe(self, members: int, now: float) -> bool:
        """The mesh has so many members now. Do claims have homes?

        At once if there are more than `MAX_GOSSIPED`; and not any more once there were no more than
        that for `SETTLED` seconds.
        """
        if members > MAX_GOSSIPED:
            self.large, self._small_since = True, None
        elif self.large:
            if self._small_since is None:
                self._small_since = now
            if now - self._small_since >= SETTLED:
                self.large, self._small_since = False, None
        return self.large
