"""What a request is expected to cost, whether it may, and who is asked before whom."""

from typing import Any

import pytest
from fakes_mesh import asking

from promptmesh.mesh.ladder import Bill, dollars, is_paid, refusal, rung
from promptmesh.mesh.loads import Busy
from promptmesh.mesh.policies import Allowance, Candidate
from promptmesh.providers.base import (
    EmbedRequest,
    GenerateRequest,
    Image,
    Message,
    ModelOffer,
    Prefer,
    Price,
    Sampling,
    Text,
)
from promptmesh.providers.tokens import prompt_tokens


def candidate(name: str, **fields: Any) -> Candidate:
    return Candidate(peer=name, node=name, provider="p", offer=ModelOffer(id="m"), **fields)


def of(*content: Text | Image, **fields: Any) -> GenerateRequest:
    return GenerateRequest(model="m", messages=(Message(role="user", content=content),), **fields)


# --- the bill -------------------------------------------------------------------------------------

PRICE = Price(prompt=1_000_000, completion=10_000_000)  # 1 and 10 dollars a token


def test_the_answer_is_as_long_as_it_may_be_or_as_usual() -> None:
    prompt = of(Text(text="some words"))
    tokens = prompt_tokens(prompt)
    assert Bill(prompt, lambda: 7.0).at(PRICE, paid=True) == tokens + 70
    bounded = of(Text(text="some words"), sampling=Sampling(max_tokens=3))
    assert Bill(bounded, lambda: 7.0).at(PRICE, paid=True) == tokens + 30
    embedded = EmbedRequest(model="m", inputs=((1, 2),))
    assert Bill(embedded, lambda: 7.0).at(PRICE, paid=True) == 2


def test_what_is_not_known_to_be_free() -> None:
    bill = Bill(asking(), lambda: 1.0)
    assert bill.at(None, paid=False) == 0
    assert bill.at(None, paid=True) is None
    assert bill.at(Price(), paid=True) == 0


@pytest.mark.parametrize("number", [-1.0, float("nan"), float("inf"), float("-inf"), 1e308])
@pytest.mark.parametrize("name", ["prompt", "completion"])
def test_a_price_that_is_none_is_not_believed(name: str, number: float) -> None:
    cost = Bill(of(Text(text="x" * 4000)), lambda: 1e9).at(Price(**{name: number}), paid=True)
    assert cost is None or (number == 1e308 and 0 < cost < float("inf"))


@pytest.mark.parametrize(
    ("price", "provider", "paid"),
    [
        (None, True, True),
        (None, False, False),
        (Price(), True, False),
        (Price(prompt=0.1), False, True),
        (Price(completion=0.1), False, True),
    ],
)
def test_a_price_says_more_than_its_provider(
    price: Price | None, provider: bool, paid: bool
) -> None:
    assert is_paid(price, provider) is paid


# --- what is too dear -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost", "most", "why"),
    [
        (0.0, None, ""),
        (None, None, ""),
        (0.0, 0.0, ""),
        (0.25, 0.25, ""),
        (0.25, 0.2, "the request is expected to cost $0.25 there, and may cost $0.2"),
        (0.00123, 0.0, "the request is expected to cost $0.00123 there, and may cost $0.00"),
        (None, 1.0, "nobody says what it costs, and the request may cost $1.00"),
    ],
)
def test_the_cost_of_a_request(cost: float | None, most: float | None, why: str) -> None:
    refused = refusal(candidate("a", paid=cost != 0, cost=cost), asking(max_cost=most))
    assert (refused.reason if refused else "") == why
    assert refused is None or refused.wait is None


def test_the_money_of_a_day() -> None:
    left = Allowance(0.5, "$2.00 (limits.max_cost_per_day)", 3600)
    assert refusal(candidate("a", paid=True, cost=0.5, allowance=left), asking()) is None
    refused = refusal(candidate("a", paid=True, cost=0.6, allowance=left), asking())
    assert refused is not None
    assert refused.reason == (
        "the request is expected to cost $0.6 there, and $0.5 of $2.00 (limits.max_cost_per_day) "
        "is left today"
    )
    assert refused.wait == 3600
    spent = Allowance(-0.1, "$2.00", 3600)
    assert refusal(candidate("a", paid=True, cost=None, allowance=spent), asking()) is not None
    assert refusal(candidate("a", cost=0.0, allowance=spent), asking()) is None


def test_dollars() -> None:
    assert [dollars(x) for x in (0, 0.000012345, 0.5, 1, 12.345)] == [
        "$0.00",
        "$1.23e-05",
        "$0.5",
        "$1.00",
        "$12.35",
    ]


# --- who before whom ------------------------------------------------------------------------------

OWN = candidate("own", own=True)
FULL = candidate("full", own=True, busy=Busy(0, 4, 4))
PEER = candidate("peer")
PAID = candidate("paid", own=True, paid=True)


@pytest.mark.parametrize(
    ("prefer", "left", "first"),
    [
        ("free", [PAID, PEER, OWN], [PEER, OWN]),
        ("free", [PAID, FULL], [FULL]),
        ("free", [PAID], [PAID]),
        ("own", [PAID, PEER, OWN, FULL], [OWN]),
        ("own", [PAID, PEER, FULL], [PEER, FULL]),
        ("own", [PAID], [PAID]),
        ("any", [PAID, PEER, OWN], [PAID, PEER, OWN]),
        ("free", [], []),
    ],
)
def test_the_rungs(prefer: Prefer, left: list[Candidate], first: list[Candidate]) -> None:
    assert list(rung(left, prefer)) == first
