"""Gemini by HTTP, for those who have a key.

It is always asked for a stream, also for a caller who wants the whole: so a caller who leaves stops
the work at once, and a cut answer is noticed. The key travels in a header, never in a URL.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from urllib.parse import quote

from .base import (
    MAX_DIMENSIONS,
    Embedding,
    EmbedRequest,
    GenerateError,
    GenerateRequest,
    Health,
    ModelOffer,
    ProviderUnavailable,
    RequestRejected,
)
from .gemini_embed import MAX_BATCH, encode_embed, read_embeddings
from .gemini_messages import Quirks, Signatures, encode_count, encode_request, read_count
from .gemini_models import PAGE, GeminiModel, read_models
from .gemini_options import GeminiOptions
from .gemini_settings import KEYS, NO_KEY, GeminiSettings
from .gemini_stream import GeminiDecoder
from .http_answer import HttpAnswer, post
from .http_client import open_client
from .http_reply import HttpReply
from .model_list import ModelList
from .openai_errors import ErrorReader
from .options import read_options
from .tokens import TokenCount

#: Bytes of a number in a reply; of a whole reply with a count, and with `MAX_BATCH` vectors.
_NUMBER = 28
_MAX_COUNT = 64 * 1024
_MAX_EMBEDDINGS = MAX_BATCH * MAX_DIMENSIONS * _NUMBER
#: Stands first in the list: Google gives this name to its present model of that size.
DEFAULT = "gemini-flash-latest"
_BASE_URL_HINT = "it has no version at its end"
_KEY_HINT = f"check the key, in {' or '.join(KEYS)} or where `api_key_env` says"


class GeminiHttp:
    """A `Provider`. `run` keeps its list of models fresh, and closes its connections at the end."""

    #: Requests at once, where the configuration says nothing: no process here bears them.
    slots = 16

    def __init__(self, settings: GeminiSettings) -> None:
        """Raises `ValueError` that names the wrong setting; connects to nothing."""
        key = settings.key
        if not key:
            raise ValueError(NO_KEY)
        self._settings = settings
        self._client = open_client(
            settings.url,
            {"x-goog-api-key": key},
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.read_timeout,
        )
        self.errors = ErrorReader(settings.name, [key], base_url=_BASE_URL_HINT, key=_KEY_HINT)
        self._signatures = Signatures()
        self._quirks = Quirks()
        self._offers = tuple(map(_offer, map(_unlisted, settings.models)))
        self._list = ModelList(
            self._client,
            self.errors,
            settings.url,
            f"/v1beta/models?pageSize={PAGE}",
            self._learn,
            configured=bool(settings.models),
        )

    @property
    def name(self) -> str:
        return self._settings.name

    def models(self) -> Sequence[ModelOffer]:
        """The configured models, or those that Google listed last."""
        return self._offers

    def open(self, request: GenerateRequest) -> HttpAnswer:
        return HttpAnswer(self, request)

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        found: list[Embedding] = []
        for start in range(0, len(request.inputs), MAX_BATCH):
            inputs = request.inputs[start : start + MAX_BATCH]
            body = encode_embed(request, inputs)
            path = _path(request.model, "batchEmbedContents")
            told = await post(self._client, path, body, _MAX_EMBEDDINGS, self.errors)
            found += read_embeddings(told, inputs, self.errors)
        return found

    async def count_tokens(self, request: GenerateRequest) -> TokenCount:
        """As Google counts them, with what its template adds."""
        body = encode_count(self._body(request), request.model)
        path = _path(request.model, "countTokens")
        told = await post(self._client, path, body, _MAX_COUNT, self.errors)
        try:
            return TokenCount(read_count(told), True)
        except ValueError as error:
            raise ProviderUnavailable(f"{self.name} counted no tokens: {error}") from None

    async def check(self) -> Health:
        """Ask for the models, and remember them."""
        return await self._list.check()

    async def run(self) -> None:
        """Ask for the models now and then, until cancelled."""
        await self._list.run()

    async def aclose(self) -> None:
        """Close the idle connections."""
        await self._client.aclose()

    # What a call asks of its provider.

    def send(self, request: GenerateRequest) -> AbstractAsyncContextManager[HttpReply]:
        if request.prefix:
            raise ProviderUnavailable(f"{self.name} cannot continue an answer")
        path = _path(request.model, "streamGenerateContent")
        return self._client.request("POST", f"{path}?alt=sse", self._body(request))

    def _body(self, request: GenerateRequest) -> bytes:
        options = read_options(GeminiOptions, request.extra)
        return encode_request(request, options, self._signatures, self._quirks)

    def learn(self, request: GenerateRequest, failure: GenerateError) -> bool:
        refused = type(failure) is RequestRejected
        return refused and self._quirks.learn(request.model, failure.message)

    def decoder(self, request: GenerateRequest) -> GeminiDecoder:
        return GeminiDecoder(self.errors, self._signatures)

    def _learn(self, body: bytes) -> None:
        """Take over a list of models. Raises `ValueError`."""
        listed = read_models(body)
        wanted = self._settings.models or sorted(listed, key=lambda model: model != DEFAULT)
        self._offers = tuple(_offer(listed.get(m) or _unlisted(m)) for m in wanted)


def _path(model: str, method: str) -> str:
    return f"/v1beta/models/{quote(model.removeprefix('models/'), safe='')}:{method}"


def _unlisted(model: str) -> GeminiModel:
    return GeminiModel(id=model, context=None, generates=True, embeds="embedding" in model)


def _offer(model: GeminiModel) -> ModelOffer:
    return ModelOffer(
        id=model.id,
        tasks=("embed",) if model.embeds else ("generate",),
        context_length=model.context,
        modalities=("text",) if model.embeds else ("text", "image"),
        tools=not model.embeds,
        egress=True,
    )
