"""Any server of the OpenAI dialect: vLLM, SGLang, llama.cpp, Ollama, LM Studio, OpenRouter.

The server is always asked for a stream, also for a caller who wants the whole: so a caller who
leaves stops the work at once, and a cut answer is noticed by its missing end.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Annotated, Self

import msgspec
import trio

from .base import (
    Answering,
    Chunk,
    DeadlineExceeded,
    Embedding,
    EmbedRequest,
    GenerateError,
    GenerateRequest,
    Health,
    ModelOffer,
    Origin,
    ProviderUnavailable,
    RequestRejected,
    Usage,
)
from .http_client import (
    BrokenReply,
    HttpFailure,
    HttpReply,
    TimedOut,
    open_client,
    parse_base_url,
)
from .openai_chat import Continuation, Quirks, encode_request
from .openai_embeddings import encode_embed, longest_reply, read_embeddings, refuses_base64
from .openai_errors import ErrorReader, ServerError
from .openai_models import ListedModel, read_models
from .openai_stream import AnswerDecoder

#: Seconds between two questions for the models; while the server is down first the one, then twice
#: as long each time up to the other.
REFRESH = 30.0
FIRST_RETRY, LAST_RETRY = 1.0, 10.0
#: The same for a server on the public internet, whose list may be long.
PUBLIC_REFRESH = 300.0
#: Seconds. `Provider.check` may take 2.
CHECK_TIME = 1.9
#: A body that explains an error is read so far, in bytes and seconds.
MAX_ERROR_BODY = 64 * 1024
ERROR_BODY_TIME = 5.0
#: OpenRouter's list of 400 models has 700 kB.
MAX_MODEL_LIST = 8 * 1024 * 1024

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]


class OpenAICompatibleSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One server. Its key and headers never appear in logs or errors."""

    name: str
    #: Usually ends in /v1.
    base_url: str
    api_key: str | None = None
    #: Empty: those that the server lists.
    models: tuple[str, ...] = ()
    #: Those that make embeddings, in addition to those of which the server says so.
    embedding_models: tuple[str, ...] = ()
    #: Sent with each request.
    headers: dict[str, str] = {}
    #: What its models can do, where its list does not tell.
    tools: bool = True
    modalities: tuple[str, ...] = ("text",)
    continuation: Continuation = "none"
    #: Does a prompt leave the members' machines? None: if the host is on the public internet.
    egress: bool | None = None
    connect_timeout: Seconds = 5.0
    #: The longest silence; generous, because the caller has deadlines of its own.
    read_timeout: Seconds = 600.0

    def __repr__(self) -> str:
        return f"OpenAICompatibleSettings(name={self.name!r}, base_url={self.base_url!r})"


class OpenAICompatible:
    """A `Provider`. `run` keeps its list of models fresh, and closes its connections at the end."""

    def __init__(self, settings: OpenAICompatibleSettings) -> None:
        """Raises `ValueError` that names the wrong setting; connects to nothing."""
        self._settings = settings
        try:
            address = parse_base_url(settings.base_url)
        except ValueError as error:
            raise ValueError(f"base_url: {error}") from None
        headers = dict(settings.headers)
        if settings.api_key:
            if not re.fullmatch(r"[\x21-\x7e]+", settings.api_key):
                raise ValueError("api_key: it has characters that no key has, such as a space")
            headers["authorization"] = f"Bearer {settings.api_key}"
        self._client = open_client(
            settings.base_url,
            headers,
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.read_timeout,
        )
        secrets = [*settings.headers.values(), settings.api_key or ""]
        self.errors = ErrorReader(settings.name, secrets)
        self._quirks = Quirks()
        self._where = str(address)
        self._private = address.private
        self._egress = not address.private if settings.egress is None else settings.egress
        self._health = Health(state="starting", reason="it was not asked yet")
        #: When `check` may ask the server again.
        self._ask_again = -math.inf
        #: Until it refuses vectors in base64.
        self._takes_base64 = True
        configured = dict.fromkeys((*settings.models, *settings.embedding_models))
        self._offers = tuple(self._offer(ListedModel(id=id_)) for id_ in configured)

    @property
    def name(self) -> str:
        return self._settings.name

    def models(self) -> Sequence[ModelOffer]:
        """The configured models, or those the server listed last, also while it is down: who asks
        for one then learns that the server is down, and not that there is no such model."""
        return self._offers

    def open(self, request: GenerateRequest) -> _Call:
        return _Call(self, request)

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        while True:
            asked_for_base64 = self._takes_base64
            body = encode_embed(request, base64_vectors=asked_for_base64)
            try:
                async with self._client.request("POST", "/embeddings", body) as reply:
                    failure = await self.failure(reply)
                    if failure is None:
                        found = await _read(reply, longest_reply(request))
                        return read_embeddings(found, request, self.errors)
            except HttpFailure as error:
                raise _unavailable(error, self.name) from None
            if not (asked_for_base64 and refuses_base64(failure)):
                raise failure
            self._takes_base64 = False

    async def check(self) -> Health:
        """Ask for the models, and remember them.

        A public server, and one that refused, is not asked at each call: what it said last counts.
        """
        if trio.current_time() >= self._ask_again:
            self._health = await self._ask()
        return self._health

    async def _ask(self) -> Health:
        self._ask_again = -math.inf if self._private else trio.current_time() + LAST_RETRY
        with trio.move_on_after(CHECK_TIME):
            try:
                async with self._client.request("GET", "/models") as reply:
                    if reply.status != 200:
                        return self._unwell(reply.status, self.errors.read(await _explain(reply)))
                    self._learn(await _read(reply, MAX_MODEL_LIST))
            except HttpFailure as error:
                reason = self.errors.redact(str(error))
                hint = f"start the server at {self._where}, or correct base_url"
                return Health(state="unavailable", reason=reason, hint=hint)
            if not self._private:
                self._ask_again = trio.current_time() + PUBLIC_REFRESH
            return Health()
        return Health(
            state="unavailable",
            reason=f"{self._where} did not list its models within 2 s",
            hint="look at the server: it is overloaded, or hangs",
        )

    async def run(self) -> None:
        """Ask for the models now and then, until cancelled."""
        delay = FIRST_RETRY
        try:
            while True:
                if (await self.check()).state == "ready":
                    delay = FIRST_RETRY
                    await trio.sleep(REFRESH)
                else:
                    await trio.sleep(delay)
                    delay = min(2 * delay, LAST_RETRY)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1.0):
                await self.aclose()

    async def aclose(self) -> None:
        """Close the idle connections."""
        await self._client.aclose()

    # What a call asks of its provider.

    @property
    def continues(self) -> bool:
        return self._settings.continuation != "none"

    def send(self, request: GenerateRequest) -> AbstractAsyncContextManager[HttpReply]:
        body = encode_request(request, self._quirks, self._settings.continuation)
        return self._client.request("POST", "/chat/completions", body)

    async def failure(self, reply: HttpReply) -> GenerateError | None:
        """What a reply says of a failure; None if it holds an answer."""
        if reply.status == 200:
            kind = reply.headers.get("content-type", "")
            if not kind.startswith("text/html"):
                return None
            hint = "is base_url right? it usually ends in /v1"
            return ProviderUnavailable(f"{self.name} answered with a web page ({hint})")
        said = self.errors.read(await _explain(reply))
        return self.errors.reply(reply.status, reply.headers, said, time.time())

    def learn(self, failure: GenerateError) -> bool:
        """Can the request be sent again without what the server refused?"""
        return type(failure) is RequestRejected and self._quirks.learn(failure.message)

    def _unwell(self, status: int, said: ServerError) -> Health:
        reason = f"{self._where} answered {status}" + (f": {said.message}" if said.message else "")
        if status != 503:
            self._ask_again = trio.current_time() + LAST_RETRY
        if status in (401, 403):
            hint = "check the key: `api_key_env` names the variable that holds it"
            return Health(state="unavailable", reason=reason, hint=hint)
        if status == 503:
            return Health(state="starting", reason=reason, hint="wait: it may be loading a model")
        if status == 404 and (self._settings.models or self._settings.embedding_models):
            return Health()  # It lists no models, and need not: they are configured.
        hint = "is base_url right? it usually ends in /v1"
        return Health(state="unavailable", reason=reason, hint=hint)

    def _learn(self, body: bytes) -> None:
        """Take over a list of models. Raises `BrokenReply`."""
        try:
            listed = read_models(body)
        except ValueError as error:
            raise BrokenReply(str(error)) from None
        models = self._settings.models or tuple(listed)
        wanted = dict.fromkeys((*models, *self._settings.embedding_models))
        self._offers = tuple(self._offer(listed.get(m) or ListedModel(id=m)) for m in wanted)

    def _offer(self, model: ListedModel) -> ModelOffer:
        embeds = model.embeds or model.id in self._settings.embedding_models
        return ModelOffer(
            id=model.id,
            tasks=("embed",) if embeds else ("generate",),
            context_length=model.context,
            modalities=model.modalities or self._settings.modalities,
            tools=self._settings.tools and not embeds,
            can_continue=self.continues and not embeds,
            egress=self._egress,
            loaded=model.loaded,
        )


class _Call:
    """One request: entered when the server has accepted it, left when nobody wants more of it."""

    __slots__ = ("_chunks", "_context", "_provider", "_request")

    def __init__(self, provider: OpenAICompatible, request: GenerateRequest) -> None:
        self._provider = provider
        self._request = request

    async def __aenter__(self) -> Answering:
        provider, request = self._provider, self._request
        if request.prefix and not provider.continues:
            raise ProviderUnavailable(f"{provider.name} cannot continue an answer")
        reply = await self._accepted()
        self._chunks = _Chunks(reply, AnswerDecoder(provider.errors), request)
        return Answering(Origin(provider=provider.name, model=request.model), self._chunks)

    async def _accepted(self) -> HttpReply:
        """Send the request, again if the server refuses a field that it can do without."""
        while True:
            context = self._context = self._provider.send(self._request)
            try:
                reply = await context.__aenter__()
            except HttpFailure as error:
                raise _unavailable(error, self._provider.name) from None
            try:
                failure = await self._provider.failure(reply)
            except BaseException:
                await context.__aexit__(*sys.exc_info())
                raise
            if failure is None:
                return reply
            await context.__aexit__(None, None, None)
            if not self._provider.learn(failure):
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

    def __init__(self, reply: HttpReply, decoder: AnswerDecoder, request: GenerateRequest) -> None:
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
        """For a server that counts nothing: a token is a piece of a stream, or 4 characters."""
        decoder = self._decoder
        prompt = sum(len(message.text) for message in self._request.messages)
        return Usage(
            prompt_tokens=prompt // 4,
            completion_tokens=decoder.pieces if decoder.streamed else len(decoder.text) // 4,
            exact=False,
        )

    async def finish(self) -> None:
        """Let the server end its reply, so that the connection can be used again."""
        if self._decoder.finished:
            await self._reply.finish()


def _unavailable(error: HttpFailure, name: str) -> ProviderUnavailable:
    """No reply, in the words of the vocabulary."""
    kind = DeadlineExceeded if isinstance(error, TimedOut) else ProviderUnavailable
    return kind(f"{name}: {error}")


async def _explain(reply: HttpReply) -> bytes:
    """The body of an error, or as much of it as comes soon."""
    body = bytearray()
    with trio.move_on_after(ERROR_BODY_TIME):
        try:
            while len(body) < MAX_ERROR_BODY and (piece := await reply.receive()):
                body += piece
        except HttpFailure:
            pass  # The status says the most of it.
    return bytes(body[:MAX_ERROR_BODY])


async def _read(reply: HttpReply, limit: int) -> bytes:
    body = bytearray()
    while piece := await reply.receive():
        body += piece
        if len(body) > limit:
            raise BrokenReply(f"the reply is longer than {limit} bytes")
    return bytes(body)
