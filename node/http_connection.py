"""One HTTP/1.1 connection on a trio stream: its requests are read ahead and answered in turn.

One task of a connection reads all the time, also while a request is being answered: it keeps what a
client sends ahead, and when the input ends it cancels the handler at once. So the end of input
means that the client left: a client that shuts down its sending side before it has its answer does
not get one. Requests are answered one after another. The task that has read one answers it, and as
soon as it has to wait for anything a new task goes on reading: what needs no waiting needs no task.
Whatever ends a connection early (the client, a stalled send, `HttpServer.stop`) cancels that
nursery: a handler never sees a network error, only `trio.Cancelled`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import struct
import sys
import types
from collections.abc import Generator
from typing import Any, Protocol

import trio

from .http_messages import CONTINUE, Limits, RefusedRequest, Request, answer_head, error_body
from .http_reader import RequestReader
from .http_responder import Handler, Responder

log = logging.getLogger(__name__)

RECEIVE_SIZE = 64 * 1024
#: A write that does not fit the socket's buffer goes out in pieces of this size, each with the
#: send timeout, so that a slow client that does read is not taken for a stalled one.
SEND_PIECE = 64 * 1024
#: So many writes may succeed without waiting before others get a turn.
SENDS_WITHOUT_CHECKPOINT = 16

#: What a broken, reset or closed stream raises.
GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


class Server(Protocol):
    """What a connection asks of its server."""

    limits: Limits
    stopping: bool
    handler: Handler


class _Pipe(Protocol):
    """The two calls of a stream that every request pays for."""

    async def receive(self) -> bytes:
        """What has arrived; `b""` when the other side has left, in whatever way."""
        ...

    def send_nowait(self, data: bytes) -> int:
        """Send as much as is taken without waiting, and say how much that was."""
        ...


class _StreamPipe:
    """Any stream, by its own calls."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    async def receive(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(RECEIVE_SIZE))
        except GONE:
            return b""

    def send_nowait(self, data: bytes) -> int:
        return 0


class _SocketPipe:
    """A socket, by the system's calls: a small write costs a third of the stream's own.

    A stream's receive tries before it waits, and its send yields to other tasks each time; here a
    receive waits first, since the next bytes are mostly not there yet, and a send that fits does
    not yield. Errors of a send are left to the stream's own.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._socket = stream.socket

    async def receive(self) -> bytes:
        while True:
            try:
                await trio.lowlevel.wait_readable(self._socket.fileno())
                return os.read(self._socket.fileno(), RECEIVE_SIZE)
            except BlockingIOError:
                continue
            except (OSError, *GONE):
                return b""

    def send_nowait(self, data: bytes) -> int:
        try:
            return os.write(self._socket.fileno(), data)
        except OSError:
            return 0


class Connection:
    """One client's connection: its requests are read ahead and answered in turn."""

    def __init__(self, server: Server, stream: trio.abc.HalfCloseableStream) -> None:
        self._server = server
        self._limits = server.limits
        self._stream = stream
        self._pipe: _Pipe = _StreamPipe(stream)
        host = ""
        if isinstance(stream, trio.SocketStream):
            host = _peer_host(stream)
            if sys.platform != "win32":
                self._pipe = _SocketPipe(stream)
        self._reader = RequestReader(server.limits, host)
        self._nursery: trio.Nursery
        #: Until when what is being waited for from the client may take.
        self._until = math.inf
        #: Ends the reading by then or earlier: moving its deadline costs more than to look again.
        self._reading = trio.CancelScope()
        self._phase = ""
        self._answering = False
        #: The last answer is out: only the client's end of input is waited for.
        self._finished = False
        self._gone = False
        self._sending = False
        self._sends = 0
        #: Set while the client is too far ahead for reading on.
        self._room: trio.Event | None = None

    async def run(self) -> None:
        """Serve until either side closes. The stream is left to the caller to close."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._wait_for_client()
            await self._read()

    def stop(self) -> None:
        """Take no further request: leave at once if none is being answered."""
        if not self._answering:
            self.leave()

    def leave(self) -> None:
        """End it now, with the handler."""
        self._gone = True
        self._nursery.cancel_scope.cancel()

    def stays_open(self, request: Request) -> bool:
        """Will there be another answer after the one to this request?"""
        return request.keep_alive and not self._server.stopping

    # --- reading

    async def _read(self) -> None:
        """Read to the end of the input, or until another task does."""
        while not self._gone:
            with trio.CancelScope(deadline=self._until) as reading:
                self._reading = reading
                if not await self._read_to_end():
                    return
                self.leave()
            if reading.cancelled_caught and self._until <= trio.current_time():
                await self._expire()

    async def _read_to_end(self) -> bool:
        """Did this task see the end? False: another task reads on."""
        while data := await self._pipe.receive():
            if self._finished:
                continue
            self._reader.feed(data)
            if self._answering:
                if self._reader.buffered > self._limits.max_read_ahead:
                    self._room = trio.Event()
                    await self._room.wait()
                continue
            request = await self._next_request()
            if request is not None:
                self._answering = True
                self._phase = ""
                self._until = math.inf
                if self._reading.cancel_called:  # the last byte came as its time ended
                    self._nursery.start_soon(self._answer, request, name="http answer")
                elif not await self._answer_here(request):
                    return False
        return True

    @types.coroutine
    def _answer_here(self, request: Request) -> Generator[Any, Any, bool]:
        """Answer in this task. Is it still the one that reads?

        This does what `await` does, step by step, to see where the answer first waits. The time
        limit of the reading would end the answer, and one that asks how much time it has (as soon
        as it begins) would take it for its own.
        """
        self._reading.deadline = math.inf
        answer = self._answer(request)
        try:
            trap = answer.send(None)
        except StopIteration:
            return True
        self._nursery.start_soon(self._read, name="http reading")
        try:
            while True:
                try:
                    result = yield trap
                except BaseException as error:  # goes where `await` would send it
                    trap = answer.throw(error)
                else:
                    trap = answer.send(result)
        except StopIteration:
            return False

    def _read_on(self) -> None:
        if self._room is not None:
            self._room.set()
            self._room = None

    async def _next_request(self) -> Request | None:
        """The next whole request; None: more must be read, or nothing more is wanted."""
        try:
            request = self._reader.next_request()
            while request is None and self._reader.take_expectation():
                self._reading.deadline = self._until  # this may not be broken off any earlier
                await self.send(CONTINUE)
                # More may have come meanwhile, and nobody but us would look at it.
                request = self._reader.next_request()
        except RefusedRequest as refused:
            log.debug("request refused: %d %s", refused.status, refused.message)
            await self._refuse(refused.status, refused.message)
            return None
        if request is None:
            self._answering = False
            self._wait_for_client()
        return request

    def _wait_for_client(self) -> None:
        """Set the deadline of the part that comes next; more of the same part does not move it."""
        phase = self._reader.phase
        if phase != self._phase:
            self._phase = phase
            seconds: float = getattr(self._limits, f"{phase}_timeout")
            self._wait_until(trio.current_time() + seconds)

    def _wait_until(self, deadline: float) -> None:
        self._until = deadline
        if deadline < self._reading.deadline:
            self._reading.deadline = deadline

    async def _expire(self) -> None:
        if self._finished or self._phase == "idle":
            self.leave()
        else:
            await self._refuse(408, "the request took too long to arrive")

    # --- answering

    async def _answer(self, first: Request) -> None:
        """Answer this request, and those that have come whole in the meantime."""
        request: Request | None = first
        while request is not None:
            await self._handle(request)
            if self._gone:
                return
            if not self.stays_open(request):
                await self._finish()
                return
            request = await self._next_request()
            if request is None or self._reader.buffered <= self._limits.max_read_ahead:
                self._read_on()

    async def _handle(self, request: Request) -> None:
        responder = Responder(self, request)
        try:
            await self._server.handler(request, responder)
            if not responder.ended and not self._gone:
                log.error("no whole answer was given to %s %r", request.method, request.path)
        except Exception:
            # The log has it whole; the client learns only that it was our fault.
            log.exception("the handler of %s %r failed", request.method, request.path)
        if not responder.started:
            await responder.send(500, error_body(500, "internal server error"))
        elif not responder.ended:
            if request.version == "1.0":
                self._reset_on_close()
            self.leave()

    async def _refuse(self, status: int, message: str) -> None:
        """Say why, and hear no more."""
        body = error_body(status, message)
        framing = f"content-length: {len(body)}\r\nconnection: close\r\n"
        await self.send(answer_head(status, "application/json", (), framing) + body)
        await self._finish()

    async def _finish(self) -> None:
        """Close our side, and let the client read before the rest is closed.

        Closing at once would reset the connection where the client is still sending, and it could
        lose the answer. When the server stops there is no time for that.
        """
        if self._server.stopping:
            self.leave()
            return
        self._finished = True
        self._answering = False
        self._wait_until(trio.current_time() + self._limits.linger_timeout)
        self._read_on()
        try:
            await self._stream.send_eof()
        except GONE:
            self.leave()

    def _reset_on_close(self) -> None:
        """Close with a reset, where an end would look like the end of the answer."""
        if isinstance(self._stream, trio.SocketStream):
            linger = struct.pack("ii", 1, 0)
            with contextlib.suppress(OSError):
                self._stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    # --- sending

    async def send(self, data: bytes) -> None:
        """Send it all, or be cancelled. Mostly without waiting."""
        if self._sending:
            raise RuntimeError("another task is writing this answer")
        if self._gone:
            await trio.lowlevel.checkpoint()
            return
        sent = self._pipe.send_nowait(data)
        if sent < len(data):
            await self._send_rest(memoryview(data)[sent:])
            return
        self._sends += 1
        if self._sends % SENDS_WITHOUT_CHECKPOINT == 0:
            await trio.lowlevel.checkpoint()

    async def _send_rest(self, rest: memoryview) -> None:
        self._sending = True
        try:
            for start in range(0, len(rest), SEND_PIECE):
                with trio.fail_after(self._limits.send_timeout):
                    await self._stream.send_all(rest[start : start + SEND_PIECE])
        except (trio.TooSlowError, *GONE):
            self.leave()
            await trio.lowlevel.checkpoint()
        except BaseException:
            # Cancelled by a time limit of the handler's own: half a piece is out, and nothing
            # sensible can follow it.
            self.leave()
            raise
        finally:
            self._sending = False


def _peer_host(stream: trio.SocketStream) -> str:
    try:
        name = stream.socket.getpeername()
    except OSError:  # it has left already
        return ""
    return str(name[0]) if isinstance(name, tuple) else ""
