"""Providers with prices: what they offer, what is counted, and the limits of a day."""

from collections.abc import Iterator
from typing import Any

import pytest
import trio
from fakes_mesh import FakeProvider, asking

from promptmesh.node.ledger import DAY, Ledger
from promptmesh.node.node_database import NodeDatabase
from promptmesh.node.pricing import Priced, Purse
from promptmesh.providers.base import (
    EmbedRequest,
    ModelOffer,
    Price,
    ProviderUnavailable,
    Sampling,
    StreamInterrupted,
)

OWN, BOB = "12D3-own", "12D3-bob"
#: One dollar a token of the prompt, ten of the answer.
PRICE = Price(prompt=1_000_000, completion=10_000_000)
#: Of an answer of the fake provider: 1 token in, 3 out.
COST = 31.0


def clock() -> float:
    return 20_000 * DAY + DAY - 600.0


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    database = NodeDatabase(None)
    yield Ledger(database, peer=OWN, clock=clock)
    database.close()


def priced(ledger: Ledger, provider: FakeProvider | None = None, **limits: Any) -> Priced:
    purse = Purse(ledger, peer=OWN, clock=clock, **limits)
    return Priced(provider or FakeProvider(), purse, PRICE, {})


async def ask(provider: Priced, **fields: Any) -> None:
    bounded = Sampling(max_tokens=3)
    async with provider.open(asking(sampling=bounded, **fields)) as answering:
        await answering.completion()


def test_prices_stand_over_what_a_provider_says_of_itself(ledger: Ledger) -> None:
    large, own = Price(prompt=7), Price(prompt=9)
    fake = FakeProvider(offers=(ModelOffer(id="m", price=own), ModelOffer(id="large")))
    purse = Purse(ledger, peer=OWN)
    assert [o.price for o in Priced(fake, purse, PRICE, {"large": large}).models()] == [
        PRICE,
        large,
    ]
    some = Priced(fake, purse, None, {"large": large})
    assert [o.price for o in some.models()] == [own, large]
    assert some.models() is some.models()
    fake.offers = fake.offers[1:]
    assert [o.id for o in some.models()] == ["large"]


async def test_a_whole_answer_costs_what_it_has_whoever_asked(ledger: Ledger) -> None:
    provider = priced(ledger)
    await ask(provider)
    await ask(provider, asker=BOB)
    assert (ledger.spent().all, ledger.spent().members) == (2 * COST, COST)
    rows = list(ledger.sums("asker", "peer", "provider", "model", days=1))
    assert [(by["asker"], by["peer"], c.money, c.requests) for by, c in rows] == [
        ("", OWN, COST, 0),
        (BOB, OWN, COST, 0),
    ]


async def test_who_leaves_has_spent_what_came(ledger: Ledger) -> None:
    provider = priced(ledger, FakeProvider(words=["word " * 10, "never read"]))
    async with provider.open(asking()) as answering:
        await anext(aiter(answering.chunks))
    assert ledger.spent().all > 100  # of the ten tokens alone


async def test_a_cut_answer_cost_money_and_one_that_never_began_did_not(ledger: Ledger) -> None:
    provider = priced(ledger, FakeProvider(cut=True))
    with pytest.raises(StreamInterrupted):
        await ask(provider)
    spent = ledger.spent().all
    assert spent > 0
    provider = priced(ledger, FakeProvider(fail=ProviderUnavailable("no")))
    with pytest.raises(ProviderUnavailable):
        await ask(provider)
    assert ledger.spent().all == spent


async def test_embeddings_cost_their_tokens(ledger: Ledger) -> None:
    provider = priced(ledger)
    found = await provider.embed(EmbedRequest(model="m", inputs=("one", "two")))
    assert ledger.spent().all == sum(e.usage.prompt_tokens for e in found) > 0


async def test_a_day_has_its_limit_and_members_theirs(ledger: Ledger) -> None:
    provider = priced(ledger, per_day=200.0, per_day_by_members=60.0)
    await ask(provider, asker=BOB)
    with pytest.raises(ProviderUnavailable, match=r"\$29.00 of \$60.00 for members") as refused:
        await ask(provider, asker=BOB)
    assert refused.value.retry_after == pytest.approx(600)
    for _ in range(5):
        await ask(provider)
    with pytest.raises(ProviderUnavailable, match=r"\$14.00 of \$200.00 \(limits.max_cost"):
        await ask(provider)


async def test_many_at_once_stay_below_the_limit(
    ledger: Ledger, autojump_clock: trio.testing.MockClock
) -> None:
    fake = FakeProvider(delay=5)
    provider = priced(ledger, fake, per_day=110.0)
    refused = 0

    async def one() -> None:
        nonlocal refused
        try:
            await ask(provider)
        except ProviderUnavailable:
            refused += 1

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(one)
    assert (fake.served, refused) == (3, 7)
    assert ledger.spent().all == 3 * COST
    # Nothing is held back when all are over, also after a cancellation.
    with trio.move_on_after(1):
        await ask(priced(ledger, fake, per_day=1e9))
    assert Purse(ledger, peer=OWN, per_day=110.0, clock=clock).allowance("").left == 110 - 3 * COST


def test_without_limits_all_may_be_spent(ledger: Ledger) -> None:
    assert Purse(ledger, peer=OWN).allowance(BOB).left == float("inf")
    only_members = Purse(ledger, peer=OWN, per_day_by_members=0.0)
    assert only_members.allowance(BOB).left == 0
    assert only_members.allowance("").left == float("inf")
