"""The chunks of an answer of a vendor's program, up to a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, Self

import msgspec
import trio

from .base import Chunk, DeadlineExceeded, GenerateError, StreamInterrupted, Usage
from .stop_strings import StopScanner


class UntilStop:
    """Takes chunks as they come, and has those `ready` that are to be given."""

    __slots__ = ("_scanner", "_usage", "over", "ready")

    def __init__(self, stop: Sequence[str], usage: Callable[[], Usage]) -> None:
        """`usage` estimates the tokens, where nobody counted them."""
        self._scanner = StopScanner(stop)
        self._usage = usage
        self.ready: deque[Chunk] = deque()
        #: The last one is among those that are ready.
        self.over = False

    def take(self, chunk: Chunk) -> None:
        """Take the next one; what comes after a stop string is dropped."""
        if self.over:
            return
        if not chunk.text and chunk.finish_reason is None:
            self.ready.append(chunk)
            return
        text = self._scanner.feed(chunk.text)
        if chunk.finish_reason is not None:
            text += self._scanner.flush()
        if text:
            self.ready.append(Chunk(text=text))
        if self._scanner.found:
            chunk = Chunk(finish_reason="stop")
        if chunk.finish_reason is not None:
            self.over = True
            usage = chunk.usage or self._usage()
            self.ready.append(msgspec.structs.replace(chunk, text="", usage=usage))


class TurnDecoder(Protocol):
    """Understands what a program that is kept tells of one turn."""

    failure: GenerateError | None

    def take(self) -> list[Chunk]: ...

    def broken(self, reason: str) -> GenerateError: ...


class TurnChunks:
    """The chunks of a turn of a program that is kept."""

    __slots__ = ("_decoder", "_limit", "_news", "_until")

    def __init__(
        self,
        decoder: TurnDecoder,
        news: Callable[[], Awaitable[None]],
        until: UntilStop,
        limit: float,
    ) -> None:
        """`news` waits until there is more to take, or it has ended; `limit` is the longest silence
        (s)."""
        self._decoder = decoder
        self._news = news
        self._until = until
        self._limit = limit

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        until, decoder = self._until, self._decoder
        while not until.ready:
            if until.over:
                raise StopAsyncIteration
            for chunk in decoder.take():
                until.take(chunk)
            if not until.ready and not until.over:
                if decoder.failure is not None:
                    raise decoder.failure
                await self._wait(decoder)
        return until.ready.popleft()

    async def _wait(self, decoder: TurnDecoder) -> None:
        with trio.move_on_after(self._limit):
            await self._news()
            return
        failure = decoder.broken(f"silent for {self._limit:g} s")
        if isinstance(failure, StreamInterrupted):
            raise failure
        raise DeadlineExceeded(failure.message)
