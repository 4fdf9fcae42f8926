"""The index of claims: which peers say that they have the answer to a key.

It is fed with envelopes from gossip and from neighbours, in any order and any number of times, and
answers without asking anybody. What it lacks it gets from a neighbour: `versions` says what is
here, `since` gives what somebody else lacks, page by page.

What an envelope costs is bounded: everything that needs no signature is looked at before it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import trio

from . import claim_rows, ranges
from .claim_rows import (
    MAX_ALL_CLAIMS,
    MAX_CLAIMS,
    MAX_FOUND,
    MAX_FOUND_OF_PEER,
    MAX_PEERS,
    MAX_RANGES,
    NEVER,
    Claim,
    Held,
    Ingested,
    Version,
)
from .claims import (
    Batch,
    ClaimError,
    Opened,
    Verify,
    begin_epoch,
    keep_batch,
    publisher_id,
    unseal,
)
from .conduct import Conduct
from .database import Database
from .ranges import Range

#: Rows that expire in one transaction, which takes 5 ms.
ROWS = 256


class ClaimIndex:
    """The claims of all others. Its faults are misses; what strangers send raises nothing."""

    def __init__(
        self, database: Database, *, peer: str, verify: Verify, conduct: Conduct | None = None
    ) -> None:
        """`peer` is this node."""
        self._database = database
        self._peer = peer
        self._verify = verify
        self._conduct = conduct or Conduct(database)
        self._held: dict[str, Held] = {}
        #: Claims in all batches of others; None: not counted.
        self._total: int | None = None
        self._generation = database.generation

    # --- asking ---------------------------------------------------------------------------------

    def lookup(self, mesh_key: bytes, now: float) -> list[Claim]:
        """What peers claim of that key, trusted or not; of each peer the newest few."""
        wanted = (mesh_key, now, MAX_FOUND_OF_PEER, MAX_FOUND)
        found: list[Any] = self._database.attempt(
            "claims", lambda: self._database.rows(claim_rows.LOOKUP, wanted), []
        )
        return [Claim._make((*row[:5], bool(row[5]))) for row in found]

    def sources(self, mesh_key: bytes, cid: bytes, now: float) -> int:
        """How many others claim to have that answer to that key."""
        wanted = (mesh_key, cid, now)
        found = self._database.attempt(
            "claims", lambda: self._database.row(claim_rows.SOURCES, wanted), (0,)
        )
        return int(found[0])

    def envelopes(self, mesh_key: bytes, limit: int, now: float) -> list[bytes]:
        """The signed batches that claim that key."""
        wanted = (mesh_key, now, limit)
        found: list[Any] = self._database.attempt(
            "claims", lambda: self._database.rows(claim_rows.ENVELOPES, wanted), []
        )
        return [envelope for (envelope,) in found]

    def live(self, now: float) -> int:
        """How many claims of others hold, not counting those to have a copy."""
        sql = "SELECT count(*) FROM claim WHERE expires_at > ? AND NOT held"
        found = self._database.attempt("claims", lambda: self._database.row(sql, (now,)), (0,))
        return int(found[0])

    def statements(self, mesh_key: bytes, cid: bytes, now: float) -> list[bytes]:
        """One signed envelope of each peer, this node among them, that claims that CID for the key.

        That it computed it before that it has it, then what names the fewest other answers.
        """
        wanted = (now, mesh_key, cid, self._peer)
        rows: list[tuple[bytes]] = self._database.attempt(
            "claims", lambda: self._database.rows(claim_rows.CLAIMING, wanted), []
        )
        found: list[tuple[bool, int, str, bytes]] = []
        for (envelope,) in rows:
            with suppress(ClaimError):  # the file is damaged
                opened = unseal(envelope)
                batch = opened.batch
                said = [e.held for e in batch.entries if (e.key, e.cid) == (mesh_key, cid)]
                if said:
                    found.append((min(said), len(batch.entries), opened.peer, envelope))
        first: dict[str, bytes] = {}
        for _, _, peer, envelope in sorted(found):
            first.setdefault(peer, envelope)
        return list(first.values())

    # --- taking ---------------------------------------------------------------------------------

    def ingest(self, envelope: bytes, now: float, *, told_by: str = "") -> Ingested:
        """Take an envelope, whoever brought it.

        `told_by` is who told it unasked, by gossip or to a home: it may tell only what it says
        itself, and only so fast.
        """
        try:
            opened = unseal(envelope)
        except ClaimError as error:
            return Ingested("refused", reason=str(error))
        if told_by and opened.peer != told_by:
            return Ingested("refused", opened.peer, reason="told by another peer")
        if self._conduct.silence(opened.peer, now) is not None:
            return Ingested("silenced", opened.peer)
        if told_by and not self._conduct.admits(told_by, len(opened.batch.entries), now):
            return Ingested("fast", opened.peer, reason="it tells more than it may")
        failed = Ingested("full", opened.peer, reason="the cache failed")
        try:
            return self._database.attempt(
                "claims", lambda: self._ingest(opened, envelope, now), failed
            )
        except ClaimError:  # the envelope that was stored under this number is damaged
            return failed

    def _ingest(self, opened: Opened, envelope: bytes, now: float) -> Ingested:
        peer, batch = opened.peer, opened.batch
        if peer == self._peer:
            return self._ingest_own(opened)
        publisher = self._database.row("SELECT id, epoch FROM publisher WHERE peer = ?", (peer,))
        if publisher is not None and batch.epoch < publisher[1]:
            return Ingested("stale", peer, reason="it is of an older epoch")
        held = Held(batch.epoch)
        if publisher is not None and batch.epoch == publisher[1]:
            held = self._held_of(publisher[0], batch.epoch, peer)
            if ranges.contains(held.numbers, batch.number):
                return self._again(publisher[0], opened, envelope)
        elif publisher is None and self._full():
            return Ingested("full", peer, reason=f"claims of {MAX_PEERS} peers are here")
        if batch.expires_at <= now:
            return Ingested("stale", peer, reason="its claims are over")
        if claim_rows.early(batch, now):
            return Ingested("early", peer, reason="a claim that was made in the future")
        if self._count() + len(batch.entries) > MAX_ALL_CLAIMS:
            return Ingested("full", peer, reason=f"{MAX_ALL_CLAIMS} claims are here")
        wrong = claim_rows.untimely(batch)
        if wrong is None and not opened.signed(self._verify):
            wrong = "not signed"
        if wrong is not None:
            return Ingested("refused", peer, reason=wrong)
        return self._take(peer, batch, envelope, now)

    def _full(self) -> bool:
        count: int = self._database.row("SELECT count(*) FROM publisher")[0]
        return count >= MAX_PEERS

    def _count(self) -> int:
        if self._total is None or self._generation != self._database.generation:
            sql = """
                SELECT coalesce(sum(entries), 0) FROM batch AS b JOIN publisher AS p
                ON p.id = b.publisher WHERE p.peer <> ?"""
            self._total = int(self._database.row(sql, (self._peer,))[0])
        return self._total

    def _take(self, peer: str, batch: Batch, envelope: bytes, now: float) -> Ingested:
        live = [entry for entry in batch.entries if entry.expires_at > now]
        known = self._held.get(peer)
        if known is None or known.epoch != batch.epoch:
            self._total = None  # what it said in an older epoch goes
        with self._database.transaction() as connection:
            publisher = publisher_id(connection, peer, batch.epoch)
            held = self._held_of(publisher, batch.epoch, peer)
            dropped = _make_room(connection, publisher, batch, held)
            if dropped is not None:
                keep_batch(connection, publisher, batch, envelope)
                connection.executemany(
                    claim_rows.CLAIM,
                    [(e[0], publisher, *e[1:], batch.number) for e in live],
                )
        # So that it is not sent again and again, also if there is no room for it.
        ranges.add(held.numbers, batch.number)
        if dropped is None:
            return Ingested("full", peer, reason=f"{MAX_CLAIMS} newer claims of it are here")
        held.claims += len(batch.entries) - dropped
        self._total = None if self._total is None else self._total + len(batch.entries) - dropped
        return Ingested("new", peer, claims=len(live))

    def _again(self, publisher: int, opened: Opened, envelope: bytes) -> Ingested:
        """A number that was seen: is it the same batch?"""
        stored = self._database.row(
            "SELECT envelope FROM batch WHERE publisher = ? AND number = ?",
            (publisher, opened.batch.number),
        )
        if stored is None:
            return Ingested("known", opened.peer)
        first = unseal(stored[0])
        if first.payload == opened.payload:
            return Ingested("known", opened.peer)
        # The first is checked once more: a damaged file is no proof.
        if not (opened.signed(self._verify) and first.signed(self._verify)):
            return Ingested("refused", opened.peer, reason="not signed")
        return Ingested(
            "equivocation",
            opened.peer,
            reason=f"two batches with the number {opened.batch.number}",
            evidence=(stored[0], envelope),
        )

    def _ingest_own(self, opened: Opened) -> Ingested:
        """A batch that this node signed: if it does not remember it, it lost its numbers."""
        epoch, number = opened.batch.epoch, opened.batch.number
        found = self._database.row(claim_rows.NUMBERING)
        lost = found is None or (epoch, number) > (found[0], found[1])
        if lost and opened.signed(self._verify):
            # Both numbers were used by another file of this node: go past them.
            with self._database.transaction() as connection:
                begin_epoch(connection, self._peer, epoch + 1)
        return Ingested("own", opened.peer)

    # --- repair ---------------------------------------------------------------------------------

    def versions(self, now: float) -> dict[str, Version]:
        """Which batches are here, by peer, this node's own among them.

        Of who has no say all is said to be here, so that it is not sent.
        """
        known: dict[str, Version] = self._database.attempt("claims", self._versions, {})
        return known | dict.fromkeys(self._conduct.silenced(now), Version(NEVER, ()))

    def _versions(self) -> dict[str, Version]:
        versions = {
            peer: Version(epoch, tuple(self._numbers(publisher, epoch, peer)[-MAX_RANGES:]))
            for publisher, peer, epoch in self._database.rows(claim_rows.PUBLISHERS)
        }
        own = self._database.row(claim_rows.NUMBERING)
        if own is not None:
            # Also where none was signed yet in this epoch: older ones are not wanted back.
            versions[self._peer] = Version(own[0], tuple(claim_rows.own_numbers(self._database)))
        return versions

    def since(
        self,
        versions: Mapping[str, tuple[int, Sequence[Range]]],
        limit: int = 64,
        *,
        now: float,
        max_bytes: int = 256 * 1024,
    ) -> list[bytes]:
        """Envelopes that whoever sent these versions lacks, at most so many.

        A fair share of each peer's, newest first. Whoever pages through asks again with its new
        versions, until a page is empty or brings nothing new.
        """
        return self._database.attempt(
            "claims", lambda: self._since(versions, limit, now, max_bytes), []
        )

    def _since(
        self,
        versions: Mapping[str, tuple[int, Sequence[Range]]],
        limit: int,
        now: float,
        max_bytes: int,
    ) -> list[bytes]:
        lacking: list[tuple[int, list[Range]]] = []
        silenced = set(self._conduct.silenced(now))
        for publisher, peer, epoch in self._database.rows(claim_rows.PUBLISHERS):
            if peer in silenced:
                continue
            theirs, numbers = versions.get(peer, (0, ()))
            if theirs <= epoch:
                here = self._numbers(publisher, epoch, peer)
                known = numbers[:MAX_RANGES] if theirs == epoch else ()
                missing = ranges.without(here, known)
                if missing:
                    lacking.append((publisher, missing))
        page: list[bytes] = []
        share = max(1, limit // max(1, len(lacking)))
        for publisher, missing in lacking[:limit]:
            page += self._newest(publisher, missing, share, now)
        total = 0
        for count, envelope in enumerate(page):
            total += len(envelope)
            if total > max_bytes:
                return page[:count]
        return page

    def _newest(self, publisher: int, missing: list[Range], limit: int, now: float) -> list[bytes]:
        found: list[bytes] = []
        for first, last in reversed(missing):
            rows = self._database.rows(
                claim_rows.NEWEST, (publisher, first, last, now, limit - len(found))
            )
            found += [envelope for (envelope,) in rows]
            if len(found) >= limit:
                break
        return found

    def _numbers(self, publisher: int, epoch: int, peer: str) -> list[Range]:
        if peer == self._peer:
            return claim_rows.own_numbers(self._database)
        return self._held_of(publisher, epoch, peer).numbers

    def _held_of(self, publisher: int, epoch: int, peer: str) -> Held:
        if self._generation != self._database.generation:
            self._generation = self._database.generation
            self._held.clear()
            self._total = None
        held = self._held.get(peer)
        if held is None or held.epoch != epoch:
            held = self._held[peer] = claim_rows.held(self._database, publisher, epoch)
        return held

    # --- forgetting -----------------------------------------------------------------------------

    def forget(self, peer: str) -> None:
        """Drop everything a peer claimed."""

        def forget() -> None:
            with self._database.transaction() as connection:
                connection.execute("DELETE FROM publisher WHERE peer = ?", (peer,))

        self._held.pop(peer, None)
        self._total = None
        self._database.attempt("claims", forget, None)

    async def expire(self, now: float) -> int:
        """Drop what is over, a few rows at a time; how many rows that were. Never raises."""
        expired = 0
        while gone := self._database.attempt("claims", lambda: self._expire(now), 0):
            expired += gone
            await trio.lowlevel.checkpoint()
        if expired:
            self._database.attempt("claims", self._drop_silent, None)
        return expired

    def _expire(self, now: float) -> int:
        with self._database.transaction() as connection:
            gone = sum(connection.execute(sql, (now, ROWS)).rowcount for sql in claim_rows.EXPIRE)
        if gone:
            self._held.clear()
            self._total = None
        return gone

    def _drop_silent(self) -> None:
        with self._database.transaction() as connection:
            connection.execute(claim_rows.SILENT)


def _make_room(
    connection: sqlite3.Connection, publisher: int, batch: Batch, held: Held
) -> int | None:
    """Drop the oldest batches of that peer until this one has room; how many claims that were.

    None if there are newer ones only.
    """
    excess = held.claims + len(batch.entries) - MAX_CLAIMS
    oldest: list[tuple[int, int]] = []
    rows = connection.execute(claim_rows.OLDEST, (publisher, batch.number)) if excess > 0 else ()
    for row in rows:
        oldest.append(row)
        excess -= row[1]
        if excess <= 0:
            break
    if excess > 0:
        return None
    for number, _ in oldest:
        for sql in claim_rows.DROP:
            connection.execute(sql, (publisher, number))
    return sum(entries for _, entries in oldest)
