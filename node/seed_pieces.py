"""A text on its way from the loop to one reader elsewhere, piece by piece."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loop_thread import Job

#: Begins the work, which gives each piece to the function.
Begin = Callable[[Callable[[str], None]], "Job[str]"]


def pieces(begin: Begin) -> Iterator[str]:
    """Each piece as it comes, for a thread that may block. Raises what the work does; closing it
    cancels the work."""
    from .loop_waiting import wait

    ready = Pieces()
    job = begin(ready.put)
    job.future.add_done_callback(ready.end)
    try:
        while (text := wait(job, ready.next())) is not None:
            yield text
        job.future.result()
    finally:
        job.cancel()


async def async_pieces(begin: Begin) -> AsyncIterator[str]:
    """The same for a task of trio or asyncio."""
    from .loop_waiting import wait_async

    ready = Pieces()
    job = begin(ready.put)
    job.future.add_done_callback(ready.end)
    try:
        while (text := await wait_async(job, ready.next())) is not None:
            yield text
        job.future.result()
    finally:
        job.cancel()


class Pieces:
    """Text on its way from the loop to one reader elsewhere."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready: deque[str | None] = deque()
        self._waiting: Future[str | None] | None = None

    def put(self, text: str | None) -> None:
        """Give the next piece; None after the last."""
        with self._lock:
            waiting, self._waiting = self._waiting, None
            if waiting is None:
                self._ready.append(text)
        if waiting is not None:
            waiting.set_result(text)

    def end(self, _: Future[Any]) -> None:
        """There are no more."""
        self.put(None)

    def next(self) -> Future[str | None]:
        """The next piece, when it comes."""
        future: Future[str | None] = Future()
        with self._lock:
            if not self._ready:
                self._waiting = future
                return future
            text = self._ready.popleft()
        future.set_result(text)
        return future
