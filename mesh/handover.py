"""An answer that can change hands: when its backend breaks off, another one goes on.

Whoever computes runs in a task of its own, so that it can be left while the reader of the answer
stays. That costs a task, so it is done only where somebody could take over. `attempts` decides who
and how, `continuing` joins the parts.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec
import trio

from ..providers.base import Chunk, GenerateError, GenerateRequest, Origin, StreamInterrupted
from .asking import Asking
from .attempts import Attempts, Step
from .continuing import Mismatch, Seam, SoFar, seam_of

logger = logging.getLogger(__name__)

#: Chunks that wait for the reader; more, and the backend waits.
MOST_UNREAD = 256


@asynccontextmanager
async def tasks() -> AsyncIterator[trio.Nursery]:
    """A nursery that ends with its block, and whose block's own error is raised as it is."""
    problem: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except Exception as error:  # raised below: not in a group
            problem = error
        nursery.cancel_scope.cancel()
    if problem is not None:
        raise problem


class Running:
    """One candidate being asked, in a task."""

    def __init__(self, step: Step, asking: Asking, changed: trio.lowlevel.ParkingLot) -> None:
        self.step = step
        self.asking = asking
        self.origin = Origin()
        #: Its first token came; and: nothing more will come.
        self.begun = self.over = False
        self.error: Exception | None = None
        self._chunks: deque[Chunk] = deque()
        self._changed = changed
        self._room = trio.lowlevel.ParkingLot()
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        """Ask it, and take in what it gives, until it ends or is stopped."""
        try:
            with self._scope:
                async with self.asking.open() as answering:
                    self.origin, self.begun = answering.origin, True
                    async for chunk in answering.chunks:
                        self._chunks.append(chunk)
                        self._changed.unpark_all()
                        while len(self._chunks) > MOST_UNREAD:
                            await self._room.park()
        except Exception as error:  # the reader sees it
            self.error = error
        finally:
            self.over = True
            self._changed.unpark_all()

    def stop(self) -> None:
        """Cancel its work."""
        self._scope.cancel()

    def take(self) -> Chunk | None:
        """The next chunk, if there is one."""
        if not self._chunks:
            return None
        chunk = self._chunks.popleft()
        if self._room:
            self._room.unpark_all()
        return chunk


class Handover:
    """The answer: an iterator of its chunks."""

    def __init__(
        self,
        attempts: Attempts,
        nursery: trio.Nursery,
        *,
        next_step: Callable[[], Awaitable[Step]],
        ask: Callable[[Step], Asking],
        answered: Callable[[Step, Asking], None],
    ) -> None:
        """`next_step` waits until somebody may be asked; `answered` is told of each first token."""
        self._attempts = attempts
        self._nursery = nursery
        self._next_step = next_step
        self._ask = ask
        self._answered = answered
        self._so_far = SoFar()
        #: Who gave the beginning, where another one continued it.
        self._begun_by = ""
        self._seam: Seam | None = None
        self._running: Running
        self._changed = trio.lowlevel.ParkingLot()

    async def begin(self) -> Origin:
        """Who answers, once a first token is there. Raises the error that ends the request."""
        self._running = await self._first()
        return self._running.origin

    @property
    def text(self) -> str:
        """The text given so far."""
        return self._so_far.text

    def __aiter__(self) -> Handover:
        return self

    async def __anext__(self) -> Chunk:
        while True:
            chunk = self._running.take()
            if chunk is not None:
                joined = chunk if self._seam is None else self._join(self._seam, chunk)
                if joined is not None:
                    self._so_far.add(joined)
                    return joined
            elif not self._running.over:
                await self._changed.park()
            elif self._running.error is not None:
                await self._go_on(self._running, self._running.error)
            else:
                raise StopAsyncIteration

    # --- asking

    async def _first(self) -> Running:
        """Ask until somebody's first token is there."""
        while True:
            running = await self._race(self._start(await self._next_step()))
            if running.begun:
                self._answered(running.step, running.asking)
                return running
            self._failed(running)

    async def _race(self, first: Running) -> Running:
        """The one whose first token came, or the last that failed before it."""
        patience = self._attempts.patience(first.step)
        racing = [first]
        if patience is not None:
            with trio.move_on_after(patience):
                await self._decided(racing)
            if not first.begun and not first.over:
                step = self._attempts.second(trio.current_time())
                racing += [] if step is None else [self._start(step)]
        while True:
            running = await self._decided(racing)
            racing.remove(running)
            if running.begun or not racing:
                break
            self._failed(running)
        for slow in racing:
            slow.asking.outrun()
            slow.stop()
            self._attempts.outrun(slow.step.candidate, running.step.candidate, slow.asking.seconds)
        return running

    async def _decided(self, racing: Sequence[Running]) -> Running:
        """Wait until one of them has begun, or ended."""
        while True:
            for running in sorted(racing, key=lambda running: not running.begun):
                if running.begun or running.over:
                    return running
            await self._changed.park()

    def _start(self, step: Step) -> Running:
        running = Running(step, self._ask(step), self._changed)
        self._nursery.start_soon(running.run)
        return running

    def _failed(self, running: Running) -> None:
        candidate, error = running.step.candidate, running.error
        if not isinstance(error, GenerateError):
            raise error or AssertionError(f"{candidate} ended without a word")
        logger.info("request %s: %s failed: %s", self._attempts.request.id, candidate, error)
        self._attempts.failed(candidate, error, running.asking.seconds)

    # --- another one goes on

    async def _go_on(self, broken: Running, error: Exception) -> None:
        """Find who goes on. Raises the error that ends the request if nobody can."""
        if not isinstance(error, StreamInterrupted) or broken.asking.unread:
            raise error
        logger.info("request %s: %s", self._attempts.request.id, error)
        self._attempts.broke(error, broken.asking.seconds, self._so_far)
        self._running = await self._first()
        step = self._running.step
        if step.way == "continue" and not self._begun_by:
            self._begun_by = str(broken.step.candidate)
        elif step.way == "restart":
            self._begun_by = ""
        request = self._attempts.request
        assert isinstance(request, GenerateRequest)
        self._seam = seam_of(step.way, request, self._so_far, step.candidate.offer)

    def _join(self, seam: Seam, chunk: Chunk) -> Chunk | None:
        running = self._running
        try:
            joined = seam.join(chunk)
        except Mismatch as error:
            running.stop()
            raise self._attempts.differed(error, running.asking.seconds) from error
        if joined is None or joined.finish_reason is None:
            return joined
        origin = joined.origin or running.origin
        if self._begun_by:  # the rest is asked for past all caches; the whole is an answer like any
            origin = msgspec.structs.replace(origin, begun_by=self._begun_by, cache="miss")
        if self._attempts.request.cache.mode == "bypass":
            origin = msgspec.structs.replace(origin, cache="bypass")
        return msgspec.structs.replace(joined, origin=origin)
