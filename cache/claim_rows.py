"""What the index of claims gives and keeps, and the SQL for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from . import ranges
from .claims import MAX_LIFE, MAX_SKEW, Batch
from .database import Database
from .ranges import Range

#: Claims in the live batches of one peer; what it says beyond that is not kept.
MAX_CLAIMS = 5000
#: Peers whose claims are kept.
MAX_PEERS = 1024
#: Ranges of numbers told of one peer. Of more, those are sent once again that are left out.
MAX_RANGES = 16
#: Claims to one key that are looked at.
MAX_FOUND = 256


class Claim(NamedTuple):
    """A peer says that it has a block with the answer. Times in seconds since 1970."""

    peer: str
    cid: bytes
    size: int
    made_at: int
    expires_at: int


class Version(NamedTuple):
    """Which batches of a peer are here."""

    epoch: int
    #: (first, last) number, both inside.
    numbers: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Ingested:
    """What became of an envelope.

    `new` was taken; `known` was here already; `own` is this node's; `stale` is of an older epoch or
    over; `full` could be sound, but there is no room for it here; `refused` is malformed, not
    signed or of another time; `equivocation` is the second of two batches with one number, and
    `evidence` holds both envelopes.
    """

    status: Literal["new", "known", "own", "stale", "full", "refused", "equivocation"]
    peer: str = ""
    #: Claims that were taken.
    claims: int = 0
    reason: str = ""
    evidence: tuple[bytes, ...] = ()


@dataclass(slots=True)
class Held:
    """What is remembered of a publisher's epoch, so that its rows need not be counted."""

    epoch: int
    numbers: list[Range] = field(default_factory=list)
    claims: int = 0


#: (key, now, limit) -> `Claim`s.
LOOKUP = """
    SELECT p.peer, c.cid, c.size, c.made_at, c.expires_at
    FROM claim AS c JOIN publisher AS p ON p.id = c.publisher
    WHERE c.key = ? AND c.expires_at > ? LIMIT ?"""
#: Of two claims of a peer that say the same, the one that holds longer stays.
CLAIM = """
    INSERT INTO claim (key, publisher, cid, size, made_at, expires_at) VALUES (?, ?, ?, ?, ?, ?)
    ON CONFLICT DO UPDATE SET
        size = excluded.size, made_at = excluded.made_at, expires_at = excluded.expires_at
        WHERE excluded.expires_at > expires_at"""
#: The epoch of this node's own batches and the number of the last.
NUMBERING = "SELECT epoch, number FROM numbering"
PUBLISHERS = "SELECT id, peer, epoch FROM publisher"
#: (publisher, first, last, now, limit) -> live envelopes of these numbers.
NEWEST = """
    SELECT envelope FROM batch
    WHERE publisher = ? AND number BETWEEN ? AND ? AND expires_at > ?
    ORDER BY number DESC LIMIT ?"""
#: (now, limit): some of what is over.
EXPIRE = (
    """DELETE FROM claim WHERE (key, publisher, cid) IN (
        SELECT key, publisher, cid FROM claim WHERE expires_at <= ? LIMIT ?)""",
    """DELETE FROM batch WHERE (publisher, number) IN (
        SELECT publisher, number FROM batch WHERE expires_at <= ? LIMIT ?)""",
)
#: Who has nothing left to say.
SILENT = """
    DELETE FROM publisher WHERE NOT EXISTS (SELECT 1 FROM batch WHERE publisher = publisher.id)"""


def held(database: Database, publisher: int, epoch: int) -> Held:
    """What the live batches of a publisher are. Raises `sqlite3.Error`."""
    found = database.rows(
        "SELECT number, entries FROM batch WHERE publisher = ? ORDER BY number", (publisher,)
    )
    return Held(epoch, ranges.of(row[0] for row in found), sum(row[1] for row in found))


def own_numbers(database: Database) -> list[Range]:
    """The numbers of this node's batches in its epoch. Raises `sqlite3.Error`."""
    found = database.row(NUMBERING)
    return [(1, found[1])] if found and found[1] else []


def untimely(batch: Batch, now: float) -> str | None:
    """What is wrong with its times, if anything."""
    for entry in batch.entries:
        if entry.made_at > now + MAX_SKEW:
            return "a claim that was made in the future"
        if not entry.made_at < entry.expires_at <= entry.made_at + MAX_LIFE:
            return "a claim that holds for too long, or not at all"
    return None
