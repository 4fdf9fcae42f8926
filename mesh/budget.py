"""How many requests may be sent beyond those that were asked for. Pure: told the time.

What fails is asked again, and elsewhere; where everything fails that multiplies the load just when
there is too much of it. So what is sent in addition is a share of what was asked for lately.
"""

from __future__ import annotations


class Budget:
    """A bucket of tokens: each request of a caller puts in a share of one, each more takes one."""

    def __init__(self, share: float, *, most: float, a_second: float = 0.0, now: float) -> None:
        """It begins full if it fills by itself (`a_second`), else empty."""
        self._share = share
        self._most = most
        self._a_second = a_second
        self._tokens = most if a_second else 0.0
        self._at = now

    def earn(self, now: float) -> None:
        """A caller asked."""
        self._fill(now)
        self._tokens = min(self._tokens + self._share, self._most)

    def take(self, now: float) -> bool:
        """May one more be sent? Then it is counted."""
        self._fill(now)
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _fill(self, now: float) -> None:
        passed, self._at = max(now - self._at, 0.0), max(now, self._at)
        self._tokens = min(self._tokens + passed * self._a_second, self._most)
