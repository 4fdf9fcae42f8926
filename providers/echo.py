"""A provider without a model: it answers with the last user message, word by word.

For tests and first tries. What it does wrong, it does on demand: by its settings, or for one
request by a directive anywhere in the last user message, which is not part of the answer::

    tell me [[echo first_s=0.5 gap_s=0.01 n=20 fail=unavailable after=3 retry_after=2]]

- `first_s`, `gap_s`: seconds before the first word, and between two words.
- `n`: answer with that many words, repeating the message as often as needed.
- `fail`: fail with `unavailable`, `rejected`, `context`, `filtered`, `model`, `deadline` or
  `interrupted`; before the first word, or after the number of words that `after` says. `after`
  without `fail` means `interrupted`. `retry_after`: seconds, told with the failure.
- `hang`: say nothing more, before the first word or after that many.

Its `embedding_models` make vectors without a model too: each word of a text counts up or down one
of the `dimensions` numbers (64 where the request does not say), both by a hash of the word, and the
vector is scaled to length 1. So the same text has the same vector on every machine, and texts that
share words are near each other. `first_s`, `fail` and `hang` work there as well.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Sequence
from types import TracebackType
from typing import Annotated, Literal, Self

import msgspec
import trio

from .base import (
    Answering,
    Chunk,
    ContentFiltered,
    ContextTooLong,
    DeadlineExceeded,
    Embedding,
    EmbedRequest,
    FinishReason,
    GenerateError,
    GenerateRequest,
    Health,
    Input,
    ModelNotFound,
    ModelOffer,
    Origin,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
    Usage,
)

Fail = Literal[
    "", "unavailable", "rejected", "context", "filtered", "model", "deadline", "interrupted"
]
_FAILURES: dict[str, type[GenerateError]] = {
    "unavailable": ProviderUnavailable,
    "rejected": RequestRejected,
    "context": ContextTooLong,
    "filtered": ContentFiltered,
    "model": ModelNotFound,
    "deadline": DeadlineExceeded,
    "interrupted": StreamInterrupted,
}
#: Words of an answer, so that a directive costs no unbounded memory.
MAX_WORDS = 100_000
#: Numbers of a vector, where the request does not say.
DIMENSIONS = 64

_DIRECTIVE = re.compile(r"\s?\[\[echo\b([^\[\]]*)\]\]")
#: A word with the space around it: joined, they are the text again.
_WORD = re.compile(r"\s*\S+|\s+")

Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400)]
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_WORDS)]


class Behaviour(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How it answers. See the module."""

    first_s: Seconds = 0.0
    gap_s: Seconds = 0.0
    n: Count | None = None
    fail: Fail = ""
    after: Count | None = None
    retry_after: Seconds | None = None
    hang: bool = False


class EchoSettings(Behaviour, frozen=True, kw_only=True):
    """The behaviour of every request, and what it offers."""

    name: str = "echo"
    models: tuple[str, ...] = ("echo",)
    #: Models that make vectors.
    embedding_models: tuple[str, ...] = ()
    #: In words; a longer prompt, with the `max_tokens` of its answer, is refused.
    context_length: Annotated[int, msgspec.Meta(ge=1)] | None = None


class EchoStats(msgspec.Struct, frozen=True, kw_only=True):
    """What it has done. Each request is started, and ends as one of the next three."""

    started: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    running: int = 0
    tokens: int = 0


class Echo:
    """A `Provider`. See the module."""

    def __init__(self, settings: EchoSettings | None = None) -> None:
        self._settings = settings or EchoSettings()
        self._counts = dict.fromkeys(EchoStats.__struct_fields__, 0)
        self._offers = tuple(
            ModelOffer(
                id=model,
                context_length=self._settings.context_length,
                can_continue=True,
                counts_begun=True,
                engine="echo",
                repeatable=True,
            )
            for model in self._settings.models
        ) + tuple(
            ModelOffer(id=model, tasks=("embed",), engine="echo", repeatable=True)
            for model in self._settings.embedding_models
        )

    @property
    def name(self) -> str:
        return self._settings.name

    def models(self) -> Sequence[ModelOffer]:
        return self._offers

    async def check(self) -> Health:
        return Health()

    def stats(self) -> EchoStats:
        """The counters."""
        return EchoStats(**self._counts)

    def count(self, counter: str, change: int = 1) -> None:
        self._counts[counter] += change

    def open(self, request: GenerateRequest) -> _Call:
        return _Call(self, self._settings, request)

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        await trio.lowlevel.checkpoint()
        if request.model not in self._settings.embedding_models:
            raise _no_model(self.name, request.model)
        self.count("started")
        self.count("running")
        ended = "cancelled"
        try:
            found = await self._embed(request)
            ended = "finished"
            return found
        except GenerateError:
            ended = "failed"
            raise
        finally:
            self.count("running", -1)
            self.count(ended)

    async def _embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        wanted: Behaviour = self._settings
        found = []
        for given in request.inputs:
            if isinstance(given, str):
                given, told = read_directive(given, self._settings)
                wanted = wanted if told is self._settings else told
            found.append(_embedding(given, request.dimensions or DIMENSIONS))
        await trio.sleep(wanted.first_s)
        await _misbehave(self.name, wanted, "")
        return found


def words(text: str) -> list[str]:
    """The tokens of a text: its words, each with its space, so that joined they are the text."""
    return _WORD.findall(text)


def read_directive(text: str, settings: EchoSettings) -> tuple[str, Behaviour]:
    """The text without its directive, and what it makes of the settings.

    Raises `RequestRejected` for a directive that says something else than the module's list.
    """
    found = _DIRECTIVE.search(text)
    if found is None:
        return text, settings
    fields = {name: getattr(settings, name) for name in Behaviour.__struct_fields__}
    for word in found[1].split():
        name, _, value = word.partition("=")
        fields[name] = value or True
    try:
        # Not strict: the values are text.
        wanted = msgspec.convert(fields, Behaviour, strict=False)
    except msgspec.ValidationError as error:
        raise RequestRejected(f"[[echo ...]]: {error}", field="messages") from None
    return text[: found.start()] + text[found.end() :], wanted


class _Call:
    """One request, and the iterator of its chunks."""

    def __init__(self, echo: Echo, settings: EchoSettings, request: GenerateRequest) -> None:
        self._echo = echo
        self._settings = settings
        self._request = request
        self._ended: Literal["finished", "failed", "cancelled"] = "cancelled"
        self._given = 0
        self._done = False

    async def __aenter__(self) -> Answering:
        await trio.lowlevel.checkpoint()
        self._prepare()
        self._echo.count("started")
        self._echo.count("running")
        return Answering(Origin(provider=self._echo.name, model=self._request.model), self)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._echo.count("running", -1)
        self._echo.count(self._ended)

    def _prepare(self) -> None:
        """Work out the whole answer. Raises `RequestRejected`."""
        request, settings = self._request, self._settings
        if request.model not in settings.models:
            raise _no_model(settings.name, request.model)
        last = next((m.text for m in reversed(request.messages) if m.role == "user"), "")
        text, self._behaviour = read_directive(last, settings)
        self._prompt = sum(len(words(message.text)) for message in request.messages)
        limit = request.sampling.max_tokens
        if settings.context_length and self._prompt + (limit or 0) > settings.context_length:
            raise ContextTooLong(
                f"{self._prompt} words and an answer of {limit or 0} do not fit into "
                f"{settings.context_length}"
            )
        text = _repeated(text, self._behaviour.n)
        old = len(request.prefix) - min(request.begun, len(request.prefix))
        before, begun = request.prefix[:old], request.prefix[old:]
        text = text.removeprefix(before)
        text = text if text.startswith(begun) else begun + text
        self._reason: FinishReason = "stop"
        answer = words(_stopped(text, request.sampling.stop))
        if limit is not None and len(answer) > limit:
            answer = answer[:limit]
            self._reason = "length"
        self._words = words("".join(answer)[len(begun) :])
        #: Words of the answer that were there before.
        self._counted = len(answer) - len(self._words)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        if self._done:
            raise StopAsyncIteration
        wanted = self._behaviour
        await trio.sleep(wanted.gap_s if self._given else wanted.first_s)
        if self._given == (wanted.after or 0):
            try:
                await _misbehave(self._echo.name, wanted, "".join(self._words[: self._given]))
            except GenerateError:
                self._done, self._ended = True, "failed"
                raise
        if self._given == len(self._words):
            self._done = True
            self._ended = "finished"
            return Chunk(finish_reason=self._reason, usage=self._usage())
        word = self._words[self._given]
        self._given += 1
        self._echo.count("tokens")
        return Chunk(text=word)

    def _usage(self) -> Usage:
        return Usage(prompt_tokens=self._prompt, completion_tokens=self._counted + self._given)


def _no_model(name: str, model: str) -> ModelNotFound:
    return ModelNotFound(f"{name} has no model {model!r}", field="model")


async def _misbehave(name: str, wanted: Behaviour, partial: str) -> None:
    """Hang or fail, if that is wanted here."""
    if wanted.hang:
        await trio.sleep_forever()
    fail = wanted.fail or ("interrupted" if wanted.after is not None else "")
    if fail:
        raise _FAILURES[fail](
            f"{name} was told to fail", retry_after=wanted.retry_after, partial=partial
        )


def _embedding(given: Input, dimensions: int) -> Embedding:
    """The vector of a text, or of tokens as if each were a word."""
    tokens = words(given) if isinstance(given, str) else list(map(str, given))
    counts = [0] * dimensions
    for token in tokens or [""]:
        number = int.from_bytes(hashlib.sha256(_spelling(token)).digest()[:8])
        counts[(number >> 1) % dimensions] += 1 if number & 1 else -1
    length = math.sqrt(sum(n * n for n in counts)) or 1.0
    vector = struct.pack(f"<{dimensions}f", *(n / length for n in counts))
    return Embedding(vector=vector, usage=Usage(prompt_tokens=len(tokens)))


def _spelling(token: str) -> bytes:
    return token.strip().lower().encode("utf-8", "surrogatepass")


def _repeated(text: str, n: int | None) -> str:
    """A text of `n` words, from that one as often as needed."""
    if n is None:
        return text
    found = text.split() or ["echo"]
    return " ".join(found[i % len(found)] for i in range(n))


def _stopped(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    places = [text.find(s) for s in stop if s]
    return text[: min((p for p in places if p >= 0), default=len(text))]
