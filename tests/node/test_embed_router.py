"""Embeddings through the router: each input is looked up, computed and stored on its own."""

import struct
import time
from typing import Any

import msgspec
import pytest
import trio
from fakes_mesh import embedding_of
from fakes_router import HERE, THERE, Backends, Setup, setup
from trio.testing import MockClock, wait_all_tasks_blocked

from promptmesh.cache.answers import AnswerCache
from promptmesh.cache.keys import embed_keys
from promptmesh.cache.records import EmbeddingRecord
from promptmesh.node.embed_router import EmbedRouter
from promptmesh.providers.base import (
    CacheControl,
    CacheOnlyMiss,
    Chunk,
    DeadlineExceeded,
    Embedding,
    EmbedRequest,
    Origin,
    Price,
    Usage,
)


def asking(*inputs: Any, **fields: Any) -> EmbedRequest:
    return EmbedRequest(model="m", inputs=inputs, **fields)


async def embed(s: Setup, request: EmbedRequest, **how: Any) -> tuple[Origin, Chunk]:
    async with EmbedRouter(s.router).open(request, **how) as answering:
        (chunk,) = [chunk async for chunk in answering.chunks]
    assert chunk.finish_reason == "stop"
    assert len(chunk.embeddings) == len(request.inputs)
    return answering.origin, chunk


def vectors(chunk: Chunk) -> list[bytes]:
    return [embedding.vector for embedding in chunk.embeddings]


def expected(*inputs: Any) -> list[bytes]:
    return [embedding_of(given).vector for given in inputs]


async def held(answers: AnswerCache, given: Any, **fields: Any) -> Any:
    (key,) = embed_keys(asking(given, **fields))
    return await answers.lookup(key, now=time.time(), kind=EmbeddingRecord)


def wide(given: Any) -> Embedding:
    """A vector of another model."""
    return Embedding(vector=struct.pack("<5f", *range(5)), usage=Usage(prompt_tokens=1))


async def test_the_second_time_it_is_stored() -> None:
    async with setup() as s:
        origin, chunk = await embed(s, asking("hi"))
        assert (origin.cache, origin.provider, chunk.usage) == ("miss", "p", Usage(prompt_tokens=2))
        again, stored = await embed(s, asking("hi"))
        assert (again.cache, again.peer, again.node) == ("hit-local", HERE, "here")
        assert vectors(stored) == vectors(chunk) == expected("hi")
        assert stored.usage == Usage(prompt_tokens=2, cached=True)
        assert again.cid == chunk.cid == stored.cid
        assert s.shared.told == [chunk.cid]
        assert len(s.backends.asked) == 1


async def test_only_what_is_not_stored_is_computed_and_the_order_is_kept() -> None:
    async with setup() as s:
        await embed(s, asking("a", "bb"))
        origin, chunk = await embed(s, asking("ccc", "bb", (1, 2), "a", "ccc"))
        assert s.backends.asked[-1].inputs == ("ccc", (1, 2))
        assert vectors(chunk) == expected("ccc", "bb", (1, 2), "a", "ccc")
        assert [e.usage.cached for e in chunk.embeddings] == [False, True, False, True, False]
        assert chunk.usage == Usage(prompt_tokens=3 + 2 + 2 + 1 + 3)
        assert origin.cache == "miss"
        assert origin.age is not None
        assert (chunk.cid, origin.cid) == (None, None)
        again, stored = await embed(s, asking("a", "bb", "ccc", (1, 2)))
        assert again.cache == "hit-local"
        assert stored.usage == Usage(prompt_tokens=8, cached=True)
        assert len(s.backends.asked) == 2
        assert len(set(s.shared.told)) == 4


async def test_what_hits_save_is_counted() -> None:
    origin = {"price": Price(prompt=1_000_000.0)}
    async with setup(Backends(origin=origin)) as s:
        await embed(s, asking("aa", "bbb"))
        await embed(s, asking("aa", "bbb", "c"))
        await embed(s, asking("aa", "bbb", "c"))
        stat = await s.answers.stat(now=time.time())
        assert (stat.misses, stat.hits_local) == (2, 1)
        assert (stat.tokens_saved, stat.money_saved) == (5 + 6, 11)


@pytest.mark.parametrize(("mode", "reads"), [("refresh", False), ("bypass", False), ("use", True)])
async def test_cache_control(mode: Any, reads: bool) -> None:
    async with setup() as s:
        await embed(s, asking("a"))
        origin, chunk = await embed(s, asking("a", "b", cache=CacheControl(mode=mode)))
        assert s.backends.asked[-1].inputs == (("b",) if reads else ("a", "b"))
        assert origin.cache == ("bypass" if mode == "bypass" else "miss")
        assert (await held(s.answers, "b") is not None) == (mode != "bypass")
        assert all((e.cid is None) == (mode == "bypass") for e in chunk.embeddings)


async def test_only_stored_ones_are_given_where_nothing_else_is_wanted() -> None:
    only = CacheControl(mode="only")
    async with setup() as s:
        await embed(s, asking("a"))
        with pytest.raises(CacheOnlyMiss, match="of 2 inputs 1"):
            await embed(s, asking("a", "b", cache=only))
        assert (await embed(s, asking("a", cache=only)))[0].cache == "hit-local"
        assert len(s.backends.asked) == 1
    async with setup(reuse="never") as s:
        await embed(s, asking("a"))
        with pytest.raises(CacheOnlyMiss, match="never"):
            await embed(s, asking("a", cache=only))
        assert (await embed(s, asking("a")))[0].cache == "miss"


async def test_how_old_it_may_be_and_namespaces() -> None:
    async with setup() as s:
        await embed(s, asking("a"))
        assert (await embed(s, asking("a", cache=CacheControl(max_age=0))))[0].cache == "miss"
        team = CacheControl(namespace="team")
        assert (await embed(s, asking("a", cache=team)))[0].cache == "miss"
        assert (await embed(s, asking("a", cache=team)))[0].cache == "hit-local"


async def test_what_may_not_leave_is_neither_told_nor_given_to_peers() -> None:
    async with setup() as s:
        local = CacheControl(scope="local")
        await embed(s, asking("a", cache=local))
        assert s.shared.told == []
        assert s.shared.asked == 0
        assert s.backends.asked[0].cache.mode == "bypass"
        origin, _ = await embed(s, asking("a"), local_only=True)
        assert origin.cache == "miss"
        assert s.backends.local_only == [False, True]
        assert s.shared.asked == 0


async def test_what_peers_have_is_found_input_by_input() -> None:
    async with setup() as other:
        await embed(other, asking("a", "bb"))
        known = [await held(other.answers, given) for given in ("a", "bb")]
    async with setup() as s:
        keys = embed_keys(asking("a", "bb"))
        s.shared.by_key = {key: (one, THERE) for key, one in zip(keys, known, strict=True)}
        origin, chunk = await embed(s, asking("a", "bb"))
        assert (origin.cache, origin.peer, origin.node) == ("hit-mesh", THERE, "there")
        assert vectors(chunk) == expected("a", "bb")
        origin, chunk = await embed(s, asking("a", "bb", "ccc"))
        assert s.backends.asked[-1].inputs == ("ccc",)
        assert vectors(chunk) == expected("a", "bb", "ccc")


async def test_a_peers_embeddings_are_kept_and_told_as_the_peers() -> None:
    async with setup(Backends(peer=THERE)) as s:
        origin, chunk = await embed(s, asking("a", "b"))
        assert origin.peer == THERE
        assert s.shared.told == [embedding.cid for embedding in chunk.embeddings]
        assert s.shared.sources == [THERE, THERE]
        stored = await held(s.answers, "a")
        assert (stored.source, stored.cid_text) == (THERE, chunk.embeddings[0].cid)


async def test_vectors_of_two_models_with_one_name_never_come_together() -> None:
    async with setup() as s:
        await embed(s, asking("a", "b"))
        s.backends.embed = wide
        _, chunk = await embed(s, asking("a", "b", "c"))
        assert [call.inputs for call in s.backends.asked[1:]] == [("c",), ("a", "b", "c")]
        assert {len(vector) for vector in vectors(chunk)} == {20}
        # What was computed last is the answer from now on.
        origin, chunk = await embed(s, asking("a", "b", "c"))
        assert origin.cache == "hit-local"
        assert {len(vector) for vector in vectors(chunk)} == {20}


async def test_nor_do_those_of_two_versions_of_its_weights() -> None:
    async with setup(Backends(origin={"weights": "sha256:1"})) as s:
        await embed(s, asking("a"))
        s.backends.origin = {"weights": "sha256:2"}
        await embed(s, asking("a", "b"))
        assert [call.inputs for call in s.backends.asked[1:]] == [("b",), ("a", "b")]


async def test_equal_batches_at_once_share_one_computation(autojump_clock: MockClock) -> None:
    async with setup(Backends(delay=5)) as s:
        origins = []

        async def ask(*inputs: str) -> None:
            origins.append((await embed(s, asking(*inputs)))[0].cache)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "a", "b")
            await wait_all_tasks_blocked()
            nursery.start_soon(ask, "a", "b")
        assert sorted(origins) == ["coalesced", "miss"]
        assert len(s.backends.asked) == 1
        assert s.backends.asked[0].deadline is None


async def test_the_work_goes_on_when_the_first_asker_leaves(autojump_clock: MockClock) -> None:
    async with setup(Backends(delay=5)) as s:
        with trio.move_on_after(1):
            await embed(s, asking("a"))
        assert await held(s.answers, "a") is None  # nobody was left
        async with trio.open_nursery() as nursery:
            nursery.start_soon(embed, s, asking("b"))
            await trio.sleep(1)
            with trio.move_on_after(1):
                await embed(s, asking("b"))
        assert await held(s.answers, "b") is not None


async def test_a_deadline(autojump_clock: MockClock) -> None:
    async with setup(Backends(delay=5)) as s:
        with pytest.raises(DeadlineExceeded):
            await embed(s, asking("a", deadline=1.0))
        assert (await embed(s, asking("a", deadline=6.0)))[0].cache == "miss"


async def test_a_cid_that_is_not_that_of_what_was_sent_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def lie(given: Any) -> Embedding:
        return msgspec.structs.replace(embedding_of(given), cid="bafy-other")

    async with setup(Backends(peer=THERE, embed=lie)) as s:
        _, chunk = await embed(s, asking("a"))
        assert chunk.embeddings[0].cid not in (None, "bafy-other")
        assert "not what its CID names" in caplog.text


async def test_a_large_batch_leaves_others_their_turn() -> None:
    """2048 inputs, all computed and stored, then all found."""
    inputs = [f"text number {i}" for i in range(2048)]
    async with setup() as s:
        for status in ("miss", "hit-local"):
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    await trio.lowlevel.checkpoint()
                    turns += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(count)
                origin, chunk = await embed(s, asking(*inputs))
                nursery.cancel_scope.cancel()
            assert origin.cache == status
            assert vectors(chunk) == expected(*inputs)
            assert turns > 60
