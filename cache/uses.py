"""When blocks and answers were last used: remembered at each use, written down now and then.

A write for each read would cost more than the read. What is lost when the process is killed is
half a minute of order in the eviction, and of hits in the statistics.
"""

from __future__ import annotations

from collections import Counter
from functools import partial

import trio

from .database import Database

#: Seconds within which a second use of a block is not written down.
SAME_USE = 60
#: Blocks and answers that are remembered; more are forgotten.
MAX_USES = 4096
#: Uses that are written down in one transaction, which takes 1 ms.
BATCH = 64


class Uses:
    """The uses since the last time that they were written down."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._blocks: set[bytes] = set()
        self._hits: Counter[tuple[bytes, bytes]] = Counter()

    def block(self, digest: bytes) -> None:
        """A block was read."""
        if len(self._blocks) < MAX_USES:
            self._blocks.add(digest)

    def hit(self, key: bytes, digest: bytes) -> None:
        """An answer was found by its key."""
        if len(self._hits) < MAX_USES:
            self._hits[key, digest] += 1

    async def write(self, now: float) -> None:
        """Write them down, a few at a time. Never raises."""
        hits, self._hits = list(self._hits.items()), Counter()
        blocks, self._blocks = list(self._blocks), set()
        await self._write(
            "UPDATE answer SET hits = hits + ? WHERE key = ? AND digest = ?",
            [(count, key, digest) for (key, digest), count in hits],
        )
        await self._write(
            "UPDATE block SET used_at = ? WHERE digest = ? AND used_at < ?",
            [(int(now), digest, int(now) - SAME_USE) for digest in blocks],
        )

    async def _write(self, sql: str, uses: list[tuple[int | bytes, ...]]) -> None:
        for start in range(0, len(uses), BATCH):
            some = partial(self._write_some, sql, uses[start : start + BATCH])
            self._database.attempt("noting uses", some, None)
            await trio.lowlevel.checkpoint()

    def _write_some(self, sql: str, uses: list[tuple[int | bytes, ...]]) -> None:
        with self._database.transaction() as connection:
            connection.executemany(sql, uses)
