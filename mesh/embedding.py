"""Embeddings carried as answers: so one way of asking a candidate, with its deadlines, its breaker
and its measures, serves both. An answer to an `EmbedRequest` is one chunk that holds all vectors.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import msgspec
import trio

from ..providers.base import (
    FLOAT_SIZE,
    Answering,
    Asked,
    Chunk,
    Embedding,
    EmbedRequest,
    Origin,
    Provider,
    ProviderUnavailable,
    Ready,
    Usage,
    total_usage,
    vector_fault,
)

#: Bytes of vectors that one chunk is filled with on the wire.
MAX_PIECE = 1024 * 1024
#: Vectors that are looked at before others have their turn: those take about a millisecond.
CHECKED_AT_ONCE = 64


def answer_of(provider: Provider, request: Asked) -> AbstractAsyncContextManager[Answering]:
    """What a provider gives: its answer, or its embeddings as one."""
    if isinstance(request, EmbedRequest):
        return _embedding(provider, request)
    return provider.open(request)


@asynccontextmanager
async def _embedding(provider: Provider, request: EmbedRequest) -> AsyncIterator[Answering]:
    found = await provider.embed(request)
    yield Answering(Origin(provider=provider.name, model=request.model), Ready([closing(found)]))


def closing(embeddings: Sequence[Embedding], usage: Usage | None = None) -> Chunk:
    """The embeddings as the one chunk of an answer."""
    return Chunk(
        embeddings=tuple(embeddings),
        finish_reason="stop",
        usage=usage or total_usage(e.usage for e in embeddings),
        cid=embeddings[0].cid if len(embeddings) == 1 else None,
    )


async def whole(chunks: AsyncIterator[Chunk], request: EmbedRequest) -> AsyncGenerator[Chunk, None]:
    """The same answer as one chunk, once all of it is here and fits the request.

    So a backend whose embeddings are no good has failed before its answer began, and another is
    asked. Raises `ProviderUnavailable`, and what the chunks raise.
    """
    found: list[Embedding] = []
    async for chunk in chunks:
        found += chunk.embeddings
        if len(found) > len(request.inputs):
            break
        if chunk.finish_reason is not None:
            await _check(found, request)
            yield closing(found, chunk.usage)
            return
    if len(found) > len(request.inputs):
        raise _unfit(f"more than the {len(request.inputs)} embeddings asked for")


async def _check(found: Sequence[Embedding], request: EmbedRequest) -> None:
    if len(found) != len(request.inputs):
        raise _unfit(f"{len(found)} embeddings for {len(request.inputs)} inputs")
    sizes = {len(embedding.vector) for embedding in found}
    if len(sizes) > 1:
        raise _unfit("vectors of different lengths")
    for number, embedding in enumerate(found):
        if number % CHECKED_AT_ONCE == 0:
            await trio.lowlevel.checkpoint()
        if fault := vector_fault(embedding.vector):
            raise _unfit(fault)
    numbers = sizes.pop() // FLOAT_SIZE
    if request.dimensions not in (None, numbers):
        raise _unfit(f"vectors of {numbers} numbers, and {request.dimensions} were asked for")


def _unfit(what: str) -> ProviderUnavailable:
    return ProviderUnavailable(f"it gave {what}")


def pieces(chunk: Chunk, most: int = MAX_PIECE) -> list[Chunk]:
    """Chunks that fit into frames, the last one of them closing: the same answer for the wire."""
    parts: list[Chunk] = []
    group: list[Embedding] = []
    size = 0
    for embedding in chunk.embeddings:
        if group and size + len(embedding.vector) > most:
            parts.append(Chunk(embeddings=tuple(group)))
            group, size = [], 0
        group.append(embedding)
        size += len(embedding.vector)
    parts.append(msgspec.structs.replace(chunk, embeddings=tuple(group)))
    return parts
