"""Slots and a queue around a provider, shared by this node's own work and its peers'.

What waits goes in the order of `waiting`: this node's own requests before those of members, and
these before what nobody waits for.
"""

from __future__ import annotations

import itertools
import math
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
    GenerateError,
    GenerateRequest,
    Health,
    ModelOffer,
    Priority,
    Provider,
    ProviderBusy,
    Usage,
    Value,
    total_usage,
)
from .throttle import Throttle
from .tokens import TokenCount, count_tokens, estimated_usage
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
    #: There is a free slot, and a limit that keeps it free.
    limited: bool = False


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
        self._slots = slots
        self._max_waiting = max_waiting
        self._throttle = throttle
        if throttle is not None:
            throttle.limiter.on_change.append(self._next)
        #: Those that have a slot, and since when.
        self._inside: dict[Place, float] = {}
        #: Those that wait, which they do only while no slot is free or a limit is reached; each at
        #: its gate, and the first of them until the limit lets it through.
        self._line = Line()
        self._gates: dict[Place, trio.Event] = {}
        self._alarms: dict[Place, trio.CancelScope] = {}
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
            found = await self.provider.embed(request)
            self.settle(place, total_usage(e.usage for e in found).prompt_tokens)
            return found
        finally:
            self.leave(place)

    @property
    def counts_tokens(self) -> bool:
        """Does it matter how many tokens an answer has?"""
        return self._throttle is not None and self._throttle.counts_tokens

    @property
    def free(self) -> bool:
        """Would one that comes now begin at once?"""
        if self._throttle is None:
            return self._has_slot
        return self._has_slot and not len(self._line) and not self._limited

    @property
    def _has_slot(self) -> bool:
        return self._slots is None or len(self._inside) < self._slots

    @property
    def _limited(self) -> bool:
        """Is a limit reached?"""
        now = trio.current_time()
        return self._throttle is not None and self._throttle.limiter.when(1, now) > now

    def load(self, priority: Priority = "background") -> Load:
        """How busy it is now, to a request of that priority: what would go after it does not count.

        To one in the background everything does.
        """
        free = self.free
        return Load(
            running=len(self._inside),
            waiting=self._line.count(priority),
            slots=self._slots,
            wait=None if free else self._expected(Place("", priority))[1],
            limited=not free and self._has_slot,
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
        now = trio.current_time()
        place = Place(request.kind, request.priority, request.id, now)
        if self._throttle is not None:
            self._throttle.prepare(place, request, self.name, now)
        try:
            if not len(self._line) and self._may_begin(place, now):
                self._begin(place, now)
            else:
                await self._turn(place)
        except BaseException:
            if self._inside.pop(place, None) is not None:  # it had its turn in that very moment
                self._next()
            if self._throttle is not None:
                self._throttle.cancel(place)
            raise
        return place

    async def _turn(self, place: Place) -> None:
        """Wait for its turn. Raises `ProviderBusy` if that will not come."""
        self._make_room(place)
        gate = self._gates[place] = trio.Event()
        self._line.add(place)
        try:
            while not gate.is_set():
                with trio.CancelScope() as self._alarms[place]:
                    self._next()
                    await gate.wait()
        finally:
            del self._gates[place], self._alarms[place]
            if place not in self._inside:
                self._line.discard(place)
                self._next()
        if place not in self._inside:
            if self._refuses(place):
                assert self._throttle is not None
                raise self._throttle.refusal(place, self.name, trio.current_time())
            raise self._busy(place, "more urgent requests filled its queue")

    def settle(self, place: Place, tokens: int, answer: int | None = None) -> None:
        """It used so many tokens; `answer`: those of a whole answer."""
        if self._throttle is not None:
            self._throttle.settle(place, tokens, answer)

    def leave(self, place: Place) -> None:
        """Give a slot back."""
        self._times.learn(place.kind, trio.current_time() - self._inside.pop(place))
        if self._throttle is not None:
            self._throttle.end(place)
        self._next()

    def observe_first(self, seconds: float) -> None:
        self._ttft = average(self._ttft, seconds)

    def observe_rate(self, tokens: int, seconds: float) -> None:
        self._rate = average(self._rate, tokens / max(seconds, MIN_SPAN))

    # The queue.

    def _may_begin(self, place: Place, now: float) -> bool:
        if not self._has_slot:
            return False
        return self._throttle is None or self._throttle.allows(self, place, now)

    def _begin(self, place: Place, now: float) -> None:
        self._inside[place] = now
        if self._throttle is not None:
            self._throttle.let_in(place, now)

    def _next(self) -> None:
        """Let those begin whose turn it is, and see to it that the next will."""
        if self._throttle is not None:
            self._next_allowed(self._throttle)
            return
        while self._has_slot and (place := self._line.take()) is not None:
            self._begin(place, trio.current_time())
            self._gates[place].set()

    def _next_allowed(self, throttle: Throttle) -> None:
        now = trio.current_time()
        while self._has_slot and (first := self._line.first()) is not None:
            if self._may_begin(first, now):
                self._line.take()
                self._begin(first, now)
            elif throttle.refuses:
                self._line.discard(first)
            else:
                throttle.limiter.ask(self, first.since)
                if (alarm := self._alarms.get(first)) is not None:
                    at = throttle.limiter.when(first.tokens, now)
                    # Where others are before it, they tell when they have had their turn.
                    alarm.deadline = at if at > now else math.inf
                return
            self._gates[first].set()
        throttle.limiter.ask(self, None)

    def _refuses(self, place: Place) -> bool:
        return (
            self._throttle is not None
            and self._throttle.refuses
            and self._has_slot
            and not self._may_begin(place, trio.current_time())
        )

    def _make_room(self, place: Place) -> None:
        """Let it into the queue. Raises `ProviderBusy` if it would wait in vain, or has no room."""
        if self._throttle is not None and self._refuses(place):
            raise self._throttle.refusal(place, self.name, trio.current_time())
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
        return len(ahead) + 1, self._wait(place, ahead)

    def _wait(self, place: Place, ahead: Sequence[Place]) -> float | None:
        """Seconds until slots and limits let it through; None: it cannot be told yet."""
        now = trio.current_time()
        if self._throttle is None:
            return self._times.wait(self._inside, ahead, now)
        tokens = [*(each.tokens for each in ahead), max(place.tokens, 1)]
        allowed = self._throttle.limiter.forecast(tokens, now) - now
        if self._slots is None or len(self._inside) + len(ahead) < self._slots:
            return allowed
        wait = self._times.wait(self._inside, ahead, now) if self._inside else None
        return None if wait is None and not allowed else max(wait or 0.0, allowed)

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
        "_said",
    )

    def __init__(self, admission: Admission, request: GenerateRequest) -> None:
        self._admission = admission
        self._request = request
        #: When the first chunk came, and how many have come.
        self._first = 0.0
        self._pieces = 0
        #: What it said so far, where its tokens are counted.
        self._said: list[str] | None = [] if admission.counts_tokens else None

    async def __aenter__(self) -> Answering:
        self._place: Place | None = await self._admission.enter(self._request)
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
                self._admission.settle(self._place, used.total_tokens, used.completion_tokens)
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
            self._admission.settle(place, used.total_tokens)
        self._admission.leave(place)
