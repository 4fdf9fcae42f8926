"""Asking a second candidate when the first token is late: for whom, after how long. Pure.

The first token wins, and the other one is cancelled. It helps where now and then one is slow for no
reason that shows; where all are slow for want of slots it would only add work, so it is bounded by
a share of the requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from .budget import Budget
from .policies import Candidate

#: Share of the requests that may be sent twice, and how many that may be at once.
HEDGE_SHARE, MOST_HEDGES = 0.05, 5.0


def hedge_budget(now: float) -> Budget:
    """What all requests of a node have together."""
    return Budget(HEDGE_SHARE, most=MOST_HEDGES, now=now)


def patience_with(candidate: Candidate) -> float | None:
    """Seconds after which another one is asked too; None: never.

    What was paid for is not thrown away.
    """
    speed = candidate.speed
    return None if candidate.paid or speed is None else speed.late


def may_be_second(left: Sequence[Candidate]) -> list[Candidate]:
    """Those that may be asked too: it costs nothing, and shows no third party the prompt."""
    return [c for c in left if not c.paid and not c.offer.egress]
