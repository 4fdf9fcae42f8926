"""The limits of the configured providers: those that have the same key share one."""

from __future__ import annotations

from collections.abc import Iterable

from ..providers.rate_limits import RateLimiter, Rates
from ..providers.throttle import Throttle
from .config_providers import ProviderConfig


class Limiters:
    """A limiter for each key, and for each provider without one."""

    def __init__(self, tables: Iterable[ProviderConfig]) -> None:
        rates: dict[object, Rates] = {}
        for table in tables:
            owner = _owner(table)
            rates[owner] = rates.get(owner, Rates()).stricter(_rates(table))
        self._limiters = {owner: RateLimiter(all_) for owner, all_ in rates.items()}

    def of(self, table: ProviderConfig) -> Throttle | None:
        """What limits this provider; None: nothing does."""
        limiter, member = self._limiters[_owner(table)], _member_rates(table)
        if not limiter.rates and not member:
            return None
        return Throttle(limiter, member=member, refuses=table.when_limited == "refuse")


def _owner(table: ProviderConfig) -> object:
    return table.name if table.api_key is None else table.api_key


def _rates(table: ProviderConfig) -> Rates:
    return Rates(table.requests_per_minute, table.tokens_per_minute, table.requests_at_once)


def _member_rates(table: ProviderConfig) -> Rates:
    return Rates(table.member_requests_per_minute, table.member_tokens_per_minute)
