"""Pooled outbound HTTP/1.1 on httptools and non-blocking sockets, for `http:` base URLs."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import httptools
import trio

from .http_address import Address
from .http_reply import (
    IDLE_LIFETIME,
    MAX_BODY,
    MAX_HEAD,
    MAX_IDLE,
    BrokenReply,
    HttpReply,
    NotConnected,
    TimedOut,
    reason_of,
)

READ_SIZE = 64 * 1024


class _NoReply(BrokenReply):
    """The connection was closed before the first byte of a reply."""


class _Connection:
    """A socket and the reply that is being read from it."""

    __slots__ = (
        "_fd",
        "_overhead",
        "_parser",
        "_size",
        "_until_close",
        "broken",
        "complete",
        "cut_short",
        "extra",
        "head",
        "headers",
        "idle_since",
        "keep",
        "parts",
        "received",
        "silence",
        "socket",
        "status",
    )

    def __init__(self, sock: socket.socket, silence: float) -> None:
        self.socket = sock
        self._fd = sock.fileno()
        self.silence = silence
        self.idle_since = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self.begin()

    def begin(self) -> None:
        """Forget the last reply."""
        self.status = 0
        self.headers: dict[str, str] = {}
        self.parts: list[bytes] = []
        #: The head is complete; the whole reply is; bytes came that belong to none.
        self.head = self.complete = self.extra = False
        #: The server said that the connection stays; it replied before it had the whole request.
        self.keep = self.cut_short = False
        self._until_close = False
        self.received = self._size = self._overhead = 0
        #: Raised when everything before it was read.
        self.broken: BrokenReply | None = None

    def usable(self) -> bool:
        """Is an idle connection still open, and silent as it should be?"""
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    async def send(self, data: bytes) -> None:
        """Send all, or until the server replies or closes without having read it.

        A connection that is lost shows when the reply is read. Raises `TimedOut`.
        """
        view = memoryview(data)
        while view and not self.cut_short:
            try:
                view = view[self.socket.send(view) :]
            except BlockingIOError:
                self.cut_short = await self._wait_writable()
            except OSError:
                self.cut_short = True

    async def _wait_writable(self) -> bool:
        """Wait until more can be sent, or, True, there is something to read."""
        readable = False

        async def wait_readable(nursery: trio.Nursery) -> None:
            nonlocal readable
            await trio.lowlevel.wait_readable(self._fd)
            readable = True
            nursery.cancel_scope.cancel()

        with trio.CancelScope(deadline=trio.current_time() + self.silence):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait_readable, nursery)
                await trio.lowlevel.wait_writable(self._fd)
                nursery.cancel_scope.cancel()
            return readable
        raise TimedOut(f"the server read nothing for {self.silence:g} s")

    async def receive(self) -> None:
        """Read once from the socket. Raises `HttpFailure`."""
        if self.broken is not None:
            raise self.broken
        with trio.CancelScope(deadline=trio.current_time() + self.silence):
            await trio.lowlevel.wait_readable(self._fd)
            try:
                data = self.socket.recv(READ_SIZE)
            except BlockingIOError:
                return
            except OSError as error:
                raise self._ended(reason_of(error)) from None
            self._feed(data)
            return
        raise TimedOut(f"the server sent nothing for {self.silence:g} s")

    def _ended(self, how: str) -> BrokenReply:
        if not self.received:
            return _NoReply(f"the server closed the connection without a reply ({how})")
        return BrokenReply(f"the connection ended before the reply did ({how})")

    def _feed(self, data: bytes) -> None:
        if not data:
            if not (self.head and self._until_close):
                raise self._ended("end of input")
            self.complete = True
            return
        self.received += len(data)
        size = self._size
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.complete:
                self.broken = BrokenReply(f"the reply is not valid HTTP: {error}")
            self.extra = True
        # Trailers, chunk extensions and interim replies count as head, too.
        self._overhead = 0 if self._size > size else self._overhead + len(data)
        if self._overhead > MAX_HEAD and not self.complete:
            self.broken = BrokenReply(f"the head of the reply is larger than {MAX_HEAD} bytes")
        elif self._size > MAX_BODY:
            self.broken = BrokenReply(f"the reply is larger than {MAX_BODY} bytes")

    # What the parser calls.

    def on_message_begin(self) -> None:
        self.extra = self.complete

    def on_header(self, name: bytes, value: bytes) -> None:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status < 200:
            self.headers = {}
            return
        self.head = True
        coding = self.headers.get("transfer-encoding")
        if coding is None:
            self._until_close = "content-length" not in self.headers
        else:
            self._until_close = not coding.lower().endswith("chunked")
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            self.broken = BrokenReply("the reply is compressed, which was not asked for")

    def on_body(self, data: bytes) -> None:
        self._size += len(data)
        if self.broken is None:
            self.parts.append(data)

    def on_message_complete(self) -> None:
        if self.status >= 200:
            self.complete = True
            self.keep = self._parser.should_keep_alive()


class _PooledReply(HttpReply):
    """One request and its reply on a connection of the pool."""

    __slots__ = ("_connection", "_message", "_pool", "headers", "status")

    def __init__(self, pool: HttpPool, message: bytes) -> None:
        self._pool = pool
        self._message = message
        self.status = 0
        self.headers: Mapping[str, str] = {}

    async def __aenter__(self) -> Self:
        connection = self._pool.take_idle()
        if connection is not None:
            try:
                await self._begin(connection)
                return self
            except _NoReply:
                pass  # The server closed it in the same moment; that says nothing of the request.
        await self._begin(await self._pool.connect())
        return self

    async def _begin(self, connection: _Connection) -> None:
        try:
            await connection.send(self._message)
            while not connection.head:
                await connection.receive()
        except BaseException:
            connection.socket.close()
            raise
        self._connection = connection
        self.status = connection.status
        self.headers = connection.headers

    async def receive(self) -> bytes:
        connection = self._connection
        while not connection.parts:
            if connection.complete and connection.broken is None:
                return b""
            await connection.receive()
        parts, connection.parts = connection.parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @property
    def complete(self) -> bool:
        return self._connection.complete

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        connection = self._connection
        if connection.keep and not connection.extra and not connection.cut_short:
            self._pool.give_back(connection)
        else:
            connection.socket.close()


class HttpPool:
    """Connections to one `http:` base URL, kept open between requests, the last used first."""

    def __init__(
        self,
        address: Address,
        headers: Mapping[str, str],
        *,
        connect_timeout: float = 5.0,
        read_timeout: float = 600.0,
        max_idle: int = MAX_IDLE,
    ) -> None:
        self.address = address
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        self._max_idle = max_idle
        self._idle: deque[_Connection] = deque()
        host = str(address).removesuffix(":80")
        lines = [f" HTTP/1.1\r\nHost: {host}\r\n"]
        lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
        self._head = "".join(lines).encode("latin-1")

    @property
    def idle(self) -> int:
        """Connections that are open and not in use."""
        return len(self._idle)

    def request(self, method: str, path: str, body: bytes | None = None) -> _PooledReply:
        message = f"{method} {self.address.path}{path}".encode("ascii") + self._head
        if body is None:
            return _PooledReply(self, message + b"\r\n")
        size = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        return _PooledReply(self, b"".join((message, size, body)))

    async def aclose(self) -> None:
        while self._idle:
            self._idle.pop().socket.close()

    def take_idle(self) -> _Connection | None:
        """An idle connection that is still good, ready for a request."""
        oldest = trio.current_time() - IDLE_LIFETIME
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since >= oldest and connection.usable():
                connection.begin()
                return connection
            connection.socket.close()
        return None

    def give_back(self, connection: _Connection) -> None:
        """Keep a connection for the next request, and close those that are too many or too old."""
        now = trio.current_time()
        connection.idle_since = now
        self._idle.append(connection)
        while len(self._idle) > self._max_idle or self._idle[0].idle_since < now - IDLE_LIFETIME:
            self._idle.popleft().socket.close()

    async def connect(self) -> _Connection:
        """A new connection. Raises `NotConnected` or `TimedOut`."""
        with trio.CancelScope(deadline=trio.current_time() + self._connect_timeout):
            try:
                stream = await trio.open_tcp_stream(self.address.host, self.address.port)
            except OSError as error:
                raise NotConnected(
                    f"cannot connect to {self.address}: {reason_of(error)}"
                ) from None
            sock = socket.socket(fileno=stream.socket.detach())
            sock.setblocking(False)
            # Without it a small write waits for the acknowledgement of the last, up to 40 ms.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return _Connection(sock, self._read_timeout)
        raise TimedOut(f"no connection to {self.address} within {self._connect_timeout:g} s")
