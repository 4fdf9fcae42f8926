"""Providers of this node that cost money: their prices, what was spent, and what may be.

A price stands over what a provider says of itself. What an answer cost is put into the ledger at
its end, whoever asked, and though the asker left: then by an estimate. While it is under way what
it is expected to cost is held back, so that many requests at once stay below the limits of a day.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager

import msgspec

from ..mesh.ladder import Bill, dollars
from ..mesh.policies import Allowance
from ..mesh.transport import PeerId
from ..providers.base import (
    Answering,
    Asked,
    Chunk,
    Declined,
    Embedding,
    EmbedRequest,
    GenerateRequest,
    Health,
    ModelOffer,
    Price,
    Provider,
    Usage,
    total_usage,
)
from ..providers.tokens import TokenCount, count_tokens, estimated_usage
from .ledger import DAY, Counts, Ledger
from .replays import cost

#: Tokens of an answer whose length is not bounded, for what is held back.
USUAL = 500.0


class Purse:
    """What may be spent on this node's own providers in a day (UTC)."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        peer: PeerId,
        per_day: float | None = None,
        per_day_by_members: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`peer` is this node. Without a limit (US dollars) all may be spent."""
        self._ledger = ledger
        self._peer = peer
        self._limits = per_day, per_day_by_members
        self._clock = clock
        #: What requests under way are expected to cost: in all, and for members.
        self._held = [0.0, 0.0]

    def allowance(self, asker: PeerId) -> Allowance:
        """What is left for that asker; "": a program of this machine."""
        every, members = self._limits
        if every is None and members is None:
            return Allowance()
        spent = self._ledger.spent()
        renewed = DAY - self._clock() % DAY
        found = []
        if every is not None:
            left = every - spent.all - self._held[0]
            found.append(Allowance(left, f"{dollars(every)} (limits.max_cost_per_day)", renewed))
        if members is not None and asker:
            left = members - spent.members - self._held[1]
            rule = f"{dollars(members)} for members (limits.max_member_cost_per_day)"
            found.append(Allowance(left, rule, renewed))
        return min(found, default=Allowance())

    @contextmanager
    def hold(self, amount: float, asker: PeerId) -> Iterator[None]:
        """While inside, so much is not left. Raises `Declined` if it is not left now."""
        allowance = self.allowance(asker)
        if allowance.left <= 0 or amount > allowance.left:
            raise Declined(
                f"{dollars(amount)} are expected, and {dollars(max(allowance.left, 0))} of "
                f"{allowance.rule} is left today",
                retry_after=allowance.renewed,
            )
        members = amount if asker else 0.0
        self._held[0] += amount
        self._held[1] += members
        try:
            yield
        finally:
            self._held[0] -= amount
            self._held[1] -= members

    def spend(self, money: float, request: Asked, provider: str) -> None:
        """So much was spent on that request."""
        self._ledger.add(
            Counts(money=money),
            asker=request.asker,
            peer=self._peer,
            provider=provider,
            model=request.model,
            cache="miss",
        )


class Priced:
    """A provider with prices: `prices` by model, `price` of all others."""

    def __init__(
        self, provider: Provider, purse: Purse, price: Price | None, prices: Mapping[str, Price]
    ) -> None:
        self.name = provider.name
        self._provider = provider
        self._purse = purse
        self._price = price
        self._prices = prices
        self._seen: Sequence[ModelOffer] = ()
        self._offers: Sequence[ModelOffer] = ()

    def models(self) -> Sequence[ModelOffer]:
        offers = self._provider.models()
        if offers != self._seen:
            self._seen = tuple(offers)
            self._offers = tuple(
                msgspec.structs.replace(offer, price=self._of(offer.id) or offer.price)
                for offer in offers
            )
        return self._offers

    def _of(self, model: str) -> Price | None:
        return self._prices.get(model, self._price)

    async def check(self) -> Health:
        return await self._provider.check()

    async def count_tokens(self, request: GenerateRequest) -> TokenCount:
        return await count_tokens(self._provider, request)

    @asynccontextmanager
    async def open(self, request: GenerateRequest) -> AsyncIterator[Answering]:
        """As the provider. Raises `Declined` where too little money is left today."""
        with self._purse.hold(self._expected(request), request.asker):
            async with self._provider.open(request) as answering:
                chunks = self._count(request, aiter(answering.chunks))
                answering.chunks = chunks
                try:
                    yield answering
                finally:
                    await chunks.aclose()

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        """As the provider. Raises as `open`."""
        with self._purse.hold(self._expected(request), request.asker):
            found = await self._provider.embed(request)
            self._spend(request, total_usage(embedding.usage for embedding in found))
            return found

    def _expected(self, request: Asked) -> float:
        return Bill(request, lambda: USUAL).at(self._of(request.model), paid=True) or 0.0

    async def _count(
        self, request: GenerateRequest, chunks: AsyncIterator[Chunk]
    ) -> AsyncGenerator[Chunk, None]:
        """The same chunks. What they cost is noted also where nobody waits for the last one."""
        usage: Usage | None = None
        texts: list[str] = []
        try:
            async for chunk in chunks:
                texts += (chunk.text, chunk.reasoning)
                usage = chunk.usage or usage
                if chunk.finish_reason is not None:
                    self._end(request, usage, texts)
                    texts, usage = [], None
                yield chunk
        finally:
            if any(texts) or usage:
                self._end(request, usage, texts)
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()

    def _end(self, request: GenerateRequest, usage: Usage | None, texts: Sequence[str]) -> None:
        """Note what it cost: by its usage, or where that never came by an estimate."""
        self._spend(request, usage or estimated_usage(request, "".join(texts)))

    def _spend(self, request: Asked, usage: Usage) -> None:
        money = cost(self._of(request.model), usage)
        if money:
            self._purse.spend(money, request, self.name)
