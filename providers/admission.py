"""Slots and a queue around a provider, shared by this node's own work and its peers'."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Self

import trio

from .base import (
    Answering,
    Chunk,
    Embedding,
    EmbedRequest,
    GenerateRequest,
    Health,
    ModelOffer,
    Provider,
    ProviderUnavailable,
    Value,
)

#: Seconds. What a full queue says before anything was measured, and what it says at least.
MIN_RETRY_AFTER = 1.0
MAX_RETRY_AFTER = 600.0
#: Seconds. Below it a rate would be the clock's.
MIN_SPAN = 0.001
#: The weight of a new measurement in a moving average: about the last ten count.
WEIGHT = 0.2


class Load(Value, frozen=True, kw_only=True):
    """How busy a provider is. `slots` None: it takes as many as come."""

    running: int = 0
    waiting: int = 0
    slots: int | None = None


class Admission:
    """A `Provider` that lets `slots` requests through at once; more wait in their order.

    One that would be number `max_waiting` + 1 in the queue is refused by `ProviderUnavailable`
    with the time after which another try should succeed. A slot is held until the closing chunk
    was read, the answer failed, or its context was left.
    """

    def __init__(self, provider: Provider, *, slots: int | None, max_waiting: int = 64) -> None:
        self.provider = provider
        self._slots = slots
        self._max_waiting = max_waiting
        self._running = 0
        self._queue = trio.lowlevel.ParkingLot()
        self._held: float | None = None
        self._ttft: float | None = None
        self._rate: float | None = None

    @property
    def name(self) -> str:
        return self.provider.name

    def models(self) -> Sequence[ModelOffer]:
        return self.provider.models()

    async def check(self) -> Health:
        return await self.provider.check()

    def open(self, request: GenerateRequest) -> _Admitted:
        return _Admitted(self, request)

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        await self.enter()
        since = trio.current_time()
        try:
            return await self.provider.embed(request)
        finally:
            self.leave(trio.current_time() - since)

    @property
    def load(self) -> Load:
        """How busy it is now."""
        return Load(running=self._running, waiting=len(self._queue), slots=self._slots)

    @property
    def ttft(self) -> float | None:
        """Seconds from a free slot to the first chunk; moving average, None until measured."""
        return self._ttft

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first chunk, or over all where they came as one chunk.

        Moving average, None until measured."""
        return self._rate

    # What an admitted request calls.

    async def enter(self) -> None:
        """Take a slot, after those who came before. Raises `ProviderUnavailable`."""
        if self._slots is None or (self._running < self._slots and not len(self._queue)):
            self._running += 1
            return
        if len(self._queue) >= self._max_waiting:
            raise ProviderUnavailable(
                f"the queue of {self.name} is full: {self._running} are running and "
                f"{len(self._queue)} wait",
                retry_after=self._wait_estimate(),
            )
        await self._queue.park()  # Whoever leaves hands the slot over.

    def leave(self, held: float) -> None:
        """Give a slot back, held for that many seconds."""
        self._held = _average(self._held, held)
        if len(self._queue):
            self._queue.unpark()
        else:
            self._running -= 1

    def observe_first(self, seconds: float) -> None:
        self._ttft = _average(self._ttft, seconds)

    def observe_rate(self, tokens: int, seconds: float) -> None:
        self._rate = _average(self._rate, tokens / max(seconds, MIN_SPAN))

    def _wait_estimate(self) -> float:
        """Seconds until the queue has moved by one."""
        if self._held is None or not self._slots:
            return MIN_RETRY_AFTER
        return min(max(self._held / self._slots, MIN_RETRY_AFTER), MAX_RETRY_AFTER)


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + WEIGHT * (new - old)


class _Admitted:
    """One request, and the iterator of its chunks."""

    __slots__ = (
        "_admission",
        "_chunks",
        "_context",
        "_first",
        "_held_since",
        "_pieces",
        "_request",
    )

    def __init__(self, admission: Admission, request: GenerateRequest) -> None:
        self._admission = admission
        self._request = request
        #: When the first chunk came, and how many have come.
        self._first = 0.0
        self._pieces = 0

    async def __aenter__(self) -> Answering:
        await self._admission.enter()
        self._held_since: float | None = trio.current_time()
        try:
            self._context: AbstractAsyncContextManager[Answering] = self._admission.provider.open(
                self._request
            )
            answering = await self._context.__aenter__()
        except BaseException:
            self._release()
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
            return await self._context.__aexit__(kind, error, traceback)
        finally:
            self._release()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        try:
            chunk = await self._chunks.__anext__()
        except Exception:  # the caller sees it, as the end or as the failure it is
            self._release()
            raise
        since = self._held_since
        if since is None:
            return chunk
        self._pieces += 1
        if self._pieces == 1:
            self._first = trio.current_time()
            self._admission.observe_first(self._first - since)
        if chunk.finish_reason is not None:
            if chunk.usage is not None and chunk.usage.completion_tokens:
                began = self._first if self._pieces > 2 else since
                span = trio.current_time() - began
                self._admission.observe_rate(chunk.usage.completion_tokens, span)
            self._release()
        return chunk

    def _release(self) -> None:
        if self._held_since is not None:
            since, self._held_since = self._held_since, None
            self._admission.leave(trio.current_time() - since)
