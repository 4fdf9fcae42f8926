"""An answer over HTTP, of any dialect: a request that was accepted, and its chunks."""

from __future__ import annotations

import sys
import time
from collections import deque
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Protocol, Self

import msgspec
import trio

from .base import (
    Answering,
    Chunk,
    DeadlineExceeded,
    GenerateError,
    GenerateRequest,
    Origin,
    ProviderUnavailable,
    Usage,
)
from .http_client import HttpClient
from .http_reply import BrokenReply, HttpFailure, HttpReply, TimedOut
from .openai_errors import ErrorReader
from .stream_decoder import StreamDecoder
from .tokens import estimated_usage

#: A body that explains an error is read so far, in bytes and seconds.
MAX_ERROR_BODY = 64 * 1024
ERROR_BODY_TIME = 5.0


class Server(Protocol):
    """Who is asked."""

    errors: ErrorReader

    @property
    def name(self) -> str: ...

    def send(self, request: GenerateRequest) -> AbstractAsyncContextManager[HttpReply]:
        """Send the request. Raises a `GenerateError` for one that this server cannot be asked."""
        ...

    def learn(self, request: GenerateRequest, failure: GenerateError) -> bool:
        """Can the request be sent again without what the server refused?"""
        ...

    def decoder(self, request: GenerateRequest) -> StreamDecoder:
        """A decoder of the reply."""
        ...


class HttpAnswer:
    """One request: entered when the server has accepted it, left when nobody wants more of it."""

    __slots__ = ("_chunks", "_context", "_request", "_server")

    def __init__(self, server: Server, request: GenerateRequest) -> None:
        self._server = server
        self._request = request

    async def __aenter__(self) -> Answering:
        server, request = self._server, self._request
        reply = await self._accepted()
        self._chunks = _Chunks(reply, server.decoder(request), request)
        return Answering(Origin(provider=server.name, model=request.model), self._chunks)

    async def _accepted(self) -> HttpReply:
        """Send the request, again if the server refuses a field that it can do without."""
        server = self._server
        while True:
            context = self._context = server.send(self._request)
            try:
                reply = await context.__aenter__()
            except HttpFailure as error:
                raise unavailable(error, server.name) from None
            try:
                failure = await failure_of(reply, server.errors)
            except BaseException:
                await context.__aexit__(*sys.exc_info())
                raise
            if failure is None:
                return reply
            await context.__aexit__(None, None, None)
            if not server.learn(self._request, failure):
                raise failure

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                await self._chunks.finish()
        finally:
            await self._context.__aexit__(kind, error, traceback)


class _Chunks:
    """The chunks of a reply, all that arrived together at once."""

    __slots__ = ("_decoder", "_ready", "_reply", "_request")

    def __init__(self, reply: HttpReply, decoder: StreamDecoder, request: GenerateRequest) -> None:
        self._reply = reply
        self._decoder = decoder
        self._request = request
        self._ready: deque[Chunk] = deque()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        decoder = self._decoder
        while not self._ready:
            if decoder.failure is not None:
                raise decoder.failure
            if decoder.finished:
                raise StopAsyncIteration
            try:
                data = await self._reply.receive()
            except HttpFailure as error:
                failure = decoder.broken(str(error))
                if isinstance(error, TimedOut) and isinstance(failure, ProviderUnavailable):
                    failure = DeadlineExceeded(failure.message)
                raise failure from None
            self._ready.extend(decoder.feed(data) if data else decoder.end())
        chunk = self._ready.popleft()
        if chunk.finish_reason is not None and chunk.usage is None:
            return msgspec.structs.replace(chunk, usage=self._estimate())
        return chunk

    def _estimate(self) -> Usage:
        """For a server that counts nothing."""
        decoder = self._decoder
        pieces = decoder.pieces if decoder.streamed else 0
        return estimated_usage(self._request, decoder.text, pieces=pieces)

    async def finish(self) -> None:
        """Let the server end its reply, so that the connection can be used again."""
        if self._decoder.finished:
            await self._reply.finish()


async def post(
    client: HttpClient, path: str, body: bytes, limit: int, errors: ErrorReader
) -> bytes:
    """The whole reply to one request, of so many bytes at most. Raises a `GenerateError`."""
    try:
        async with client.request("POST", path, body) as reply:
            if failure := await failure_of(reply, errors):
                raise failure
            return await read_body(reply, limit)
    except HttpFailure as error:
        raise unavailable(error, errors.name) from None


async def failure_of(reply: HttpReply, errors: ErrorReader) -> GenerateError | None:
    """What a reply says of a failure; None if it holds an answer."""
    if reply.status == 200:
        if not reply.headers.get("content-type", "").startswith("text/html"):
            return None
        return ProviderUnavailable(f"{errors.name} answered with a web page ({errors.place_hint})")
    return errors.reply(reply.status, reply.headers, errors.read(await explain(reply)), time.time())


def unavailable(error: HttpFailure, name: str) -> ProviderUnavailable:
    """No reply, in the words of the vocabulary."""
    kind = DeadlineExceeded if isinstance(error, TimedOut) else ProviderUnavailable
    return kind(f"{name}: {error}")


async def explain(reply: HttpReply) -> bytes:
    """The body of an error, or as much of it as comes soon."""
    body = bytearray()
    with trio.move_on_after(ERROR_BODY_TIME):
        try:
            while len(body) < MAX_ERROR_BODY and (piece := await reply.receive()):
                body += piece
        except HttpFailure:
            pass  # The status says the most of it.
    return bytes(body[:MAX_ERROR_BODY])


async def read_body(reply: HttpReply, limit: int) -> bytes:
    """The whole body. Raises `HttpFailure`."""
    body = bytearray()
    while piece := await reply.receive():
        body += piece
        if len(body) > limit:
            raise BrokenReply(f"the reply is longer than {limit} bytes")
    return bytes(body)
