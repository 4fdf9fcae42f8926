"""Stored answers as answers, and what computing one costs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from ..cache.answer_rows import StoredAnswer
from ..providers.base import Answering, Chunk, Completion, Origin, Price, Ready, Usage


class Replayed(Answering):
    """A stored answer, whole or as a stream, at full speed."""

    __slots__ = ("_completion", "stored")

    def __init__(self, origin: Origin, stored: StoredAnswer) -> None:
        usage = msgspec.structs.replace(stored.completion.usage, cached=True)
        self.stored = stored
        self._completion = msgspec.structs.replace(stored.completion, usage=usage)
        super().__init__(origin, Ready(self._stream()))

    async def whole(self) -> tuple[Completion, Chunk]:
        return self._completion, self._closing()

    def _closing(self) -> Chunk:
        completion = self._completion
        return Chunk(
            finish_reason=completion.finish_reason,
            usage=completion.usage,
            cid=self.stored.cid_text,
        )

    def _stream(self) -> Iterator[Chunk]:
        for chunk in self._completion.chunks():
            yield chunk if chunk.finish_reason is None else self._closing()


def cost(price: Price | None, usage: Usage) -> float | None:
    """US dollars; None where the price is not known, or is none that a peer may say."""
    if price is None:
        return None
    cost = (
        usage.prompt_tokens * price.prompt + usage.completion_tokens * price.completion
    ) / 1_000_000
    return cost if 0 <= cost < math.inf else None
