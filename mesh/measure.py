"""What this node saw of providers, its own and its peers': speed, failures, load. Pure.

Times are monotonic seconds, told by the caller.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from .frames import Load
from .transport import PeerId

#: Weight of the newest sample in the moving averages: half of the memory is the last 3 samples.
ALPHA = 0.2
#: Weight of the newest outcome in the error rate, and the seconds in which half of it fades: who
#: failed and is not asked would else never be asked again. They are multiplied by the failures in a
#: row, up to so many: who fails each time it is tried is tried ever less.
ERROR_ALPHA, ERROR_HALF_LIFE, LONGEST_ROW = 0.25, 10.0, 6
#: Times to the first token that are remembered one by one, and how many of them tell what is late:
#: longer than this share of them.
RECENT, ENOUGH, LATE = 40, 20, 0.95
#: (peer, provider, model) that are remembered; the least recently used are forgotten.
MAX_MEASURED = 10_000
#: A generation shorter than this (s) says nothing of the speed: it came in one piece.
MIN_GENERATION = 0.005
#: Seconds a breaker stays open after the first failure; doubled by each further one, up to the cap.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 8.0
#: A provider's own `retry_after` is believed up to this (s).
LONGEST_RETRY_AFTER = 3600.0
#: Seconds for which a peer may say that it is about to choose.
LONGEST_CHOICE = 0.5
#: An answer with an error of the server's own (5xx) opens the breaker at this count in a row.
ERRORS_IN_A_ROW = 2


class BackendId(NamedTuple):
    """A provider of a node."""

    peer: PeerId
    provider: str


class Measured(NamedTuple):
    """A model at a provider of a node."""

    peer: PeerId
    provider: str
    model: str


# --- speed --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Speed:
    """Moving averages of what answers took. None: no sample yet."""

    #: Seconds from the first byte sent to the first token.
    ttft: float | None = None
    #: Tokens per second after the first token.
    rate: float | None = None
    #: When the last sample came.
    at: float = -math.inf
    #: Requests sent while there was no sample.
    tries: int = 0
    #: Whole answers since it was first asked, or since it came back.
    answers: int = 0
    #: Share of recent attempts that failed, 0 to 1, as it was at `failed_at`.
    errors: float = 0.0
    failed_at: float = -math.inf
    #: Failures since the last whole answer.
    row: int = 0
    #: Seconds until a failed attempt had failed.
    failing: float | None = None
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def first_token(self, seconds: float, now: float) -> None:
        self.ttft, self.at = _average(self.ttft, seconds), now
        self._recent.append(seconds)

    @property
    def late(self) -> float | None:
        """Seconds after which a first token is late, for this model there; None: not known yet."""
        if len(self._recent) < ENOUGH:
            return None
        return sorted(self._recent)[math.ceil(LATE * len(self._recent)) - 1]

    def finished(self, tokens: int, seconds: float, now: float) -> None:
        """A whole answer: so many tokens, so long from the first to the last."""
        self.answers += 1
        self.row = 0
        self.errors *= 1 - ERROR_ALPHA
        if tokens > 1 and seconds >= MIN_GENERATION:
            self.rate, self.at = _average(self.rate, min((tokens - 1) / seconds, 1e6)), now

    def failed(self, seconds: float, now: float) -> None:
        """An attempt failed after so long."""
        faded = self.errors_at(now)
        self.errors, self.failed_at = faded + ERROR_ALPHA * (1 - faded), now
        self.row += 1
        self.failing = _average(self.failing, seconds)

    def errors_at(self, now: float) -> float:
        """The share of attempts that fail, as far as it is still remembered."""
        if not self.errors:
            return 0.0
        half_life = ERROR_HALF_LIFE * min(max(self.row, 1), LONGEST_ROW)
        return self.errors * math.exp2(min(self.failed_at - now, 0.0) / half_life)


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + ALPHA * (new - old)


class Measures:
    """The speed of each (peer, provider, model), and how long answers of each model are."""

    def __init__(self) -> None:
        self._speeds: OrderedDict[Measured, Speed] = OrderedDict()
        #: By model and kind of request ("": all of them).
        self._lengths: OrderedDict[tuple[str, str], float] = OrderedDict()

    def get(self, what: Measured) -> Speed | None:
        """What was seen; None: nothing."""
        return self._speeds.get(what)

    def of(self, what: Measured) -> Speed:
        """The averages to add to."""
        speed = self._speeds.get(what)
        if speed is None:
            speed = self._speeds[what] = Speed()
            if len(self._speeds) > MAX_MEASURED:
                self._speeds.popitem(last=False)
        self._speeds.move_to_end(what)
        return speed

    def came_back(self, peer: PeerId, provider: str = "") -> None:
        """What its answers were before counts no more: its share grows from the first one on."""
        for what, speed in self._speeds.items():
            if what.peer == peer and provider in ("", what.provider):
                speed.answers = 0

    def add_length(self, model: str, tokens: int, kind: str = "") -> None:
        """An answer of that model, to a request of that kind, had so many tokens."""
        for key in {(model, kind), (model, "")}:
            self._lengths[key] = _average(self._lengths.pop(key, None), min(tokens, 10**6))
            if len(self._lengths) > MAX_MEASURED:
                self._lengths.popitem(last=False)

    def length(self, model: str, default: float = 200.0, *, kind: str = "") -> float:
        """Tokens to expect of an answer, by others of its kind, else by all of the model."""
        of_model = self._lengths.get((model, ""), default)
        return self._lengths.get((model, kind), of_model)


# --- breakers -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Breaker:
    """Keeps requests away from what fails; then lets one through to see (half-open)."""

    failures: int = 0
    #: Open until then. It stays half-open after that until a probe has succeeded.
    until: float = -math.inf
    probing: bool = False
    reason: str = ""

    @property
    def tripped(self) -> bool:
        """Is it open or half-open?"""
        return self.until > -math.inf

    def refuses(self, now: float) -> float | None:
        """None if a request may pass, else the seconds after which one may."""
        if now < self.until:
            return self.until - now
        if self.tripped and self.probing:
            return FIRST_PAUSE
        return None

    def begin(self) -> None:
        """A request passes: while half-open it is the probe."""
        self.probing = self.tripped

    def abandoned(self) -> None:
        """The request ended without saying anything about the backend."""
        self.probing = False

    def succeeded(self) -> None:
        self.failures, self.until, self.probing, self.reason = 0, -math.inf, False, ""

    def failed(
        self, now: float, reason: str, *, at_once: bool, retry_after: float | None = None
    ) -> None:
        """A request failed. `at_once`: the first such failure opens it."""
        self.reason = reason[:200]
        if now < self.until and retry_after is None:
            return  # one of several that were under way when it opened
        self.failures += 1
        self.probing = False
        if retry_after is not None:
            pause = min(max(retry_after, 0.0), LONGEST_RETRY_AFTER)
        elif at_once or self.tripped or self.failures >= ERRORS_IN_A_ROW:
            pause = min(FIRST_PAUSE * 2.0 ** min(self.failures - 1, 10), LONGEST_PAUSE)
        else:
            return
        self.until = max(self.until, now + pause)


class Breakers:
    """A breaker for each provider of each node, and one for each node (provider "")."""

    def __init__(self) -> None:
        self._breakers: dict[BackendId, Breaker] = {}

    def of(self, backend: BackendId) -> Breaker:
        """The breaker, made when first needed."""
        breaker = self._breakers.get(backend)
        if breaker is None:
            if len(self._breakers) >= MAX_MEASURED:
                self._forget_closed()
            breaker = self._breakers[backend] = Breaker()
        return breaker

    def get(self, backend: BackendId) -> Breaker | None:
        return self._breakers.get(backend)

    def refusal(self, backend: BackendId, now: float) -> tuple[float, str] | None:
        """Seconds to wait and why, if the provider's breaker or its node's is open."""
        for which in (backend, BackendId(backend.peer, "")):
            breaker = self._breakers.get(which)
            wait = breaker.refuses(now) if breaker else None
            if breaker is not None and wait is not None:
                return wait, breaker.reason
        return None

    def _forget_closed(self) -> None:
        self._breakers = {k: b for k, b in self._breakers.items() if b.failures}


# --- load ---------------------------------------------------------------------------------------


class Busy(NamedTuple):
    """Requests of others (running and waiting), our own in flight, and how many run at once."""

    others: int = 0
    in_flight: int = 0
    slots: int = 1
    #: What it said last: how many were there, and the seconds until another would begin.
    told: int = 0
    wait: float | None = None
    #: Other nodes that were about to choose when it was told, and when that was.
    rivals: int = 0
    at: float = -math.inf

    @property
    def all(self) -> int:
        """How many are there now."""
        return self.others + self.in_flight


@dataclass(slots=True)
class _Seen:
    #: What others have running and waiting there, by the last report.
    others: int = 0
    slots: int = 1
    in_flight: int = 0
    #: How many it said were there, and how long another would wait.
    told: int = 0
    wait: float | None = None
    #: Other nodes that had just asked for its load when it was reported, and may choose it too.
    rivals: int = 0
    #: When it was reported; None: never.
    at: float | None = None


@dataclass(slots=True)
class Loads:
    """How busy the peers' providers are: what they said last, and this node's requests since.

    A peer counts our requests too, so those that were in flight when it spoke are taken off what it
    said, and those that are in flight now are counted by ourselves.
    """

    _seen: dict[BackendId, _Seen] = field(default_factory=dict)

    def begin(self, backend: BackendId) -> None:
        """A request of ours is sent."""
        self._of(backend).in_flight += 1

    def end(self, backend: BackendId) -> None:
        """Its last byte came, or it was given up."""
        self._of(backend).in_flight -= 1

    def report(
        self,
        backend: BackendId,
        load: Load,
        now: float,
        *,
        known: int | None = None,
        rivals: int = 0,
    ) -> None:
        """The peer said how busy it is.

        Of our requests it knew at most `known`: those sent after it was asked came too late.
        """
        seen = self._of(backend)
        ours = seen.in_flight if known is None else min(known, seen.in_flight)
        seen.told, seen.wait = load.running + load.waiting, load.wait
        seen.others = max(seen.told - ours, 0)
        seen.slots, seen.rivals, seen.at = load.slots, rivals, now

    def told(self, backend: BackendId) -> float | None:
        """When it was last reported; None: never."""
        seen = self._seen.get(backend)
        return seen.at if seen else None

    def in_flight(self, backend: BackendId) -> int:
        """Our own requests there."""
        seen = self._seen.get(backend)
        return seen.in_flight if seen else 0

    def get(self, backend: BackendId, advertised: Load) -> Busy:
        """How busy it is now; as advertised if it never said otherwise."""
        seen = self._seen.get(backend)
        if seen is None or seen.at is None:
            others = advertised.running + advertised.waiting
            return Busy(others, seen.in_flight if seen else 0, advertised.slots)
        return Busy(
            seen.others, seen.in_flight, seen.slots, seen.told, seen.wait, seen.rivals, seen.at
        )

    def forget(self, peer: PeerId) -> None:
        """The peer is gone: what it said holds no more."""
        for backend in [b for b in self._seen if b.peer == peer]:
            if not self._seen[backend].in_flight:
                del self._seen[backend]

    def _of(self, backend: BackendId) -> _Seen:
        seen = self._seen.get(backend)
        if seen is None:
            seen = self._seen[backend] = _Seen()
        return seen


# --- others who choose --------------------------------------------------------------------------


class Choosing:
    """Peers that have asked how busy this node is, and are about to choose whom to ask.

    Nodes that look at the same moment see the same, and would all go to the same place. So each is
    told how many looked before it and may not have chosen yet.
    """

    def __init__(self) -> None:
        #: The model each asks for, and until when it may be choosing.
        self._askers: dict[PeerId, tuple[str, float]] = {}

    def enter(self, asker: PeerId, model: str, within: float, now: float) -> int:
        """It will have chosen within so many seconds. Returns how many others are choosing."""
        self._askers = {p: entry for p, entry in self._askers.items() if entry[1] > now}
        others = sum(entry[0] == model for p, entry in self._askers.items() if p != asker)
        self._askers[asker] = model, now + min(within, LONGEST_CHOICE)
        return others

    def chose(self, asker: PeerId) -> None:
        """Its request is here: it is counted as such."""
        self._askers.pop(asker, None)


# --- all of it ----------------------------------------------------------------------------------


class Fault(Enum):
    """Whom a failure speaks against."""

    #: Nobody: the request itself, or its asker.
    NONE = auto()
    #: The provider said that it failed; once may happen.
    PROVIDER = auto()
    #: The provider was silent, or sent nonsense.
    PROVIDER_AT_ONCE = auto()
    #: The node could not be reached, or was lost.
    PEER = auto()


class Experience:
    """What this node learns from each request that it sends to a backend."""

    def __init__(self) -> None:
        self.measures = Measures()
        self.breakers = Breakers()
        self.loads = Loads()

    def begin(self, what: Measured) -> None:
        """A request is sent."""
        self.loads.begin(BackendId(what.peer, what.provider))
        speed = self.measures.of(what)
        if speed.ttft is None:
            speed.tries += 1
        for breaker in self._made_breakers(what):
            breaker.begin()

    def end(self, what: Measured) -> None:
        """Its last byte came, or it was given up."""
        self.loads.end(BackendId(what.peer, what.provider))

    def succeeded(self, what: Measured) -> None:
        """A whole answer came."""
        for breaker in self._made_breakers(what):
            breaker.succeeded()

    def outrun(self, what: Measured, seconds: float, now: float) -> None:
        """It had no token after so long, and another one had: it was slow, and did not fail."""
        speed = self.measures.of(what)
        if speed.ttft is None or seconds > speed.ttft:
            speed.first_token(seconds, now)

    def abandoned(self, what: Measured) -> None:
        """The asker left before it was known how it ends."""
        for breaker in self._made_breakers(what):
            breaker.abandoned()

    def failed(
        self,
        what: Measured,
        fault: Fault,
        reason: str,
        now: float,
        retry_after: float | None,
        *,
        seconds: float,
    ) -> None:
        """There was no whole answer; that took so long."""
        self.abandoned(what)
        if fault is Fault.NONE:
            return
        self.measures.of(what).failed(seconds, now)
        at_fault = BackendId(what.peer, "" if fault is Fault.PEER else what.provider)
        breaker = self.breakers.of(at_fault)
        breaker.failed(now, reason, at_once=fault is not Fault.PROVIDER, retry_after=retry_after)
        if breaker.tripped:
            self.measures.came_back(*at_fault)

    def connection(self, peer: PeerId, connected: bool) -> None:
        """A connection to the peer came or went."""
        breaker = self.breakers.get(BackendId(peer, ""))
        if connected and breaker is not None:
            breaker.succeeded()
        if not connected:
            self.loads.forget(peer)
            self.measures.came_back(peer)

    def _made_breakers(self, what: Measured) -> list[Breaker]:
        ids = BackendId(what.peer, what.provider), BackendId(what.peer, "")
        return [b for b in map(self.breakers.get, ids) if b is not None]
