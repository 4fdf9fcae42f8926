"""What a node counts of its requests for Prometheus, in memory, since it was started.

The trace tells of each request that ended, the route of each candidate that was asked: nothing is
observed a second time. A label is a word of a closed vocabulary, a provider that this node's owner
named, or one of at most `MAX_MODELS` models that answered here: no peer and no client can add names
without end, and beyond `MAX_SERIES` combinations providers and models are not told apart any more.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

from ..mesh.route import Route
from ..mesh.transport import PeerId
from .trace import Record

#: Models that have series of their own; the first that answered.
MAX_MODELS = 100
#: Combinations of labels of one metric.
MAX_SERIES = 2000
#: What stands for names that have no series of their own.
OTHERS = "(others)"
#: What stands for all providers of peers, and for stored answers.
PEERS, CACHE = "(peers)", "(cache)"
#: Upper bounds (s) of the buckets of a histogram: a hit takes a millisecond, a long answer minutes.
BUCKETS: tuple[float, ...] = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0, 600.0),
)


class Asked(NamedTuple):
    """The labels of a request."""

    #: `own` programs, or a `member` of the mesh.
    asker: str
    #: What a model is for (`Task`); "": the request could not be read.
    task: str
    #: Who gave the answer; "": nobody.
    provider: str
    model: str
    #: How the cache dealt with it (`CacheStatus`); "": it had no answer.
    cache: str
    #: `answered`, `left`, or the code of the error.
    outcome: str


class Tried(NamedTuple):
    """The labels of a candidate's being asked."""

    provider: str
    #: `answered`: its first token came; `outrun`; or the code of the error.
    outcome: str


class Histogram:
    """Times by how long they were."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        #: One for each bucket, and one for what is longer.
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """It took so long."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds

    def merge(self, other: Histogram) -> None:
        """Add what the other has."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


class Counts:
    """What is counted of the requests that have all labels in common."""

    __slots__ = ("completion_tokens", "first_token", "number", "prompt_tokens", "whole")

    def __init__(self) -> None:
        self.number = 0
        #: Of whole answers.
        self.prompt_tokens = self.completion_tokens = 0
        #: From the beginning to the first token of a provider, and to the end of a whole answer.
        self.first_token, self.whole = Histogram(), Histogram()


class Metrics:
    """The counts. See the module."""

    def __init__(self, peer: PeerId) -> None:
        """`peer` is this node."""
        self._peer = peer
        self._models: set[str] = set()
        #: Requests that have not ended: of programs, and of members.
        self.running = {"own": 0, "member": 0}
        self.requests: dict[Asked, Counts] = {}
        self.tried: dict[Tried, int] = {}

    # --- what the trace tells

    def begun(self, record: Record) -> None:
        """A request came."""
        self.running["member" if record.for_peer else "own"] += 1

    def ended(self, record: Record) -> None:
        """It ended, as its record says."""
        self.running["member" if record.for_peer else "own"] -= 1
        self._count(record)

    def refused(self, record: Record) -> None:
        """It could not be read."""
        self._count(record)

    def settled(self, route: Route) -> None:
        """All candidates that are asked for a request were asked."""
        for tried in route.tried:
            candidate = tried.candidate
            provider = self._provider(candidate.peer, candidate.provider)
            outcome = "outrun" if tried.outcome == "outrun" else tried.code or "answered"
            labels = Tried(provider, outcome)
            if labels not in self.tried and len(self.tried) >= MAX_SERIES:
                labels = labels._replace(provider=OTHERS)
            self.tried[labels] = self.tried.get(labels, 0) + 1

    def _count(self, record: Record) -> None:
        counts = self._counts_of(record)
        counts.number += 1
        route = record.route
        if route is not None and route.first_at is not None:
            counts.first_token.add(route.first_at - record.started)
        if record.state != "answered" or record.ended is None:
            return
        counts.whole.add(record.ended - record.started)
        usage = record.usage
        if usage is not None:
            counts.prompt_tokens += usage.prompt_tokens
            counts.completion_tokens += usage.completion_tokens

    # --- names

    def _counts_of(self, record: Record) -> Counts:
        origin, model = record.origin, record.model
        if model not in self._models:
            model = self._new_model(record)
        labels = Asked(
            "member" if record.for_peer else "own",
            record.task,
            "" if origin is None else self._provider(origin.peer, origin.provider),
            model,
            "" if origin is None else origin.cache,
            record.code or record.state,
        )
        counts = self.requests.get(labels)
        if counts is None:
            if len(self.requests) >= MAX_SERIES:
                labels = labels._replace(provider=OTHERS, model=OTHERS)
            counts = self.requests.setdefault(labels, Counts())
        return counts

    def _provider(self, peer: PeerId, provider: str) -> str:
        if provider == "cache":
            return CACHE
        return provider if peer == self._peer else PEERS

    def _new_model(self, record: Record) -> str:
        if record.state != "answered" or not record.model or len(self._models) >= MAX_MODELS:
            return OTHERS
        self._models.add(record.model)
        return record.model
