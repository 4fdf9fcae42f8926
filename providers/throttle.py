"""The limits of one provider: of its key, which others may share, and of each member that asks."""

from __future__ import annotations

from collections import OrderedDict

from .base import Asked, GenerateRequest, ProviderBusy, ProviderUnavailable
from .rate_limits import RateLimiter, Rates
from .tokens import prompt_tokens
from .waiting import Place

#: Members whose use is remembered; the one that asked longest ago is forgotten.
MAX_MEMBERS = 1024


class Throttle:
    """Lets requests through as their limits allow.

    Where the key is at its limit a request waits, or is refused (`refuses`). A member that has had
    its share is always refused: it has others to ask, and would hold up those that wait behind it.
    """

    def __init__(
        self, limiter: RateLimiter, *, member: Rates | None = None, refuses: bool = False
    ) -> None:
        self.limiter = limiter
        self.refuses = refuses
        self._member = member or Rates()
        self._members: OrderedDict[str, RateLimiter] = OrderedDict()

    @property
    def counts_tokens(self) -> bool:
        """Is there a limit of tokens?"""
        limits = (self.limiter.rates.tokens_per_minute, self._member.tokens_per_minute)
        return limits != (None, None)

    def prepare(self, place: Place, request: Asked, name: str, now: float) -> None:
        """Note what a request takes, and count it for the member that asks.

        Raises `ProviderUnavailable` for one that is larger than a minute's limit, `ProviderBusy`
        for one of a member that has had its share.
        """
        limits = [rates.tokens_per_minute for rates in (self.limiter.rates, self._member)]
        most = min((limit for limit in limits if limit is not None), default=None)
        prompt, answer = 0.0, _most_answer(request)
        if most is not None:
            prompt = prompt_tokens(request)
            if prompt > most:
                raise ProviderUnavailable(
                    f"the prompt has about {prompt:.0f} tokens, and {name} takes {most} a minute"
                )
        place.tokens = self.limiter.reserve(prompt, answer)
        if self._member and request.asker:
            self._take_of_member(place, request.asker, prompt, answer, name, now)

    def _take_of_member(
        self, place: Place, asker: str, prompt: float, answer: int | None, name: str, now: float
    ) -> None:
        limiter = self._members.pop(asker, None) or RateLimiter(self._member)
        self._members[asker] = limiter
        if len(self._members) > MAX_MEMBERS:
            self._members.popitem(last=False)
        tokens = limiter.reserve(prompt, answer)
        at = limiter.when(tokens, now)
        if at > now:
            raise busy(f"{name} gives each member {self._member}, and it has had them", at - now)
        place.grants.append((limiter, limiter.take(tokens, now)))

    def allows(self, who: object, place: Place, now: float) -> bool:
        """May it begin now, as far as the key goes?"""
        limiter = self.limiter
        return limiter.is_next(who, place.since) and limiter.when(place.tokens, now) <= now

    def let_in(self, place: Place, now: float) -> None:
        """It begins now."""
        place.grants.append((self.limiter, self.limiter.take(place.tokens, now)))

    def refusal(self, place: Place, name: str, now: float) -> ProviderBusy:
        """What one is told that may not wait."""
        wait = self.limiter.when(place.tokens, now) - now
        return busy(f"{name} is at its limit of {self.limiter.rates}", wait)

    @staticmethod
    def settle(place: Place, tokens: int, answer: int | None) -> None:
        """It used so many tokens; `answer`: those of a whole answer."""
        for limiter, grant in place.grants:
            limiter.settle(grant, tokens, answer)

    @staticmethod
    def end(place: Place) -> None:
        """It is under way no more."""
        for limiter, grant in place.grants:
            limiter.end(grant)

    @staticmethod
    def cancel(place: Place) -> None:
        """It was never sent, and counts for nothing."""
        for limiter, grant in place.grants:
            limiter.cancel(grant)
        place.grants.clear()


def busy(why: str, wait: float) -> ProviderBusy:
    """The refusal; a `wait` that is infinite ends when another request does."""
    return ProviderBusy(why, retry_after=max(wait, 0.1) if wait < 1e6 else 1.0)


def _most_answer(request: Asked) -> int | None:
    return request.sampling.max_tokens if isinstance(request, GenerateRequest) else 0
