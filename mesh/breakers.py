"""Who is left alone for a while because it failed, or refused. Pure.

Times are monotonic seconds, told by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

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


K = TypeVar("K", bound=Hashable)
P = TypeVar("P", bound="Pause")


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


class _Pauses(Generic[K, P]):
    """The pauses of many, by what they hold back."""

    _make: type[P]

    def __init__(self) -> None:
        self._pauses: dict[K, P] = {}

    def of(self, key: K) -> P:
        """The pause, made when first needed."""
        pause = self._pauses.get(key)
        if pause is None:
            if len(self._pauses) >= MAX_BREAKERS:
                self._forget_some()
            pause = self._pauses[key] = self._make()
        return pause

    def get(self, key: K) -> P | None:
        return self._pauses.get(key)

    def _wait(self, key: K, now: float) -> tuple[float, str] | None:
        pause = self._pauses.get(key)
        wait = pause.refuses(now) if pause else None
        return None if pause is None or wait is None else (wait, pause.reason)

    def _forget_some(self) -> None:
        """Those that hold nothing, and the oldest where all do."""
        oldest = next(iter(self._pauses))
        self._pauses = {k: p for k, p in self._pauses.items() if p.failures and k != oldest}


class Breakers(_Pauses[BackendId, Breaker]):
    """A breaker for each provider of each node, and one for each node (provider "")."""

    _make = Breaker

    def refusal(self, backend: BackendId, now: float) -> tuple[float, str] | None:
        """Seconds to wait and why, if the provider's breaker or its node's is open."""
        return self._wait(backend, now) or self._wait(BackendId(backend.peer, ""), now)


class Refusals(_Pauses[Measured, Refusal]):
    """What was refused by each (peer, provider, model): another model may still be answered."""

    _make = Refusal

    def refusal(self, what: Measured, now: float) -> tuple[float, str] | None:
        """Seconds to wait and why, if it is not to be asked."""
        return self._wait(what, now)

    def forget(self, peer: PeerId, provider: str = "") -> None:
        """Whatever it was may have been mended: at that provider, or ("") at all of the node."""
        for what in [w for w in self._pauses if w.peer == peer and provider in ("", w.provider)]:
            del self._pauses[what]
