"""Which of the candidates that could answer is asked: three policies. Pure.

A policy is told the candidates, the time (monotonic seconds), a random generator and what else
decides; it reads no clock and keeps nothing, but for `Turns`, the counts of `round_robin`.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from types import MappingProxyType
from typing import NamedTuple

from ..providers.base import ModelOffer, Policy
from .backend_id import BackendId, Measured
from .loads import Busy
from .measure import Speed
from .transport import PeerId

#: Up to so many candidates `best_performance` weighs all; of more, so many are drawn at random, by
#: how much they get done: nodes that know the same and all take the best would meet there.
FEW = 8
#: Seconds that a failed attempt costs beside those until it has failed: starting again elsewhere.
FAILURE_COST = 2.0
#: Seconds that a candidate is put back which did not answer when asked how busy it is.
SILENCE_COST = 5.0
#: Seconds of an answer where nothing was ever measured.
UNKNOWN = 1.0
#: An unmeasured candidate is taken for this much of the best measured one, so that it is tried; and
#: for this much more after each try that measured nothing.
OPTIMISM, DISAPPOINTMENT = 0.9, 0.5
#: Seconds in which half of the trust in our own measurements goes over to what its node says.
TRUST_HALF_LIFE = 120.0
#: Share of the time to the first token that a prompt saves which was seen there.
PREFIX_SAVES = 0.7
#: Seconds to load a model that is not in memory.
LOADING = 10.0
#: Candidates whose times differ by less than this share of them are equally good.
NEAR = 0.02
#: Others who choose at the same moment that are reckoned with.
MAX_RIVALS = 64
#: Decisions of one request that are kept to be shown.
MAX_DECISIONS = 8
#: Models whose turns are remembered.
MAX_MODELS = 1024


class Allowance(NamedTuple):
    """What may still be spent at a provider of this node today (US dollars), and by what rule."""

    left: float = math.inf
    rule: str = ""
    #: Seconds until it is another day.
    renewed: float = 0.0


@dataclass(slots=True, eq=False)
class Candidate:
    """A provider of a node that offers the model asked for."""

    peer: PeerId
    node: str
    provider: str
    offer: ModelOffer
    #: Is it this node's own?
    own: bool = False
    busy: Busy = field(default_factory=Busy)
    #: Seconds since its node said how busy it is; 0: it is our own.
    age: float = 0.0
    #: Did it leave the last question how busy it is without an answer?
    silent: bool = False
    #: Seconds to its node and back; None: not connected, or not known yet.
    rtt: float | None = None
    #: What this node measured; None: nothing yet.
    speed: Speed | None = None
    #: What its own node says it measured: seconds to the first token, tokens per second.
    said_ttft: float | None = None
    said_rate: float | None = None
    #: Share of the prompt that it has seen lately, 0 to 1 (`affinity`).
    seen: float = 0.0
    #: It spends somebody's money or subscription.
    paid: bool = False
    #: US dollars that the request is expected to cost there; None: nobody says.
    cost: float | None = 0.0
    #: What may still be spent there today, if it is this node's own.
    allowance: Allowance = field(default_factory=Allowance)
    #: Why this request, or none of this node, may go there; "": it may.
    forbidden: str = ""

    @property
    def backend(self) -> BackendId:
        return BackendId(self.peer, self.provider)

    @property
    def measured(self) -> Measured:
        return Measured(self.peer, self.provider, self.offer.id)

    def __str__(self) -> str:
        return f"{self.node or self.peer}:{self.provider}"


class Turns:
    """How often each candidate had its turn, by model.

    The counts of a constant set differ by at most one. A candidate that joins or comes back starts
    at the smallest count of the others: it gets its share, and not what it missed.
    """

    def __init__(self) -> None:
        self._models: OrderedDict[str, _Counts] = OrderedDict()

    def take(self, candidates: Sequence[Candidate], rng: Random) -> Turn:
        """The candidate whose turn it is; its turn is then over."""
        model = candidates[0].offer.id
        counts = self._models.setdefault(model, _Counts({}))
        self._models.move_to_end(model)
        if len(self._models) > MAX_MODELS:
            self._models.popitem(last=False)
        return counts.take(candidates, rng)


class Turn(NamedTuple):
    """Whose turn it is, and how many each had before."""

    candidate: Candidate
    counts: Mapping[BackendId, int]


@dataclass(slots=True)
class _Counts:
    counts: dict[BackendId, int]
    #: The smallest count at the last turn: who is below it was not there.
    floor: int = 0

    def take(self, candidates: Sequence[Candidate], rng: Random) -> Turn:
        there = [n for c in candidates if (n := self.counts.get(c.backend, -1)) >= self.floor]
        start = min(there, default=self.floor)
        counts = {c.backend: max(self.counts.get(c.backend, 0), start) for c in candidates}
        self.floor = min(counts.values())
        chosen = rng.choice([c for c in candidates if counts[c.backend] == self.floor])
        self.counts.update(counts)
        self.counts[chosen.backend] += 1
        if len(self.counts) > 4 * len(counts) + 64:
            self.counts = {k: n for k, n in self.counts.items() if n > self.floor or k in counts}
        return Turn(chosen, counts)


def least_loaded(candidates: Sequence[Candidate], key: bytes, rng: Random) -> Candidate:
    """The one with the fewest requests for each slot.

    Ties go by rendezvous hash of the request's key, so that equal requests at two nodes meet at one
    peer and share its work; without a key, at random.
    """
    loads = [c.busy.all / c.busy.slots for c in candidates]
    least = min(loads)
    tied = [c for c, load in zip(candidates, loads, strict=True) if load == least]
    if len(tied) == 1:
        return tied[0]
    return max(tied, key=lambda c: rendezvous(key, c.backend)) if key else rng.choice(tied)


def rendezvous(key: bytes, backend: BackendId) -> bytes:
    """The weight of a backend for that key; the highest wins, at every node the same."""
    name = f"{backend.peer}\0{backend.provider}".encode()
    return hashlib.blake2b(name, key=hashlib.sha256(key).digest(), digest_size=16).digest()


class Work(NamedTuple):
    """Tokens to expect of the answer, and of those that it may have to wait for."""

    tokens: float
    typical: float


class Expected(NamedTuple):
    """Seconds until an answer is whole: if nobody is there before it, and as far as is known."""

    idle: float
    total: float
    #: Seconds that each request before it adds, once there is a queue.
    each: float = 0.0
    #: Of those, until the first token (None: nobody has measured it), and for its failures.
    first: float | None = None
    trouble: float = 0.0


def best_performance(
    candidates: Sequence[Candidate], expected: Sequence[Expected], rng: Random
) -> Candidate:
    """The one expected to finish first; of those that are equally good, any.

    Others who choose at this moment know what we know, and take the best before us: we take what is
    then the best.
    """
    times = [e.total for e in expected]
    for _ in range(min(max(c.busy.rivals for c in candidates), MAX_RIVALS)):
        taken = times.index(min(times))
        times[taken] += expected[taken].each
    enough = min(times) * (1 + NEAR)
    return rng.choice([c for c, time in zip(candidates, times, strict=True) if time <= enough])


def expected_times(candidates: Sequence[Candidate], work: Work, now: float) -> list[Expected]:
    """When each would have finished: waiting, the first token, the rest, and its failures."""
    speeds = [_speed(c, now) for c in candidates]
    known = [speed for speed in speeds if speed is not None]
    best, best_typical = (
        min((ttft + tokens * pace for ttft, pace in known), default=UNKNOWN) for tokens in work
    )
    times = []
    for candidate, speed in zip(candidates, speeds, strict=True):
        first = None
        if speed is None:
            alone, typical = _guess(candidate, best), _guess(candidate, best_typical)
        else:
            ttft, pace = speed
            first = ttft * (1 - PREFIX_SAVES * candidate.seen)
            alone, typical = first + work.tokens * pace, ttft + work.typical * pace
        trouble = _trouble(candidate, now)
        idle, wait = alone + trouble, _wait(candidate, typical)
        each = typical / candidate.busy.slots
        times.append(Expected(idle, idle + wait, each, first, trouble))
    return times


def _speed(candidate: Candidate, now: float) -> tuple[float, float] | None:
    """Seconds to the first token, and for each further one; None where nobody has measured any.

    What this node measured itself counts before what the candidate's node says, but the longer ago
    the less: who was slow once is tried again.
    """
    ours = candidate.speed
    trust = 0.5 ** (max(now - ours.at, 0.0) / TRUST_HALF_LIFE) if ours else 0.0
    said = candidate.said_ttft
    ttft = _blend(
        ours.ttft if ours else None, None if said is None else said + (candidate.rtt or 0), trust
    )
    if ttft is None:
        return None
    rate = candidate.said_rate
    return ttft, _blend(_pace(ours.rate if ours else None), _pace(rate), trust) or 0.0


def _pace(rate: float | None) -> float | None:
    return 1 / max(rate, 1e-3) if rate else None


def _blend(ours: float | None, said: float | None, trust: float) -> float | None:
    if ours is None or said is None:
        return said if ours is None else ours
    return trust * ours + (1 - trust) * said


def _guess(candidate: Candidate, best: float) -> float:
    """Seconds of an answer of one that nobody has measured.

    One try tells what a second would, so the optimism is for one request at a time; and it wears
    off where a try tells nothing.
    """
    tries = candidate.speed.tries if candidate.speed else 0
    in_flight = candidate.busy.in_flight
    disappointed = 1 + DISAPPOINTMENT * max(tries - in_flight, 0)
    return best * OPTIMISM * (1 + in_flight) * disappointed


def _wait(candidate: Candidate, service: float) -> float:
    """Seconds until a slot is free, each of the requests before ours taking `service`.

    One that has just come (back) takes as many at once as it has answered, and one more: so its
    share grows with what it shows.
    """
    busy, answers = candidate.busy, candidate.speed.answers if candidate.speed else 0
    growing = _rounds(busy.in_flight, min(busy.slots, 1 + answers)) * service
    return max(_queue(busy, candidate.age, service), growing)


def _queue(busy: Busy, age: float, service: float) -> float:
    """Its node knows what those that are there are doing; of those that came since we know."""
    if busy.all < busy.slots:
        return 0.0
    if busy.wait is None or busy.told < busy.slots or busy.all < busy.told:
        return _rounds(busy.all, busy.slots) * service
    return max(busy.wait - age, 0.0) + (busy.all - busy.told) / busy.slots * service


def _rounds(busy: int, slots: int) -> float:
    return max(busy + 1 - slots, 0) / slots


def _trouble(candidate: Candidate, now: float) -> float:
    """Seconds that its failures, its silence and the loading of the model are expected to cost."""
    cost = LOADING if candidate.offer.loaded is False else 0.0
    if candidate.silent:
        cost += SILENCE_COST
    speed = candidate.speed
    if speed is not None and (errors := speed.errors_at(now)):
        cost += (FAILURE_COST + (speed.failing or 0.0)) * errors / (1 - min(errors, 0.9))
    return cost


def draw(candidates: Sequence[Candidate], work: Work, now: float, rng: Random) -> list[Candidate]:
    """Those that are weighed: all where they are few, else a few, the likelier the more they do."""
    if len(candidates) <= FEW:
        return list(candidates)
    idle = [e.idle for e in expected_times(candidates, work, now)]
    # Efraimidis and Spirakis: the largest of random ** (1 / weight) are a weighted sample.
    keys = [
        math.log(max(rng.random(), 1e-300)) * max(time, 1e-6) / c.busy.slots
        for c, time in zip(candidates, idle, strict=True)
    ]
    order = sorted(range(len(keys)), key=keys.__getitem__, reverse=True)
    return [candidates[i] for i in order[:FEW]]


class Decision(NamedTuple):
    """A choice, with what the policy knew of each: for people who ask why."""

    chosen: Candidate
    #: Those it was chosen from.
    among: Sequence[Candidate]
    #: What `best_performance` expected of each; nothing where there was only one.
    expected: Sequence[Expected] = ()
    #: How many turns each had before, by `round_robin`.
    turns: Mapping[BackendId, int] = MappingProxyType({})


class Choice:
    """The choices of one request, by the policy that is named. `left` is never empty."""

    def __init__(
        self, policy: Policy, *, turns: Turns, key: bytes, work: Work, rng: Random
    ) -> None:
        self._policy = policy
        self._turns = turns
        self._key = key
        self.work = work
        self._rng = rng
        self._drawn: Sequence[Candidate] = ()
        self.decisions: list[Decision] = []

    def draw(self, left: Sequence[Candidate], now: float) -> Sequence[Candidate]:
        """Those of many between whom `best_performance` will choose next."""
        self._drawn = draw(left, self.work, now, self._rng)
        return self._drawn

    def take(self, left: Sequence[Candidate], now: float) -> Candidate:
        """The one to ask."""
        decision = self._decide(left, now)
        if len(self.decisions) < MAX_DECISIONS:
            self.decisions.append(decision)
        return decision.chosen

    def _decide(self, left: Sequence[Candidate], now: float) -> Decision:
        if self._policy == "best_performance":
            return self._best(left, now)
        among = tuple(left)
        if self._policy == "round_robin":
            chosen, turns = self._turns.take(left, self._rng)
            return Decision(chosen, among, turns=turns)
        chosen = left[0] if len(left) == 1 else least_loaded(left, self._key, self._rng)
        return Decision(chosen, among)

    def _best(self, left: Sequence[Candidate], now: float) -> Decision:
        drawn = self._drawn or self.draw(left, now)
        self._drawn = ()
        if len(drawn) == 1:
            return Decision(drawn[0], drawn)
        expected = expected_times(drawn, self.work, now)
        return Decision(best_performance(drawn, expected, self._rng), drawn, expected)
