"""Who is left alone for a while because it failed, or refused. Pure.

Times are monotonic seconds, told by the caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .backend_id import BackendId, Measured
from .transport import PeerId

#: Seconds a breaker stays open after the first failure; doubled by each further one, up to the cap.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 8.0
#: The same for what was refused: a person mends that, or nobody.
FIRST_REST, LONGEST_REST = 2.0, 120.0
#: A provider's own `retry_after` is believed up to this (s).
LONGEST_RETRY_AFTER = 3600.0
#: An answer with an error of the server's own (5xx) opens the breaker at this count in a row.
ERRORS_IN_A_ROW = 2
#: Breakers, and refusals, that are kept; more, and those are forgotten that hold nothing.
MAX_BREAKERS = 10_000


@dataclass(slots=True)
class Pause:
    """Keeps requests away for a while; then lets one through to see (half-open)."""

    failures: int = 0
    #: It holds until then. It stays half-open after that until a probe has succeeded.
    until: float = -math.inf
    probing: bool = False
    reason: str = ""

    @property
    def tripped(self) -> bool:
        """Does it hold, or is it half-open?"""
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

    def _hold(self, now: float, seconds: float) -> None:
        self.until = max(self.until, now + seconds)


class Breaker(Pause):
    """What fails is left alone: by errors of its own (5xx), silence, and lost connections."""

    __slots__ = ()

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
            self._hold(now, _believed(retry_after))
        elif at_once or self.tripped or self.failures >= ERRORS_IN_A_ROW:
            self._hold(now, _doubled(FIRST_PAUSE, self.failures, LONGEST_PAUSE))


class Refusal(Pause):
    """What says no is not asked again and again: a key, a right, some credit or the model lacks."""

    __slots__ = ()

    def refused(self, now: float, reason: str, retry_after: float | None = None) -> None:
        """A request was refused, by a server that works."""
        self.reason = reason[:200]
        if now < self.until and retry_after is None:
            return
        self.failures += 1
        self.probing = False
        if retry_after is None:
            self._hold(now, _doubled(FIRST_REST, self.failures, LONGEST_REST))
        else:
            self._hold(now, _believed(retry_after))


def _believed(retry_after: float) -> float:
    return min(max(retry_after, 0.0), LONGEST_RETRY_AFTER)


def _doubled(first: float, times: int, longest: float) -> float:
    return min(first * 2.0 ** min(times - 1, 10), longest)


class Breakers:
    """A breaker for each provider of each node, and one for each node (provider "")."""

    def __init__(self) -> None:
        self._breakers: dict[BackendId, Breaker] = {}

    def of(self, backend: BackendId) -> Breaker:
        """The breaker, made when first needed."""
        breaker = self._breakers.get(backend)
        if breaker is None:
            if len(self._breakers) >= MAX_BREAKERS:
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


class Refusals:
    """What was refused by each (peer, provider, model): another model may still be answered."""

    def __init__(self) -> None:
        self._refusals: dict[Measured, Refusal] = {}

    def of(self, what: Measured) -> Refusal:
        """The refusal, made when first needed."""
        refusal = self._refusals.get(what)
        if refusal is None:
            if len(self._refusals) >= MAX_BREAKERS:
                self._refusals.pop(next(iter(self._refusals)))
            refusal = self._refusals[what] = Refusal()
        return refusal

    def get(self, what: Measured) -> Refusal | None:
        return self._refusals.get(what)

    def refusal(self, what: Measured, now: float) -> tuple[float, str] | None:
        """Seconds to wait and why, if it is not to be asked."""
        refusal = self._refusals.get(what)
        wait = refusal.refuses(now) if refusal else None
        return None if refusal is None or wait is None else (wait, refusal.reason)

    def forget(self, peer: PeerId, provider: str = "") -> None:
        """Whatever it was may have been mended: at that provider, or ("") at all of the node."""
        for what in [w for w in self._refusals if w.peer == peer and provider in ("", w.provider)]:
            del self._refusals[what]
