"""A real HTTP server whose every byte is written by the test."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import trio
from ports import listener_on_loopback


class Received(NamedTuple):
    """A request as the server got it."""

    method: str
    path: str
    #: By lower-case name.
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class NotHttp(Exception):
    """A stranger is at the port: a node, say, that dials whoever had it before."""


class ServerSide:
    """The server's end of one connection."""

    def __init__(self, stream: trio.abc.Stream, server: ScriptedServer) -> None:
        self.stream = stream
        self._server = server
        self._rest = bytearray()

    async def request(self) -> Received:
        """Read one whole request."""
        received = await self.request_or_end()
        assert received is not None, "the client closed the connection"
        return received

    async def request_or_end(self) -> Received | None:
        """The same; None if the client closes the connection instead. Raises `NotHttp`."""
        while b"\r\n\r\n" not in self._rest:
            if not await self._read():
                return None
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        if len(first.split(" ")) != 3:
            raise NotHttp(first[:100])
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        if headers.get("transfer-encoding") == "chunked":
            body = b"".join([piece async for piece in self._chunks()])
        else:
            body = await self._exactly(int(headers.get("content-length", "0")))
        method, path, _ = first.split(" ")
        received = Received(method, path, headers, body)
        self._server.requests.append(received)
        return received

    async def _chunks(self) -> AsyncIterator[bytes]:
        """The pieces of a chunked body that has no trailers."""
        while True:
            while b"\r\n" not in self._rest:
                await self._exactly(len(self._rest) + 1, keep=True)
            line, _, self._rest = self._rest.partition(b"\r\n")
            piece = await self._exactly(int(line, 16) + 2)
            if len(piece) == 2:
                return
            yield piece[:-2]

    async def _exactly(self, size: int, *, keep: bool = False) -> bytes:
        """So many bytes; with `keep` they are there, and stay."""
        while len(self._rest) < size:
            if not await self._read():
                raise trio.BrokenResourceError("the client left in the middle of its request")
        if keep:
            return b""
        data, self._rest = bytes(self._rest[:size]), self._rest[size:]
        return data

    async def _read(self) -> bool:
        data = await self.stream.receive_some(65536)
        self._rest += data
        return bool(data)

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            await self.stream.send_all(piece)

    async def send_bytewise(self, data: bytes) -> None:
        for i in range(len(data)):
            await self.stream.send_all(data[i : i + 1])

    async def wait_closed(self) -> None:
        """Wait until the client has closed the connection."""
        try:
            while await self.stream.receive_some(65536):
                pass
        except trio.BrokenResourceError:
            pass  # reset, because it left something unread


Script = Callable[[ServerSide], Awaitable[None]]


class ScriptedServer:
    """Runs the script once for each connection, and closes it when the script returns."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.requests: list[Received] = []
        self.connections = 0

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        return f"{self.origin}/v1"


@asynccontextmanager
async def scripted_server(*scripts: Script, limit: float = 60) -> AsyncIterator[ScriptedServer]:
    """A server on a free port; the last script is also that of all later connections.

    A script that raises fails the test, and so does one that takes longer than `limit` (s).
    """
    listener = await listener_on_loopback()
    server = ScriptedServer(listener.socket.getsockname()[1])

    async def handle(stream: trio.abc.Stream) -> None:
        script = scripts[min(server.connections, len(scripts) - 1)]
        server.connections += 1
        with suppress(NotHttp):
            async with stream:
                await script(ServerSide(stream, server))

    async def accept() -> None:
        await trio.serve_listeners(handle, [listener])

    with trio.fail_after(limit):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            yield server
            nursery.cancel_scope.cancel()


def always(data: bytes) -> Script:
    """A script that gives each request of a connection the same reply."""

    async def script(side: ServerSide) -> None:
        while await side.request_or_end():
            await side.send(data)

    return script


def reply(status: int, body: bytes | str = b"", *headers: str) -> bytes:
    """A whole reply with a length. `headers` are lines."""
    raw = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(raw)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + raw


def json_reply(status: int, value: Any, *headers: str) -> bytes:
    return reply(status, json.dumps(value), "Content-Type: application/json", *headers)


CHUNKED_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)
LAST_CHUNK = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """A piece of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def delta(content: str = "", finish: str | None = None, **fields: Any) -> dict[str, Any]:
    """A chunk of a streamed answer."""
    choice = {"index": 0, "delta": {"content": content, **fields}, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion.chunk", "choices": [choice]}


USAGE: dict[str, Any] = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
DONE = b"data: [DONE]\n\n"


def answer(*texts: str) -> bytes:
    """The events of a whole streamed answer."""
    events = [event(delta(text)) for text in texts]
    return b"".join([*events, event(delta(finish="stop")), event(USAGE), DONE])


def streamed(body: bytes) -> bytes:
    """A whole chunked reply."""
    return CHUNKED_HEAD + chunk(body) + LAST_CHUNK
