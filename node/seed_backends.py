"""What the routers of the Python API ask: the one provider that a call has chosen, and no mesh."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import msgspec

from ..cache.answer_rows import StoredAnswer
from ..mesh.ladder import Bill, is_paid, refusal
from ..mesh.policies import Candidate
from ..providers.base import (
    Answering,
    Asked,
    GenerateError,
    GenerateRequest,
    ModelOffer,
    ProviderUnavailable,
)
from .parts import Parts
from .seed_built import Built, BuiltProviders
from .seed_providers import Plan


class ChosenBackends:
    """The `Backends` of a router: a request names who was chosen for it."""

    def __init__(self, parts: Parts, built: BuiltProviders) -> None:
        self._parts = parts
        self._built = built
        #: Those that a router may be asking for, by a name of their own.
        self._chosen: dict[str, list[Built]] = {}

    @contextmanager
    def chosen(self, built: Built) -> Iterator[str]:
        """While inside, a router can ask for it by the name given.

        Equal objects of the program have one name, so that equal questions to them share a flight.
        """
        which = built.plan.key[-1] if built.in_memory else f"{id(built):x}"
        name = f"{built.plan.name}#{which}"
        self._chosen.setdefault(name, []).append(built)
        try:
            yield name
        finally:
            self._chosen[name].remove(built)
            if not self._chosen[name]:
                del self._chosen[name]

    def candidate(self, plan: Plan) -> Candidate:
        """It as one of those that could answer."""
        return Candidate(
            peer=self._parts.peer,
            node=self._parts.node,
            provider=plan.name,
            offer=ModelOffer(id=plan.model),
            own=True,
        )

    @asynccontextmanager
    async def open(
        self, request: Asked, *, local_only: bool = False, key: bytes = b""
    ) -> AsyncIterator[Answering]:
        """Ask the one provider that the request names."""
        users = self._chosen.get(request.provider or "")
        if not users or not isinstance(request, GenerateRequest):
            raise ProviderUnavailable("nobody waits for this answer any more")
        built = users[-1]
        self._check_cost(built.plan, request)
        # It is in use for as long as anybody reads, not only whose call began it.
        with _told_of(built.plan.name), self._built.used(built):
            async with self._opened(built, request) as answering:
                yield answering

    @asynccontextmanager
    async def _opened(self, built: Built, request: GenerateRequest) -> AsyncIterator[Answering]:
        await self._built.ready(built)
        asked = msgspec.structs.replace(request, provider=None, policy=None)
        async with built.provider.open(asked) as answering:
            offers = {offer.id: offer for offer in built.provider.models()}
            offer = offers.get(request.model, ModelOffer(id=request.model))
            answering.origin = msgspec.structs.replace(
                answering.origin,
                peer=self._parts.peer,
                node=self._parts.node,
                provider=built.plan.name,
                model=request.model,
                attempts=1,
                weights=offer.weights,
                engine=offer.engine,
                numerics=offer.numerics,
                price=offer.price,
            )
            yield answering

    def _check_cost(self, plan: Plan, request: GenerateRequest) -> None:
        """Raises `ProviderUnavailable` where more would be spent than a day allows."""
        candidate = self.candidate(plan)
        candidate.paid = is_paid(plan.price, plan.paid)
        bill = Bill(request, lambda: plan.max_tokens)
        candidate.cost = bill.at(plan.price, paid=candidate.paid)
        candidate.allowance = self._parts.purse.allowance(request.asker)
        refused = refusal(candidate, request)
        if refused is not None:
            raise ProviderUnavailable(f"{plan.name}: {refused.reason}", retry_after=refused.wait)


@contextmanager
def _told_of(name: str) -> Iterator[None]:
    """A mistake in a provider is a failed answer; it does not end the loop and all calls in it."""
    try:
        yield
    except GenerateError:
        raise
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # Who asked sees it.
        raise ProviderUnavailable(f"{name} failed: {type(error).__name__}: {error}") from error


class NamesAsTheyAre:
    """Model names are what they are: no peer offers any."""

    def resolve(self, request: Any, tell: Callable[[str], None] = lambda why: None) -> Any:
        return request


class NoMembers:
    """No other members: for answers that are nobody else's business."""

    async def find(
        self, key: bytes, request: Asked, tell: Callable[[str], None]
    ) -> tuple[StoredAnswer, str] | None:
        return None

    def objection(self, key: bytes, request: Asked, stored: StoredAnswer) -> str:
        return ""

    def announce(self, key: bytes, request: Asked, stored: StoredAnswer) -> None: ...
