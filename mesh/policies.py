"""Which of the candidates that could answer is asked: three policies. Pure.

A policy is told the candidates, a random generator and what else decides; it reads no clock and
keeps nothing, but for the counts of `round_robin`, which are `Turns`.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from ..providers.base import ModelOffer, Policy
from .measure import BackendId, Measured, Speed
from .transport import PeerId

#: Up to so many candidates `best_performance` weighs all; of more, two drawn at random: nodes that
#: know the same and all take the best would all go to the same one.
FEW = 8
#: Seconds that a failed attempt costs, of finding out and starting again elsewhere.
FAILURE_COST = 5.0
#: Expected seconds of an answer where nothing was ever measured.
UNKNOWN = 1.0
#: An unmeasured candidate is taken for this much of the best measured one: so it is tried.
OPTIMISM = 0.9
#: Models whose turns are remembered.
MAX_MODELS = 1024


@dataclass(slots=True, eq=False)
class Candidate:
    """A provider of a node that offers the model asked for."""

    peer: PeerId
    node: str
    provider: str
    offer: ModelOffer
    #: Is it this node's own?
    own: bool = False
    slots: int = 1
    #: Requests of others that run or wait there, and this node's own in flight.
    others: int = 0
    in_flight: int = 0
    #: What this node measured; None: nothing yet.
    speed: Speed | None = None
    #: What its own node says it measured: seconds to the first token, tokens per second.
    said_ttft: float | None = None
    said_rate: float | None = None
    #: It spends somebody's money or subscription.
    paid: bool = False

    @property
    def backend(self) -> BackendId:
        return BackendId(self.peer, self.provider)

    @property
    def measured(self) -> Measured:
        return Measured(self.peer, self.provider, self.offer.id)

    @property
    def busy(self) -> int:
        return self.others + self.in_flight

    def __str__(self) -> str:
        return f"{self.node or self.peer}:{self.provider}"


class Turns:
    """How often each candidate had its turn, by model.

    The counts of a constant set differ by at most one. A candidate that joins or comes back starts
    at the smallest count of the others: it gets its share, and not what it missed.
    """

    def __init__(self) -> None:
        self._models: OrderedDict[str, _Counts] = OrderedDict()

    def take(self, candidates: Sequence[Candidate], rng: Random) -> Candidate:
        """The candidate whose turn it is; its turn is then over."""
        model = candidates[0].offer.id
        counts = self._models.setdefault(model, _Counts({}))
        self._models.move_to_end(model)
        if len(self._models) > MAX_MODELS:
            self._models.popitem(last=False)
        return counts.take(candidates, rng)


@dataclass(slots=True)
class _Counts:
    counts: dict[BackendId, int]
    #: The smallest count at the last turn: who is below it was not there.
    floor: int = 0

    def take(self, candidates: Sequence[Candidate], rng: Random) -> Candidate:
        there = [n for c in candidates if (n := self.counts.get(c.backend, -1)) >= self.floor]
        start = min(there, default=self.floor)
        counts = {c.backend: max(self.counts.get(c.backend, 0), start) for c in candidates}
        self.floor = min(counts.values())
        chosen = rng.choice([c for c in candidates if counts[c.backend] == self.floor])
        self.counts.update(counts)
        self.counts[chosen.backend] += 1
        if len(self.counts) > 4 * len(counts) + 64:
            self.counts = {k: n for k, n in self.counts.items() if n > self.floor or k in counts}
        return chosen


def least_loaded(candidates: Sequence[Candidate], key: bytes, rng: Random) -> Candidate:
    """The one with the fewest requests for each slot.

    Ties go by rendezvous hash of the request's key, so that equal requests at two nodes meet at one
    peer and share its work; without a key, at random.
    """
    loads = [c.busy / c.slots for c in candidates]
    least = min(loads)
    tied = [c for c, load in zip(candidates, loads, strict=True) if load == least]
    if len(tied) == 1:
        return tied[0]
    return max(tied, key=lambda c: rendezvous(key, c.backend)) if key else rng.choice(tied)


def rendezvous(key: bytes, backend: BackendId) -> bytes:
    """The weight of a backend for that key; the highest wins, at every node the same."""
    name = f"{backend.peer}\0{backend.provider}".encode()
    return hashlib.blake2b(name, key=hashlib.sha256(key).digest(), digest_size=16).digest()


def best_performance(candidates: Sequence[Candidate], tokens: float, rng: Random) -> Candidate:
    """The one expected to finish first, an answer being `tokens` long."""
    few = candidates if len(candidates) <= FEW else rng.sample(candidates, 2)
    expected = expected_times(few, tokens)
    best = min(expected)
    return rng.choice([c for c, time in zip(few, expected, strict=True) if time == best])


def expected_times(candidates: Sequence[Candidate], tokens: float) -> list[float]:
    """Seconds until each would have finished: waiting, first token, the rest, and its failures."""
    alone = [_time_alone(c, tokens) for c in candidates]
    known = [time for time in alone if time is not None]
    guess = min(known) * OPTIMISM if known else UNKNOWN
    times = []
    for candidate, time in zip(candidates, alone, strict=True):
        if time is None:
            # One try tells what a second would: the optimism is for one request at a time.
            time = guess * (1 + candidate.in_flight)
        times.append(time + _wait(candidate, time) + _failures(candidate))
    return times


def _time_alone(candidate: Candidate, tokens: float) -> float | None:
    """Seconds of an answer that does not wait, by our own measurements, else by what its node says.

    None where neither tells.
    """
    speed = candidate.speed
    ttft = speed.ttft if speed and speed.ttft is not None else candidate.said_ttft
    rate = speed.rate if speed and speed.rate is not None else candidate.said_rate
    if ttft is None:
        return None
    return ttft + (tokens / rate if rate else 0.0)


def _wait(candidate: Candidate, service: float) -> float:
    """Seconds until a slot is free, each of the requests before ours taking `service`."""
    before = candidate.busy + 1 - candidate.slots
    return max(before, 0) / candidate.slots * service


def _failures(candidate: Candidate) -> float:
    """Seconds that its failures are expected to cost."""
    errors = candidate.speed.errors if candidate.speed else 0.0
    return FAILURE_COST * errors / (1 - min(errors, 0.9))


def choose(
    policy: Policy,
    candidates: Sequence[Candidate],
    *,
    turns: Turns,
    key: bytes,
    tokens: float,
    rng: Random,
) -> Candidate:
    """The candidate to ask. `candidates` is not empty and all offer the same model."""
    if len(candidates) == 1:
        return turns.take(candidates, rng) if policy == "round_robin" else candidates[0]
    if policy == "round_robin":
        return turns.take(candidates, rng)
    if policy == "least_loaded":
        return least_loaded(candidates, key, rng)
    return best_performance(candidates, tokens, rng)
