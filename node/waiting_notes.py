"""Tells a streaming client that waits for a slot where it stands, which keeps its connection alive.

Proxies and clients give up a connection on which nothing comes. So the stream of a request that has
waited for some seconds begins before its answer does, with comments: every reader of server-sent
events skips them, and a person with `curl` sees them. The price is the status, which is 200 from
then on: if the request fails after all, that is the stream's last event, as after a first token.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from ..providers.slots import Waiting
from .http_server import Responder

EVENTS = "text/event-stream; charset=utf-8"
#: Seconds from one comment to the next, and before the first.
EVERY = 5.0


class WaitingNotes:
    """Writes the comments. Its tasks run in the nursery given."""

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        waiting: Callable[[str], Awaitable[Waiting | None]],
        busy: Callable[[], bool],
    ) -> None:
        self._nursery = nursery
        #: Where the request of that id stands; None: it does not wait.
        self._waiting = waiting
        #: Might one that comes now have to wait? Else it costs no task.
        self._busy = busy

    @asynccontextmanager
    async def told(
        self, responder: Responder, request_id: str
    ) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """While inside, the client is told. What is given ends that: to be awaited before anything
        else is written, which may then find the stream begun."""
        if not self._busy():
            yield _nothing_to_stop
            return
        note = _Note(responder, request_id, self._waiting)
        self._nursery.start_soon(note.run)
        try:
            yield note.stop
        finally:
            await note.stop()


async def _nothing_to_stop() -> None:
    pass


class _Note:
    """The comments of one stream."""

    def __init__(
        self,
        responder: Responder,
        request_id: str,
        waiting: Callable[[str], Awaitable[Waiting | None]],
    ) -> None:
        self._responder = responder
        self._id = request_id
        self._waiting = waiting
        self._scope = trio.CancelScope()
        self._writing = trio.Lock()

    async def run(self) -> None:
        """Write them, until stopped."""
        with self._scope:
            while True:
                await trio.sleep(EVERY)
                waiting = await self._waiting(self._id)
                async with self._writing:
                    if self._scope.cancel_called:  # while this waited: the lock is its all the same
                        return
                    await self._tell(waiting)

    async def stop(self) -> None:
        """Let one that is being written come to its end, and write no more."""
        try:
            async with self._writing:
                pass
        finally:
            self._scope.cancel()

    async def _tell(self, waiting: Waiting | None) -> None:
        if not self._responder.started:
            if waiting is None:
                return
            await self._responder.start(
                200,
                content_type=EVENTS,
                headers=[("cache-control", "no-cache"), ("x-promptmesh-request-id", self._id)],
            )
        await self._responder.write(comment(waiting))


def comment(waiting: Waiting | None) -> bytes:
    """`: waiting, 3rd of 5, about 12 s`."""
    if waiting is None:
        return b": its turn has come\n\n"
    about = "" if waiting.wait is None else f", about {waiting.wait:.0f} s"
    return f": waiting, {_ordinal(waiting.place)} of {waiting.of}{about}\n\n".encode()


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ending}"
