"""`backend_manager` of the Python API: the node that runs on this machine, as a provider.

The node has a cache, flights and a mesh of its own, so what it answers passes no other router.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from ..providers.base import (
    ERRORS,
    Answering,
    Chunk,
    ContentFiltered,
    ContextTooLong,
    Embedding,
    EmbedRequest,
    FinishReason,
    GenerateError,
    GenerateRequest,
    Health,
    ModelOffer,
    Origin,
    ProviderUnavailable,
    StreamInterrupted,
    Usage,
)
from ..providers.event_stream import EventStream, EventTooLong
from ..providers.http_client import HttpClient, open_client
from ..providers.http_reply import HttpFailure, HttpReply
from ..providers.openai_chat import Quirks, encode_request
from .home import NOT_RUNNING, Home

#: Bytes of an error's body that are read.
MAX_ERROR = 1 << 20
CONNECT = 5.0
HEALTH_TIME = 1.9


class NodeAnswering(Answering):
    """An answer of the node, with the id by which it can be explained there."""

    __slots__ = ("request_id",)

    def __init__(self, origin: Origin, chunks: AsyncIterator[Chunk], request_id: str) -> None:
        super().__init__(origin, chunks)
        self.request_id = request_id


class _Said(msgspec.Struct):
    request_id: str = ""
    peer: str = ""
    node: str = ""
    provider: str = ""
    model: str = ""
    cache: Any = "miss"
    policy: str = ""
    attempts: int = 0
    cid: str | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: FinishReason | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False
    estimated: bool = False


class _Error(msgspec.Struct):
    message: str = ""
    code: str = ""
    param: str | None = None
    partial: str = ""


class _Event(msgspec.Struct):
    """An event of an answer, or the body of an error."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    promptmesh: _Said | None = None
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Event).decode
#: What the OpenAI dialect calls our errors, where that differs.
_CODES: dict[str, type[GenerateError]] = {
    "context_length_exceeded": ContextTooLong,
    "content_filter": ContentFiltered,
}


class RunningNode:
    """A `Provider`: whatever node `home` says is running, asked by HTTP."""

    name = "backend_manager"

    def __init__(self, home: Home, *, policy: str = "", check_first: bool = True) -> None:
        """`policy`: how it is to choose; "": as it is configured. `check_first`: ask whether it is
        well before it gets a prompt."""
        self._home = home
        self._policy = policy
        self._check_first = check_first
        self._address = ""
        self._client: HttpClient | None = None

    def models(self) -> Sequence[ModelOffer]:
        """Nothing is known beforehand: the node says what there is."""
        return ()

    async def check(self) -> Health:
        """Does it answer?"""
        running = self._home.running()
        if running is None:
            return Health(state="unavailable", reason=NOT_RUNNING)
        reason = f"the node does not answer at {running.http}"
        with trio.move_on_after(HEALTH_TIME):
            try:
                client = await self._client_of(running.http)
                async with client.request("GET", "/models") as reply:
                    if reply.status == 200:
                        async for _ in reply:
                            pass
                        return Health()
                    reason = f"the node answered {reply.status}"
            except HttpFailure as error:
                reason = str(error)
        return Health(state="unavailable", reason=reason, hint="look at its log, or start it again")

    @asynccontextmanager
    async def open(self, request: GenerateRequest) -> AsyncIterator[NodeAnswering]:
        running = self._home.running()
        if running is None:
            raise ProviderUnavailable(NOT_RUNNING)
        if self._check_first and (health := await self.check()).state != "ready":
            raise ProviderUnavailable(f"{health.reason} ({health.hint})")
        client = await self._client_of(running.http)
        body = encode_request(self._with_wishes(request), Quirks())
        try:
            async with client.request("POST", "/chat/completions", body) as reply:
                if reply.status != 200:
                    raise await _refusal(reply)
                answer = _Answer(reply)
                said = await answer.first()
                yield NodeAnswering(_origin(said), answer.chunks(), said.request_id)
        except HttpFailure as error:
            raise ProviderUnavailable(f"the running node: {error}") from None

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        raise ProviderUnavailable("the Python API asks for no embeddings yet")

    async def run(self) -> None:
        """Keep the connections until cancelled."""
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1.0):
                await self.aclose()

    async def aclose(self) -> None:
        """Close the idle connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _client_of(self, address: str) -> HttpClient:
        """The connections to the node, which may have been started again elsewhere."""
        client = self._client
        if client is not None and self._address == address:
            return client
        self._address = address
        self._client = found = open_client(
            f"http://{address}/v1", {}, connect_timeout=CONNECT, read_timeout=math.inf
        )
        if client is not None:
            await client.aclose()
        return found

    def _with_wishes(self, request: GenerateRequest) -> GenerateRequest:
        """The request with its `promptmesh` object."""
        cache = request.cache
        wishes: dict[str, Any] = {
            "cache": {
                "mode": cache.mode,
                "any_sample": cache.any_sample,
                **({} if cache.max_age is None else {"max_age": cache.max_age}),
            }
        }
        if self._policy:
            wishes["policy"] = self._policy
        if request.deadline is not None and math.isfinite(request.deadline):
            wishes["deadline_s"] = request.deadline
        extra: Mapping[str, Any] = {**request.extra, "promptmesh": wishes}
        return msgspec.structs.replace(request, dialect="openai", extra=dict(extra))


class _Answer:
    """The events of a streamed answer."""

    def __init__(self, reply: HttpReply) -> None:
        self._reply = reply
        self._events = EventStream()
        self._ready: list[_Event] = []
        self._text: list[str] = []
        self._done = False

    async def first(self) -> _Said:
        """Who answers: the first event says it."""
        event = await self._next()
        if event is None or event.promptmesh is None:
            raise ProviderUnavailable("what answers for the node is not promptmesh")
        self._ready.insert(0, event)
        return event.promptmesh

    async def chunks(self) -> AsyncIterator[Chunk]:
        """Raises a `GenerateError`, also for an answer that was cut."""
        closing: Chunk | None = None
        while (event := await self._next()) is not None:
            for choice in event.choices[:1]:
                delta = choice.delta
                if delta.content or delta.reasoning_content:
                    self._text.append(delta.content or "")
                    yield Chunk(text=delta.content or "", reasoning=delta.reasoning_content or "")
                if choice.finish_reason is not None:
                    origin = event.promptmesh or _Said()
                    closing = Chunk(
                        finish_reason=choice.finish_reason, cid=origin.cid, origin=_origin(origin)
                    )
            if event.usage is not None and closing is not None:
                closing = msgspec.structs.replace(closing, usage=_usage(event.usage))
        if closing is None:
            raise self._cut("the answer ended without its end marker")
        await self._reply.finish()
        yield closing

    async def _next(self) -> _Event | None:
        """The next event; None after the last. Raises a `GenerateError`."""
        while not self._ready:
            if self._done:
                return None
            try:
                data = await self._reply.receive()
                if not data:
                    raise self._cut("the node broke off its answer")
                for _, said in self._events.feed(data):
                    if said == b"[DONE]":
                        self._done = True
                        break
                    self._ready.append(_decode(said))
            except HttpFailure as error:
                raise self._cut(str(error)) from None
            except (EventTooLong, msgspec.DecodeError) as error:
                raise self._cut(f"what the node sent cannot be read: {error}") from None
        event = self._ready.pop(0)
        if event.error is not None:
            raise _error(event.error, None)
        return event

    def _cut(self, reason: str) -> GenerateError:
        text = "".join(self._text)
        return StreamInterrupted(reason, partial=text) if text else ProviderUnavailable(reason)


def _origin(said: _Said) -> Origin:
    fields = {n: getattr(said, n) for n in _Said.__struct_fields__ if n != "request_id"}
    try:
        return msgspec.convert(fields, Origin)
    except msgspec.ValidationError:
        raise ProviderUnavailable("what answers for the node is another version of it") from None


def _usage(said: _Usage) -> Usage:
    return Usage(
        prompt_tokens=said.prompt_tokens,
        completion_tokens=said.completion_tokens,
        cached=said.cached,
        exact=not said.estimated,
    )


async def _refusal(reply: HttpReply) -> GenerateError:
    body = bytearray()
    while len(body) < MAX_ERROR and (data := await reply.receive()):
        body += data
    wait = reply.headers.get("retry-after", "")
    try:
        error = _decode(bytes(body)).error or _Error()
    except msgspec.DecodeError:
        error = _Error()
    error.message = error.message or f"the running node answered {reply.status}"
    return _error(error, float(wait) if wait.isdecimal() else None)


def _error(said: _Error, retry_after: float | None) -> GenerateError:
    """The error that the node reports, as it would be raised in the node."""
    kind = _CODES.get(said.code) or ERRORS.get(said.code, ProviderUnavailable)
    return kind(said.message, retry_after=retry_after, partial=said.partial, field=said.param)
