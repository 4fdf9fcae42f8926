"""Which model `auto` stands for."""

from typing import Any

import pytest

from promptmesh.mesh.candidates import Source
from promptmesh.node.auto import Chosen, choose
from promptmesh.node.names import Names
from promptmesh.providers.base import (
    GenerateRequest,
    Image,
    Message,
    ModelNotFound,
    ModelOffer,
    Price,
    Text,
    Tool,
)


def source(
    node: str, provider: str, model: str, *, own: bool = False, paid: bool = False, **more: Any
) -> Source:
    available = more.pop("available", True)
    offer = ModelOffer(id=model, **more)
    return Source(f"12D3-{node}", node, provider, provider, offer, own, available, paid)


SOURCES = [
    source("a", "echo", "echo", own=True),
    source("a", "ollama", "llama3:8b", own=True),
    source("b", "vllm", "org/model"),
    source("b", "ollama", "llama3:8b"),
    source("b", "openrouter", "org/model", egress=True),
]


def asked(**fields: Any) -> GenerateRequest:
    message = Message(role="user", content=(Text(text=fields.pop("text", "hi")),))
    return GenerateRequest(model="auto", messages=(message,), **fields)


def chosen(**fields: Any) -> Chosen:
    return choose(SOURCES, asked(**fields))


def test_auto_passes_over_what_is_unavailable_where_something_else_is_there() -> None:
    broken = source("a", "ollama", "llama3:8b", own=True, available=False)
    echo = source("a", "echo", "echo", own=True)
    assert choose([broken, echo], asked()).model == "echo"
    assert choose([broken], asked()).model == "llama3:8b"


def test_auto_takes_an_own_free_model_first_and_echo_last() -> None:
    assert chosen().model == "llama3:8b"
    assert chosen(provider="vllm").model == "org/model"
    assert chosen(provider="echo").model == "echo"


def test_auto_keeps_to_the_privacy_asked_for() -> None:
    with pytest.raises(ModelNotFound):
        chosen(provider="openrouter", privacy="mesh")
    with pytest.raises(ModelNotFound):
        chosen(provider="vllm", privacy="local")


def test_auto_that_is_pinned_to_nothing_says_what_there_is() -> None:
    with pytest.raises(ModelNotFound, match=r"provider `zeta`; there is a:echo, a:ollama, b:"):
        chosen(provider="zeta")


def test_auto_with_nothing_to_ask_says_what_to_do() -> None:
    with pytest.raises(ModelNotFound, match="configure a provider"):
        choose([], asked())


DEAR = source("a", "openrouter", "dear", own=True, paid=True, egress=True)
CHEAP = source("a", "x", "cheap", own=True, egress=True, price=Price(prompt=1, completion=2))
DEARER = source("a", "x", "dearer", own=True, egress=True, price=Price(prompt=2, completion=2))
PEERS = source("b", "vllm", "theirs")
OURS = source("a", "vllm", "z-ours", own=True)


def test_auto_climbs_the_ladder() -> None:
    ladder = [DEAR, DEARER, CHEAP, PEERS, OURS]
    for best in ("z-ours", "theirs", "cheap", "dearer", "dear"):  # whose price nobody says
        assert choose(ladder, asked()).model == best
        ladder.pop()
        ladder.sort(key=lambda s: [DEAR, DEARER, CHEAP, PEERS, OURS].index(s))


def test_auto_minds_no_price_where_nobody_does() -> None:
    assert choose([CHEAP, PEERS], asked(prefer="any")).model == "cheap"  # it is at hand
    assert choose([CHEAP, PEERS], asked(), prefer="any").model == "cheap"
    assert choose([CHEAP, PEERS], asked(prefer="own"), prefer="any").model == "theirs"


def test_a_free_third_party_comes_after_this_machine() -> None:
    abroad = source("a", "x", "abroad", own=True, egress=True)
    assert choose([abroad, OURS], asked()).model == "z-ours"


SEES = source("b", "vllm", "sees", modalities=("text", "image"))
CALLS = source("b", "vllm", "calls", tools=True)
LONG = source("b", "vllm", "long", context_length=100_000)
SHORT = source("a", "vllm", "short", own=True, context_length=8)
IMAGE = Message(role="user", content=(Image(url="data:,x"),))


@pytest.mark.parametrize(
    ("request_", "model"),
    [
        (asked(), "short"),
        (GenerateRequest(model="auto", messages=(IMAGE,)), "sees"),
        (asked(tools=(Tool(name="f"),)), "calls"),
        (asked(text="long " * 1000), "calls"),
    ],
)
def test_auto_is_a_model_that_can_do_what_is_asked(request_: GenerateRequest, model: str) -> None:
    assert choose([SHORT, LONG, SEES, CALLS], request_).model == model


def test_where_no_model_can_one_that_cannot_says_why() -> None:
    assert choose([SHORT], asked(tools=(Tool(name="f"),))).model == "short"


def test_auto_passes_over_what_failed_or_refused_lately() -> None:
    def is_paused(source: Source) -> bool:
        return source.own

    assert choose([OURS, PEERS], asked(), is_paused=is_paused).model == "theirs"
    assert choose([OURS], asked(), is_paused=is_paused).model == "z-ours"


@pytest.mark.parametrize(
    ("sources", "why"),
    [
        ([OURS], "free, on this node; the only model"),
        ([PEERS, DEAR], "free, at a peer; of 2 models"),
        ([DEAR, SHORT], "paid (nothing free is there), on this node; of 2 models 1 cannot do this"),
        (SOURCES[:1], "there is no real model; the only model"),
    ],
)
def test_auto_says_why(sources: list[Source], why: str) -> None:
    assert choose(sources, asked(text="long " * 20)).why == why


def test_why_is_told_to_who_asks_for_it() -> None:
    told: list[str] = []
    names = Names(lambda: SOURCES)
    assert names.resolve(asked(), told.append).model == "llama3:8b"
    assert told == ["free, on this node; of 3 models"]
