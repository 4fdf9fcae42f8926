"""How much a provider may be asked in a minute, and what is left of it. Pure: told the time.

A sliding window that remembers each request: what began in the last 60 s, whenever they are looked
at, never exceeds the limit. A token bucket does not promise that: in a time t it lets through its
depth and its rate times t (RFC 2697, RFC 4115), so one as deep as a minute's limit twice the limit
in a minute; and a vendor counts that as a breach.

Tokens are taken before they are known: those of the prompt by an estimate, and of the answer as
many as it may have, as vendors count it, or as answers have usually had. The usage settles it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

#: Seconds of the window.
WINDOW = 60.0
#: Tokens of an answer whose length is not bounded, until some were seen, and the weight of a new
#: one in their average.
USUAL_ANSWER, WEIGHT = 500.0, 0.2


class Rates(NamedTuple):
    """What is allowed; None: as much as comes."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    #: Requests under way.
    at_once: int | None = None

    def stricter(self, other: Rates) -> Rates:
        """What both allow."""
        pairs = zip(self, other, strict=True)
        return Rates(*(min(set(pair) - {None}, default=None) for pair in pairs))  # type: ignore[type-var]

    def __bool__(self) -> bool:
        return self != Rates()

    def __str__(self) -> str:
        words = ("requests a minute", "tokens a minute", "requests at once")
        return ", ".join(
            f"{n} {what}" for n, what in zip(self, words, strict=True) if n is not None
        )


class Grant:
    """A request that was let through."""

    __slots__ = ("at", "counts", "tokens")

    def __init__(self, at: float, tokens: int) -> None:
        self.at = at
        self.tokens = tokens
        #: Is it in the window still?
        self.counts = True


class RateLimiter:
    """Counts what one key, or one member, uses; of one provider or several.

    Those that share it ask in turn: the one whose request has waited longest goes first
    (`ask`), so that none of them starves.
    """

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self._grants: deque[Grant] = deque()
        self._tokens = 0
        self._running = 0
        self._answer = USUAL_ANSWER
        #: Since when the first request of each queue waits, where only the limit keeps it.
        self._asking: dict[object, float] = {}
        #: Told when there may be more than before.
        self.on_change: list[Callable[[], None]] = []

    # --- how much

    def reserve(self, prompt: float, most_answer: int | None) -> int:
        """The tokens to take for a request. Its prompt must be within the limit by itself."""
        limit = self.rates.tokens_per_minute
        if limit is None:
            return 0
        answer = self._answer if most_answer is None else most_answer
        return min(math.ceil(prompt + answer), limit)

    def when(self, tokens: int, now: float) -> float:
        """When a request of so many tokens may begin; inf: when one that is under way has ended."""
        self._forget(now)
        if self.rates.at_once is not None and self._running >= self.rates.at_once:
            return math.inf
        return _when(self.rates, self._grants, self._tokens, tokens, now)

    def forecast(self, requests: Iterable[int], now: float) -> float:
        """When the last of them could begin, one after the other, by their tokens."""
        self._forget(now)
        grants, used, at = deque(self._grants), self._tokens, now
        for tokens in requests:
            at = _when(self.rates, grants, used, tokens, at)
            while grants and grants[0].at + WINDOW <= at:
                used -= grants.popleft().tokens
            grants.append(Grant(at, tokens))
            used += tokens
        return at

    # --- letting through

    def take(self, tokens: int, now: float) -> Grant:
        """Let one through, which may begin now."""
        grant = Grant(now, tokens)
        self._grants.append(grant)
        self._tokens += tokens
        self._running += 1
        return grant

    def settle(self, grant: Grant, tokens: int, answer: int | None = None) -> None:
        """It used so many tokens; `answer` of them are its answer's, where it was whole."""
        if answer is not None:
            self._answer += WEIGHT * (answer - self._answer)
        if grant.counts:
            self._tokens += tokens - grant.tokens
        grant.tokens = tokens
        self._changed()

    def end(self, grant: Grant) -> None:
        """It is under way no more."""
        self._running -= 1
        self._changed()

    def cancel(self, grant: Grant) -> None:
        """It was never sent: it counts for nothing."""
        if grant.counts:
            self._grants.remove(grant)
            self._tokens -= grant.tokens
            grant.counts = False
        self.end(grant)

    # --- those that share it

    def ask(self, who: object, since: float | None) -> None:
        """The first in the queue of `who` waits since then, and for nothing but this; None: none
        does."""
        before = self._asking.pop(who, None)
        if since is not None:
            self._asking[who] = since
        if before is not None and since != before:
            self._changed()

    def is_next(self, who: object, since: float) -> bool:
        """Has nobody else waited longer?"""
        return all(other is who or at >= since for other, at in self._asking.items())

    def _changed(self) -> None:
        for tell in self.on_change:
            tell()

    def _forget(self, now: float) -> None:
        while self._grants and self._grants[0].at + WINDOW <= now:
            grant = self._grants.popleft()
            self._tokens -= grant.tokens
            grant.counts = False


def _when(rates: Rates, grants: deque[Grant], used: float, tokens: int, now: float) -> float:
    at = now
    most = rates.requests_per_minute
    if most is not None and len(grants) >= most:
        at = max(at, grants[len(grants) - most].at + WINDOW)
    if rates.tokens_per_minute is not None:
        over = used + tokens - rates.tokens_per_minute
        for grant in grants:
            if over <= 0:
                break
            over -= grant.tokens
            at = max(at, grant.at + WINDOW)
    return at
