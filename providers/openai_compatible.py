"""Any server of the OpenAI dialect: vLLM, SGLang, llama.cpp, Ollama, LM Studio, OpenRouter.

The server is always asked for a stream, also for a caller who wants the whole: so a caller who
leaves stops the work at once, and a cut answer is noticed by its missing end.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

import msgspec
import trio

from .base import (
    Embedding,
    EmbedRequest,
    GenerateError,
    GenerateRequest,
    Health,
    ModelOffer,
    ProviderUnavailable,
    RequestRejected,
)
from .http_answer import HttpAnswer, post
from .http_client import open_client
from .http_reply import HttpReply
from .model_list import ModelList
from .openai_chat import Continuation, Quirks, encode_request
from .openai_embeddings import encode_embed, longest_reply, read_embeddings, refuses_base64
from .openai_errors import ErrorReader
from .openai_models import ListedModel, read_models
from .openai_stream import AnswerDecoder
from .options import Seconds, checked_base_url, checked_key
from .server_tokens import ServerTokens
from .tokens import TokenCount, estimate


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
        address = checked_base_url(settings.base_url)
        headers = dict(settings.headers)
        if settings.api_key:
            headers["authorization"] = f"Bearer {checked_key(settings.api_key)}"
        self._client = open_client(
            settings.base_url,
            headers,
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.read_timeout,
        )
        self._tokens = ServerTokens(settings.base_url, headers) if address.private else None
        secrets = [*settings.headers.values(), settings.api_key or ""]
        self.errors = ErrorReader(settings.name, secrets)
        self._quirks = Quirks()
        self._egress = not address.private if settings.egress is None else settings.egress
        #: Until it refuses vectors in base64.
        self._takes_base64 = True
        configured = dict.fromkeys((*settings.models, *settings.embedding_models))
        self._offers = tuple(self._offer(ListedModel(id=id_)) for id_ in configured)
        self._list = ModelList(
            self._client,
            self.errors,
            settings.base_url,
            "/models",
            self._learn,
            configured=bool(configured),
        )

    @property
    def name(self) -> str:
        return self._settings.name

    def models(self) -> Sequence[ModelOffer]:
        """The configured models, or those the server listed last, also while it is down: who asks
        for one then learns that the server is down, and not that there is no such model."""
        return self._offers

    def open(self, request: GenerateRequest) -> HttpAnswer:
        return HttpAnswer(self, request)

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        while True:
            asked_for_base64 = self._takes_base64
            body = encode_embed(request, base64_vectors=asked_for_base64)
            try:
                limit = longest_reply(request)
                found = await post(self._client, "/embeddings", body, limit, self.errors)
            except RequestRejected as failure:
                if not (asked_for_base64 and refuses_base64(failure)):
                    raise
                self._takes_base64 = False
            else:
                return read_embeddings(found, request, self.errors)

    async def check(self) -> Health:
        return await self._list.check()

    async def count_tokens(self, request: GenerateRequest) -> TokenCount:
        """As the server counts them, where it is one of this network that can."""
        return await self._tokens.count(request) if self._tokens else estimate(request)

    async def run(self) -> None:
        """Ask for the models now and then, until cancelled."""
        try:
            await self._list.run()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1.0):
                await self.aclose()

    async def aclose(self) -> None:
        """Close the idle connections."""
        if self._tokens is not None:
            await self._tokens.aclose()
        await self._client.aclose()

    # What a call asks of its provider.

    def send(self, request: GenerateRequest) -> AbstractAsyncContextManager[HttpReply]:
        if request.prefix and not self._continues:
            raise ProviderUnavailable(f"{self.name} cannot continue an answer")
        body = encode_request(request, self._quirks, self._settings.continuation)
        return self._client.request("POST", "/chat/completions", body)

    def learn(self, request: GenerateRequest, failure: GenerateError) -> bool:
        return type(failure) is RequestRejected and self._quirks.learn(failure.message)

    def decoder(self, request: GenerateRequest) -> AnswerDecoder:
        return AnswerDecoder(self.errors)

    # Its models.

    @property
    def _continues(self) -> bool:
        return self._settings.continuation != "none"

    def _learn(self, body: bytes) -> None:
        """Take over a list of models. Raises `ValueError`."""
        listed = read_models(body)
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
            can_continue=self._continues and not embeds,
            egress=self._egress,
            loaded=model.loaded,
        )
