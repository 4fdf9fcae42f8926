"""One request for embeddings: what is stored of its inputs, a backend for the rest, and the store.

Each input is a question of its own, so a batch is answered in part from the cache; only the inputs
that are found nowhere are computed, together. The steps are those of `Router`, over many keys.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

import msgspec
import trio

from ..cache.keys import embed_keys
from ..cache.records import EmbeddingRecord
from ..mesh.embedding import closing
from ..providers.base import (
    Answering,
    CacheOnlyMiss,
    Chunk,
    Embedding,
    EmbedRequest,
    Input,
    Origin,
    Ready,
    total_usage,
)
from .accounts import KINDS
from .replays import cost
from .router import Found, Router, flight_key
from .trace import MAX_NAME, Record

logger = logging.getLogger(__name__)

#: Inputs that are looked for at peers at once.
LOOKED_FOR_AT_ONCE = 16
#: Inputs that are looked up or stored before others have their turn: that takes a few ms.
TURN = 32


class EmbedRouter:
    """Answers requests for embeddings. See the module."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self.trace = router.trace

    @asynccontextmanager
    async def open(
        self, request: EmbedRequest, *, local_only: bool = False
    ) -> AsyncIterator[Answering]:
        """The embeddings as an answer of one chunk, which is there once it is entered.

        `local_only` as for `Router.open`. Raises a `GenerateError`, on entering.
        """
        with (
            self.trace.begin(request, local_only) as record,
            self._router.accounts.open(request) as account,
        ):
            with self._router.within_its_time(request):
                request = self._router.names.resolve(request, record.meant)
                keys = embed_keys(request)
                key = keys[0] if len(keys) == 1 else batch_key(keys)
                record.model, record.key = request.model[:MAX_NAME], key
                origin, found = await self._answer(request, keys, record)
            chunk = closing([found[key] for key in keys])
            record.answered(origin)
            record.told_usage, record.told_reason = chunk.usage, chunk.finish_reason
            yield account.follow(Answering(origin, Ready([chunk])), key)

    async def _answer(
        self, request: EmbedRequest, keys: Sequence[bytes], record: Record
    ) -> tuple[Origin, Mapping[bytes, Embedding]]:
        """The embedding of each key, and who gave those that were not stored."""
        inputs = dict(zip(keys, request.inputs, strict=True))
        local_only = record.for_peer
        record.reusing = reusable = self._router.may_reuse(request)
        stored = await self._find_all(request, list(inputs), record) if reusable else {}
        missing = [key for key in inputs if key not in stored]
        if not missing:
            origin = self._origin_of(stored.values())
            self._count(origin, stored, {}, local_only)
            return origin, _embeddings(stored)
        if request.cache.mode == "only":
            self._count(Origin(), {}, {}, local_only)
            raise CacheOnlyMiss(f"of {len(inputs)} inputs {len(missing)} are not stored")
        origin, computed = await self._compute(request, inputs, missing, reusable, local_only)
        if not _comparable(stored.values(), origin.weights, computed.values()):
            stored = {}
            origin, computed = await self._compute(
                request, inputs, list(inputs), reusable, local_only
            )
        self._count(origin, stored, computed, local_only)
        parts = [self._router.origin_of(one) for one in stored.values()]
        return _aged(origin, parts), _embeddings(stored) | computed

    # --- what is stored

    async def _find_all(
        self, request: EmbedRequest, keys: Sequence[bytes], record: Record
    ) -> dict[bytes, Found]:
        """Those of the keys that are stored, here or at peers, and can be compared."""
        found: dict[bytes, Found] = {}
        for number, key in enumerate(keys, 1):
            one = await self._router.look_here(key, request, record.for_peer, record)
            if one is not None:
                found[key] = one
            if number % TURN == 0:
                await trio.lowlevel.checkpoint()
        if len(found) < len(keys):
            left = [key for key in keys if key not in found]
            await self._find_at_peers(request, left, record, found)
        return found if _comparable(found.values()) else {}

    async def _find_at_peers(
        self,
        request: EmbedRequest,
        keys: Sequence[bytes],
        record: Record,
        found: dict[bytes, Found],
    ) -> None:
        left = iter(keys)

        async def find_some() -> None:
            for key in left:
                one = await self._router.look_at_peers(key, request, record.for_peer, record)
                if one is not None:
                    found[key] = one

        async with trio.open_nursery() as nursery:
            for _ in range(min(len(keys), LOOKED_FOR_AT_ONCE)):
                nursery.start_soon(find_some)

    def _origin_of(self, found: Iterable[Found]) -> Origin:
        """What is said of stored embeddings together: the oldest counts, and the farthest."""
        parts = [self._router.origin_of(one) for one in found]
        origin = _aged(max(parts, key=lambda part: part.cache == "hit-mesh"), parts)
        return origin if len(parts) == 1 else msgspec.structs.replace(origin, cid=None)

    # --- what is not

    async def _compute(
        self,
        request: EmbedRequest,
        inputs: Mapping[bytes, Input],
        keys: Sequence[bytes],
        reusable: bool,
        local_only: bool,
    ) -> tuple[Origin, dict[bytes, Embedding]]:
        """The embeddings of these keys by one backend; equal batches in flight share the work."""
        asked = msgspec.structs.replace(request, inputs=tuple(inputs[key] for key in keys))
        batch = batch_key(keys)
        if not reusable:
            async with self._work(batch, keys, asked, local_only) as answering:
                return answering.origin, await _read(keys, answering)
        # The work may outlive the first asker, so a peer must not end it with that one's deadline.
        shared = msgspec.structs.replace(asked, deadline=math.inf)
        flight = self._router.flights.join(
            flight_key(batch, request, local_only),
            lambda: self._work(batch, keys, shared, local_only),
            id=request.id,
            priority=request.priority,
        )
        async with flight as (answering, _):
            return answering.origin, await _read(keys, answering)

    @asynccontextmanager
    async def _work(
        self, batch: bytes, keys: Sequence[bytes], request: EmbedRequest, local_only: bool
    ) -> AsyncIterator[Answering]:
        """The embeddings of a backend, stored each under its key."""
        async with self._router.ask(batch, request, local_only) as (answering, started):
            chunk = await anext(aiter(answering.chunks))
            if request.cache.mode != "bypass":
                seconds = (trio.current_time() - started) / len(keys)
                kept = await self._keep(keys, request, chunk, answering.origin, seconds)
                chunk = msgspec.structs.replace(chunk, embeddings=kept)
            yield Answering(answering.origin, Ready([chunk]))

    async def _keep(
        self,
        keys: Sequence[bytes],
        request: EmbedRequest,
        chunk: Chunk,
        origin: Origin,
        seconds: float,
    ) -> tuple[Embedding, ...]:
        kept = []
        for number, (key, embedding) in enumerate(zip(keys, chunk.embeddings, strict=True), 1):
            cid = await self._router.keeping.keep(key, request, embedding, origin, seconds)
            if cid and embedding.cid and cid != embedding.cid:
                logger.warning("%s sent an embedding that is not what its CID names", origin.peer)
            kept.append(msgspec.structs.replace(embedding, cid=cid))
            if number % TURN == 0:
                await trio.lowlevel.checkpoint()
        return tuple(kept)

    def _count(
        self,
        origin: Origin,
        stored: Mapping[bytes, Found],
        computed: Mapping[bytes, Embedding],
        local_only: bool,
    ) -> None:
        """Note how the request was answered, and what that saved."""
        if local_only:  # a peer counts its own requests
            return
        uses = self._router.accounts.uses
        uses.count(KINDS[origin.cache])
        for found in stored.values():
            one = found.stored
            uses.saved(tokens=one.record.usage.total_tokens, seconds=one.seconds, money=one.money)
        if origin.cache in ("hit-mesh", "coalesced") and computed:  # somebody else's work
            usage = total_usage(embedding.usage for embedding in computed.values())
            uses.saved(tokens=usage.total_tokens, money=cost(origin.price, usage))


def batch_key(keys: Sequence[bytes]) -> bytes:
    """Names the inputs with these keys together."""
    return hashlib.sha256(b"".join(keys)).digest()


async def _read(keys: Sequence[bytes], answering: Answering) -> dict[bytes, Embedding]:
    chunk = await anext(aiter(answering.chunks))
    return dict(zip(keys, chunk.embeddings, strict=True))


def _embeddings(stored: Mapping[bytes, Found]) -> dict[bytes, Embedding]:
    return {key: found.stored.embedding for key, found in stored.items()}


def _aged(origin: Origin, stored: Sequence[Origin]) -> Origin:
    """The origin, as old as the oldest of the stored embeddings that are given with it."""
    ages = [one.age for one in stored if one.age is not None]
    lives = [one.ttl for one in stored if one.ttl is not None]
    if origin.age is not None:
        ages.append(origin.age)
    if origin.ttl is not None:
        lives.append(origin.ttl)
    return msgspec.structs.replace(
        origin, age=max(ages, default=None), ttl=min(lives, default=None)
    )


def _comparable(
    found: Iterable[Found], weights: str | None = None, computed: Iterable[Embedding] = ()
) -> bool:
    """Are these vectors of one model, as far as they show it?

    Vectors of two models mean nothing beside each other, though both models have one name.
    """
    records = [one.stored.record for one in found]
    sizes = {len(r.embedding.vector) for r in records if isinstance(r, EmbeddingRecord)}
    sizes |= {len(embedding.vector) for embedding in computed}
    known = {r.weights for r in records} | {weights}
    return len(sizes) <= 1 and len(known - {None}) <= 1
