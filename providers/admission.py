"""Slots and a queue around a provider, shared by this node's own work and its peers'.

What waits goes in the order of `waiting`: this node's own requests before those of members, and
these before what nobody waits for.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Self

import trio

from .base import (
    Answering,
    Asked,
    Chunk,
    Embedding,
    EmbedRequest,
    GenerateRequest,
    Health,
    ModelOffer,
    Priority,
    Provider,
    ProviderBusy,
    Value,
)
from .tokens import TokenCount, count_tokens
from .waiting import Line, Place, Times, average

#: Seconds. What one that is refused is told before anything was measured, and at least; at most.
MIN_RETRY_AFTER = 1.0
MAX_RETRY_AFTER = 600.0
#: Seconds. Below it a rate would be the clock's.
MIN_SPAN = 0.001


class Load(Value, frozen=True, kw_only=True):
    """How busy a provider is. `slots` None: it takes as many as come.

    `wait` is the seconds until one that comes now would have a slot; None: there is one free, or it
    cannot be told yet.
    """

    running: int = 0
    waiting: int = 0
    slots: int | None = None
    wait: float | None = None


class Waiting(Value, frozen=True, kw_only=True):
    """A request in the queue: it is number `place` of `of`, and begins in about `wait` seconds.

    None: that cannot be told yet.
    """

    place: int
    of: int
    wait: float | None = None


class Admission:
    """A `Provider` that lets `slots` requests through at once; more wait in their order.

    One that finds `max_waiting` before it takes the place of the last that is less urgent. If there
    is none, or its time would be over before its turn, it is refused by `ProviderBusy` with the
    time after which another try should succeed. A slot is held until the closing chunk was read,
    the answer failed, or its context was left.
    """

    def __init__(self, provider: Provider, *, slots: int | None, max_waiting: int = 64) -> None:
        self.provider = provider
        self._slots = slots
        self._max_waiting = max_waiting
        #: Those that have a slot, and since when.
        self._inside: dict[Place, float] = {}
        #: Those that wait for one, which they do only while none is free; each at its gate.
        self._line = Line()
        self._gates: dict[Place, trio.Event] = {}
        self._times = Times()
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
        place = await self.enter(request)
        try:
            return await self.provider.embed(request)
        finally:
            self.leave(place)

    @property
    def free(self) -> bool:
        """Would one that comes now have a slot at once?"""
        return self._slots is None or len(self._inside) < self._slots

    def load(self, priority: Priority = "background") -> Load:
        """How busy it is now, to a request of that priority: what would go after it does not count.

        To one in the background everything does.
        """
        return Load(
            running=len(self._inside),
            waiting=self._line.count(priority),
            slots=self._slots,
            wait=None if self.free else self._expected(Place("", priority))[1],
        )

    def waiting(self, request_id: str) -> Waiting | None:
        """Where the request of that id stands; None: it does not wait here."""
        for place, gate in self._gates.items() if request_id else ():
            if place.id == request_id and not gate.is_set():
                number, wait = self._expected(place)
                return Waiting(place=number, of=len(self._line), wait=wait)
        return None

    def urge(self, request_id: str, priority: Priority) -> None:
        """The request of that id, if it waits here, is so urgent at least."""
        self._line.urge(request_id, priority)

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

    async def enter(self, request: Asked) -> Place:
        """Take a slot, after those whose turn is before. Raises `ProviderBusy`."""
        place = Place(request.kind, request.priority, request.id)
        if self.free:
            self._inside[place] = trio.current_time()
            return place
        self._make_room(place)
        gate = self._gates[place] = trio.Event()
        self._line.add(place)
        try:
            await gate.wait()
        except BaseException:
            if self._inside.pop(place, None) is not None:  # it had its turn in that very moment
                self._next()
            raise
        finally:
            del self._gates[place]
            self._line.discard(place)
        if place not in self._inside:
            raise self._busy(place, "more urgent requests filled its queue")
        return place

    def leave(self, place: Place) -> None:
        """Give a slot back."""
        self._times.learn(place.kind, trio.current_time() - self._inside.pop(place))
        self._next()

    def observe_first(self, seconds: float) -> None:
        self._ttft = average(self._ttft, seconds)

    def observe_rate(self, tokens: int, seconds: float) -> None:
        self._rate = average(self._rate, tokens / max(seconds, MIN_SPAN))

    # The queue.

    def _next(self) -> None:
        """Hand a slot that is free to the next in the line."""
        place = self._line.take()
        if place is not None:
            self._inside[place] = trio.current_time()
            self._gates[place].set()

    def _make_room(self, place: Place) -> None:
        """Let it into the queue. Raises `ProviderBusy` if it would wait in vain, or has no room."""
        wait = self._expected(place)[1]
        left = trio.current_effective_deadline() - trio.current_time()
        if wait is not None and 0 < left < wait:
            raise self._busy(place, f"its turn would come too late, for {left:.1f} s are left")
        if len(self._line) < self._max_waiting:
            return
        last = self._line.last_behind(place)
        if last is None:
            raise self._busy(place, f"the queue of {self.name} is full")
        self._line.discard(last)
        self._gates[last].set()

    def _expected(self, place: Place) -> tuple[int, float | None]:
        """The number in the queue, now or if it came now, and the seconds until its turn."""
        newcomer = None if place in self._gates else place
        order = self._line.order(newcomer)
        ahead = list(itertools.takewhile(lambda other: other is not place, order))
        return len(ahead) + 1, self._times.wait(self._inside, ahead, trio.current_time())

    def _busy(self, place: Place, why: str) -> ProviderBusy:
        number, wait = self._expected(place)
        there = f"{len(self._inside)} are running and {len(self._line)} wait"
        about = "" if wait is None else f", with its turn in about {wait:.1f} s"
        return ProviderBusy(
            f"{why}: {there}, and it would be number {number}{about}",
            retry_after=min(max(wait or 0.0, MIN_RETRY_AFTER), MAX_RETRY_AFTER),
        )


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
        self._place: Place | None = await self._admission.enter(self._request)
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
