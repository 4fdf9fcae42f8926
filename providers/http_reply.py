"""A reply of a model server, whoever reads it from the wire, and why there may be none."""

from __future__ import annotations

import errno
import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self

import trio

MAX_HEAD = 64 * 1024
#: A hundred thousand streamed tokens with twenty log probabilities each stay below it.
MAX_BODY = 256 * 1024 * 1024
MAX_IDLE = 64
#: Seconds. Servers close an idle connection after 5 to 75 s; a closed one is noticed when taken.
IDLE_LIFETIME = 60.0
#: Seconds that `finish` waits. A server ends the body right after its last event.
FINISH_TIME = 0.1


class HttpFailure(Exception):
    """No whole reply."""


class NotConnected(HttpFailure):
    """No connection was made, so nothing was sent."""


class TimedOut(HttpFailure):
    """The server took longer than its limit, to connect or between two pieces."""


class BrokenReply(HttpFailure):
    """The reply ended too early, was too large, or was not valid."""


def reason_of(error: OSError) -> str:
    """Why, in the system's words: trio wraps the attempts at several addresses of a name."""
    cause = error.__cause__
    if isinstance(cause, ExceptionGroup):
        reasons = dict.fromkeys(reason_of(e) for e in cause.exceptions if isinstance(e, OSError))
        return ", ".join(reasons)
    if isinstance(error, socket.gaierror):
        return "the host name is not known"
    if error.errno == errno.ECONNREFUSED:
        return "connection refused"
    return (error.strerror or str(error)).lower()


class HttpReply(ABC):
    """A reply whose head has arrived. Iterating gives the body as it comes."""

    __slots__ = ()

    status: int
    #: By lower-case name; repeated ones are joined by a comma.
    headers: Mapping[str, str]

    @abstractmethod
    async def receive(self) -> bytes:
        """What arrived since, or wait for more; empty at the end. Raises `HttpFailure`."""

    @property
    def complete(self) -> bool:
        """Is it known that all of it has come?"""
        return False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        piece = await self.receive()
        if not piece:
            raise StopAsyncIteration
        return piece

    async def finish(self) -> None:
        """Read the little that follows what is known to be the end of the content."""
        if self.complete:
            return
        with trio.move_on_after(FINISH_TIME):
            try:
                while await self.receive():
                    pass
            except HttpFailure:
                pass  # The content was whole; only the connection is of no more use.
