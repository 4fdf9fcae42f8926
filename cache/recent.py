"""Answers found lately, kept ready in memory for as long as nothing in the file has changed.

Finding an answer in the file, checking it against its CID and taking it apart costs ten times as
much as answering from here. What is here is what a lookup in the file gave, under the stamp that
the file had then (`Database.stamp`): after any change, by this process or another, nothing of it
counts any more. So nobody who writes has to think of it.
"""

from __future__ import annotations

import msgspec

from .answer_rows import StoredAnswer
from .database import Stamp

#: Bytes of blocks whose answers are kept ready; what does not fit begins it anew.
MAX_BYTES = 8 * 1024 * 1024
#: Bytes of the largest answer that is: one block, whose use is noted with one digest.
MAX_SIZE = 64 * 1024

#: (key, weights or None, only those that may leave)
Wanted = tuple[bytes, str | None, bool]


class Recent:
    """The best answer to each question that was asked since the file last changed."""

    def __init__(self) -> None:
        self._stamp: Stamp | None = None
        self._answers: dict[Wanted, StoredAnswer] = {}
        self._bytes = 0

    def get(self, wanted: Wanted, stamp: Stamp, *, now: float, after: float) -> StoredAnswer | None:
        """The answer, unless it is over, or older than `after`."""
        if stamp != self._stamp:
            self._begin(stamp)
            return None
        stored = self._answers.get(wanted)
        if stored is None or stored.stored_at is None or stored.expires_at is None:
            return None
        # Of one that is over, only the file knows if it is pinned.
        if stored.expires_at <= now or stored.stored_at < after:
            return None
        return msgspec.structs.replace(stored, age=max(0.0, now - stored.stored_at))

    def put(self, wanted: Wanted, stored: StoredAnswer, stamp: Stamp) -> None:
        """Keep what a lookup of the best answer, however old, gave under that stamp."""
        if stored.size > MAX_SIZE:
            return
        if stamp != self._stamp or self._bytes + stored.size > MAX_BYTES:
            self._begin(stamp)
        self._answers[wanted] = stored
        self._bytes += stored.size

    def _begin(self, stamp: Stamp) -> None:
        self._stamp = stamp
        self._answers.clear()
        self._bytes = 0
