"""How peers behave with their claims, and who lost its say by it.

Whoever lost its say is neither believed nor listened to: its claims count for nothing, and what it
brings is dropped unread. How much of what costs it that, and for how long, is in `OFFENCES`. What
holds for a day or for ever is written down and survives a restart, a lie together with its proof;
what is over in minutes is not.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from .database import Database

logger = logging.getLogger(__name__)

Offence = Literal["equivocation", "wrong bytes", "nonsense", "flood", "undelivered"]


class Measure(NamedTuple):
    """How much of an offence is borne, and what more of it costs."""

    #: Seconds without a say.
    silence: float
    #: Times that are borne at once, and how many more each second.
    borne: float
    recovery: float
    #: What it is called in the log and in `alternatives`.
    name: str


OFFENCES: dict[Offence, Measure] = {
    # Two signed batches with one number: proof, and no accident of an honest node.
    "equivocation": Measure(math.inf, 0, 0.0, "it numbered two batches alike"),
    # Bytes that are not what their CID names, or a record that is none.
    "wrong bytes": Measure(86400.0, 0, 0.0, "it sent other bytes than it claimed"),
    # Malformed or unsigned claims, claims of others as its own, frames out of turn.
    "nonsense": Measure(600.0, 10, 1 / 60, "it sent what no honest node sends"),
    # Claims beyond the rate; counted by the claim.
    "flood": Measure(600.0, 1000, 0.0, "it flooded the mesh with claims"),
    # A claimed answer that did not come. One that was evicted is told at once and costs one, one
    # that was waited for costs `LATE`.
    "undelivered": Measure(600.0, 10, 1 / 60, "it did not deliver what it claimed"),
}
#: What an answer that never came weighs, beside one that is not there any more.
LATE = 3.0
#: Shorter silences than this (s) end with the process.
KEPT = 3600.0
#: Claims that one peer may tell: each second, and at once.
RATE, BURST = 20.0, 200.0
#: Peers whose conduct is remembered, and of whom it is written down.
MAX_PEERS, MAX_KEPT = 4096, 1024


@dataclass(slots=True)
class Bucket:
    """Tokens that come back over time."""

    level: float
    at: float

    def take(self, tokens: float, now: float, *, rate: float, burst: float) -> float:
        """Take that many, which may leave less than none; gives what is left."""
        self.level = min(burst, self.level + max(0.0, now - self.at) * rate) - tokens
        self.at = now
        return self.level


class Silence(NamedTuple):
    """That a peer lost its say."""

    offence: Offence
    #: Seconds since 1970; infinite: for ever.
    until: float


@dataclass(slots=True)
class _Record:
    """What is remembered of a peer."""

    told: Bucket
    buckets: dict[Offence, Bucket] = field(default_factory=dict)
    silence: Silence | None = None


class Conduct:
    """The conduct of all peers. Told the time (seconds since 1970)."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._peers: dict[str, _Record] = {}
        rows: list[Any] = database.attempt("offences", lambda: database.rows(_ALL), [])
        for peer, offence, until in rows:
            if offence in OFFENCES:
                silence = Silence(offence, math.inf if until is None else until)
                self._record(peer, 0.0).silence = silence

    # --- asking

    def silence(self, peer: str, now: float) -> Silence | None:
        """Why it has no say, if it has none."""
        record = self._peers.get(peer)
        if record is None or record.silence is None:
            return None
        if record.silence.until <= now:
            record.silence = None
            logger.info("peer %s has its say again", peer)
        return record.silence

    def silenced(self, now: float) -> list[str]:
        """All who have no say."""
        return [peer for peer in list(self._peers) if self.silence(peer, now) is not None]

    def evidence(self, peer: str) -> tuple[bytes, bytes] | None:
        """The two envelopes with one number that a peer signed."""
        found = self._database.attempt(
            "offences", lambda: self._database.row(_EVIDENCE, (peer,)), None
        )
        return (found[0], found[1]) if found else None

    # --- noting

    def admits(self, peer: str, claims: int, now: float) -> bool:
        """May so many claims that a peer tells be taken? Those that may not are counted."""
        level = self._record(peer, now).told.take(claims, now, rate=RATE, burst=BURST)
        if level < -OFFENCES["flood"].borne:
            self._silence(peer, "flood", now)
        return level >= 0

    def offended(
        self,
        peer: str,
        offence: Offence,
        now: float,
        *,
        weight: float = 1.0,
        evidence: tuple[bytes, bytes] | None = None,
    ) -> None:
        """A peer did that. It loses its say if that was too much; the log says so, once."""
        measure = OFFENCES[offence]
        bucket = self._record(peer, now).buckets.setdefault(offence, Bucket(measure.borne, now))
        if bucket.take(weight, now, rate=measure.recovery, burst=measure.borne) < 0:
            bucket.level = measure.borne  # the next count begins after the silence
            self._silence(peer, offence, now, evidence)

    def _silence(
        self,
        peer: str,
        offence: Offence,
        now: float,
        evidence: tuple[bytes, bytes] | None = None,
    ) -> None:
        measure = OFFENCES[offence]
        record = self._record(peer, now)
        before = self.silence(peer, now)
        record.told = Bucket(BURST, now + measure.silence)
        if before is not None and before.until >= now + measure.silence:
            return
        record.silence = Silence(offence, now + measure.silence)
        logger.warning(
            "peer %s lost its say %s: %s",
            peer,
            "for good" if math.isinf(measure.silence) else f"for {measure.silence / 60:g} minutes",
            measure.name,
        )
        if measure.silence >= KEPT:
            until = None if math.isinf(measure.silence) else now + measure.silence
            kept = (peer, offence, until, *(evidence or (None, None)))
            self._database.attempt("offences", lambda: self._database.rows(_OVER, (now,)), [])
            self._database.attempt("offences", lambda: self._database.rows(_KEEP, kept), [])

    def _record(self, peer: str, now: float) -> _Record:
        record = self._peers.get(peer)
        if record is None:
            if len(self._peers) >= MAX_PEERS:
                self._forget_one()
            record = self._peers[peer] = _Record(Bucket(BURST, now))
        return record

    def _forget_one(self) -> None:
        """Drop the peer that is known for longest and has its say; else the one known longest."""
        for peer, record in self._peers.items():
            if record.silence is None:
                del self._peers[peer]
                return
        del self._peers[next(iter(self._peers))]


_ALL = "SELECT peer, offence, until FROM offence"
_EVIDENCE = "SELECT first, second FROM offence WHERE peer = ? AND first IS NOT NULL"
_OVER = "DELETE FROM offence WHERE until <= ?"
_KEEP = f"""
    INSERT INTO offence (peer, offence, until, first, second) SELECT ?1, ?2, ?3, ?4, ?5
    WHERE (SELECT count(*) FROM offence WHERE peer <> ?1) < {MAX_KEPT}
    ON CONFLICT DO UPDATE SET offence = excluded.offence, until = excluded.until,
        first = coalesce(excluded.first, first), second = coalesce(excluded.second, second)"""
