"""What is known of a stored answer beside its record, and the SQL that reads and writes it."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from ..providers.base import Completion, Embedding
from .cid import Cid, cid_of
from .records import AnswerRecord, EmbeddingRecord, Record

#: Answers to one key that are kept; sampled ones, which nobody asks for again, can be many.
MAX_ALTERNATIVES = 64


class StoredAnswer(msgspec.Struct, frozen=True):
    """An answer from the cache. Times in seconds of the wall clock."""

    cid: Cid
    record: Record
    #: When it was made, as far as this node knows; None for a block that no key leads to.
    stored_at: float | None
    #: Seconds since then.
    age: float | None
    expires_at: float | None
    #: The peer that computed it.
    source: str
    #: Bytes of its blocks.
    size: int
    #: What computing it took (s) and cost (US dollars), where that is known here.
    seconds: float | None = None
    money: float | None = None

    @property
    def completion(self) -> Completion:
        """The answer. Who looks up embeddings gets those, and has no answer."""
        assert isinstance(self.record, AnswerRecord)
        return self.record.completion

    @property
    def embedding(self) -> Embedding:
        """The embedding, with the CID of its record and told to be stored."""
        assert isinstance(self.record, EmbeddingRecord)
        usage = msgspec.structs.replace(self.record.usage, cached=True)
        return msgspec.structs.replace(self.record.embedding, usage=usage, cid=self.cid_text)

    @property
    def cid_text(self) -> str:
        return self.cid.text


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the index: that an answer belongs to a key."""

    key: bytes
    cid: Cid
    model: str
    weights: str | None
    source: str
    own: bool
    #: How many peers claimed it when it was fetched; 0 for one that was not.
    claimed: int
    namespace: str
    #: May it leave this node?
    shared: bool
    tokens: int
    size: int
    seconds: float | None
    money: float | None
    hits: int
    stored_at: float
    expires_at: float
    used_at: float
    pinned: bool


@dataclass(frozen=True, slots=True)
class Reach:
    """How far a block may go. One that belongs to no answer here, and was not put, goes nowhere."""

    #: Of the answers that it belongs to and that may leave this node.
    namespaces: frozenset[str] = frozenset()
    #: Did a program put it?
    put: bool = False


@dataclass(frozen=True, slots=True)
class AnswerStat:
    """What the cache holds; and since it was begun, how requests were answered, and what it saved.

    Counted are the requests of this node's own programs: a peer counts its own. Seconds and money
    are known of what was computed for this node; of a peer's stored answer they count as nothing.
    """

    answers: int
    blocks: int
    bytes: int
    max_bytes: int
    #: Answers that are pinned.
    pinned: int
    hits_local: int
    hits_mesh: int
    coalesced: int
    misses: int
    bypassed: int
    tokens_saved: int
    seconds_saved: float
    money_saved: float

    @property
    def hits(self) -> int:
        return self.hits_local + self.hits_mesh


#: (key, now, made after, weights or None, only those that may leave) -> alternatives, best first.
LOOKUP = """
    SELECT a.digest, a.stored_at, a.expires_at, a.source, a.size, a.seconds, a.money
    FROM answer AS a JOIN block AS b ON b.digest = a.digest
    WHERE a.key = ?1 AND (a.expires_at > ?2 OR b.pinned) AND a.stored_at >= ?3
        AND (?4 IS NULL OR a.weights = ?4) AND (a.shared OR NOT ?5)
    ORDER BY a.own DESC, a.claimed DESC, a.stored_at DESC"""

#: (digest,) -> the row that was written last.
BY_DIGEST = """
    SELECT stored_at, expires_at, source, size FROM answer
    WHERE digest = ? ORDER BY stored_at DESC LIMIT 1"""

#: (digest of a root or a leaf,) -> the namespaces of the answers that it belongs to and that may
#: leave this node, and NULL if a program put it.
REACH = """
    SELECT NULL FROM block WHERE digest = ?1 AND put
    UNION SELECT namespace FROM answer WHERE shared AND digest IN (
        SELECT ?1 UNION ALL SELECT root FROM link WHERE leaf = ?1)"""

_ROW = """
    SELECT a.key, a.digest, a.model, a.weights, a.source, a.own, a.claimed, a.namespace, a.shared,
        a.tokens, a.size, a.seconds, a.money, a.hits, a.stored_at, a.expires_at, b.used_at, b.pinned
    FROM block AS b JOIN answer AS a ON a.digest = b.digest"""
#: (now, limit, model or None, namespace or None) -> the pinned, then the others that hold, the last
#: used first.
LISTING = f"""{_ROW}
    WHERE (a.expires_at > ?1 OR b.pinned) AND (?3 IS NULL OR a.model = ?3)
        AND (?4 IS NULL OR a.namespace = ?4)
    ORDER BY b.pinned DESC, b.used_at DESC LIMIT ?2"""
#: (now, digest, limit) -> the answers to the questions that it answers, best first.
ALTERNATIVES = f"""{_ROW}
    WHERE (a.expires_at > ?1 OR b.pinned OR a.digest = ?2)
        AND a.key IN (SELECT key FROM answer WHERE digest = ?2)
    ORDER BY a.own DESC, a.claimed DESC, a.stored_at DESC LIMIT ?3"""
#: (digest,) -> all rows of an answer: to which questions it is one.
OF_ANSWER = f"{_ROW} WHERE a.digest = ? ORDER BY a.own DESC, a.stored_at DESC"
#: (key, digest) -> one row.
ONE = f"{_ROW} WHERE a.key = ? AND a.digest = ?"

STAT = """
    SELECT answers, blocks, bytes, (
            SELECT count(*) FROM block AS b
            WHERE pinned = 1 AND EXISTS (SELECT 1 FROM answer WHERE digest = b.digest)),
        hits_local, hits_mesh, coalesced, misses, bypassed, tokens_saved, seconds_saved, money_saved
    FROM total"""

#: (least digest, greatest) -> two of the answers between.
BETWEEN = "SELECT DISTINCT digest FROM answer WHERE digest BETWEEN ? AND ? LIMIT 2"
#: (key, digest, limit) -> the next rows after that one, for going through all of them.
AFTER = """
    SELECT a.key, a.digest, a.model, a.namespace, b.pinned
    FROM answer AS a JOIN block AS b ON b.digest = a.digest
    WHERE (a.key, a.digest) > (?, ?) ORDER BY a.key, a.digest LIMIT ?"""

#: (now, limit) -> rows that expired; pinned answers do not.
EXPIRED = """
    SELECT a.key, a.digest FROM answer AS a JOIN block AS b ON b.digest = a.digest
    WHERE a.expires_at <= ? AND NOT b.pinned LIMIT ?"""
#: (limit,) -> what was used longest ago.
OLDEST = "SELECT digest, size FROM block WHERE pinned = 0 ORDER BY used_at LIMIT ?"

_INSERT = """
    INSERT INTO answer (key, digest, model, weights, source, own, claimed, namespace, shared,
        tokens, size, seconds, money, stored_at, expires_at)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT DO UPDATE SET
        source = iif(own, source, excluded.source), own = max(own, excluded.own),
        claimed = max(claimed, excluded.claimed), shared = max(shared, excluded.shared),
        seconds = coalesce(excluded.seconds, seconds), money = coalesce(excluded.money, money),
        stored_at = max(stored_at, excluded.stored_at), expires_at = excluded.expires_at"""
_SURPLUS = f"""
    DELETE FROM answer WHERE key = ?1 AND digest IN (
        SELECT a.digest FROM answer AS a JOIN block AS b ON b.digest = a.digest
        WHERE a.key = ?1 AND NOT b.pinned
        ORDER BY a.own DESC, a.stored_at DESC LIMIT -1 OFFSET {MAX_ALTERNATIVES})"""


@dataclass(frozen=True, slots=True)
class NewRow:
    """What whoever stores an answer says of it."""

    source: str
    own: bool
    claimed: int
    namespace: str
    shared: bool
    stored_at: float
    expires_at: float
    seconds: float | None = None
    money: float | None = None


def insert(
    connection: sqlite3.Connection,
    key: bytes,
    digest: bytes,
    record: Record,
    size: int,
    new: NewRow,
) -> None:
    """Write the row, over an older one of the same answer; the block must be there."""
    connection.execute(
        _INSERT,
        (
            key,
            digest,
            record.model,
            record.weights,
            new.source,
            new.own,
            new.claimed,
            new.namespace,
            new.shared,
            record.usage.total_tokens,
            size,
            new.seconds,
            new.money,
            new.stored_at,
            new.expires_at,
        ),
    )
    (count,) = connection.execute("SELECT count(*) FROM answer WHERE key = ?", (key,)).fetchone()
    if count > MAX_ALTERNATIVES:
        connection.execute(_SURPLUS, (key,))


def row(values: tuple[Any, ...]) -> Row:
    """A `Row` from the columns of `LISTING` or `ONE`."""
    found = Row(*values)
    return replace(
        found,
        cid=Cid(cid_of(values[1])),
        own=bool(found.own),
        shared=bool(found.shared),
        pinned=bool(found.pinned),
    )
