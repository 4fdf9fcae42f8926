"""What this node saw of providers, its own and its peers': speed, and what comes of failures. Pure.

Times are monotonic seconds, told by the caller.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from .backend_id import BackendId, Measured
from .breakers import Breaker, Breakers, Pause, Refusals
from .loads import Loads
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


# --- all of it ----------------------------------------------------------------------------------


class Fault(Enum):
    """Whom a failure speaks against."""

    #: Nobody: the request itself, or its asker.
    NONE = auto()
    #: The provider said that it failed; once may happen.
    PROVIDER = auto()
    #: The provider was silent, or sent nonsense.
    PROVIDER_AT_ONCE = auto()
    #: The provider works, and takes no such request from this node.
    REFUSED = auto()
    #: The node could not be reached, or was lost.
    PEER = auto()


class HeldBack(NamedTuple):
    """Why nothing is sent there for so many seconds."""

    wait: float
    reason: str
    #: It works, and refused; else it failed.
    refused: bool = False


class Experience:
    """What this node learns from each request that it sends to a backend."""

    def __init__(self) -> None:
        self.measures = Measures()
        self.breakers = Breakers()
        self.refusals = Refusals()
        self.loads = Loads()
        #: Providers whose node says that they are not ready.
        self._down: set[BackendId] = set()

    def begin(self, what: Measured) -> None:
        """A request is sent."""
        self.loads.begin(BackendId(what.peer, what.provider))
        speed = self.measures.of(what)
        if speed.ttft is None:
            speed.tries += 1
        for pause in self._pauses(what):
            pause.begin()

    def end(self, what: Measured) -> None:
        """Its last byte came, or it was given up."""
        self.loads.end(BackendId(what.peer, what.provider))

    def succeeded(self, what: Measured) -> None:
        """A whole answer came."""
        for pause in self._pauses(what):
            pause.succeeded()

    def outrun(self, what: Measured, seconds: float, now: float) -> None:
        """It had no token after so long, and another one had: it was slow, and did not fail."""
        speed = self.measures.of(what)
        if speed.ttft is None or seconds > speed.ttft:
            speed.first_token(seconds, now)

    def abandoned(self, what: Measured) -> None:
        """The asker left before it was known how it ends."""
        for pause in self._pauses(what):
            pause.abandoned()

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
        if fault is Fault.REFUSED:
            self.refusals.of(what).refused(now, reason, retry_after)
            self.measures.came_back(what.peer, what.provider)
            return
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
        self.refusals.forget(peer)
        self._down = {backend for backend in self._down if backend.peer != peer}

    def held_back(self, what: Measured, now: float) -> HeldBack | None:
        """What keeps requests from it, if anything does."""
        backend = BackendId(what.peer, what.provider)
        if (failed := self.breakers.refusal(backend, now)) is not None:
            return HeldBack(*failed)
        if (refused := self.refusals.refusal(what, now)) is not None:
            return HeldBack(*refused, refused=True)
        return None

    def on_trial(self, what: Measured) -> bool:
        """Did it fail, so that a request which it gets now is to show whether it is back?"""
        return any(isinstance(pause, Breaker) and pause.tripped for pause in self._pauses(what))

    def health(self, backend: BackendId, ready: bool) -> None:
        """What its node says of a provider. One that is ready again may have been mended."""
        if not ready:
            self._down.add(backend)
        elif backend in self._down:
            self._down.remove(backend)
            self.refusals.forget(*backend)

    def _pauses(self, what: Measured) -> list[Pause]:
        """Those that there are for it."""
        breakers = self.breakers
        found: tuple[Pause | None, ...] = (
            breakers.get(BackendId(what.peer, what.provider)),
            breakers.get(BackendId(what.peer, "")),
            self.refusals.get(what),
        )
        return [pause for pause in found if pause is not None]
