"""Anthropic's Messages API over HTTP, also of a gateway that speaks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any

import msgspec

from .anthropic_messages import (
    Quirks,
    blank_stops,
    encode_count,
    encode_request,
    read_claude_options,
    takes_prefix,
)
from .anthropic_stream import MessageDecoder
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
from .claude_settings import KEY, NO_KEY, ClaudeSettings
from .http_answer import HttpAnswer, post
from .http_client import open_client
from .http_reply import HttpReply
from .model_list import ModelList
from .openai_errors import ErrorReader
from .tokens import TokenCount

#: Of the API, which has had no other one since.
VERSION = "2023-06-01"
MAX_MODELS = 1000
#: Bytes of a reply that counts.
MAX_COUNT = 4096
_KEY_HINT = f"check the key, in {KEY} or where `api_key_env` says"


class _Listed(msgspec.Struct):
    """A model of the list. The older of the lists say no more than its id."""

    id: str
    max_input_tokens: int | None = None
    max_tokens: int | None = None
    capabilities: dict[str, Any] | None = None

    def can(self, what: str) -> bool | None:
        """None: the list does not say."""
        told = (self.capabilities or {}).get(what)
        supported = told.get("supported") if isinstance(told, dict) else None
        return supported if isinstance(supported, bool) else None


class _List(msgspec.Struct):
    data: list[_Listed]


class _Count(msgspec.Struct):
    input_tokens: Annotated[int, msgspec.Meta(ge=0)]


class AnthropicHttp:
    """A `Provider`. `run` keeps its list of models fresh, and closes its connections at the end."""

    #: Requests at once, where the configuration says nothing: no process here bears them.
    slots = 16

    def __init__(self, settings: ClaudeSettings) -> None:
        """Raises `ValueError` that names the wrong setting; connects to nothing."""
        self._settings = settings
        headers, base_url = _headers(settings), settings.url
        secrets = [*settings.headers.values(), settings.key, settings.token]
        self.errors = ErrorReader(
            settings.name, secrets, base_url="it ends before /v1", key=_KEY_HINT
        )
        self._client = open_client(
            base_url,
            headers,
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.read_timeout,
        )
        self._quirks = Quirks()
        self._limits: dict[str, int] = {}
        self._offers = tuple(self._offer(_Listed(id=model)) for model in settings.models)
        self._list = ModelList(
            self._client,
            self.errors,
            base_url,
            f"/v1/models?limit={MAX_MODELS}",
            self._learn,
            configured=bool(settings.models),
        )

    @property
    def name(self) -> str:
        return self._settings.name

    def models(self) -> Sequence[ModelOffer]:
        """The configured models, or those the server listed last, also while it is down."""
        return self._offers

    def open(self, request: GenerateRequest) -> HttpAnswer:
        return HttpAnswer(self, request)

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        raise ProviderUnavailable(f"{self.name} makes no embeddings")

    async def count_tokens(self, request: GenerateRequest) -> TokenCount:
        """What Anthropic says, which costs nothing. Raises a `GenerateError`."""
        path, body = "/v1/messages/count_tokens", encode_count(request)
        told = await post(self._client, path, body, MAX_COUNT, self.errors)
        try:
            return TokenCount(msgspec.json.decode(told, type=_Count).input_tokens, exact=True)
        except ValueError as error:
            raise ProviderUnavailable(f"{self.name}: its count cannot be read: {error}") from None

    async def check(self) -> Health:
        """Ask for the models, which costs nothing, and remember them."""
        return await self._list.check()

    async def run(self) -> None:
        """Ask for the models now and then, until cancelled."""
        await self._list.run()

    async def aclose(self) -> None:
        """Close the idle connections."""
        await self._client.aclose()

    # What a call asks of its provider.

    def send(self, request: GenerateRequest) -> AbstractAsyncContextManager[HttpReply]:
        options = read_claude_options(request, self._settings.options)
        usual = self._settings.max_tokens
        most = min(usual, self._limits.get(request.model, usual))
        body = encode_request(request, options, self._quirks, most)
        return self._client.request("POST", "/v1/messages", body)

    def learn(self, request: GenerateRequest, failure: GenerateError) -> bool:
        rejected = type(failure) is RequestRejected
        return rejected and self._quirks.learn(request.model, failure.message)

    def decoder(self, request: GenerateRequest) -> MessageDecoder:
        return MessageDecoder(self.errors, request.prefix, blank_stops(request))

    # Its models.

    def _learn(self, body: bytes) -> None:
        """Take over a list of models. Raises `ValueError`."""
        try:
            found = msgspec.json.decode(body, type=_List).data[:MAX_MODELS]
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the list of models cannot be read: {error}") from None
        listed = {model.id: model for model in found if model.id}
        wanted = dict.fromkeys(self._settings.models or listed)
        models = [listed.get(model) or _Listed(id=model) for model in wanted]
        self._limits = {m.id: m.max_tokens for m in models if m.max_tokens and m.max_tokens > 0}
        self._offers = tuple(map(self._offer, models))

    def _offer(self, model: _Listed) -> ModelOffer:
        context = model.max_input_tokens
        return ModelOffer(
            id=model.id,
            context_length=context if context and context > 0 else None,
            modalities=("text",) if model.can("image_input") is False else ("text", "image"),
            tools=True,
            can_continue=takes_prefix(model.id) and self._settings.options.thinking is None,
            egress=True,  # also by a proxy on this machine
        )


def _headers(settings: ClaudeSettings) -> Mapping[str, str]:
    """Raises `ValueError` without a key in it."""
    if settings.key:
        proof = {"x-api-key": settings.key}
    elif settings.token:
        proof = {"authorization": f"Bearer {settings.token}"}
    else:
        raise ValueError(NO_KEY)
    return {"anthropic-version": VERSION, **settings.headers, **proof}
