"""What the index of claims gives and keeps, and the SQL for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from . import ranges
from .claims import MAX_LIFE, MAX_SKEW, Batch
from .database import Database
from .ranges import Range

#: Claims in the batches of one peer that are kept: the newest.
MAX_CLAIMS = 5000
#: Claims of all peers that are kept: 250 MB.
MAX_ALL_CLAIMS = 1_000_000
#: Peers whose claims are kept.
MAX_PEERS = 1024
#: Ranges of numbers told of one peer. Of more, those are sent once again that are left out.
MAX_RANGES = 16
#: Claims to one key that are looked at, and of those the newest of each peer.
MAX_FOUND, MAX_FOUND_OF_PEER = 256, 4
#: An epoch after all others: of who has no say, nothing is wanted.
NEVER = 2**53


class Claim(NamedTuple):
    """A peer says that it has a block with the answer. Times in seconds since 1970."""

    peer: str
    cid: bytes
    size: int
    made_at: int
    expires_at: int
    #: A copy of somebody else's answer.
    held: bool


class Version(NamedTuple):
    """Which batches of a peer are here."""

    epoch: int
    #: (first, last) number, both inside.
    numbers: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Ingested:
    """What became of an envelope.

    `new` was taken; `known` was here already; `own` is this node's; `stale` is of an older epoch or
    over; `early` is of the future, as one of the clocks is wrong; `full` could be sound, but there
    is no room for it here; `fast` came faster than a peer may tell; `silenced` is of a peer that
    has no say; `refused` is malformed, not signed, held for too long or told by another peer than
    its own; `equivocation` is the second of two batches with one number, and `evidence` holds both
    envelopes.
    """

    status: Literal[
        "new",
        "known",
        "own",
        "stale",
        "early",
        "full",
        "fast",
        "silenced",
        "refused",
        "equivocation",
    ]
    peer: str = ""
    #: Claims that were taken.
    claims: int = 0
    reason: str = ""
    evidence: tuple[bytes, bytes] | None = None


@dataclass(slots=True)
class Held:
    """What is remembered of a publisher's epoch, so that its rows need not be counted."""

    epoch: int
    numbers: list[Range] = field(default_factory=list)
    claims: int = 0


#: (key, now, of each peer, limit) -> `Claim`s; of what a peer says of a key, the newest.
LOOKUP = """
    SELECT peer, cid, size, made_at, expires_at, held FROM (
        SELECT p.peer, c.cid, c.size, c.made_at, c.expires_at, c.held,
            row_number() OVER (PARTITION BY c.publisher ORDER BY c.made_at DESC, c.cid) AS nth
        FROM claim AS c JOIN publisher AS p ON p.id = c.publisher
        WHERE c.key = ? AND c.expires_at > ?)
    WHERE nth <= ? LIMIT ?"""
#: (key, CID, now) -> how many peers claim that.
SOURCES = "SELECT count(*) FROM claim WHERE key = ? AND cid = ? AND expires_at > ?"
#: (key, now, limit) -> the envelopes that say so, the newest claims first.
ENVELOPES = """
    SELECT DISTINCT b.envelope FROM (
        SELECT publisher, number, made_at FROM claim
        WHERE key = ? AND expires_at > ? ORDER BY held, made_at DESC LIMIT ?) AS c
    JOIN batch AS b ON b.publisher = c.publisher AND b.number = c.number"""
#: That somebody computed an answer stays, whatever else it says of it; of two claims that say the
#: same, the one that holds longer.
CLAIM = """
    INSERT INTO claim (key, publisher, cid, size, made_at, expires_at, held, number)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT DO UPDATE SET
        size = excluded.size, made_at = excluded.made_at, expires_at = excluded.expires_at,
        held = excluded.held, number = excluded.number
        WHERE excluded.held < held OR (excluded.held = held AND excluded.expires_at > expires_at)"""
#: (publisher, before) -> its batches before that number, the oldest first.
OLDEST = "SELECT number, entries FROM batch WHERE publisher = ? AND number < ? ORDER BY number"
#: (publisher, number): forget one batch.
DROP = (
    "DELETE FROM claim WHERE publisher = ? AND number = ?",
    "DELETE FROM batch WHERE publisher = ? AND number = ?",
)
#: (now, the key, its CID, this node) -> the live envelopes that claim that. This node's own claims
#: are in its batches only; nobody else's bytes hold that key by chance.
CLAIMING = """
    SELECT b.envelope FROM claim AS c
    JOIN batch AS b ON b.publisher = c.publisher AND b.number = c.number
    WHERE c.key = ?2 AND c.cid = ?3 AND c.expires_at > ?1
    UNION SELECT b.envelope FROM batch AS b JOIN publisher AS p ON p.id = b.publisher
    WHERE p.peer = ?4 AND b.expires_at > ?1 AND instr(b.envelope, ?2)"""
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


def early(batch: Batch, now: float) -> bool:
    """Was it made in the future? A wrong clock is no lie, and it may be this node's."""
    return any(entry.made_at > now + MAX_SKEW for entry in batch.entries)


def untimely(batch: Batch) -> str | None:
    """What is wrong with its times, if anything."""
    for entry in batch.entries:
        if not entry.made_at < entry.expires_at <= entry.made_at + MAX_LIFE:
            return "a claim that holds for too long, or not at all"
    return None
