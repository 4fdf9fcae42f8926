"""Keeping `cache.sqlite` small: what expired goes, and for room what was used longest ago.

Rows go in small batches with a checkpoint of trio between them, so that nothing else waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import trio

from . import answer_rows
from .blocks import SqliteBlocks
from .database import Database

#: Rows that are deleted in one transaction, which takes 3 ms at most.
BATCH = 16
#: Share of the room that may be in use after some was made.
ROOM_USED = 0.95


@dataclass(frozen=True, slots=True)
class Swept:
    """What one round removed."""

    expired: int
    evicted: int


async def sweep(database: Database, blocks: SqliteBlocks, *, now: float, max_bytes: int) -> Swept:
    """One round: expired answers, then blocks down to `max_bytes`. Never raises."""
    expired = evicted = 0
    while gone := database.attempt("expiry", lambda: _expire(database, now), 0):
        expired += gone
        await trio.lowlevel.checkpoint()
    if _held(database) > max_bytes:
        while (surplus := _held(database) - max_bytes * ROOM_USED) > 0:
            gone = database.attempt("eviction", partial(_evict, database, blocks, surplus), 0)
            if not gone:
                break  # the rest is pinned
            evicted += gone
            await trio.lowlevel.checkpoint()
    database.attempt("shrinking", database.shrink, None)
    await database.checkpoint()
    return Swept(expired, evicted)


def _held(database: Database) -> int:
    held: int = database.attempt(
        "counting blocks", lambda: database.row("SELECT bytes FROM total")[0], 0
    )
    return held


def _expire(database: Database, now: float) -> int:
    expired = database.rows(answer_rows.EXPIRED, (now, BATCH))
    if not expired:
        return 0
    with database.transaction() as connection:
        connection.executemany("DELETE FROM answer WHERE key = ? AND digest = ?", expired)
    return len(expired)


def _evict(database: Database, blocks: SqliteBlocks, surplus: float) -> int:
    """Drop some of what was used longest ago, not much more than the surplus."""
    going = []
    for digest, size in database.rows(answer_rows.OLDEST, (BATCH,)):
        if surplus <= 0:
            break
        going.append(digest)
        surplus -= size
    return blocks.drop(going) if going else 0
