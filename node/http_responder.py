"""The answer to one HTTP/1.1 request: how its pieces are framed. The bytes go to a `Line`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from .http_messages import Request, answer_head


class Line(Protocol):
    """What an answer asks of its connection (`http_connection.Connection`)."""

    async def send(self, data: bytes) -> None:
        """Send it all, or be cancelled."""
        ...

    def stays_open(self, request: Request) -> bool:
        """Will there be another answer after the one to this request?"""
        ...


class Responder:
    """The answer to one request: either `send`, or `start`, `write` as often as wanted, `end`.

    For one task at a time. When the client leaves, the handler is cancelled; in a shielded part of
    it, writes then do nothing.
    """

    __slots__ = ("_chunked", "_line", "_request", "ended", "started")

    def __init__(self, line: Line, request: Request) -> None:
        self._line = line
        self._request = request
        self._chunked = request.version == "1.1"
        #: Has (the head of) an answer been given, and the whole of it?
        self.started = False
        self.ended = False

    async def send(
        self,
        status: int,
        body: bytes = b"",
        *,
        content_type: str = "application/json",
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        """A whole answer. Raises `ValueError` for headers that cannot be sent."""
        self._begin()
        bodiless = status in (204, 304)
        framing = "" if bodiless else f"content-length: {len(body)}\r\n"
        head = answer_head(status, content_type, headers, framing + self._connection_field())
        self.started = self.ended = True
        if bodiless or self._request.method == "HEAD":
            body = b""
        await self._line.send(head + body)

    async def start(
        self, status: int, *, content_type: str, headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        """The head of a streamed answer. Raises `ValueError` for headers that cannot be sent."""
        self._begin()
        if status in (204, 304):
            raise ValueError(f"an answer {status} has no body")
        if self._chunked:
            framing = "transfer-encoding: chunked\r\n" + self._connection_field()
        else:  # HTTP/1.0: the body ends with the connection
            self._request.keep_alive = False
            framing = "connection: close\r\n"
        head = answer_head(status, content_type, headers, framing)
        self.started = True
        await self._line.send(head)

    async def write(self, data: bytes) -> None:
        """A piece of a streamed answer, sent at once."""
        if not self.started or self.ended:
            raise RuntimeError("write() belongs between start() and end()")
        if not data or self._request.method == "HEAD":
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        await self._line.send(data)

    async def end(self) -> None:
        """The end of a streamed answer. Without it the client sees that the answer was cut."""
        if not self.started or self.ended:
            raise RuntimeError("end() belongs after start(), once")
        self.ended = True
        if self._chunked and self._request.method != "HEAD":
            await self._line.send(b"0\r\n\r\n")

    def _begin(self) -> None:
        if self.started:
            raise RuntimeError("this request has its answer already")

    def _connection_field(self) -> str:
        if not self._line.stays_open(self._request):
            return "connection: close\r\n"
        return "" if self._chunked else "connection: keep-alive\r\n"


Handler = Callable[[Request, Responder], Awaitable[None]]
