"""Which model `auto` stands for: one that can do what is asked, the cheapest way first. Pure.

The order is that of the ladder: free before paid (unless nobody minds), this node before its peers,
no third party before one, a low price before a high one. What is unavailable just now is taken only
where nothing else is there, and `echo`, which is no model, last of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ..mesh.candidates import Source
from ..mesh.ladder import is_paid
from ..mesh.ruling_out import exposes, unfit
from ..providers.base import ModelNotFound, ModelRequest, Prefer


class Chosen(NamedTuple):
    """A model, and why it is that."""

    model: str
    why: str


class _Ranked(NamedTuple):
    """How good a source is; the smallest is the best."""

    unfit: bool
    absent: bool
    echo: bool
    paid: bool
    remote: bool
    egress: bool
    price: float
    model: str


def choose(
    sources: Sequence[Source],
    request: ModelRequest,
    *,
    prefer: Prefer = "free",
    is_paused: Callable[[Source], bool] = lambda source: False,
) -> Chosen:
    """The model to ask. `is_paused` says of a source that it failed lately, and is left alone.

    Raises `ModelNotFound` where nobody may be asked at all. If nobody can do what is asked, it is
    one that cannot: who asks it is told why.
    """
    sources = [source for source in sources if request.task in source.offer.tasks]
    usable = [source for source in sources if _may(source, request)]
    if not usable:
        raise ModelNotFound(_nothing(sources, request), field="model")
    prefer = request.prefer or prefer
    ranks = [_rank(source, request, prefer, is_paused) for source in usable]
    best = min(ranks)
    return Chosen(best.model, "; ".join(_why(best, ranks)))


def _may(source: Source, request: ModelRequest) -> bool:
    return (
        request.provider in (None, source.provider)
        and request.peer in (None, source.peer, source.node)
        and not exposes(source.offer, request, own=source.own)
    )


def _rank(
    source: Source, request: ModelRequest, prefer: Prefer, is_paused: Callable[[Source], bool]
) -> _Ranked:
    offer, price = source.offer, source.offer.price
    paid = is_paid(price, source.paid)
    known = math.inf if paid else 0.0
    return _Ranked(
        unfit=bool(unfit(offer, request)),
        absent=not source.available or is_paused(source),
        echo=source.kind == "echo",
        paid=paid and prefer != "any",
        remote=not source.own,
        egress=offer.egress,
        price=known if price is None else price.prompt + price.completion,
        model=offer.id,
    )


def _why(best: _Ranked, ranks: Sequence[_Ranked]) -> Iterator[str]:
    """`free, on this node; of 12 models 3 cannot do this and 1 is unavailable`."""
    if best.echo:
        yield "there is no real model"
    else:
        place = "at a peer" if best.remote else "on this node"
        yield f"{'paid (nothing free is there)' if best.paid else 'free'}, {place}"
    models = {rank.model for rank in ranks}
    can = {rank.model for rank in ranks if not rank.unfit}
    there = {rank.model for rank in ranks if not rank.unfit and not rank.absent}
    told = [
        f"{count} {what}"
        for count, what in (
            (len(models - can), "cannot do this"),
            (len(can - there), "unavailable just now"),
        )
        if count
    ]
    if len(models) == 1:
        yield "the only model"
    else:
        yield f"of {len(models)} models" + (f" {' and '.join(told)}" if told else "")


def _nothing(sources: Sequence[Source], request: ModelRequest) -> str:
    """Why `auto` stands for no model, and what to do."""
    if not sources:
        what = "no model makes embeddings" if request.task == "embed" else "no model can be asked"
        return f"{what}: configure a provider, or join a mesh that has one"
    wanted = {
        "provider": request.provider,
        "peer": request.peer,
        "privacy": None if request.privacy == "any" else request.privacy,
    }
    asked = " and ".join(f"{name} `{value}`" for name, value in wanted.items() if value)
    there = sorted({f"{source.node or source.peer}:{source.provider}" for source in sources})
    return f"no model is offered with {asked}; there is {', '.join(there[:20])}"
