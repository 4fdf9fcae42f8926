"""A provider behind its slots (`slots`), as this node's own work and its peers' ask it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Self

import trio

from .base import (
    Answering,
    Chunk,
    Embedding,
    EmbedRequest,
    GenerateError,
    GenerateRequest,
    Health,
    ModelOffer,
    Provider,
    Usage,
    total_usage,
)
from .slots import Slots
from .throttle import Throttle
from .tokens import TokenCount, count_tokens, estimated_usage
from .waiting import Place, average

#: Seconds. Below it a rate would be the clock's.
MIN_SPAN = 0.001


class Admission:
    """A `Provider` whose requests each hold one of its `slots`.

    A slot is held until the closing chunk was read, the answer failed, or its context was left. One
    that gets none is refused by `ProviderBusy`.
    """

    def __init__(
        self,
        provider: Provider,
        *,
        slots: int | None,
        max_waiting: int = 64,
        throttle: Throttle | None = None,
    ) -> None:
        """`throttle`: what it may be asked in a minute; None: as much as its slots take."""
        self.provider = provider
        self.slots = Slots(provider.name, slots, max_waiting=max_waiting, throttle=throttle)
        self._ttft: float | None = None
        self._rate: float | None = None

    @property
    def name(self) -> str:
        return self.provider.name

    def models(self) -> Sequence[ModelOffer]:
        return self.provider.models()

    async def check(self) -> Health:
        return await self.provider.check()

    async def count_tokens(self, request: GenerateRequest) -> TokenCount:
        return await count_tokens(self.provider, request)

    def open(self, request: GenerateRequest) -> _Admitted:
        return _Admitted(self, request)

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        place = await self.slots.enter(request)
        try:
            found = await self.provider.embed(request)
            self.slots.settle(place, total_usage(e.usage for e in found).prompt_tokens)
            return found
        finally:
            self.slots.leave(place)

    @property
    def ttft(self) -> float | None:
        """Seconds from a free slot to the first chunk; moving average, None until measured."""
        return self._ttft

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first chunk, or over all where they came as one chunk.

        Moving average, None until measured."""
        return self._rate

    def observe_first(self, seconds: float) -> None:
        self._ttft = average(self._ttft, seconds)

    def observe_rate(self, tokens: int, seconds: float) -> None:
        self._rate = average(self._rate, tokens / max(seconds, MIN_SPAN))


class _Admitted:
    """One request, and the iterator of its chunks."""

    __slots__ = (
        "_admission",
        "_chunks",
        "_context",
        "_first",
        "_held_since",
        "_pieces",
        "_place",
        "_request",
        "_said",
    )

    def __init__(self, admission: Admission, request: GenerateRequest) -> None:
        self._admission = admission
        self._request = request
        #: When the first chunk came, and how many have come.
        self._first = 0.0
        self._pieces = 0
        #: What it said so far, where its tokens are counted.
        self._said: list[str] | None = [] if admission.slots.counts_tokens else None

    async def __aenter__(self) -> Answering:
        self._place: Place | None = await self._admission.slots.enter(self._request)
        self._held_since = trio.current_time()
        try:
            self._context: AbstractAsyncContextManager[Answering] = self._admission.provider.open(
                self._request
            )
            answering = await self._context.__aenter__()
        except BaseException as error:
            self._release(error)
            raise
        self._chunks: AsyncIterator[Chunk] = aiter(answering.chunks)
        answering.chunks = self
        return answering

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        try:
            try:
                if isinstance(self._chunks, AsyncGenerator):
                    await self._chunks.aclose()
            finally:
                ended = await self._context.__aexit__(kind, error, traceback)
        finally:
            self._release()
        return ended

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        try:
            chunk = await self._chunks.__anext__()
        except Exception as error:  # the caller sees it, as the end or as the failure it is
            self._release(error)
            raise
        since = self._held_since
        if self._place is None:
            return chunk
        self._pieces += 1
        if self._pieces == 1:
            self._first = trio.current_time()
            self._admission.observe_first(self._first - since)
        if self._said is not None:
            self._said += (chunk.text, chunk.reasoning)
        if chunk.finish_reason is not None:
            if chunk.usage is not None:
                used = chunk.usage
                self._admission.slots.settle(self._place, used.total_tokens, used.completion_tokens)
                self._said = None
            if chunk.usage is not None and chunk.usage.completion_tokens:
                began = self._first if self._pieces > 2 else since
                span = trio.current_time() - began
                self._admission.observe_rate(chunk.usage.completion_tokens, span)
            self._release()
        return chunk

    def _release(self, error: BaseException | None = None) -> None:
        if self._place is None:
            return
        place, self._place = self._place, None
        if self._said is not None:
            # Nobody told its usage. Who was refused, or failed at once, has used nothing.
            failed = isinstance(error, GenerateError) and not any(self._said)
            used = Usage() if failed else estimated_usage(self._request, "".join(self._said))
            self._admission.slots.settle(place, used.total_tokens)
        self._admission.slots.leave(place)
