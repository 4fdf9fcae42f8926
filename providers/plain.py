"""A plain class with `generate(prompt, *, model_name=None, **kwargs) -> str`, as a `Provider`.

It blocks, so it runs in threads. One that has also `stream`, called in the same way, which gives
the pieces of its text one by one, is streamed. Python cannot end a thread: an answer that nobody
waits for any more runs on to its end (of a streamed one: to its next piece), and keeps its place
among the `MAX_THREADS`.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio

from .base import (
    Answering,
    Chunk,
    Embedding,
    EmbedRequest,
    GenerateError,
    GenerateRequest,
    Health,
    ModelOffer,
    Origin,
    ProviderUnavailable,
    RequestRejected,
)
from .cli_prompt import turns_text
from .tokens import estimated_usage

#: A thread cannot be cancelled; it is left to finish. (The type stubs know the older name only.)
_LEAVE_BEHIND: dict[str, Any] = {"abandon_on_cancel": True}
#: Answers of one object at once.
MAX_THREADS = 16


def is_provider(target: object) -> bool:
    """Is it a `Provider` as it is?"""
    return all(callable(getattr(target, name, None)) for name in ("open", "models", "check"))


def check_plain(target: object) -> None:
    """Raises `TypeError` for an object that cannot be adapted."""
    generate = getattr(target, "generate", None)
    if not callable(generate):
        raise TypeError(f"a {type(target).__name__} has no method generate(prompt, ...)")
    if inspect.iscoroutinefunction(generate):
        raise TypeError(
            f"{type(target).__name__}.generate is a coroutine function: it must be a plain one, "
            "which may block, as it runs in a thread"
        )


class PlainProvider:
    """A `Provider` over such an object. See the module."""

    def __init__(
        self,
        name: str,
        target: object,
        *,
        models: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
        limiter: trio.CapacityLimiter | None = None,
    ) -> None:
        """`models` are those it is asked for; without them one with its own `name`, for which it
        gets no `model_name`. `options` go along to each call. Raises `TypeError`."""
        check_plain(target)
        self.name = name
        self._target: Any = target
        self._options = dict(options or {})
        self._limiter = limiter or trio.CapacityLimiter(MAX_THREADS)
        # Nobody knows where such a class sends its prompts.
        self._offers = tuple(ModelOffer(id=model, egress=True) for model in models or (name,))

    def models(self) -> Sequence[ModelOffer]:
        return self._offers

    @asynccontextmanager
    async def open(self, request: GenerateRequest) -> AsyncIterator[Answering]:
        if request.prefix:
            raise ProviderUnavailable(f"{self.name} cannot continue an answer")
        prompt = prompt_of(request)
        ask = self._call(request)
        origin = Origin(provider=self.name, model=request.model)
        stream = getattr(self._target, "stream", None)
        if callable(stream):
            pieces = iter(await self._thread(partial(stream, prompt, **ask)))
            yield Answering(origin, self._streamed(pieces, request))
        else:
            text = await self._thread(partial(self._target.generate, prompt, **ask))
            yield Answering(origin, self._whole(text, request))

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        raise ProviderUnavailable(f"{self.name} makes no embeddings")

    async def check(self) -> Health:
        return Health()

    def _call(self, request: GenerateRequest) -> dict[str, Any]:
        sampling = request.sampling
        said = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop": list(sampling.stop) or None,
            "seed": sampling.seed,
        }
        known = {name: value for name, value in said.items() if value is not None}
        model = None if request.model == self.name else request.model
        return {"model_name": model, **known, **self._options}

    async def _thread(self, call: Callable[[], Any]) -> Any:
        """What it returns. Raises a `GenerateError`, with the object's own as its cause."""
        try:
            return await trio.to_thread.run_sync(call, limiter=self._limiter, **_LEAVE_BEHIND)
        except GenerateError:
            raise
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            # Whatever it raises: to the caller it is a failed provider.
            raise ProviderUnavailable(
                f"{self.name} failed: {type(error).__name__}: {error}"
            ) from error

    def _text(self, value: object) -> str:
        if not isinstance(value, str):
            raise ProviderUnavailable(f"{self.name} gave a {type(value).__name__} and no text")
        return value

    async def _whole(self, value: object, request: GenerateRequest) -> AsyncIterator[Chunk]:
        text = self._text(value)
        yield Chunk(text=text)
        yield Chunk(finish_reason="stop", usage=estimated_usage(request, text))

    async def _streamed(
        self, pieces: Iterator[Any], request: GenerateRequest
    ) -> AsyncIterator[Chunk]:
        texts = []
        while True:
            piece = await self._thread(partial(next, pieces, None))
            if piece is None:
                break
            texts.append(self._text(piece))
            yield Chunk(text=texts[-1])
        yield Chunk(finish_reason="stop", usage=estimated_usage(request, "".join(texts)))


def prompt_of(request: GenerateRequest) -> str:
    """A chat as one prompt: a single message as it is, several with who said them."""
    messages = request.messages
    if any(message.tool_calls for message in messages) or request.tools:
        raise RequestRejected("this provider takes plain prompts, and no tools", field="tools")
    return turns_text(messages)
