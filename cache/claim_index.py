"""The index of claims: which peers say that they have the answer to a key.

It is fed with envelopes from gossip and from neighbours, in any order and any number of times, and
answers without asking anybody. What it lacks it gets from a neighbour: `versions` says what is
here, `since` gives what somebody else lacks, page by page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import trio

from . import claim_rows, ranges
from .claim_rows import (
    MAX_CLAIMS,
    MAX_FOUND,
    MAX_PEERS,
    MAX_RANGES,
    Claim,
    Held,
    Ingested,
    Version,
)
from .claims import Batch, ClaimError, Opened, Verify, keep_batch, publisher_id, unseal
from .database import Database
from .ranges import Range

#: Rows that expire in one transaction, which takes 5 ms.
ROWS = 256


class ClaimIndex:
    """The claims of all others. Its faults are misses; what strangers send raises nothing."""

    def __init__(self, database: Database, *, peer: str, verify: Verify) -> None:
        """`peer` is this node."""
        self._database = database
        self._peer = peer
        self._verify = verify
        self._held: dict[str, Held] = {}
        self._generation = database.generation

    # --- asking ---------------------------------------------------------------------------------

    def lookup(self, mesh_key: bytes, now: float) -> list[Claim]:
        """Who claims that key: the CID that most peers claim first, then the newest."""
        wanted = (mesh_key, now, MAX_FOUND)
        found: list[Any] = self._database.attempt(
            "claims", lambda: self._database.rows(claim_rows.LOOKUP, wanted), []
        )
        claims = [Claim(*row) for row in found]
        claimed = Counter(claim.cid for claim in claims)
        return sorted(claims, key=lambda claim: (-claimed[claim.cid], claim.cid, -claim.made_at))

    def live(self, now: float) -> int:
        """How many claims of others hold, not counting those to have a copy."""
        sql = "SELECT count(*) FROM claim WHERE expires_at > ? AND NOT held"
        found = self._database.attempt("claims", lambda: self._database.row(sql, (now,)), (0,))
        return int(found[0])

    # --- taking ---------------------------------------------------------------------------------

    def ingest(self, envelope: bytes, now: float) -> Ingested:
        """Take an envelope, whoever brought it."""
        try:
            opened = unseal(envelope)
        except ClaimError as error:
            return Ingested("refused", reason=str(error))
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
        wrong = claim_rows.untimely(batch, now)
        if wrong is None and not opened.signed(self._verify):
            wrong = "not signed"
        if wrong is not None:
            return Ingested("refused", peer, reason=wrong)
        if held.claims + len(batch.entries) > MAX_CLAIMS:
            ranges.add(held.numbers, batch.number)  # so that it is not sent again and again
            return Ingested("full", peer, reason=f"{MAX_CLAIMS} claims of it are here")
        return self._take(peer, batch, envelope, now)

    def _full(self) -> bool:
        count: int = self._database.row("SELECT count(*) FROM publisher")[0]
        return count >= MAX_PEERS

    def _take(self, peer: str, batch: Batch, envelope: bytes, now: float) -> Ingested:
        live = [entry for entry in batch.entries if entry.expires_at > now]
        with self._database.transaction() as connection:
            publisher = publisher_id(connection, peer, batch.epoch)
            keep_batch(connection, publisher, batch, envelope)
            connection.executemany(
                claim_rows.CLAIM,
                [(e.key, publisher, e.cid, e.size, e.made_at, e.expires_at) for e in live],
            )
        held = self._held_of(publisher, batch.epoch, peer)
        if not ranges.contains(held.numbers, batch.number):
            ranges.add(held.numbers, batch.number)
            held.claims += len(batch.entries)
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
                connection.execute("DELETE FROM numbering")
                connection.execute("INSERT INTO numbering VALUES (?, 0)", (epoch + 1,))
                connection.execute("DELETE FROM publisher WHERE peer = ?", (self._peer,))
        return Ingested("own", opened.peer)

    # --- repair ---------------------------------------------------------------------------------

    def versions(self) -> dict[str, Version]:
        """Which batches are here, by peer, this node's own among them."""
        return self._database.attempt("claims", self._versions, {})

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
        for publisher, peer, epoch in self._database.rows(claim_rows.PUBLISHERS):
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
        return gone

    def _drop_silent(self) -> None:
        with self._database.transaction() as connection:
            connection.execute(claim_rows.SILENT)
