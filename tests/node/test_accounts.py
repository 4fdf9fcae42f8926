"""What is noted of a request by the router: at its end, as what it then is."""

from typing import Any

import msgspec
import pytest
from fakes_router import HERE, THERE, Backends, Setup, setup

from promptmesh.node.embed_router import EmbedRouter
from promptmesh.node.ledger import Counts
from promptmesh.providers.base import (
    CacheControl,
    CacheOnlyMiss,
    EmbedRequest,
    GenerateRequest,
    Message,
    Price,
    Sampling,
    StreamInterrupted,
    Text,
)

#: Of a prompt of 5 tokens and an answer of 2, which the fake backends give: 9 dollars.
PRICE = Price(prompt=1_000_000, completion=2_000_000)


def asking(prompt: str = "hi", **fields: Any) -> GenerateRequest:
    return GenerateRequest(
        model="m",
        messages=(Message(role="user", content=(Text(text=prompt),)),),
        sampling=Sampling(temperature=0),
        **fields,
    )


async def ask(s: Setup, request: GenerateRequest) -> None:
    async with s.router.open(request, local_only=bool(request.asker)) as answering:
        await answering.completion()


def rows(s: Setup) -> dict[tuple[str, ...], Counts]:
    return {
        tuple(by.values()): msgspec.structs.replace(counts, seconds_saved=0)
        for by, counts in s.ledger.sums("asker", "peer", "provider", "cache", days=1)
    }


async def test_own_answers_hits_and_failures() -> None:
    async with setup() as s:
        await ask(s, asking())
        await ask(s, asking())
        with pytest.raises(CacheOnlyMiss):
            await ask(s, asking("other", cache=CacheControl(mode="only")))
        assert rows(s) == {
            ("", HERE, "p", "miss"): Counts(requests=1, prompt_tokens=5, completion_tokens=2),
            ("", HERE, "cache", "hit-local"): Counts(
                requests=1, prompt_tokens=5, completion_tokens=2, tokens_saved=7
            ),
            ("", "", "", ""): Counts(unfinished=1),
        }


async def test_what_a_peer_computed_cost_what_it_asks_and_a_hit_saves_that() -> None:
    async with setup(Backends(peer=THERE, origin={"price": PRICE})) as s:
        await ask(s, asking())
        await ask(s, asking())
        found = rows(s)
        assert found["", THERE, "p", "miss"].money == 9
        assert found["", THERE, "p", "miss"].money_saved == 0
        (hit,) = (counts for by, counts in found.items() if by[3] == "hit-local")
        assert (hit.money, hit.money_saved, hit.tokens_saved) == (0, 9, 7)


async def test_a_served_request_is_its_askers() -> None:
    async with setup() as s:
        await ask(s, asking(asker=THERE))
        assert rows(s) == {
            (THERE, HERE, "p", "miss"): Counts(requests=1, prompt_tokens=5, completion_tokens=2)
        }


async def test_who_leaves_or_is_cut_off_has_no_answer() -> None:
    async with setup(Backends(finish=None)) as s:
        with pytest.raises(StreamInterrupted):
            await ask(s, asking(cache=CacheControl(mode="bypass")))
        async with s.router.open(asking("left")) as answering:
            await anext(aiter(answering.chunks))
        assert rows(s) == {("", HERE, "p", ""): Counts(unfinished=2)}


async def test_of_embeddings_only_the_new_ones_are_computed() -> None:
    async with setup() as s:
        router = EmbedRouter(s.router)
        for inputs in (("one", "two"), ("one", "two", "three words more"), ("two",)):
            async with router.open(EmbedRequest(model="m", inputs=inputs)) as answering:
                await answering.whole()
        found = rows(s)
        assert sum(counts.requests for counts in found.values()) == 3
        tokens = sum(counts.prompt_tokens for counts in found.values())
        saved = sum(counts.tokens_saved for counts in found.values())
        one, more = found["", HERE, "p", "miss"], found["", HERE, "cache", "hit-local"]
        assert one.requests == 2
        assert more.tokens_saved == more.prompt_tokens
        computed = sum(
            e.usage.prompt_tokens for e in map(s.backends.embed, ("one", "two", "three words more"))
        )
        assert tokens - saved == computed
