"""What may be asked in a minute: never more, whoever asks, and nothing lost."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.providers.admission import Admission
from promptmesh.providers.base import (
    EmbedRequest,
    GenerateRequest,
    Message,
    Priority,
    ProviderBusy,
    ProviderUnavailable,
    Sampling,
    Text,
)
from promptmesh.providers.echo import Echo, EchoSettings
from promptmesh.providers.rate_limits import WINDOW, Grant, RateLimiter, Rates
from promptmesh.providers.throttle import Throttle

#: A test names the clock itself: it works only for who does.
Clock = trio.testing.MockClock


class Asked(NamedTuple):
    """A request: after so many seconds, what it reserves, what it uses of it, and how it ends."""

    after: float
    reserved: int
    used: float
    cancelled: bool
    lasts: float


asked = st.builds(
    Asked,
    st.sampled_from([0.0, 0.1, 1.0, 7.3, 20.0, 59.9, 60.0, 61.0]),
    st.integers(0, 100),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.booleans(),
    st.sampled_from([0.0, 3.0, 70.0]),
)


@given(
    st.lists(asked, max_size=40),
    st.one_of(st.none(), st.integers(1, 5)),
    st.one_of(st.none(), st.integers(100, 300)),
)
def test_no_window_ever_has_more_than_the_limit(
    requests: list[Asked], most: int | None, tokens: int | None
) -> None:
    limiter = RateLimiter(Rates(most, tokens))
    now = 0.0
    ends: list[tuple[float, Grant, int]] = []
    began: list[tuple[float, float]] = []
    for request in requests:
        now += request.after
        at = limiter.when(request.reserved, now)
        assert at == limiter.forecast([request.reserved], now)
        assert now <= at <= now + WINDOW, "the longest wait is for the window to pass"
        now = max(now, at)
        assert limiter.when(request.reserved, now) == now, "it is not put off again"
        for grant, used in [(g, u) for end, g, u in ends if end <= now]:
            limiter.settle(grant, used)
        ends = [each for each in ends if each[0] > now]
        if limiter.when(request.reserved, now) > now:
            continue
        grant = limiter.take(request.reserved, now)
        if request.cancelled:
            limiter.cancel(grant)
            continue
        began.append((now, request.reserved * request.used))
        ends.append((now + request.lasts, grant, int(request.reserved * request.used)))
    for end, _ in began:
        window = [used for at, used in began if at <= end < at + WINDOW]
        assert most is None or len(window) <= most
        assert tokens is None or sum(map(math.floor, window)) <= tokens


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12))
def test_a_forecast_is_what_then_happens(tokens: list[int]) -> None:
    limiter, told = RateLimiter(Rates(3, 100)), RateLimiter(Rates(3, 100))
    now = 0.0
    for count, each in enumerate(tokens, 1):
        now = max(now, limiter.when(each, now))
        limiter.take(each, now)
        assert told.forecast(tokens[:count], 0.0) == now


def test_what_was_reserved_and_not_used_is_there_for_others() -> None:
    limiter = RateLimiter(Rates(tokens_per_minute=100))
    grant = limiter.take(90, 0.0)
    assert limiter.when(20, 0.0) == 60.0
    limiter.settle(grant, 30)
    assert limiter.when(20, 0.0) == 0.0
    # More than was thought counts, too; and what has left the window counts no more.
    limiter.settle(grant, 120)
    assert limiter.when(20, 1.0) == 60.0
    assert limiter.when(100, 60.0) == 60.0
    limiter.settle(grant, 500)
    assert limiter.when(100, 60.0) == 60.0


def test_the_answer_is_reserved_as_long_as_it_may_be_or_usually_is() -> None:
    limiter = RateLimiter(Rates(tokens_per_minute=1000))
    assert limiter.reserve(10.2, 50) == 61
    assert limiter.reserve(10, None) == 510
    assert limiter.reserve(10, 5000) == 1000, "more can never be had: it waits for all of it"
    for _ in range(30):
        limiter.settle(limiter.take(0, 0.0), 100, answer=90)
    assert 95 <= limiter.reserve(10, None) <= 105
    assert RateLimiter(Rates(5)).reserve(10, 50) == 0


def test_rates_of_two_tables() -> None:
    assert Rates(5, None, 2).stricter(Rates(3, 100)) == Rates(3, 100, 2)
    assert not Rates()
    assert str(Rates(60, None, 2)) == "60 requests a minute, 2 requests at once"


# --- around a provider


def request(
    name: str = "", *, words: int = 3, max_tokens: int = 10, **fields: Any
) -> GenerateRequest:
    message = Message(role="user", content=(Text(text="word " * words),))
    sampling = Sampling(max_tokens=max_tokens)
    return GenerateRequest(model="echo", messages=(message,), sampling=sampling, id=name, **fields)


def limited(
    rates: Rates | RateLimiter,
    *,
    slots: int | None = None,
    refuses: bool = False,
    member: Rates | None = None,
    **echo: Any,
) -> Admission:
    limiter = rates if isinstance(rates, RateLimiter) else RateLimiter(rates)
    throttle = Throttle(limiter, member=member, refuses=refuses)
    return Admission(Echo(EchoSettings(name="e", **echo)), slots=slots, throttle=throttle)


class Asking:
    """Asks, and notes who began when."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.began: list[tuple[str, float]] = []
        self._nursery = nursery

    async def ask(self, admission: Admission, name: str, **fields: Any) -> None:
        async with admission.open(request(name, **fields)) as answering:
            self.began.append((name, trio.current_time()))
            await answering.completion()

    async def start(self, admission: Admission, *names: str, **fields: Any) -> None:
        for name in names:
            self._nursery.start_soon(lambda n=name: self.ask(admission, n, **fields))
            await trio.testing.wait_all_tasks_blocked()

    @property
    def order(self) -> str:
        return "".join(name for name, _ in self.began)


async def test_requests_wait_for_their_minute(autojump_clock: Clock) -> None:
    admission = limited(Rates(2))
    assert admission.slots.free
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        asking = Asking(nursery)
        await asking.start(admission, "a", "b", "c", "d", "e")
        waiting = admission.slots.waiting("e")
        assert waiting is not None
        assert (waiting.place, waiting.of) == (3, 3)
        assert waiting.wait == pytest.approx(120)
        load = admission.slots.load()
        assert (load.waiting, load.limited) == (3, True)
        assert load.wait == pytest.approx(120)
    assert sorted(asking.order[2:4]) == ["c", "d"], "they begin in the same moment"
    assert (asking.order[:2], asking.order[4:]) == ("ab", "e")
    assert [at - began for _, at in asking.began] == pytest.approx([0, 0, 60, 60, 120])


async def test_the_usage_settles_what_was_reserved(autojump_clock: Clock) -> None:
    # The echo says as many tokens as it was given words, and not the 500 that it might.
    admission = limited(Rates(tokens_per_minute=600))
    for _ in range(5):
        async with admission.open(request(max_tokens=500)) as answering:
            await answering.completion()
    assert trio.current_time() < 1
    # Two at once are more than may be, as nobody knows how long they will be.
    async with trio.open_nursery() as nursery:
        asking = Asking(nursery)
        await asking.start(admission, "a", "b", max_tokens=500)
    assert asking.order == "ab"


async def test_a_prompt_larger_than_the_limit_goes_elsewhere(autojump_clock: Clock) -> None:
    admission = limited(Rates(tokens_per_minute=50))
    with pytest.raises(ProviderUnavailable, match="takes 50 a minute") as caught:
        async with admission.open(request(words=1000)):
            pass
    assert caught.value.retry_after is None


async def test_who_may_not_wait_is_told_when(autojump_clock: Clock) -> None:
    admission = limited(Rates(1), refuses=True)
    async with trio.open_nursery() as nursery:
        asking = Asking(nursery)
        await asking.start(admission, "a")
        await trio.sleep(20)
        with pytest.raises(ProviderBusy, match="limit of 1 requests a minute") as caught:
            await asking.ask(admission, "b")
        assert caught.value.retry_after == pytest.approx(40, abs=0.1)
        await trio.sleep(caught.value.retry_after or 0)
        await asking.start(admission, "c")
    assert asking.order == "ac"


async def test_who_may_not_wait_may_wait_for_a_slot(autojump_clock: Clock) -> None:
    admission = limited(Rates(2), refuses=True, slots=1, first_s=5)
    async with trio.open_nursery() as nursery:
        asking = Asking(nursery)
        await asking.start(admission, "a", "b")
        with pytest.raises(ProviderBusy, match="at its limit"):
            await asking.ask(admission, "c")
    assert asking.order == "ab"


async def test_a_turn_after_the_deadline_is_refused_at_once(autojump_clock: Clock) -> None:
    admission = limited(Rates(1))
    async with trio.open_nursery() as nursery:
        asking = Asking(nursery)
        await asking.start(admission, "a")
        with trio.move_on_after(30), pytest.raises(ProviderBusy, match="too late") as caught:
            await asking.ask(admission, "b")
        assert caught.value.retry_after == pytest.approx(60)
    assert trio.current_time() < 31


async def test_who_leaves_the_queue_takes_nothing(autojump_clock: Clock) -> None:
    admission = limited(Rates(1, 1000))
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        asking = Asking(nursery)
        await asking.start(admission, "a")
        async with trio.open_nursery() as leaving:
            gone = Asking(leaving)
            await gone.start(admission, "x", "y", "z")
            await asking.start(admission, "b")
            await trio.sleep(10)
            leaving.cancel_scope.cancel()
    assert asking.order == "ab"
    assert asking.began[1][1] - began == pytest.approx(60)


@pytest.mark.parametrize("moment", [59.999, 60.0, 60.001])
async def test_leaving_as_ones_turn_comes_loses_no_turn(
    moment: float, autojump_clock: Clock
) -> None:
    admission = limited(Rates(1))
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        asking = Asking(nursery)
        await asking.start(admission, "a")
        left = Asking(nursery)

        scope = trio.CancelScope()

        async def leave() -> None:
            with scope:
                await left.ask(admission, "x")

        nursery.start_soon(leave)
        await trio.testing.wait_all_tasks_blocked()
        await asking.start(admission, "b")
        await trio.sleep_until(began + moment)
        scope.cancel()
    assert asking.order == "ab"
    # Who began and was then cancelled has had its request; who did not, has not.
    assert asking.began[1][1] - began == pytest.approx(60 if not left.began else 120, abs=0.01)


async def test_the_urgent_go_first_and_nobody_starves(autojump_clock: Clock) -> None:
    admission = limited(Rates(1))
    async with trio.open_nursery() as nursery:
        asking = Asking(nursery)
        await asking.start(admission, "-")
        for priority, name in (("background", "b"), ("member", "m"), ("own", "o")):
            urgency: Priority = priority  # type: ignore[assignment] # one of the three
            await asking.start(admission, *(name * 20), priority=urgency)
    order = asking.order[1:]
    assert order[:8] == "oooooooo"
    assert order.index("b") < 12
    assert sorted(order) == sorted("o" * 20 + "m" * 20 + "b" * 20)
    assert all(b - a >= 60 - 1e-6 for (_, a), (_, b) in pairwise(asking.began))


async def test_providers_with_one_key_share_it_in_turn(autojump_clock: Clock) -> None:
    limiter = RateLimiter(Rates(2))
    one, other = limited(limiter), limited(limiter)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        asking = Asking(nursery)
        for number in range(3):
            await asking.start(one, f"a{number}")
            await trio.sleep(0.1)
            await asking.start(other, f"b{number}")
            await trio.sleep(0.1)
    assert asking.order == "a0b0a1b1a2b2"
    times = [round((at - began) / 60) for _, at in asking.began]
    assert times == [0, 0, 1, 1, 2, 2]


async def test_one_key_has_so_many_at_once(autojump_clock: Clock) -> None:
    limiter, start = RateLimiter(Rates(at_once=1)), trio.current_time()
    one, other = limited(limiter, first_s=5), limited(limiter, first_s=5)
    async with trio.open_nursery() as nursery:
        asking = Asking(nursery)
        await asking.start(one, "a", "c")
        await asking.start(other, "b")
    assert asking.order == "acb", "c had waited longer"
    assert trio.current_time() - start == pytest.approx(15, abs=0.5)


async def test_a_member_has_its_share_and_no_more(autojump_clock: Clock) -> None:
    admission = limited(Rates(), member=Rates(1))
    async with trio.open_nursery() as nursery:
        asking = Asking(nursery)
        await asking.start(admission, "a", asker="bob")
        with pytest.raises(ProviderBusy, match="gives each member 1 requests") as caught:
            await asking.ask(admission, "b", asker="bob")
        assert caught.value.retry_after == pytest.approx(60, abs=0.1)
        await asking.start(admission, "c", asker="eve")
        await asking.start(admission, "d", "e")
    assert asking.order == "acde"


async def test_a_member_that_was_refused_for_the_key_keeps_its_share(
    autojump_clock: Clock,
) -> None:
    admission = limited(Rates(1), member=Rates(1), refuses=True)
    async with trio.open_nursery() as nursery:
        asking = Asking(nursery)
        await asking.start(admission, "a")
        with pytest.raises(ProviderBusy, match="at its limit"):
            await asking.ask(admission, "b", asker="bob")
        await trio.sleep(60)
        await asking.start(admission, "c", asker="bob")
    assert asking.order == "ac"


async def test_embeddings_count(autojump_clock: Clock) -> None:
    admission = limited(Rates(1), embedding_models=("v",))
    began = trio.current_time()
    for _ in range(2):
        await admission.embed(EmbedRequest(model="v", inputs=("one two",)))
    assert trio.current_time() - began == pytest.approx(60)
