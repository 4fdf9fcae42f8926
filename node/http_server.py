"""The HTTP/1.1 server: accepts connections, bounds their number, stops them. No routes.

What happens on a connection is in `http_connection`, what an answer is in `http_responder`, and
what the bytes mean in `http_reader` and `http_messages`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Protocol

import trio

from .http_connection import GONE, RECEIVE_SIZE, Connection
from .http_messages import Limits, Request, answer_head, error_body
from .http_responder import Handler, Responder

__all__ = ["Handler", "HttpServer", "Limits", "Request", "Responder", "open_listeners"]

log = logging.getLogger(__name__)

#: Connections beyond the limit that are told so at the same time; further ones are only closed.
MAX_REFUSALS = 64
#: Seconds that cancelled handlers have to end in `HttpServer.stop`.
CANCEL_GRACE = 2.0


class _Started(Protocol):
    """What `nursery.start` passes (the stubs that come with libp2p lack `trio.TaskStatus`)."""

    def started(self, value: Sequence[trio.SocketListener], /) -> None: ...


class HttpServer:
    """Serves a handler on listeners or single streams, until it is stopped."""

    def __init__(self, handler: Handler, limits: Limits | None = None) -> None:
        self.handler = handler
        self.limits = limits or Limits()
        self.stopping = False
        self._connections: set[Connection] = set()
        self._refusals = 0
        self._accepting = trio.CancelScope()
        self._serving = trio.CancelScope()
        self._emptied = trio.Event()

    async def serve(
        self,
        listeners: Sequence[trio.SocketListener],
        *,
        task_status: _Started = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve these listeners until `stop`; once. They are closed in any case."""
        with self._serving:
            async with trio.open_nursery() as nursery:
                task_status.started(listeners)
                with self._accepting:
                    await trio.serve_listeners(
                        self.serve_connection, list(listeners), handler_nursery=nursery
                    )

    async def serve_connection(self, stream: trio.abc.HalfCloseableStream) -> None:
        """Serve one connection to its end, and close it. Raises nothing of its own."""
        connection: Connection | None = None
        try:
            if self.stopping:
                return
            if len(self._connections) >= self.limits.max_connections:
                await self._refuse_connection(stream)
                return
            connection = Connection(self, stream)
            self._connections.add(connection)
            await connection.run()
        except Exception:
            # A fault of this server, for its log; other connections go on.
            log.exception("a connection failed")
        finally:
            try:
                await trio.aclose_forcefully(stream)
            finally:
                self._forget(connection)

    async def stop(self, grace: float) -> None:
        """Accept nothing more, close idle connections, and end.

        Answers in progress get `grace` seconds to finish, then are cancelled. Always returns,
        at the latest `CANCEL_GRACE` seconds after that, also where clients do not read.
        """
        self.stopping = True
        self._accepting.cancel()
        for connection in tuple(self._connections):
            connection.stop()
        with trio.move_on_after(grace):
            await self._wait_emptied()
        for connection in tuple(self._connections):
            connection.leave()
        with trio.move_on_after(CANCEL_GRACE):
            await self._wait_emptied()
        if self._connections:
            log.error("%d handlers do not end though cancelled", len(self._connections))
        self._serving.cancel()

    async def _wait_emptied(self) -> None:
        if self._connections:
            await self._emptied.wait()

    def _forget(self, connection: Connection | None) -> None:
        if connection is not None:
            self._connections.discard(connection)
        if self.stopping and not self._connections:
            self._emptied.set()

    async def _refuse_connection(self, stream: trio.abc.HalfCloseableStream) -> None:
        if self._refusals >= MAX_REFUSALS:
            return
        body = error_body(503, "too many connections")
        framing = f"content-length: {len(body)}\r\nconnection: close\r\n"
        head = answer_head(503, "application/json", [("retry-after", "1")], framing)
        self._refusals += 1
        try:
            with trio.move_on_after(self.limits.linger_timeout), contextlib.suppress(*GONE):
                await stream.send_all(head + body)
                await stream.send_eof()
                while await stream.receive_some(RECEIVE_SIZE):
                    pass
        finally:
            self._refusals -= 1


async def open_listeners(host: str, port: int) -> list[trio.SocketListener]:
    """Listen on every address of that host (IPv4 or IPv6); port 0 takes a free one.

    Raises `OSError` that names the address and says why not. Accepted connections have TCP_NODELAY
    (of `trio.SocketStream`), without which a stream of small writes waits for acknowledgements.
    """
    try:
        return list(await trio.open_tcp_listeners(port, host=host))
    except OSError as error:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        reason = error.strerror or str(error)
        message = f"cannot listen on {address}: {reason[:1].lower()}{reason[1:]}"
        raise OSError(error.errno, message) from error
