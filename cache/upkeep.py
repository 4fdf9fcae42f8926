"""Keeping `cache.sqlite` small: what expired goes, and for room what was used longest ago.

And forgetting many answers at once.

Rows go in small batches with a checkpoint of trio between them, so that nothing else waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from . import answer_rows
from .blocks import SqliteBlocks
from .database import Database

#: Rows that are deleted in one transaction, which takes 3 ms at most.
BATCH = 16
#: Rows that are looked at in one go, which takes 1 ms.
LOOKED_AT = 256
#: Share of the room that may be in use after some was made.
ROOM_USED = 0.95


@dataclass(frozen=True, slots=True)
class Swept:
    """What one round removed."""

    expired: int
    evicted: int


@dataclass(frozen=True, slots=True)
class Purged:
    """What a purge removed, and what it left because it is pinned."""

    removed: int
    pinned: int


async def purge(database: Database, *, model: str | None, namespace: str | None) -> Purged:
    """Forget all answers but the pinned ones, of that model and namespace where given. Never
    raises."""
    removed = pinned = 0
    last = (b"", b"")
    while rows := _after(database, last):
        last = rows[-1][:2]
        matching = [row for row in rows if model in (None, row[2]) and namespace in (None, row[3])]
        going = [row[:2] for row in matching if not row[4]]
        pinned += len(matching) - len(going)
        for start in range(0, len(going), BATCH):
            some = partial(_delete, database, going[start : start + BATCH])
            removed += database.attempt("purge", some, 0)
            await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
    return Purged(removed, pinned)


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
    return _delete(database, expired) if expired else 0


def _after(database: Database, last: tuple[bytes, bytes]) -> list[Any]:
    wanted = (*last, LOOKED_AT)
    found: list[Any] = database.attempt(
        "purge", lambda: database.rows(answer_rows.AFTER, wanted), []
    )
    return found


def _delete(database: Database, rows: Sequence[tuple[bytes, bytes]]) -> int:
    with database.transaction() as connection:
        return connection.executemany(
            "DELETE FROM answer WHERE key = ? AND digest = ?", rows
        ).rowcount


def _evict(database: Database, blocks: SqliteBlocks, surplus: float) -> int:
    """Drop some of what was used longest ago, not much more than the surplus."""
    going = []
    for digest, size in database.rows(answer_rows.OLDEST, (BATCH,)):
        if surplus <= 0:
            break
        going.append(digest)
        surplus -= size
    return blocks.drop(going) if going else 0
