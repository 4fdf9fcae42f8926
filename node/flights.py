"""Equal requests in flight share one computation.

The first asker of a key starts a flight; whoever asks the same while it is under way follows it,
and reads its stream from the start. The work belongs to the flight, not to its first asker: it goes
on while one follower is left, and is cancelled when the last one leaves. It has as much time as the
follower who has the most, and where it waits for a slot it is as urgent as the most urgent of them.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import msgspec
import trio

from ..providers.base import (
    Answering,
    Chunk,
    GenerateError,
    Origin,
    Priority,
    StreamInterrupted,
)
from ..providers.waiting import PRIORITIES

logger = logging.getLogger(__name__)

#: Starts the work of a flight.
Compute = Callable[[], AbstractAsyncContextManager[Answering]]
#: Makes the request of that id, where it waits for a slot, so urgent at least.
Urge = Callable[[str, Priority], None]


class Flight:
    """One computation, its chunks so far, and the tasks that wait for more."""

    def __init__(self, id: str, priority: Priority, until: float) -> None:
        #: The request that is computed, how urgent it is, and when its last follower gives up.
        self.id = id
        self.priority = priority
        self.scope = trio.CancelScope(deadline=until)
        self.origin: Origin | None = None
        self.chunks: list[Chunk] = []
        self.error: GenerateError | None = None
        #: It has ended, in whatever way; and: with all its chunks.
        self.finished = self.whole = False
        self.followers = 0
        self._changed = trio.lowlevel.ParkingLot()

    async def run(self, compute: Compute) -> None:
        """Do the work, and hand every chunk to whoever waits."""
        try:
            with self.scope:
                async with compute() as answering:
                    self.origin = answering.origin
                    self._changed.unpark_all()
                    async for chunk in answering.chunks:
                        self.chunks.append(chunk)
                        self._changed.unpark_all()
                self.whole = True
        except GenerateError as error:
            self.error = error
        except Exception as error:  # the log has it; the followers see an error of the node's own
            logger.exception("a shared computation failed")
            self.error = GenerateError(f"internal error: {error!r}")
        finally:
            self.finished = True
            self._changed.unpark_all()

    async def wait_origin(self) -> Origin:
        """Who answers. Raises what the computation raised before it knew."""
        while self.origin is None:
            await self._raise_if_ended()
            await self._changed.park()
        return self.origin

    async def wait_chunks(self, seen: int) -> bool:
        """Wait for more than `seen` chunks; False at the end. Raises what the work raised."""
        while len(self.chunks) <= seen:
            if self.whole:
                return False
            await self._raise_if_ended()
            await self._changed.park()
        return True

    async def _raise_if_ended(self) -> None:
        if self.error is not None:
            # A copy for each follower: an exception that two tasks raise mixes their tracebacks.
            raise copy.copy(self.error) from self.error.__cause__
        if self.finished:
            # Its time was the longest of all followers': over for it, it is over for this one too,
            # who is to be cancelled by its own deadline, and not to hear of another failure.
            await trio.lowlevel.checkpoint()
            raise StreamInterrupted("the shared computation was cancelled")


class _Following:
    """A follower's view of a flight's chunks, from the first."""

    def __init__(self, flight: Flight, joined: bool) -> None:
        self._flight = flight
        self._joined = joined
        self._seen = 0

    def shown(self, origin: Origin) -> Origin:
        """The origin as this follower is to see it."""
        return msgspec.structs.replace(origin, cache="coalesced") if self._joined else origin

    @property
    def text(self) -> str:
        """The text given so far."""
        return "".join(chunk.text for chunk in self._flight.chunks[: self._seen])

    def __aiter__(self) -> _Following:
        return self

    async def __anext__(self) -> Chunk:
        if self._seen >= len(self._flight.chunks) and not await self._flight.wait_chunks(
            self._seen
        ):
            raise StopAsyncIteration
        self._seen += 1
        chunk = self._flight.chunks[self._seen - 1]
        if chunk.origin is None or not self._joined:
            return chunk
        return msgspec.structs.replace(chunk, origin=self.shown(chunk.origin))


class Flights:
    """The computations under way, by key. Their tasks run in the nursery given."""

    def __init__(self, nursery: trio.Nursery, urge: Urge = lambda id, priority: None) -> None:
        self._nursery = nursery
        self._urge = urge
        self._flights: dict[bytes, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    @asynccontextmanager
    async def join(
        self, key: bytes, compute: Compute, *, id: str = "", priority: Priority = "own"
    ) -> AsyncIterator[tuple[Answering, bool]]:
        """Follow the flight of that key, started with `compute` if there is none.

        `id` and `priority` are those of the request that `compute` answers, if it is used. Gives
        the answer and whether it was under way already. Raises what the work raises.
        """
        until = trio.current_effective_deadline()
        flight = self._flights.get(key)
        joined = flight is not None and not flight.scope.cancel_called
        if flight is None or not joined:
            flight = self._flights[key] = Flight(id, priority, until)
            self._nursery.start_soon(self._fly, key, flight, compute)
        else:
            self._follow(flight, priority, until)
        flight.followers += 1
        try:
            origin = await flight.wait_origin()
            following = _Following(flight, joined)
            yield Answering(following.shown(origin), following), joined
        finally:
            flight.followers -= 1
            if not flight.followers:
                flight.scope.cancel()
                self._land(key, flight)

    def _follow(self, flight: Flight, priority: Priority, until: float) -> None:
        flight.scope.deadline = max(flight.scope.deadline, until)
        if PRIORITIES.index(priority) < PRIORITIES.index(flight.priority):
            flight.priority = priority
            self._urge(flight.id, priority)

    async def _fly(self, key: bytes, flight: Flight, compute: Compute) -> None:
        try:
            await flight.run(compute)
        finally:
            self._land(key, flight)

    def _land(self, key: bytes, flight: Flight) -> None:
        """Nobody may join any more: the work is done, or given up."""
        if self._flights.get(key) is flight:
            del self._flights[key]
