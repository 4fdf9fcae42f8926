"""What a request is expected to cost at a candidate, whether it may, and free before paid. Pure.

The ladder is own, peers, paid. The policy chooses among those of the lowest rung that can answer;
the next rung is for when none of it can. By default own and peers' free providers are one rung, as
the policies weigh both by how busy they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

from ..providers.base import Asked, GenerateRequest, Prefer, Price
from ..providers.tokens import prompt_tokens
from .policies import Candidate


class Refused(NamedTuple):
    """Why a candidate may not be paid for. It passes after `wait` seconds, or (None) never."""

    reason: str
    wait: float | None = None


class Bill:
    """What one request is expected to cost, at any price."""

    def __init__(self, request: Asked, usual: Callable[[], float]) -> None:
        """`usual` gives the tokens of an answer whose length the request does not bound."""
        self._request = request
        self._usual = usual

    def at(self, price: Price | None, *, paid: bool) -> float | None:
        """US dollars; None: nobody says what it costs, and somebody pays."""
        if price is None:
            return None if paid else 0.0
        prompt, answer = self._tokens
        cost = (prompt * price.prompt + answer * price.completion) / 1_000_000
        # A peer may say anything.
        return cost if min(price.prompt, price.completion) >= 0 and cost < math.inf else None

    @cached_property
    def _tokens(self) -> tuple[float, float]:
        """Of the prompt and of the answer."""
        request = self._request
        if not isinstance(request, GenerateRequest):
            return prompt_tokens(request), 0.0
        most = request.sampling.max_tokens
        return prompt_tokens(request), self._usual() if most is None else most


def is_paid(price: Price | None, paid: bool) -> bool:
    """Does an offer cost money? `paid` is what is known of its provider, where it has no price."""
    return paid if price is None else bool(price.prompt or price.completion)


def refusal(candidate: Candidate, request: Asked) -> Refused | None:
    """Why the candidate costs too much for this request; None: it does not."""
    cost, most, left = candidate.cost, request.max_cost, candidate.allowance.left
    if most is not None and cost is None:
        return Refused(f"nobody says what it costs, and the request may cost {dollars(most)}")
    expected = cost or 0.0
    says = f"the request is expected to cost {dollars(expected)} there"
    if most is not None and expected > most:
        return Refused(f"{says}, and may cost {dollars(most)}")
    if candidate.paid and (left <= 0 or expected > left):
        rule, renewed = candidate.allowance.rule, candidate.allowance.renewed
        return Refused(f"{says}, and {dollars(max(left, 0))} of {rule} is left today", renewed)
    return None


def spent_at(candidate: Candidate, request: Asked, tokens: float) -> float:
    """What an attempt that broke cost there, after so many tokens of the answer (US dollars)."""
    price = candidate.offer.price
    if price is None:
        return 0.0
    return (prompt_tokens(request) * price.prompt + tokens * price.completion) / 1_000_000


def too_much(candidate: Candidate, request: Asked, spent: float) -> str:
    """Why the request may not cost that much more, after what was `spent`; "": it may."""
    most, cost = request.max_cost, candidate.cost
    if most is None or not spent or not candidate.paid or spent + (cost or 0.0) <= most:
        return ""
    says = f"the request is expected to cost {dollars(cost or 0.0)} there"
    return f"{says}, and of {dollars(most)} that it may cost {dollars(spent)} are spent"


def rung(candidates: Sequence[Candidate], prefer: Prefer) -> Sequence[Candidate]:
    """Those among whom the policy chooses now; `candidates` are all that are left, in any order.

    `own`: free providers of this node as long as one has a slot, then all free ones, then the paid
    ones; `free` makes no difference between own and peers' free ones; `any` makes none at all.
    """
    free = () if prefer == "any" else [c for c in candidates if not c.paid]
    if prefer == "own":
        own = [c for c in free if c.own and c.busy.all < c.busy.slots]
        if own:
            return own
    return free or candidates


def dollars(amount: float) -> str:
    """`$0.0123`: as many digits as tell something."""
    return f"${amount:.2f}" if amount >= 1 or not amount else f"${amount:.3g}"
