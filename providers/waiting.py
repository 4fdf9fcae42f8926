"""Who waits for a slot: in which order they go, and how long that takes. Pure: told the time.

The most urgent go first, and of those the one that came first. Nobody starves: who was overtaken
`MOST_OVERTAKEN` times by such that came later has the next turn. So while more urgent requests come
without end, at least one turn in nine is a less urgent one's (one in ten of each kind, if there are
both).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import get_args

from .base import Priority
from .rate_limits import Grant, RateLimiter

#: From the most urgent to the least.
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
#: Turns of others that came later, before the first of a priority has its own.
MOST_OVERTAKEN = 8
#: The weight of a new measurement in a moving average: about the last ten count.
WEIGHT = 0.2
#: Kinds of requests (`GenerateRequest.kind`) whose time in a slot is remembered.
MAX_KINDS = 64
#: One that is longer in its slot than was expected is expected to take this share of that still.
LEFT = 0.3


class Place:
    """A request in a slot, or in the line for one."""

    __slots__ = ("grants", "id", "kind", "number", "rank", "since", "tokens")

    def __init__(self, kind: str, priority: Priority, id: str = "", since: float = 0.0) -> None:
        #: What is known of how long it will take.
        self.kind = kind
        self.rank = PRIORITIES.index(priority)
        self.id = id
        #: How many came before it.
        self.number = math.inf
        #: When it came.
        self.since = since
        #: Tokens that it takes of what is allowed in a minute, and by whom it was let through.
        self.tokens = 0
        self.grants: list[tuple[RateLimiter, Grant]] = []


_Queues = Sequence["OrderedDict[Place, None]"]


class Line:
    """Those who wait, each priority in its order."""

    def __init__(self) -> None:
        self._queues: _Queues = [OrderedDict() for _ in PRIORITIES]
        #: Of each priority: how often its first was overtaken in a row.
        self._overtaken = [0] * len(PRIORITIES)
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return sum(map(len, self._queues))

    def count(self, priority: Priority) -> int:
        """How many wait that are as urgent or more."""
        return sum(map(len, self._queues[: PRIORITIES.index(priority) + 1]))

    def add(self, place: Place) -> None:
        """It waits now, as the last of its priority."""
        place.number = next(self._numbers)
        self._queues[place.rank][place] = None

    def discard(self, place: Place) -> None:
        """It waits no more, if it did."""
        self._queues[place.rank].pop(place, None)

    def take(self) -> Place | None:
        """The one whose turn it is: it waits no more."""
        return _take(self._queues, self._overtaken) if len(self) else None

    def first(self) -> Place | None:
        """The same, which waits on."""
        return next(self.order(), None)

    def last_behind(self, place: Place) -> Place | None:
        """The last of those that are less urgent than this one."""
        for queue in reversed(self._queues[place.rank + 1 :]):
            if queue:
                return next(reversed(queue))
        return None

    def urge(self, id: str, priority: Priority) -> None:
        """The request of that id is so urgent at least: it stands where it would have stood."""
        rank = PRIORITIES.index(priority)
        for queue in self._queues[rank + 1 :]:
            for place in [waiting for waiting in queue if waiting.id == id]:
                del queue[place]
                place.rank = rank
                better = self._queues[rank]
                better[place] = None
                for later in [other for other in better if other.number > place.number]:
                    better.move_to_end(later)

    def order(self, newcomer: Place | None = None) -> Iterator[Place]:
        """All of them, and one that would come now, in their turns if nobody else comes."""
        queues = [queue.copy() for queue in self._queues]
        if newcomer is not None:
            queues[newcomer.rank][newcomer] = None
        overtaken = list(self._overtaken)
        while len(left := [queue for queue in queues if queue]) > 1:
            yield _take(queues, overtaken)
        yield from itertools.chain(*left)


def _take(queues: _Queues, overtaken: list[int]) -> Place:
    """Whose turn it is; `queues` are not all empty."""
    ranks = [rank for rank, queue in enumerate(queues) if queue]
    late = [rank for rank in ranks if overtaken[rank] >= MOST_OVERTAKEN]
    rank = (late or ranks)[0]
    place, _ = queues[rank].popitem(last=False)
    overtaken[rank] = 0
    for behind in range(rank + 1, len(queues)):
        first = next(iter(queues[behind]), None)
        if first is None:
            overtaken[behind] = 0
        elif first.number < place.number:
            overtaken[behind] += 1
    return place


class Times:
    """How long requests hold a slot, by their kind: moving averages."""

    def __init__(self) -> None:
        self._all: float | None = None
        self._by_kind: OrderedDict[str, float] = OrderedDict()

    def learn(self, kind: str, seconds: float) -> None:
        """One of that kind held a slot for so long."""
        self._all = average(self._all, seconds)
        self._by_kind[kind] = average(self._by_kind.pop(kind, None), seconds)
        if len(self._by_kind) > MAX_KINDS:
            self._by_kind.popitem(last=False)

    def wait(
        self, inside: Mapping[Place, float], ahead: Iterable[Place], now: float
    ) -> float | None:
        """Seconds until the slots of those inside, each there since that time, and then the turns
        of those ahead are over; None: it cannot be told yet."""
        typical = self._all
        if typical is None:
            return None
        free = []
        for place, since in inside.items():
            whole = self._by_kind.get(place.kind, typical)
            free.append(max(whole - (now - since), LEFT * whole))
        heapq.heapify(free)
        for place in ahead:
            heapq.heapreplace(free, free[0] + self._by_kind.get(place.kind, typical))
        return free[0]


def average(old: float | None, new: float) -> float:
    """The moving average after one more."""
    return new if old is None else old + WEIGHT * (new - old)
