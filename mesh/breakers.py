"""Who is left alone for a while because it failed. Pure.

Times are monotonic seconds, told by the caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .backend_id import BackendId

#: Seconds a breaker stays open after the first failure; doubled by each further one, up to the cap.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 8.0
#: A provider's own `retry_after` is believed up to this (s).
LONGEST_RETRY_AFTER = 3600.0
#: An answer with an error of the server's own (5xx) opens the breaker at this count in a row.
ERRORS_IN_A_ROW = 2
#: Breakers that are kept; more, and those that are closed are forgotten.
MAX_BREAKERS = 10_000


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
