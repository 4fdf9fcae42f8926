"""One answer of a worker, as the node waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trio

from .base import (
    ERRORS,
    Chunk,
    Embedding,
    GenerateError,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
    ToolCallDelta,
    Usage,
)
from .hf_frames import Begun, Counted, Failed, Finished, Piece, Vectors

#: What a worker tells of one request.
Told = Begun | Piece | Vectors | Finished | Failed | Counted


class CountCall:
    """The number of a prompt's tokens, as the node waits for it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._tokens = 0
        self._over = trio.Event()
        self._error: GenerateError | None = None

    def take(self, event: Told) -> None:
        """An event about this request."""
        match event:
            case Counted(tokens=tokens):
                self._tokens = tokens
                self._over.set()
            case Failed():
                self.fail(failure_of(event))

    def fail(self, error: GenerateError) -> None:
        """It will not be counted."""
        self._error = error
        self._over.set()

    async def tokens(self) -> int:
        """How many. Raises the worker's `GenerateError`."""
        await self._over.wait()
        if self._error is not None:
            raise self._error
        return self._tokens


class EmbedCall:
    """The embeddings of one request, as the node waits for them."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._found: dict[int, Embedding] = {}
        self._over = trio.Event()
        self._error: GenerateError | None = None

    def take(self, event: Told) -> None:
        """An event about this request."""
        match event:
            case Vectors():
                self._found.update(zip(event.places, event.embeddings, strict=True))
            case Failed():
                self.fail(failure_of(event))
            case Finished():
                self._over.set()

    def fail(self, error: GenerateError) -> None:
        """There will be no more of them."""
        self._error = error
        self._over.set()

    async def embeddings(self) -> Sequence[Embedding]:
        """All of them, in the order of the inputs. Raises the worker's `GenerateError`."""
        await self._over.wait()
        if self._error is not None:
            raise self._error
        return [self._found[place] for place in sorted(self._found)]


def failure_of(event: Failed) -> GenerateError:
    """What a worker says of a failure."""
    kind = ERRORS.get(event.code, ProviderUnavailable)
    return kind(event.message, field=event.field, retry_after=event.retry_after)


class Call:
    """The chunks of one answer: an async iterator.

    Pieces that came while nobody read are given as one chunk. What waits here is at most the answer
    itself, which has a limit: the batch does not stop for one slow reader.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._begun = False
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._tool_calls: list[ToolCallDelta] = []
        self._produced: list[str] = []
        self._finished: Finished | None = None
        self._error: GenerateError | None = None
        self._over = False
        self._changed = trio.Event()

    # --- what comes -----------------------------------------------------------------------------

    def take(self, event: Told) -> None:
        """An event about this answer."""
        match event:
            case Begun():
                self._begun = True
            case Piece():
                self._text.append(event.text)
                self._logprobs.extend(event.logprobs)
                self._tool_calls.extend(event.tool_calls)
                self._produced.append(event.text)
            case Finished():
                self._finished = event
            case Failed():
                self.fail(failure_of(event))
        self._changed.set()

    def fail(self, error: GenerateError) -> None:
        """The answer ends here. After some text that is a `StreamInterrupted` with the text."""
        partial = "".join(self._produced)
        if partial and not isinstance(error, RequestRejected):
            error = StreamInterrupted(error.message, partial=partial, retry_after=error.retry_after)
        self._error = error
        self._changed.set()

    # --- who waits ------------------------------------------------------------------------------

    async def wait_begun(self) -> None:
        """Wait until the worker has taken the request. Raises its `GenerateError`."""
        while not self._begun:
            if self._error is not None:
                raise self._error
            await self._next_change()

    async def _next_change(self) -> None:
        self._changed = trio.Event()
        await self._changed.wait()

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Chunk:
        await trio.lowlevel.checkpoint()
        while True:
            if any(self._text) or self._logprobs or self._tool_calls:
                return self._ready_chunk()
            if self._over:
                raise StopAsyncIteration
            if self._error is not None:
                self._over = True
                raise self._error
            if self._finished is not None:
                self._over = True
                return self._last_chunk(self._finished)
            await self._next_change()

    def _ready_chunk(self) -> Chunk:
        chunk = Chunk(
            text="".join(self._text),
            logprobs=tuple(self._logprobs),
            tool_calls=tuple(self._tool_calls),
        )
        for waiting in (self._text, self._logprobs, self._tool_calls):
            waiting.clear()
        return chunk

    def _last_chunk(self, finished: Finished) -> Chunk:
        return Chunk(
            finish_reason=finished.reason,
            usage=Usage(
                prompt_tokens=finished.prompt_tokens,
                completion_tokens=finished.completion_tokens,
            ),
        )
