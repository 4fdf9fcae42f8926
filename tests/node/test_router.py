"""One request through the router: reuse, flights, what is stored, what is told, deadlines."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from fakes_router import THERE, Backends, Setup, setup

from promptmesh.cache.keys import request_key
from promptmesh.node.router import Reuse, Router
from promptmesh.providers.base import (
    Answering,
    Asked,
    CacheControl,
    CacheOnlyMiss,
    DeadlineExceeded,
    FinishReason,
    GenerateRequest,
    Message,
    Price,
    Sampling,
    StreamInterrupted,
    Text,
    Usage,
)


def asking(prompt: str = "hi", *, temperature: float | None = 0, **fields: Any) -> GenerateRequest:
    return GenerateRequest(
        model="m",
        messages=(Message(role="user", content=(Text(text=prompt),)),),
        sampling=Sampling(temperature=temperature),
        **fields,
    )


async def ask(s: Setup, request: GenerateRequest, **how: Any) -> tuple[str, str, str | None]:
    """The text, the cache status and the CID."""
    async with s.router.open(request, **how) as answering:
        chunks = [chunk async for chunk in answering.chunks]
    return "".join(c.text for c in chunks), answering.origin.cache, chunks[-1].cid


async def test_a_deterministic_answer_is_computed_once_and_told() -> None:
    async with setup() as s:
        first = await ask(s, asking())
        again = await ask(s, asking())
    assert first == ("hi 1", "miss", again[2])
    assert again[:2] == ("hi 1", "hit-local")
    assert s.shared.told == [first[2]]


async def test_a_sampled_answer_is_stored_and_not_reused_unless_asked_for() -> None:
    async with setup() as s:
        first = await ask(s, asking(temperature=1.0))
        second = await ask(s, asking(temperature=1.0))
        assert (first[0], second[0], second[1]) == ("hi 1", "hi 2", "miss")
        any_sample = asking(temperature=1.0, cache=CacheControl(any_sample=True))
        assert (await ask(s, any_sample))[1] == "hit-local"


async def test_what_two_engines_made_is_not_stored_as_the_answer_of_one() -> None:
    async with setup(Backends(origin={"begun_by": "n:other"})) as s:
        assert (await ask(s, asking()))[2] is None
        assert (await ask(s, asking()))[:2] == ("hi 2", "miss")
        assert not s.shared.told


@pytest.mark.parametrize(("reuse", "computed"), [("always", 1), ("never", 2)])
async def test_reuse_is_policy(reuse: Reuse, computed: int) -> None:
    async with setup(reuse=reuse) as s:
        await ask(s, asking(temperature=1.0))
        await ask(s, asking(temperature=1.0))
    assert len(s.backends.asked) == computed


async def test_modes_of_the_cache() -> None:
    async with setup() as s:
        bypass = asking(cache=CacheControl(mode="bypass"))
        assert await ask(s, bypass) == ("hi 1", "bypass", None)
        assert s.shared.asked == 0
        with pytest.raises(CacheOnlyMiss):
            await ask(s, asking(cache=CacheControl(mode="only")))
        await ask(s, asking())
        assert (await ask(s, asking(cache=CacheControl(mode="refresh"))))[0] == "hi 3"
        assert (await ask(s, asking(cache=CacheControl(mode="only"))))[1] == "hit-local"


async def test_equal_requests_share_one_flight(autojump_clock: trio.testing.MockClock) -> None:
    async with setup(Backends(delay=5)) as s:
        results = []

        async def one(start: float) -> None:
            await trio.sleep(start)
            results.append(await ask(s, asking()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, 0)
            nursery.start_soon(one, 1)
    assert {r[:2] for r in results} == {("hi 1", "miss"), ("hi 1", "coalesced")}
    assert len(s.backends.asked) == 1


async def test_who_may_answer_separates_flights(autojump_clock: trio.testing.MockClock) -> None:
    async with setup(Backends(delay=5)) as s, trio.open_nursery() as nursery:
        nursery.start_soon(ask, s, asking())
        nursery.start_soon(ask, s, asking(peer="other"))
    assert len(s.backends.asked) == 2


@dataclass
class AtTheOther(Backends):
    """Has another node answer, and computes for that node's requests."""

    other: Router = field(init=False)

    @asynccontextmanager
    async def open(
        self, request: Asked, *, local_only: bool = False, key: bytes = b""
    ) -> AsyncIterator[Answering]:
        if local_only:
            async with super().open(request, local_only=True, key=key) as answering:
                yield answering
        else:
            assert isinstance(request, GenerateRequest)
            async with self.other.open(request, local_only=True) as answering:
                yield answering


async def test_two_nodes_that_ask_each_other_the_same_do_not_wait_for_each_other(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The provider is named, as in a request that comes from a peer."""
    one, two = AtTheOther(delay=5), AtTheOther(delay=5)
    async with setup(one) as s, setup(two) as t:
        one.other, two.other = t.router, s.router
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, s, asking(provider="p"))
            nursery.start_soon(ask, t, asking(provider="p"))
        assert trio.current_time() < 10
    assert (one.local_only, two.local_only) == ([True], [True])


async def test_a_hit_of_the_mesh_is_replayed_with_its_usage() -> None:
    async with setup() as other:
        await ask(other, asking())
        (row,) = await other.answers.listing(now=time.time())
        stored = await other.answers.get(row.cid.raw, now=time.time())
        assert stored is not None
    async with setup() as s:
        s.shared.knows = (stored, THERE)
        async with s.router.open(asking()) as answering:
            chunks = [chunk async for chunk in answering.chunks]
        origin = answering.origin
        assert (origin.cache, origin.peer, origin.node) == ("hit-mesh", THERE, "there")
        assert chunks[-1].usage == Usage(prompt_tokens=5, completion_tokens=2, cached=True)
        assert chunks[-1].cid == row.cid.text
        assert s.backends.asked == []


async def test_a_peers_request_uses_what_is_here_and_nothing_else() -> None:
    async with setup() as s:
        await ask(s, asking(), local_only=True)
        assert s.backends.local_only == [True]
        assert s.shared.asked == 0
        assert len(s.shared.told) == 1
        # What may not leave this node is not given to a peer, which computes its own.
        await ask(s, asking("secret", cache=CacheControl(scope="local")))
        assert (await ask(s, asking("secret"), local_only=True))[1] == "miss"


@pytest.mark.parametrize("private", [{"cache": CacheControl(scope="local")}, {"privacy": "local"}])
async def test_a_private_answer_is_kept_and_not_told(private: dict[str, Any]) -> None:
    async with setup() as s:
        await ask(s, asking(**private))
        assert s.shared.told == []
        assert s.shared.asked == 0
        assert (await ask(s, asking(**private)))[1] == "hit-local"


async def test_an_answer_that_may_not_stay_at_a_peer_is_a_miss_here() -> None:
    async with setup(Backends(peer=THERE, origin={"cache": "bypass"})) as s:
        assert (await ask(s, asking(cache=CacheControl(scope="local"))))[1] == "miss"
        bypass = CacheControl(mode="bypass", scope="local")
        assert (await ask(s, asking(cache=bypass)))[1] == "bypass"


async def test_an_answer_of_scope_local_is_not_kept_by_the_peer_that_makes_it() -> None:
    async with setup(Backends(peer=THERE)) as s:
        await ask(s, asking(cache=CacheControl(scope="local")))
        assert s.backends.asked[0].cache.mode == "bypass"


async def test_the_answer_of_a_peer_is_kept_and_told_as_a_copy() -> None:
    async with setup(Backends(peer=THERE)) as s:
        assert (await ask(s, asking()))[2] is not None
        assert s.shared.sources == [THERE]  # which makes it a copy
        assert (await ask(s, asking()))[1] == "hit-local"


@pytest.mark.parametrize(
    ("finish", "max_tokens", "kept"),
    [
        ("length", 2, True),
        ("length", 5, False),  # the context was full
        ("length", None, False),
        ("content_filter", None, False),
    ],
)
async def test_only_whole_answers_are_kept(
    finish: FinishReason, max_tokens: int | None, kept: bool
) -> None:
    async with setup(Backends(finish=finish)) as s:
        request = asking()
        sampling = Sampling(temperature=0, max_tokens=max_tokens)
        request = GenerateRequest(model="m", messages=request.messages, sampling=sampling)
        assert ((await ask(s, request))[2] is not None) is kept
        assert len(await s.answers.listing(now=time.time())) == kept


async def test_a_cut_answer_is_not_stored() -> None:
    async with setup(Backends(finish=None)) as s:
        async with s.router.open(asking(temperature=1.0)) as answering:
            with pytest.raises(StreamInterrupted):
                await answering.completion()
        assert await s.answers.listing(now=time.time()) == []


async def test_the_whole_has_a_deadline(autojump_clock: trio.testing.MockClock) -> None:
    async with setup(Backends(delay=100), deadline=10) as s:
        with pytest.raises(DeadlineExceeded, match="within 10 s") as raised:
            await ask(s, asking(temperature=1.0))
        assert raised.value.partial == "hi "
        with pytest.raises(DeadlineExceeded, match="within 3 s"):
            await ask(s, asking(temperature=1.0, deadline=3))
        assert s.backends.asked[1].deadline == pytest.approx(3, abs=0.5)
        # In a flight each asker has a deadline of its own, and the work has none.
        with pytest.raises(DeadlineExceeded) as raised:
            await ask(s, asking(deadline=3))
        assert raised.value.partial == "hi "
        assert s.backends.asked[2].deadline is None


async def test_a_fault_of_the_cache_is_a_miss() -> None:
    async with setup() as s:
        s.answers._database.close()
        assert await ask(s, asking()) == ("hi 1", "miss", None)


async def test_what_a_distrusted_node_computed_is_not_given() -> None:
    async with setup(Backends(peer=THERE)) as s:
        await ask(s, asking())
        assert (await ask(s, asking()))[1] == "hit-local"
        s.shared.distrusted.add(THERE)
        assert (await ask(s, asking()))[1] == "miss"
        assert s.shared.asked == 2


async def test_how_many_must_agree_counts_at_peers_too() -> None:
    async with setup(Backends(peer=THERE), min_agreement=3) as s:
        await ask(s, asking())
        await ask(s, asking("other", cache=CacheControl(min_agreement=2)))
        await ask(s, asking("private", cache=CacheControl(scope="local")))
        wanted = [request.cache.min_agreement for request in s.backends.asked]
        assert wanted == [3, 2, None]


# --- what is counted, and what a hit saves --------------------------------------------------------


async def counted(s: Setup) -> dict[str, float]:
    """What the statistics say, without zeros."""
    stat = await s.answers.stat(now=time.time())
    names = ("hits_local", "hits_mesh", "coalesced", "misses", "bypassed")
    saved = ("tokens_saved", "seconds_saved", "money_saved")
    return {name: getattr(stat, name) for name in (*names, *saved) if getattr(stat, name)}


async def test_a_hit_saves_what_computing_took(autojump_clock: trio.testing.MockClock) -> None:
    price = Price(prompt=2.0, completion=10.0)  # dollars for a million tokens
    async with setup(Backends(delay=3, origin={"price": price})) as s:
        await ask(s, asking())
        assert await counted(s) == {"misses": 1}
        for _ in range(2):
            await ask(s, asking())
        assert await counted(s) == {
            "misses": 1,
            "hits_local": 2,
            "tokens_saved": 14,
            "seconds_saved": pytest.approx(6),
            "money_saved": pytest.approx(2 * 30 / 1e6),
        }


async def test_who_shares_a_computation_saves_its_tokens(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with setup(Backends(delay=3, origin={"price": Price(completion=10.0)})) as s:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask, s, asking())
        assert await counted(s) == {
            "misses": 1,
            "coalesced": 2,
            "tokens_saved": 14,
            "money_saved": pytest.approx(2 * 20 / 1e6),
        }


async def test_what_a_peer_had_stored_is_a_hit_of_the_mesh() -> None:
    there = {"cache": "hit-local", "age": 100.0, "ttl": 50.0, "price": Price(completion=1.0)}
    async with setup(Backends(peer=THERE, origin=there)) as s:
        assert (await ask(s, asking()))[1] == "hit-mesh"
        first = await counted(s)
        assert (first["hits_mesh"], first["tokens_saved"]) == (1, 7)
        # It is as old as it was there, it ends with it, and what it took is not known.
        found = (await s.answers.listing(now=time.time()))[0]
        assert time.time() - found.stored_at == pytest.approx(100, abs=40)
        assert found.expires_at - time.time() == pytest.approx(50, abs=40)
        assert (found.seconds, found.money) == (None, None)
        assert (await ask(s, asking(cache=CacheControl(max_age=90))))[1] == "hit-mesh"
        assert (await ask(s, asking(cache=CacheControl(max_age=200))))[1] == "hit-local"
        assert len(s.backends.asked) == 2


async def test_an_answer_found_in_the_mesh_counts_once() -> None:
    async with setup() as there:
        await ask(there, asking())
        known = await there.answers.lookup(request_key(asking()), now=time.time())
        assert known is not None
        async with setup() as s:
            s.shared.knows = (known, THERE)
            await ask(s, asking())
            count = await counted(s)
    assert (count["hits_mesh"], count["tokens_saved"]) == (1, 7)
    assert "misses" not in count


async def test_each_kind_is_counted_and_a_peers_requests_are_not() -> None:
    async with setup() as s:
        await ask(s, asking(cache=CacheControl(mode="bypass")))
        await ask(s, asking(cache=CacheControl(mode="refresh")))
        await ask(s, asking(temperature=1.0))
        with pytest.raises(CacheOnlyMiss):
            await ask(s, asking("other", cache=CacheControl(mode="only")))
        assert await counted(s) == {"bypassed": 1, "misses": 3}
        for _ in range(2):
            served = msgspec.structs.replace(asking("a peer's"), asker=THERE)
            await ask(s, served, local_only=True)
        assert await counted(s) == {"bypassed": 1, "misses": 3}


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
async def test_a_price_that_is_none_counts_as_nothing(price: float) -> None:
    async with setup(Backends(origin={"price": Price(completion=price)})) as s:
        await ask(s, asking())
        await ask(s, asking())
        assert "money_saved" not in await counted(s)
