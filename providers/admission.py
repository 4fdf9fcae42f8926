"""Slots and a queue around a provider, shared by this node's own work and its peers'."""

from __future__ import annotations

import heapq
from collections import OrderedDict
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
#: Kinds of requests (`GenerateRequest.kind`) whose time in a slot is remembered.
MAX_KINDS = 64
#: One that is longer in its slot than was expected is expected to take this share of that still.
LEFT = 0.3


class Load(Value, frozen=True, kw_only=True):
    """How busy a provider is. `slots` None: it takes as many as come.

    `wait` is the seconds until one that comes now would have a slot; None: there is one free, or it
    cannot be told yet.
    """

    running: int = 0
    waiting: int = 0
    slots: int | None = None
    wait: float | None = None


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
        #: Those that have a slot, and since when; those that wait, in their order.
        self._inside: dict[_Place, float] = {}
        self._outside: dict[_Place, None] = {}
        self._held: float | None = None
        self._held_by_kind: OrderedDict[str, float] = OrderedDict()
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
        place = await self.enter(request.kind)
        try:
            return await self.provider.embed(request)
        finally:
            self.leave(place)

    @property
    def load(self) -> Load:
        """How busy it is now."""
        return Load(
            running=self._running,
            waiting=len(self._queue),
            slots=self._slots,
            wait=self._expected_wait(),
        )

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

    async def enter(self, kind: str) -> _Place:
        """Take a slot, after those who came before. Raises `ProviderUnavailable`."""
        place = _Place(kind)
        if self._slots is None or (self._running < self._slots and not len(self._queue)):
            self._running += 1
            self._inside[place] = trio.current_time()
            return place
        if len(self._queue) >= self._max_waiting:
            raise ProviderUnavailable(
                f"the queue of {self.name} is full: {self._running} are running and "
                f"{len(self._queue)} wait",
                retry_after=self._wait_estimate(),
            )
        self._outside[place] = None
        try:
            await self._queue.park()  # Whoever leaves hands the slot over.
        finally:
            del self._outside[place]
        self._inside[place] = trio.current_time()
        return place

    def leave(self, place: _Place) -> None:
        """Give a slot back."""
        held = trio.current_time() - self._inside.pop(place)
        self._held = _average(self._held, held)
        kind = place.kind
        self._held_by_kind[kind] = _average(self._held_by_kind.pop(kind, None), held)
        if len(self._held_by_kind) > MAX_KINDS:
            self._held_by_kind.popitem(last=False)
        if len(self._queue):
            self._queue.unpark()
        else:
            self._running -= 1

    def observe_first(self, seconds: float) -> None:
        self._ttft = _average(self._ttft, seconds)

    def observe_rate(self, tokens: int, seconds: float) -> None:
        self._rate = _average(self._rate, tokens / max(seconds, MIN_SPAN))

    def _expected_wait(self) -> float | None:
        """Seconds until one that comes now would have a slot."""
        average = self._held
        if self._slots is None or self._running < self._slots or average is None:
            return None
        now = trio.current_time()
        # One that was just handed its slot has it, and stands outside until it runs.
        free = [0.0] * max(self._slots - len(self._inside), 0)
        for place, since in self._inside.items():
            whole = self._held_by_kind.get(place.kind, average)
            free.append(max(whole - (now - since), LEFT * whole))
        heapq.heapify(free)
        for place in self._outside:
            whole = self._held_by_kind.get(place.kind, average)
            heapq.heapreplace(free, free[0] + whole)
        return free[0]

    def _wait_estimate(self) -> float:
        """Seconds until the queue has moved by one."""
        if self._held is None or not self._slots:
            return MIN_RETRY_AFTER
        return min(max(self._held / self._slots, MIN_RETRY_AFTER), MAX_RETRY_AFTER)


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + WEIGHT * (new - old)


class _Place:
    """A request in a slot, or in the queue for one."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        #: What is known of how long it will take.
        self.kind = kind


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
    )

    def __init__(self, admission: Admission, request: GenerateRequest) -> None:
        self._admission = admission
        self._request = request
        #: When the first chunk came, and how many have come.
        self._first = 0.0
        self._pieces = 0

    async def __aenter__(self) -> Answering:
        self._place: _Place | None = await self._admission.enter(self._request.kind)
        self._held_since = trio.current_time()
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
        if self._place is None:
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
        if self._place is not None:
            place, self._place = self._place, None
            self._admission.leave(place)
