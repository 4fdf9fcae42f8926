"""What is kept of the answers of backends: the whole ones, each when its last chunk comes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import msgspec
import trio

from ..cache.answer_rows import StoredAnswer
from ..cache.answers import AnswerCache
from ..providers.base import (
    Answering,
    Asked,
    Chunk,
    Completion,
    CompletionBuilder,
    Embedding,
    GenerateRequest,
    Origin,
)
from .replays import cost
from .trace import Record

logger = logging.getLogger(__name__)


class Keeping:
    """Stores answers, and tells the others of those that they may have."""

    def __init__(
        self, answers: AnswerCache, announce: Callable[[bytes, Asked, StoredAnswer], None]
    ) -> None:
        self._answers = answers
        self._announce = announce

    async def keep(
        self,
        key: bytes,
        request: Asked,
        content: Completion | Embedding,
        origin: Origin,
        seconds: float,
    ) -> str | None:
        """Store a whole answer or an embedding, tell the others, and return its CID.

        None if it may not be kept: it is cut, or two engines made parts of it. `seconds`: how long
        it took to come.
        """
        shared = request.cache.scope == "mesh" and request.privacy != "local"
        if isinstance(content, Completion) and (origin.begun_by or _is_cut(content, request)):
            return None
        computed = origin.cache == "miss"  # and not a peer's stored answer
        stored = await self._answers.store(
            key,
            content,
            model=origin.model or request.model,
            weights=origin.weights,
            engine=origin.engine,
            numerics=origin.numerics,
            now=time.time(),
            age=origin.age or 0.0,
            ttl=_least(request.cache.ttl, origin.ttl),
            source=origin.peer,
            namespace=request.cache.namespace,
            shared=shared,
            seconds=seconds if computed else None,
            money=cost(origin.price, content.usage) if computed else None,
        )
        if stored is None:
            return None
        if shared:
            self._announce(key, request, stored)
        return stored.cid_text


class Recording:
    """Passes an answer on, and stores it when it is whole: its last chunk gets the CID."""

    def __init__(
        self,
        keeping: Keeping,
        key: bytes,
        request: GenerateRequest,
        answering: Answering,
        started: float,
        record: Record,
        seen_from_here: Callable[[Origin], Origin],
    ) -> None:
        self._keeping = keeping
        self._key = key
        self._request = request
        self._answering = answering
        self._started = started
        self._record = record
        self._seen_from_here = seen_from_here
        self._chunks = aiter(answering.chunks)
        self._builder = CompletionBuilder()

    @property
    def text(self) -> str:
        """The text given so far."""
        return self._builder.text

    def __aiter__(self) -> Recording:
        return self

    async def __anext__(self) -> Chunk:
        chunk = await anext(self._chunks)
        self._builder.add(chunk)
        if chunk.finish_reason is None:
            return chunk
        if chunk.origin is not None:  # another backend ended it
            chunk = msgspec.structs.replace(chunk, origin=self._seen_from_here(chunk.origin))
        origin = chunk.origin or self._answering.origin
        seconds = trio.current_time() - self._started
        whole = self._builder.completion()
        cid = await self._keeping.keep(self._key, self._request, whole, origin, seconds)
        self._record.stored(origin, cid)
        if cid and chunk.cid and cid != chunk.cid:
            logger.warning("%s sent an answer that is not what its CID names", origin.peer)
        return msgspec.structs.replace(chunk, cid=cid)


def _is_cut(completion: Completion, request: Asked) -> bool:
    """Is it less than the model would have said?"""
    if completion.finish_reason == "length" and isinstance(request, GenerateRequest):
        most, usage = request.sampling.max_tokens, completion.usage
        # Fewer tokens than it was allowed: the model's context was full.
        return most is None or (usage.exact and 0 < usage.completion_tokens < most)
    return completion.finish_reason == "content_filter"


def _least(*seconds: float | None) -> float | None:
    return min((s for s in seconds if s is not None), default=None)
