"""The stored answers: from a key to a record, its blocks, and how long all that is kept.

An answer and its row are one transaction, done when `store` returns. Several answers to one key are
alternatives: this node's own comes first, then the one that most peers claimed, then the newest.
The room is bounded by the bytes of blocks; what was used longest ago goes first, and what is pinned
is kept for ever.

A fault of the database is a miss: it is logged, and nothing here raises for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from ..providers.base import Completion, Embedding
from . import answer_rows
from .answer_rows import AnswerStat, NewRow, Reach, Row, StoredAnswer
from .blocks import SqliteBlocks
from .cid import Cid, cid_of, digests_from, split, verify
from .database import Database
from .recent import Recent
from .record_bounds import RecordError
from .records import AnswerRecord, Blocks, Record, RecordHead, decode, encode, record_of
from .upkeep import Purged, Swept, purge, sweep

logger = logging.getLogger(__name__)

DAY = 86400.0
#: Seconds between two times that hits and uses are written down.
NOTED_EVERY = 30.0


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is kept, and for how long (s)."""

    max_bytes: int = 1_000_000_000
    default_ttl: float = DAY
    max_ttl: float = 7 * DAY


class AnswerCache:
    """The answers that this node holds. See the module."""

    def __init__(
        self,
        database: Database,
        blocks: SqliteBlocks,
        *,
        peer: str = "",
        limits: Limits | None = None,
    ) -> None:
        """`blocks` is over the same database; `peer` is this node."""
        self._database = database
        self._blocks = blocks
        #: How requests were answered; the router counts.
        self.uses = blocks.uses
        self._peer = peer
        self._limits = limits or Limits()
        self._recent = Recent()
        self._noted_at = 0.0

    # --- reading --------------------------------------------------------------------------------

    async def lookup(
        self,
        key: bytes,
        *,
        now: float,
        kind: type[Record] = AnswerRecord,
        max_age: float | None = None,
        weights: str | None = None,
        shared_only: bool = False,
    ) -> StoredAnswer | None:
        """The best answer to a key, or None.

        `kind`: of record that answers such a question. `max_age` (s): none that is older.
        `weights`: only of weights with that digest. `shared_only`: none that may not leave this
        node.
        """
        after = float("-inf") if max_age is None else now - max_age

        def lookup() -> StoredAnswer | None:
            stamp = self._database.stamp()
            recent = self._recent.get((key, weights, shared_only), stamp, now=now, after=after)
            if recent is not None and isinstance(recent.record, kind):
                digest = split(recent.cid.raw)[1]
                self.uses.block(digest)
                self.uses.hit(key, digest)
                return recent
            sql, wanted = answer_rows.LOOKUP, (key, now, after, weights, shared_only)
            for digest, stored_at, *known in self._database.rows(sql, wanted):
                record = self._record(digest, used=True)
                if isinstance(record, kind):
                    self.uses.hit(key, digest)
                    age = max(0.0, now - stored_at)
                    cid = Cid(cid_of(digest))
                    stored = StoredAnswer(cid, record, stored_at, age, *known)
                    if max_age is None:
                        self._recent.put((key, weights, shared_only), stored, stamp)
                    return stored
            return None

        return self._database.attempt("lookup", lookup, None)

    async def get(self, cid: bytes, *, now: float) -> StoredAnswer | None:
        """The answer that a CID names, expired or not; None if it is not here or no answer.

        Looking at it is no use of it: it may still be the next to be evicted.
        """
        digest = split(cid)[1]

        def get() -> StoredAnswer | None:
            record = self._record(digest, used=False)
            if record is None:
                return None
            found = self._database.row(answer_rows.BY_DIGEST, (digest,))
            stored_at, expires_at, source, size = found or (None, None, "", 0)
            age = None if stored_at is None else max(0.0, now - stored_at)
            return StoredAnswer(
                Cid(cid_of(digest)), record, stored_at, age, expires_at, source, size
            )

        return self._database.attempt("get", get, None)

    async def row(self, key: bytes, cid: bytes) -> Row | None:
        """What the index says of one answer to one key."""
        found = self._database.attempt(
            "row", lambda: self._database.row(answer_rows.ONE, (key, split(cid)[1])), None
        )
        return answer_rows.row(found) if found else None

    async def rows(self, cid: bytes) -> list[Row]:
        """What the index says of an answer: a row for each question that it is one to."""
        return self._listed(answer_rows.OF_ANSWER, (split(cid)[1],))

    async def listing(
        self,
        limit: int = 100,
        *,
        now: float,
        model: str | None = None,
        namespace: str | None = None,
    ) -> list[Row]:
        """The pinned ones, then the others, the last used first; of a model or namespace only."""
        await self.uses.write(now)
        return self._listed(answer_rows.LISTING, (now, limit, model, namespace))

    async def alternatives(self, cid: bytes, *, now: float) -> list[Row]:
        """The answers to the questions that this one answers, it among them, the best first."""
        wanted = (now, split(cid)[1], answer_rows.MAX_ALTERNATIVES)
        return self._listed(answer_rows.ALTERNATIVES, wanted)

    def _listed(self, sql: str, parameters: tuple[Any, ...]) -> list[Row]:
        found: list[Any] = self._database.attempt(
            "listing", lambda: self._database.rows(sql, parameters), []
        )
        return [answer_rows.row(values) for values in found]

    async def beginning(self, start: str) -> list[Cid]:
        """The answers whose CIDs begin with that text, two at most. Raises `ValueError` if none
        could."""
        between = digests_from(start)
        found: list[Any] = self._database.attempt(
            "looking for a CID", lambda: self._database.rows(answer_rows.BETWEEN, between), []
        )
        return [Cid(cid_of(digest)) for (digest,) in found]

    async def stat(self, *, now: float) -> AnswerStat:
        """What is held and what it saved."""
        await self.uses.write(now)
        found = self._database.attempt(
            "stat", lambda: self._database.row(answer_rows.STAT), (0,) * 12
        )
        return AnswerStat(*found[:3], self._limits.max_bytes, *found[3:])

    async def reach(self, cid: bytes) -> Reach:
        """How far a block, a root or a leaf, may go; nowhere if the CID is none of ours."""
        try:
            digest = split(cid)[1]
        except ValueError:
            return Reach()
        rows: list[tuple[str | None]] = self._database.attempt(
            "permission", lambda: self._database.rows(answer_rows.REACH, (digest,)), []
        )
        found = {row[0] for row in rows}
        return Reach(frozenset(name for name in found if name is not None), None in found)

    # --- writing --------------------------------------------------------------------------------

    async def store(
        self,
        key: bytes,
        content: Completion | Embedding,
        *,
        model: str,
        weights: str | None = None,
        engine: str | None = None,
        numerics: str | None = None,
        now: float,
        age: float = 0.0,
        ttl: float | None = None,
        source: str = "",
        namespace: str = "",
        shared: bool = True,
        seconds: float | None = None,
        money: float | None = None,
    ) -> StoredAnswer | None:
        """Keep a whole answer or an embedding for `ttl` seconds; return it once it is written.

        None if it was not stored: a filtered answer, one that has no record, a `ttl` of nothing, a
        fault. `age` (s): it was made that long ago; `source` is the peer that computed it;
        `shared`: may it leave this node? `seconds` and `money` (US dollars) are what it took to
        compute, and what each hit will save.
        """
        head = RecordHead(model=model, weights=weights, engine=engine, numerics=numerics)
        record = record_of(content, head)
        try:
            blocks = encode(record)
        except RecordError as error:
            logger.info("an answer is not stored: %s", error)
            return None
        expires_at = now + min(
            self._limits.default_ttl if ttl is None else ttl, self._limits.max_ttl
        )
        own = source in ("", self._peer)
        new = NewRow(
            source or self._peer, own, 0, namespace, shared, now - age, expires_at, seconds, money
        )
        if not self._keep(key, record, blocks, new, now):
            return None
        cid = Cid(blocks.cid)
        return StoredAnswer(
            cid, record, now - age, age, expires_at, new.source, blocks.size, seconds, money
        )

    async def adopt(
        self,
        key: bytes,
        cid: bytes,
        blocks: Mapping[bytes, bytes],
        *,
        now: float,
        made_at: float,
        expires_at: float,
        source: str,
        kind: type[Record] = AnswerRecord,
        claimed: int = 1,
        namespace: str = "",
    ) -> StoredAnswer:
        """Keep an answer that peers claimed, from its blocks by CID, the root and its leaves.

        Given back also where it cannot be stored. Raises `RecordError` if the blocks are not a
        record of that kind with that CID.
        """
        root = blocks.get(cid)
        if root is None or not verify(cid, root):
            raise RecordError("the block is not what its CID names")
        record = decode(root, blocks.get)
        if not isinstance(record, kind):
            raise RecordError("the record is not of the kind that was asked for")
        again = encode(record)
        expires_at = min(expires_at, now + self._limits.max_ttl)
        made_at = min(made_at, now)
        new = NewRow(source, source == self._peer, claimed, namespace, True, made_at, expires_at)
        self._keep(key, record, again, new, now)
        return StoredAnswer(
            Cid(cid), record, made_at, now - made_at, expires_at, source, again.size
        )

    async def pin(self, cid: bytes) -> bool:
        """Keep it for ever. Is it there?"""
        return await self._blocks.pin(cid)

    async def unpin(self, cid: bytes) -> bool:
        """Let it expire and be evicted like any other. Is it there?"""
        return await self._blocks.pin(cid, False)

    async def remove(self, cid: bytes) -> bool:
        """Forget it, pinned or not, for every key. Was it there?"""
        return await self._blocks.delete(cid)

    async def purge(self, *, model: str | None = None, namespace: str | None = None) -> Purged:
        """Forget the answers of a model, of a namespace, or of a model in a namespace.

        What is pinned stays: whoever pinned it asked for just that.
        """
        return await purge(self._database, model=model, namespace=namespace)

    # --- upkeep ---------------------------------------------------------------------------------

    async def maintain(self, now: float) -> Swept:
        """One round: expiry, eviction, checkpoint. Never raises."""
        if not 0 <= now - self._noted_at < NOTED_EVERY:
            self._noted_at = now
            await self.uses.write(now)
        return await sweep(self._database, self._blocks, now=now, max_bytes=self._limits.max_bytes)

    async def run(self, *, interval: float = 1.0, clock: Callable[[], float] = time.time) -> None:
        """`maintain` every so many seconds, until cancelled."""
        try:
            while True:
                await self.maintain(clock())
                await trio.sleep(interval)
        finally:
            with trio.move_on_after(1) as cleanup:
                cleanup.shield = True
                await self.uses.write(clock())

    # --- inside ---------------------------------------------------------------------------------

    def _record(self, digest: bytes, *, used: bool) -> Record | None:
        """Raises `sqlite3.Error`."""
        root = self._blocks.read(digest, used=used)
        if root is None:
            return None
        try:
            return decode(root, lambda cid: self._blocks.read(split(cid)[1], used=used))
        except RecordError as error:
            # A leaf was damaged, or somebody else put a block that is no record.
            logger.info("%s is no answer: %s", Cid(cid_of(digest)).text, error)
            return None

    def _keep(self, key: bytes, record: Record, blocks: Blocks, new: NewRow, now: float) -> bool:
        if new.expires_at <= now:
            return False
        root = split(blocks.cid)[1]

        def keep() -> bool:
            with self._database.transaction() as connection:
                self._blocks.write(connection, blocks.blocks, now)
                connection.executemany(
                    "INSERT INTO link VALUES (?, ?) ON CONFLICT DO NOTHING",
                    [(root, split(cid)[1]) for cid, _ in blocks.blocks[1:]],
                )
                answer_rows.insert(connection, key, root, record, blocks.size, new)
            return True

        return self._database.attempt("store", keep, False)
