"""A model server that fails: every way in which a real one does, by request.

It speaks the OpenAI dialect over raw sockets. The first part of a request's path names the fault,
so one server gives each provider that points at it a fault of its own::

    base_url = "http://127.0.0.1:PORT/stall/v1"

What it saw it remembers: each request, and whether its client left before it had said all.
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import trio
from fakes_http import (
    CHUNKED_HEAD,
    DONE,
    USAGE,
    NotHttp,
    Received,
    ScriptedServer,
    ServerSide,
    answer,
    chunk,
    delta,
    event,
    json_reply,
    reply,
    streamed,
)
from ports import listener_on_loopback

#: What an answer says before its fault, where it says anything.
PARTIAL = "Once upon"
#: What one says that is whole.
WHOLE = "Once upon a time."
#: Its pieces come so far apart (s) where it is slow.
DRIP = 1.0
PULSE = 0.1
#: A test that brings several requests together waits so long (s) for the others.
TOGETHER = 60.0

#: A model of several sizes, and the tokens that each server of it takes.
LONG = "long"
CONTEXTS = {"context-openai": 4096, "smaller": 2048, "larger": 8192}

BEGUN = event(delta("Once")) + event(delta(" upon"))
_TEXT = event(delta("x" * 32 * 1024))


@dataclass
class Seen:
    """A request as the server saw it."""

    fault: str
    request: Received
    #: The client closed the connection before the server had said all.
    left: bool = False
    #: One of both has ended it.
    over: trio.Event = field(default_factory=trio.Event)

    @property
    def model(self) -> str:
        return str(self.request.json["model"])


class FaultBackend(ScriptedServer):
    """See the module."""

    def __init__(self, port: int, *, scheme: str = "http") -> None:
        super().__init__(port)
        self._scheme = scheme
        self.seen: list[Seen] = []
        #: Fault -> the requests that must be there before it strikes: they fail at once together.
        self.together: dict[str, int] = {}
        #: Is `flapping` up?
        self.up = True
        self._arrival = trio.lowlevel.ParkingLot()

    def base(self, fault: str) -> str:
        """The base URL of a server with that fault."""
        return f"{self._scheme}://127.0.0.1:{self.port}/{fault}/v1"

    def of(self, fault: str, model: str | None = None) -> list[Seen]:
        """The requests that met that fault, of a model or of all."""
        return [s for s in self.seen if s.fault == fault and model in (None, s.model)]

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve one connection until one of both ends it."""
        async with stream:
            side = ServerSide(stream, self)
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError, NotHttp):
                while received := await side.request_or_end():
                    fault, _, rest = received.path[1:].partition("/v1")
                    if fault not in FAULTS:  # somebody looks for what had this port before
                        await side.send(reply(404))
                    elif rest == "/models":
                        await side.send(_models(fault))
                    else:
                        await self._strike(fault, received, side)

    async def _strike(self, fault: str, received: Received, side: ServerSide) -> None:
        seen = Seen(fault, received)
        self.seen.append(seen)
        self._arrival.unpark_all()
        with trio.move_on_after(TOGETHER):
            while len(self.of(fault)) < self.together.get(fault, 0):
                await self._arrival.park()
        strike = FAULTS[fault] if fault != "flapping" or not self.up else FAULTS["healthy"]
        try:
            if isinstance(strike, bytes):
                await side.send(strike)
            else:
                await strike(Call(side, seen))
        except trio.BrokenResourceError:
            seen.left = True
            raise
        finally:
            seen.over.set()


def _models(fault: str) -> bytes:
    """The list of models: those that have another context than all others.

    The connection is closed, so that each request comes on a new one and is sent only once.
    """
    context = CONTEXTS.get(fault)
    models = [{"id": LONG, "max_model_len": context}] if context else []
    return json_reply(200, {"data": models}, "Connection: close")


class Call:
    """One request to be answered badly."""

    def __init__(self, side: ServerSide, seen: Seen) -> None:
        self._side = side
        self._seen = seen
        self.send = side.send
        self.send_bytewise = side.send_bytewise

    def reset(self) -> None:
        """Cut the connection, so that the client sees a reset and no end."""
        stream = self._side.stream
        if isinstance(stream, trio.SSLStream):
            stream = stream.transport_stream
        assert isinstance(stream, trio.SocketStream)
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.socket.close()

    async def close(self) -> None:
        """End the connection in good order."""
        await self._side.stream.aclose()

    async def until_left(self) -> None:
        """Say nothing more until the client leaves."""
        await self._side.wait_closed()
        self._seen.left = True

    async def again_and_again(self, piece: bytes, pause: float = 0.0) -> None:
        """Send it until the client leaves."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._notice, nursery.cancel_scope)
            with suppress(trio.BrokenResourceError):  # `_notice` sees it, too
                while True:
                    await self.send(piece)
                    await trio.sleep(pause)

    async def drip(self, data: bytes) -> None:
        """Send a byte every `DRIP` until the client leaves."""
        for i in range(len(data)):
            await self.send(data[i : i + 1])
            with trio.move_on_after(DRIP):
                await self.until_left()
                return

    async def _notice(self, work: trio.CancelScope) -> None:
        await self.until_left()
        work.cancel()


def _said(body: bytes) -> bytes:
    """A reply that has begun with these events."""
    return CHUNKED_HEAD + chunk(body)


def _error(message: str, **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, **fields}}


Strike = bytes | Callable[[Call], Awaitable[None]]


def _then(data: bytes, *, reset: bool = False) -> Strike:
    """Send that, then cut the connection or say nothing more."""

    async def strike(call: Call) -> None:
        if data:
            await call.send(data)
        if reset:
            call.reset()
        else:
            await call.until_left()

    return strike


def _endless(head: bytes, piece: bytes, pause: float = 0.0) -> Strike:
    async def strike(call: Call) -> None:
        await call.send(head)
        await call.again_and_again(piece, pause)

    return strike


def _closing(data: bytes) -> Strike:
    async def strike(call: Call) -> None:
        await call.send(data)
        await call.close()

    return strike


async def _drip(call: Call) -> None:
    await call.send(CHUNKED_HEAD)
    await call.drip(chunk(answer(WHOLE)))


#: A whole answer that is not streamed.
_JSON = b'{"choices":[{"index":0,"message":{"content":"%s"},"finish_reason":"stop"}]}'
_BODY = _JSON % WHOLE.encode()
_JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
_CONTEXT_VLLM = (
    "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens "
    "(4800 in the messages, 200 in the completion). Please reduce the length of the messages."
)
_CONTEXT_LLAMA = "the request exceeds the available context size (4096 tokens), try increasing it"
_CONTEXT_OLLAMA = "the input length exceeds the context length"
_FILTER = "The response was filtered due to the prompt triggering our content management policy."

#: Fault -> what is sent, or who does it. `healthy` is none.
FAULTS: dict[str, Strike] = {
    "healthy": streamed(answer("Once upon", " a time.")),
    "smaller": streamed(answer("Once upon", " a time.")),
    "larger": streamed(answer("Once upon", " a time.")),
    "flapping": _then(b"", reset=True),
    # Before the head of the reply.
    "silence": _then(b""),
    "reset-before-headers": _then(b"", reset=True),
    "not-http": _closing(b"220 mail.example.org ESMTP\r\n"),
    "endless-headers": _endless(b"HTTP/1.1 200 OK\r\n", b"X-More: " + b"x" * 4096 + b"\r\n"),
    # By its status.
    "status-400": json_reply(400, _error("top_k must be -1 or at least 1", param="top_k")),
    "status-401": json_reply(401, _error("Incorrect API key provided")),
    "status-402": json_reply(402, _error("Insufficient credits")),
    "status-403": json_reply(403, _error("this key may not use this model")),
    "status-404": json_reply(404, _error("The model `x` does not exist.", type="NotFoundError")),
    "status-408": json_reply(408, _error("the request took too long")),
    "status-429": json_reply(429, _error("Rate limit reached")),
    "status-429-retry-after": json_reply(429, _error("Rate limit reached"), "Retry-After: 7"),
    "status-500": json_reply(500, _error("CUDA error: out of memory")),
    "status-502": reply(502, "<html>Bad Gateway</html>"),
    "status-503-retry-after": json_reply(503, _error("Loading model"), "Retry-After: 7"),
    "redirect": reply(307, b"", "Location: http://127.0.0.1:1/v1"),
    "web-page": reply(200, "<html>Welcome!</html>", "Content-Type: text/html"),
    "endless-error": _endless(b"HTTP/1.1 500 Oh\r\nConnection: close\r\n\r\n", b"x" * 65536),
    # Of the request.
    "context-vllm": json_reply(
        400, {"object": "error", "message": _CONTEXT_VLLM, "type": "BadRequestError", "code": 400}
    ),
    "context-llama.cpp": json_reply(
        400, _error(_CONTEXT_LLAMA, type="exceed_context_size_error", code=400, n_ctx=4096)
    ),
    "context-ollama": json_reply(400, _error(_CONTEXT_OLLAMA, type="invalid_request_error")),
    "context-openai": json_reply(
        400,
        _error(_CONTEXT_VLLM, type="invalid_request_error", code="context_length_exceeded"),
    ),
    "filter-before": json_reply(400, _error(_FILTER, code="content_filter", param="prompt")),
    "filter-event": streamed(BEGUN + event(_error(_FILTER, code="content_filter"))),
    "filter-finish": streamed(BEGUN + event(delta(finish="content_filter")) + event(USAGE) + DONE),
    # After the head, before the first token.
    "reset-after-headers": _then(CHUNKED_HEAD, reset=True),
    "hang": _then(CHUNKED_HEAD),
    "only-pings": _endless(CHUNKED_HEAD, chunk(b": ping\n\n"), PULSE),
    "drip": _drip,
    "error-first": streamed(event(_error("the engine is dead"))),
    "malformed-first": streamed(b"data: {'choices': []}\n\n"),
    "empty-body": reply(200, b"", "Content-Type: text/event-stream"),
    "only-done": streamed(DONE),
    "length-too-long": _closing(
        _JSON_HEAD + b"Content-Length: %d\r\n\r\n" % (len(_BODY) + 1) + _BODY
    ),
    "length-too-short": _closing(
        _JSON_HEAD + b"Content-Length: %d\r\n\r\n" % (len(_BODY) - 9) + _BODY
    ),
    "endless-line": _endless(CHUNKED_HEAD + chunk(b"data: "), chunk(b"x" * 65536)),
    "endless-json": _endless(_JSON_HEAD + b'\r\n{"choices":[{"message":{"content":"', b"x" * 65536),
    # After the first token.
    "reset-in-a-chunk": _then(_said(BEGUN) + chunk(event(delta(" a")))[:40], reset=True),
    "stall": _then(_said(BEGUN)),
    "no-end-marker": streamed(BEGUN),
    "done-without-finish": streamed(BEGUN + DONE),
    "reset-after-finish": _then(_said(BEGUN + event(delta(finish="stop"))), reset=True),
    "strange-finish": streamed(BEGUN + event(delta(finish="error")) + DONE),
    "malformed-event": streamed(BEGUN + b"data: {'choices': []}\n\n" + answer(" a time.")),
    "invalid-utf8": streamed(BEGUN + event(delta("@")).replace(b"@", b"\xff\xfe") + answer("")),
    "wrong-types": streamed(BEGUN + event({"choices": {"0": "text"}}) + answer(" a time.")),
    "error-event": streamed(BEGUN + event(_error("CUDA error: out of memory")) + DONE),
    "endless-answer": _endless(_said(BEGUN), chunk(_TEXT)),
    "never-ending": _endless(_said(BEGUN), chunk(event(delta("."))), PULSE),
    # Strange, and yet whole.
    "no-done": streamed(BEGUN + event(delta(" a time.")) + event(delta(finish="stop"))),
    "duplicate-finish": streamed(
        BEGUN + event(delta(" a time.")) + 2 * event(delta(finish="stop")) + event(USAGE) + 2 * DONE
    ),
    "empty-answer": streamed(event(delta(finish="stop")) + event(USAGE) + DONE),
    "not-streamed": reply(200, _BODY, "Content-Type: application/json"),
}


@asynccontextmanager
async def fault_backend(tls: ssl.SSLContext | None = None) -> AsyncIterator[FaultBackend]:
    """A `FaultBackend` on a free port, which speaks TLS if it has a context for that."""
    listener = await listener_on_loopback()
    backend = FaultBackend(listener.socket.getsockname()[1], scheme="https" if tls else "http")
    door = trio.SSLListener(listener, tls, https_compatible=True) if tls else listener
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, backend.serve, [door])
        yield backend
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def refusing_port() -> AsyncIterator[int]:
    """A port at which every connection is refused, and which nobody else gets."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]
