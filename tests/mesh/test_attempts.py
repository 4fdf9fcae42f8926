"""Who is asked next, and what is said when nobody is left."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from types import MappingProxyType
from typing import Any

import pytest

from promptmesh.mesh.attempts import (
    LONGEST_PAUSE,
    PAUSE,
    Attempts,
    retry_budget,
)
from promptmesh.mesh.budget import Budget
from promptmesh.mesh.continuing import SoFar
from promptmesh.mesh.ending import MOST_LISTED
from promptmesh.mesh.policies import Candidate
from promptmesh.mesh.ruling_out import Obstacle, RuledOut, rule_out
from promptmesh.providers.base import (
    CacheOnlyMiss,
    Chunk,
    ContentFiltered,
    ContextTooLong,
    DeadlineExceeded,
    Declined,
    GenerateError,
    GenerateRequest,
    Image,
    Message,
    ModelNotFound,
    ModelOffer,
    Price,
    ProviderBusy,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
    Text,
    Tool,
)


def candidate(node: str, *, own: bool = False, **offer: Any) -> Candidate:
    return Candidate(
        peer=f"id-{node}", node=node, provider="vllm", offer=ModelOffer(id="m", **offer), own=own
    )


def asking(text: str = "hi", **fields: Any) -> GenerateRequest:
    message = Message(role="user", content=(Text(text=text),))
    return GenerateRequest(model="m", messages=(message,), **fields)


def attempts(
    *candidates: Candidate,
    ruled_out: Sequence[RuledOut] = (),
    models: Sequence[str] = (),
    for_peer: bool = False,
    budget: Budget | None = None,
    obstacles: Mapping[Candidate, Obstacle] = MappingProxyType({}),
    held: Mapping[Candidate, Obstacle] = MappingProxyType({}),
    until: float = math.inf,
    rng: Random | None = None,
    **fields: Any,
) -> Attempts:
    """`held`: the candidates with an obstacle from the beginning, until that is taken out."""
    request = asking(**fields)
    out = [r for c, obstacle in held.items() if (r := rule_out(c, request, obstacle))]
    return Attempts(
        request,
        candidates,
        [*ruled_out, *out],
        choose=lambda left: left[0],
        models=lambda: models,
        obstacle=lambda c: obstacles.get(c) or held.get(c),
        budget=budget or retry_budget(0.0),
        rng=rng or Random(1),
        until=until,
        for_peer=for_peer,
    )


def ask(way: Attempts, now: float = 0.0) -> Candidate:
    """Who is asked now; it must be at once."""
    step = way.next(now)
    assert step.pause == 0
    return step.candidate


A, B, C = candidate("a"), candidate("b"), candidate("c")


# --- the way through the candidates


@pytest.mark.parametrize(
    "error",
    [
        ProviderUnavailable("500"),
        ProviderUnavailable("busy", retry_after=3.0),
        DeadlineExceeded("no token"),
        ModelNotFound("not here any more"),
        StreamInterrupted("broke before anything was sent"),
        GenerateError("odd"),
    ],
)
def test_the_next_is_asked_after(error: GenerateError) -> None:
    way = attempts(A, B)
    assert ask(way) is A
    way.failed(A, error, 0.1)
    assert ask(way) is B
    way.answered(B, 0.2)
    assert [str(a) for a in way.tried] == [f"a:vllm: {error.message}", "b:vllm: answered"]


@pytest.mark.parametrize(
    "error",
    [RequestRejected("bad temperature"), ContentFiltered("no"), CacheOnlyMiss("not stored")],
)
def test_nobody_else_is_asked_after(error: GenerateError) -> None:
    way = attempts(A, B)
    with pytest.raises(type(error)) as raised:
        way.failed(ask(way), error, 0.1)
    assert raised.value is error
    assert len(way.tried) == 1


def test_only_a_larger_model_is_asked_when_the_context_is_too_long() -> None:
    small, same, large, unknown = (
        candidate("small", context_length=4096),
        candidate("same", context_length=4096),
        candidate("large", context_length=8192),
        candidate("unknown"),
    )
    error = ContextTooLong("5000 tokens")
    way = attempts(small, same, unknown, large)
    way.failed(ask(way), error, 0.1)
    assert ask(way) is large
    with pytest.raises(ContextTooLong) as raised:
        way.failed(large, error, 0.1)
    assert raised.value is error


def test_each_is_asked_once_and_the_error_names_all_with_their_reasons() -> None:
    way = attempts(A, B, held={C: Obstacle("its node is not reachable: refused", 2.0)})
    way.failed(ask(way), ProviderUnavailable("500 from vllm"), 0.1)
    way.failed(ask(way), DeadlineExceeded("no token within 120 s", retry_after=7.0), 120.0)
    with pytest.raises(ProviderUnavailable) as raised:
        ask(way)
    error = raised.value
    assert not isinstance(error, DeadlineExceeded)
    for part in ("`m`", "a:vllm: 500 from vllm", "b:vllm: no token within 120 s", "c:vllm: its no"):
        assert part in error.message
    assert error.retry_after == 2.0


def test_deadlines_alone_stay_deadlines_and_missing_models_missing() -> None:
    for kind in (DeadlineExceeded, ModelNotFound):
        way = attempts(A, B)
        way.failed(ask(way), kind("x"), 0.1)
        way.failed(ask(way), kind("y"), 0.1)
        with pytest.raises(kind):
            ask(way)


def test_one_whose_breaker_has_opened_meanwhile_is_passed_over() -> None:
    obstacles = {B: Obstacle("it failed and is left alone for 3.0 s more", 3.0)}
    way = attempts(A, B, C, obstacles=obstacles)
    way.failed(ask(way), ProviderUnavailable("500"), 0.1)
    assert ask(way) is C
    way.failed(C, ProviderUnavailable("502"), 0.1)
    with pytest.raises(ProviderUnavailable, match="b:vllm: it failed and is left alone") as raised:
        way.next(0.0)
    assert raised.value.retry_after == 3.0


# --- once more


SERVER = ProviderUnavailable("500", again=True)


def test_where_nobody_else_is_left_it_is_asked_once_more_after_a_pause() -> None:
    way = attempts(A, B)
    way.failed(ask(way), SERVER, 0.1)
    assert ask(way) is B  # another one first
    way.failed(B, DeadlineExceeded("silent"), 0.1)
    step = way.next(0.0)
    assert step.candidate is A
    assert PAUSE / 2 <= step.pause <= PAUSE * 1.5
    way.failed(A, SERVER, 0.1)
    with pytest.raises(ProviderUnavailable):
        way.next(1.0)


@pytest.mark.parametrize(
    "error",
    [
        DeadlineExceeded("silent"),
        ProviderBusy("full", retry_after=0.5),
        ProviderUnavailable("connection refused"),
        ProviderUnavailable("429", retry_after=LONGEST_PAUSE + 0.1),
        ModelNotFound("gone"),
    ],
)
def test_it_is_not_asked_again_after(error: GenerateError) -> None:
    way = attempts(A)
    way.failed(ask(way), error, 0.1)
    with pytest.raises(GenerateError):
        way.next(0.0)


def test_as_what_each_was_asked_is_kept() -> None:
    way = attempts(A, B)
    way.failed(ask(way), SERVER, 0.1)
    way.failed(ask(way), SERVER, 0.1)
    way.answered(way.next(0.0).candidate, 0.1)
    assert [(a.candidate, a.step.role, a.outcome) for a in way.tried] == [
        (A, "turn", "failed"),
        (B, "turn", "failed"),
        (A, "again", "answered"),
    ]


def test_a_peers_request_is_not_tried_again() -> None:
    way = attempts(A, for_peer=True)
    way.failed(ask(way), SERVER, 0.1)
    with pytest.raises(ProviderUnavailable) as raised:
        way.next(0.0)
    assert raised.value.again  # whoever asked decides


def test_the_pause_is_what_the_server_and_the_breaker_say() -> None:
    limited = attempts(A)
    limited.failed(ask(limited), ProviderUnavailable("429", retry_after=1.5), 0.1)
    assert limited.next(0.0).pause == 1.5
    obstacles: dict[Candidate, Obstacle] = {}
    broken = attempts(A, obstacles=obstacles)
    broken.failed(ask(broken), SERVER, 0.1)
    obstacles[A] = Obstacle("left alone", 1.0)
    assert broken.next(0.0).pause == 1.0
    hurried = attempts(A, until=1.0)
    hurried.failed(ask(hurried), ProviderUnavailable("429", retry_after=1.5), 0.1)
    with pytest.raises(ProviderUnavailable):
        hurried.next(0.0)


def test_pauses_differ() -> None:
    pauses = set()
    rng = Random(1)
    for _ in range(20):
        way = attempts(A, rng=rng)
        way.failed(ask(way), SERVER, 0.1)
        pauses.add(way.next(0.0).pause)
    assert len(pauses) == 20


def test_the_budget_bounds_what_is_sent_beyond_a_second_candidate() -> None:
    empty = Budget(0.2, most=20, now=0.0)
    way = attempts(A, B, C, budget=empty)
    way.failed(ask(way), SERVER, 0.1)
    assert ask(way) is B
    way.failed(B, SERVER, 0.1)
    with pytest.raises(ProviderUnavailable, match="too many requests were tried again lately"):
        way.next(0.0)
    way = attempts(A, budget=empty)
    way.failed(ask(way), SERVER, 0.1)
    with pytest.raises(ProviderUnavailable, match="too many requests"):
        way.next(0.0)


def test_a_budget_is_a_share_of_the_requests() -> None:
    share = Budget(0.25, most=3, now=0.0)
    assert not share.take(0.0)
    for _ in range(4):
        share.earn(0.0)
    assert share.take(0.0)
    assert not share.take(9e9)
    for _ in range(100):
        share.earn(9e9)
    assert [share.take(9e9) for _ in range(4)] == [True, True, True, False]
    fills = Budget(0.2, most=2, a_second=0.5, now=0.0)
    assert [fills.take(0.0) for _ in range(3)] == [True, True, False]
    assert not fills.take(1.0)
    assert fills.take(2.0)


# --- held back for a while


LATER = Obstacle("it is starting", 5.0)
SOON = Obstacle("its node is not reachable", 1.0)


def test_one_that_was_held_back_is_asked_once_it_may_be() -> None:
    for at_first in (True, False):
        obstacles = {B: LATER}
        way = attempts(A, held=obstacles) if at_first else attempts(B, A, obstacles=obstacles)
        assert ask(way) is A
        way.failed(A, ProviderUnavailable("500"), 0.1)
        assert not way.may_go_elsewhere
        obstacles.clear()
        assert way.may_go_elsewhere
        assert ask(way) is B
        way.failed(B, ProviderUnavailable("501"), 0.1)
        with pytest.raises(ProviderUnavailable, match="501") as raised:
            ask(way)
        assert "starting" not in raised.value.message


def test_an_answer_may_be_gone_on_with_by_one_that_is_held_back_at_first() -> None:
    first, second = candidate("a", can_continue=True), candidate("b", can_continue=True)
    obstacles = {second: LATER}
    way = attempts(first, held=obstacles)
    assert way.may_go_on
    assert not attempts(first).may_go_on
    way.answered(ask(way), 0.1)
    break_off(way)
    obstacles.clear()
    step = way.next(1.0)
    assert (step.candidate, step.way, step.after) == (second, "continue", first)


def test_it_is_told_why_nobody_goes_on() -> None:
    first, second = candidate("a", can_continue=True), candidate("b", can_continue=True)
    way = attempts(first, held={second: LATER})
    way.answered(ask(way), 0.1)
    break_off(way)
    with pytest.raises(StreamInterrupted, match="gone; b:vllm: it is starting; nobody can go on"):
        way.next(1.0)


def break_off(way: Attempts) -> None:
    so_far = SoFar()
    so_far.add(Chunk(text="one "))
    way.broke(StreamInterrupted("gone", partial="one "), 0.2, so_far)


def test_a_short_obstacle_is_waited_for_where_nobody_else_is_left() -> None:
    obstacles = {B: SOON}
    way = attempts(A, B, obstacles=obstacles)
    assert ask(way) is A
    way.failed(A, ProviderUnavailable("connection refused"), 0.1)
    step = way.next(0.0)
    assert (step.candidate, step.pause, step.role, step.number) == (B, 1.0, "turn", 2)
    # It is still held back after that, or again.
    way.passed_over(step, SOON)
    assert not way.under_way
    with pytest.raises(ProviderUnavailable, match="b:vllm: its node is not reachable"):
        way.next(1.0)
    obstacles.clear()
    assert way.next(2.0)[:3] == (B, 2, 0.0)


def test_one_that_failed_comes_before_one_whose_obstacle_takes_longer() -> None:
    way = attempts(A, held={B: SOON})
    way.failed(ask(way), SERVER, 0.1)
    step = way.next(0.0)
    assert (step.candidate, step.role) == (A, "again")
    way.passed_over(step, SOON)
    with pytest.raises(ProviderUnavailable):
        way.next(1.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"held": {B: LATER}},
        {"held": {B: SOON}, "until": 0.9},
        {"held": {B: SOON}, "for_peer": True},
        {"held": {B: SOON}, "budget": Budget(0.0, most=20.0, now=0.0)},
    ],
)
def test_it_is_not_waited_for(fields: dict[str, Any]) -> None:
    way = attempts(A, **fields)
    way.failed(ask(way), ProviderUnavailable("connection refused"), 0.1)
    with pytest.raises(ProviderUnavailable):
        way.next(0.0)


def test_where_nobody_was_asked_yet_it_ends_at_once() -> None:
    with pytest.raises(ProviderUnavailable) as raised:
        attempts(held={A: SOON}).next(0.0)
    assert raised.value.retry_after == 1.0


def test_a_larger_model_that_is_held_back_is_not_taken_for_none() -> None:
    small, same, large = (
        candidate(n, context_length=s) for n, s in (("s", 9), ("t", 9), ("l", 99))
    )
    way = attempts(small, same, held={large: LATER})
    way.failed(ask(way), ContextTooLong("10 tokens"), 0.1)
    with pytest.raises(ProviderUnavailable, match="l:vllm: it is starting") as raised:
        way.next(0.0)
    assert raised.value.retry_after == 5.0


# --- nobody to ask


def test_nobody_offers_it_says_what_there_is() -> None:
    with pytest.raises(ModelNotFound) as raised:
        attempts(models=["z", "llama", "z"]).next(0.0)
    assert raised.value.message == "nobody offers the model `m`; there are: llama, z"
    assert raised.value.field == "model"
    with pytest.raises(ModelNotFound, match="no model at all"):
        attempts().next(0.0)


def test_a_long_list_is_cut() -> None:
    with pytest.raises(ModelNotFound, match=f"and {100 - MOST_LISTED} more"):
        attempts(models=[f"m{i}" for i in range(100)]).next(0.0)


def reasons(*candidates: Candidate, obstacle: Obstacle | None = None, **fields: Any) -> Any:
    request = asking(**fields)
    if obstacle is not None:
        return attempts(held=dict.fromkeys(candidates, obstacle), **fields)
    found = [rule_out(c, request, None) for c in candidates]
    assert all(found)
    return attempts(ruled_out=[r for r in found if r], **fields)


def test_what_passes_is_an_unavailability_with_the_time_to_come_back() -> None:
    with pytest.raises(ProviderUnavailable) as raised:
        reasons(A, B, obstacle=Obstacle("it failed and is left alone for 3.0 s more", 3.0)).next(
            0.0
        )
    assert raised.value.retry_after == 3.0
    assert "a:vllm: it failed" in raised.value.message
    assert "b:vllm: it failed" in raised.value.message


def test_what_does_not_pass_is_the_requests_fault() -> None:
    third = candidate("a", egress=True)
    with pytest.raises(RequestRejected, match="a:vllm: privacy is `mesh`"):
        reasons(third, privacy="mesh").next(0.0)


def test_a_prompt_that_fits_nowhere_is_too_long() -> None:
    with pytest.raises(ContextTooLong, match="its 100 tokens"):
        reasons(candidate("a", context_length=100), text="x" * 9000).next(0.0)


def test_another_peer_than_the_one_asked_for_is_not_listed_as_a_reason() -> None:
    obstacle = Obstacle("starting", 5.0)
    with pytest.raises(ProviderUnavailable) as raised:
        attempts(held=dict.fromkeys((A, B), obstacle), peer="b").next(0.0)
    assert "b:vllm: starting" in raised.value.message
    assert "a:vllm" not in raised.value.message


def test_a_peer_that_does_not_have_it_is_a_missing_model() -> None:
    with pytest.raises(ModelNotFound, match="the request is for peer z"):
        reasons(A, B, peer="z").next(0.0)


def test_to_a_peer_that_asks_it_is_never_the_requests_fault() -> None:
    out = rule_out(A, asking(privacy="local"), None)
    assert out is not None
    with pytest.raises(ProviderUnavailable):
        attempts(ruled_out=[out], for_peer=True).next(0.0)


# --- the filter

IMAGES = (Message(role="user", content=(Image(url="data:image/png;base64,AA"),)),)


def request_with(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**{"model": "m", "messages": ()} | fields)


@pytest.mark.parametrize(
    ("who", "request_", "reason"),
    [
        (A, request_with(), None),
        (A, request_with(peer="a"), None),
        (A, request_with(peer="id-a"), None),
        (A, request_with(peer="b"), "for peer b"),
        (A, request_with(provider="vllm"), None),
        (A, request_with(provider="ollama"), "for provider ollama"),
        (A, request_with(privacy="mesh"), None),
        (A, request_with(privacy="local"), "another machine"),
        (candidate("a", own=True), request_with(privacy="local"), None),
        (candidate("a", own=True, egress=True), request_with(privacy="local"), "third party"),
        (candidate("a", egress=True), request_with(privacy="mesh"), "third party"),
        (candidate("a", egress=True), request_with(privacy="any"), None),
        (A, request_with(tools=(Tool(name="t"),)), "cannot call tools"),
        (candidate("a", tools=True), request_with(tools=(Tool(name="t"),)), None),
        (A, request_with(messages=IMAGES), "cannot see images"),
        (candidate("a", modalities=("text", "image")), request_with(messages=IMAGES), None),
        (A, request_with(prefix="so far"), "cannot continue"),
        (candidate("a", can_continue=True), request_with(prefix="so far"), None),
        (candidate("a", context_length=10), asking("x" * 80), None),
        (candidate("a", context_length=10), asking("x" * 88), "does not fit"),
        (replace(A, forbidden="it is blocked"), request_with(), "it is blocked"),
    ],
)
def test_the_filter(who: Candidate, request_: GenerateRequest, reason: str | None) -> None:
    ruled_out = rule_out(who, request_, None)
    if reason is None:
        assert ruled_out is None
    else:
        assert ruled_out is not None
        assert reason in ruled_out.reason
        assert ruled_out.wait is None


def test_a_peer_is_told_that_money_is_what_is_missing() -> None:
    dear = [
        RuledOut(candidate(n), "it costs $9", wait=w, too_dear=True)
        for n, w in (("a", 60), ("b", None))
    ]
    with pytest.raises(Declined, match="it costs") as declined:
        attempts(ruled_out=dear, for_peer=True).next(0.0)
    assert declined.value.retry_after == 60
    with pytest.raises(ProviderUnavailable) as here:
        attempts(ruled_out=dear).next(0.0)
    assert (type(here.value), here.value.retry_after) == (ProviderUnavailable, 60)
    with pytest.raises(RequestRejected) as here_never:
        attempts(ruled_out=dear[1:]).next(0.0)
    assert here_never.value.field == "promptmesh.max_cost"


def test_what_costs_too_much_is_ruled_out() -> None:
    dear = replace(A, paid=True, cost=0.5)
    ruled_out = rule_out(dear, asking(max_cost=0.4), None)
    assert ruled_out is not None
    assert ruled_out.too_dear
    assert rule_out(dear, asking(max_cost=0.5), None) is None


def test_what_broken_attempts_cost_counts_against_the_limit() -> None:
    offer = ModelOffer(id="m", can_continue=True, price=Price(completion=1_000_000))  # $1 a token
    first, second = (
        Candidate(peer=n, node=n, provider="x", offer=offer, paid=True, cost=4.0) for n in "ab"
    )
    free = candidate("free", can_continue=True)
    for most, goes_on in ((9.0, second), (6.0, free)):
        way = attempts(first, second, free, max_cost=most)
        way.answered(ask(way), 0.1)
        so_far = SoFar()
        for word in ("one ", "two ", "three"):
            so_far.add(Chunk(text=word))
        way.broke(StreamInterrupted("gone", partial=so_far.text), 0.2, so_far)
        assert ask(way) is goes_on
    way = attempts(first, second, max_cost=6.0)
    way.answered(ask(way), 0.1)
    way.broke(StreamInterrupted("gone", partial=so_far.text), 0.2, so_far)
    with pytest.raises(StreamInterrupted, match=r"\$4.00 there, and of \$6.00 .* \$4.00 are spent"):
        way.next(0.0)


def test_a_prompt_that_was_read_in_vain_counts_too() -> None:
    offer = ModelOffer(id="m", price=Price(prompt=1_000_000))
    first, second = (
        Candidate(peer=n, node=n, provider="x", offer=offer, paid=True, cost=1.0) for n in "ab"
    )
    for error, kind in ((SERVER, None), (DeadlineExceeded("silent"), DeadlineExceeded)):
        way = attempts(first, second, max_cost=1.5)
        way.failed(ask(way), error, 0.1)
        if kind is None:  # an error costs nothing
            assert ask(way) is second
        else:
            with pytest.raises(kind, match="are spent"):
                way.next(0.0)
