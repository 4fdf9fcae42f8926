"""When blocks and answers were last used, and how requests were answered: the statistics.

Both are remembered at each use and written down now and then, as a write for each read would cost
more than the read. What is lost when the process is killed is half a minute of order in the
eviction, and of counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Literal

import trio

from .database import Database

#: Seconds within which a second use of a block is not written down.
SAME_USE = 60
#: Blocks and answers that are remembered; more are forgotten.
MAX_USES = 4096
#: Uses that are written down in one transaction, which takes 1 ms.
BATCH = 64

#: How a request was answered: a column of `total`.
Kind = Literal["hits_local", "hits_mesh", "coalesced", "misses", "bypassed"]


class Uses:
    """The uses since the last time that they were written down."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._blocks: set[bytes] = set()
        self._hits: Counter[tuple[bytes, bytes]] = Counter()
        #: By column of `total`.
        self._counts: dict[str, float] = {}

    def block(self, digest: bytes) -> None:
        """A block was read."""
        if len(self._blocks) < MAX_USES:
            self._blocks.add(digest)

    def hit(self, key: bytes, digest: bytes) -> None:
        """An answer was found by its key."""
        if len(self._hits) < MAX_USES:
            self._hits[key, digest] += 1

    def count(
        self, kind: Kind, *, tokens: int = 0, seconds: float | None = 0, money: float | None = 0
    ) -> None:
        """A request was answered so, and saved that; what is not known counts as nothing."""
        self._add(kind, 1)
        self.saved(tokens=tokens, seconds=seconds, money=money)

    def saved(self, *, tokens: int = 0, seconds: float | None = 0, money: float | None = 0) -> None:
        """What a request saved, where that is known after it was counted."""
        self._add("tokens_saved", tokens)
        self._add("seconds_saved", seconds)
        self._add("money_saved", money)

    def _add(self, column: str, amount: float | None) -> None:
        if amount:
            self._counts[column] = self._counts.get(column, 0) + amount

    async def write(self, now: float) -> None:
        """Write them down, a few at a time. Never raises."""
        counts, self._counts = self._counts, {}
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

        for column, amount in counts.items():
            await self._write(f"UPDATE total SET {column} = {column} + ?", [(amount,)])

    async def _write(self, sql: str, uses: Sequence[tuple[float | bytes, ...]]) -> None:
        for start in range(0, len(uses), BATCH):
            some = partial(self._write_some, sql, uses[start : start + BATCH])
            self._database.attempt("noting uses", some, None)
            await trio.lowlevel.checkpoint()

    def _write_some(self, sql: str, uses: Sequence[tuple[float | bytes, ...]]) -> None:
        with self._database.transaction() as connection:
            connection.executemany(sql, uses)
