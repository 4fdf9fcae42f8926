"""The slots of a provider, and who waits for one: this node's own work and its peers'.

What waits goes in the order of `waiting`: this node's own requests before those of members, and
these before what nobody waits for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import trio

from .base import Asked, Priority, ProviderBusy, Value
from .throttle import Throttle
from .waiting import Line, Place, Times

#: Seconds. What one that is refused is told before anything was measured, and at least; at most.
MIN_RETRY_AFTER = 1.0
MAX_RETRY_AFTER = 600.0


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


class Slots:
    """Lets `count` requests through at once (None: all); more wait in their order.

    One that finds `max_waiting` before it takes the place of the last that is less urgent. If there
    is none, or its time would be over before its turn, it is refused by `ProviderBusy` with the
    time after which another try should succeed.
    """

    def __init__(
        self, name: str, count: int | None, *, max_waiting: int, throttle: Throttle | None
    ) -> None:
        """`throttle`: what the provider of that name may be asked in a minute; None: as much as
        its slots take."""
        self._name = name
        self._count = count
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

    async def enter(self, request: Asked) -> Place:
        """Take a slot, after those whose turn is before. Raises `ProviderBusy`."""
        now = trio.current_time()
        place = Place(request.kind, request.priority, request.id, now)
        if self._throttle is not None:
            self._throttle.prepare(place, request, self._name, now)
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
                raise self._throttle.refusal(place, self._name, trio.current_time())
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

    @property
    def counts_tokens(self) -> bool:
        """Does it matter how many tokens an answer has?"""
        return self._throttle is not None and self._throttle.counts_tokens

    @property
    def free(self) -> bool:
        """Would one that comes now begin at once?"""
        if self._throttle is None:
            return self._has_free
        return self._has_free and not len(self._line) and not self._limited

    @property
    def _has_free(self) -> bool:
        return self._count is None or len(self._inside) < self._count

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
            slots=self._count,
            wait=None if free else self._expected(Place("", priority))[1],
            limited=not free and self._has_free,
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

    def _may_begin(self, place: Place, now: float) -> bool:
        if not self._has_free:
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
        while self._has_free and (place := self._line.take()) is not None:
            self._begin(place, trio.current_time())
            self._gates[place].set()

    def _next_allowed(self, throttle: Throttle) -> None:
        now = trio.current_time()
        while self._has_free and (first := self._line.first()) is not None:
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
            and self._has_free
            and not self._may_begin(place, trio.current_time())
        )

    def _make_room(self, place: Place) -> None:
        """Let it into the queue. Raises `ProviderBusy` if it would wait in vain, or has no room."""
        if self._throttle is not None and self._refuses(place):
            raise self._throttle.refusal(place, self._name, trio.current_time())
        wait = self._expected(place)[1]
        left = trio.current_effective_deadline() - trio.current_time()
        if wait is not None and 0 < left < wait:
            raise self._busy(place, f"its turn would come too late, for {left:.1f} s are left")
        if len(self._line) < self._max_waiting:
            return
        last = self._line.last_behind(place)
        if last is None:
            raise self._busy(place, f"the queue of {self._name} is full")
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
        if self._count is None or len(self._inside) + len(ahead) < self._count:
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
