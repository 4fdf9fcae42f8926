"""Slots and the queue around a provider."""

import contextlib
import math
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from promptmesh.providers.admission import Admission
from promptmesh.providers.base import (
    Answering,
    Chunk,
    Completion,
    GenerateRequest,
    Message,
    Origin,
    Priority,
    Provider,
    ProviderBusy,
    ProviderUnavailable,
    Sampling,
    StreamInterrupted,
    Text,
)
from promptmesh.providers.echo import Echo, EchoSettings
from promptmesh.providers.slots import Load, Waiting
from promptmesh.providers.waiting import LEFT, MAX_KINDS, MOST_OVERTAKEN, PRIORITIES


def request(
    text: str = "one two three", max_tokens: int | None = None, **fields: Any
) -> GenerateRequest:
    return GenerateRequest(
        **fields,
        model="echo",
        messages=(Message(role="user", content=(Text(text=text),)),),
        sampling=Sampling(max_tokens=max_tokens),
    )


async def ask(provider: Provider, text: str = "one two three") -> Completion:
    async with provider.open(request(text)) as answering:
        return await answering.completion()


def admission(slots: int | None, max_waiting: int = 64, **settings: Any) -> Admission:
    return Admission(Echo(EchoSettings(**settings)), slots=slots, max_waiting=max_waiting)


async def test_it_is_the_provider_it_wraps() -> None:
    echo = Echo(EchoSettings(name="e", models=("a",)))
    wrapped: Provider = Admission(echo, slots=1)
    assert wrapped.name == "e"
    assert wrapped.models() == echo.models()
    assert (await wrapped.check()).state == "ready"


async def test_answers_pass_through() -> None:
    for slots in (None, 1):
        got = await ask(admission(slots))
        assert got == await ask(Echo())


async def test_slots_and_order() -> None:
    wrapped = admission(2)
    order: list[int] = []
    go = [trio.Event() for _ in range(5)]

    async def one(number: int) -> None:
        async with wrapped.open(request()):
            order.append(number)
            await go[number].wait()

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(one, number)
            await wait_all_tasks_blocked()
        assert order == [0, 1]
        assert wrapped.slots.load() == Load(running=2, waiting=3, slots=2)
        go[1].set()
        await wait_all_tasks_blocked()
        assert order == [0, 1, 2]
        assert (wrapped.slots.load().running, wrapped.slots.load().waiting) == (2, 2)
        go[0].set()
        await wait_all_tasks_blocked()
        assert order == [0, 1, 2, 3]
        for event in go:
            event.set()
    assert order == [0, 1, 2, 3, 4]
    assert wrapped.slots.load() == Load(slots=2)


async def test_the_wait_is_told_by_what_those_inside_are_expected_to_take(
    autojump_clock: MockClock,
) -> None:
    """Short ones take 2 s and long ones 20 s, in two slots."""
    wrapped = admission(2)

    async def one(tokens: int, seconds: float) -> None:
        async with wrapped.open(request(max_tokens=tokens)):
            await trio.sleep(seconds)

    async with trio.open_nursery() as nursery:
        assert wrapped.slots.load().wait is None
        for tokens, seconds in ((10, 2.0), (1000, 20.0)):
            await one(tokens, seconds)
        assert wrapped.slots.load().wait is None  # a slot is free
        nursery.start_soon(one, 10, 2.0)
        nursery.start_soon(one, 1000, 50.0)
        await trio.sleep(0.5)
        assert wrapped.slots.load().wait == pytest.approx(1.5)
        nursery.start_soon(one, 1000, 20.0)
        await trio.sleep(0.5)
        assert wrapped.slots.load().wait == pytest.approx(19.0)  # behind the other long one's slot
        await trio.sleep(20.0)  # the first long one takes longer than was expected, and may go on
        assert wrapped.slots.load().wait == pytest.approx(LEFT * 20.0)


async def test_a_kind_that_never_came_is_taken_for_the_average(autojump_clock: MockClock) -> None:
    wrapped = admission(1, max_waiting=2 * MAX_KINDS)

    async def one(tokens: int) -> None:
        async with wrapped.open(request(max_tokens=tokens)):
            await trio.sleep(4.0)

    async with trio.open_nursery() as nursery:
        await one(10)
        for tokens in range(1, 1 + MAX_KINDS + 3):
            nursery.start_soon(one, tokens)
            await wait_all_tasks_blocked()
            if tokens == 1:
                await trio.sleep(1.0)
                assert wrapped.slots.load().wait == pytest.approx(3.0)
    assert len(wrapped.slots._times._by_kind) == MAX_KINDS


async def test_newcomer_does_not_overtake_the_queue() -> None:
    wrapped = admission(1)
    order: list[str] = []

    async def one(name: str) -> None:
        async with wrapped.open(request()):
            order.append(name)

    async with trio.open_nursery() as nursery:
        async with wrapped.open(request()):
            nursery.start_soon(one, "first")
            await wait_all_tasks_blocked()
        # The slot is free in this moment, but it belongs to the first.
        await one("second")
    assert order == ["first", "second"]


async def test_unlimited() -> None:
    wrapped = admission(None)
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(ask, wrapped, "[[echo hang]]")
        await wait_all_tasks_blocked()
        assert wrapped.slots.load() == Load(running=50)
        nursery.cancel_scope.cancel()
    assert wrapped.slots.load() == Load()


async def test_full_queue(autojump_clock: MockClock) -> None:
    wrapped = admission(2, max_waiting=1, first_s=8)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask, wrapped)
        await wait_all_tasks_blocked()
        with pytest.raises(ProviderBusy, match="queue of echo is full") as caught:
            await ask(wrapped)
        assert caught.value.retry_after == 1.0  # nothing was measured
        assert wrapped.slots.load() == Load(running=2, waiting=1, slots=2)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask, wrapped)
        await wait_all_tasks_blocked()
        with pytest.raises(ProviderBusy) as caught:
            await ask(wrapped)
        # A request takes 8 s, there are two slots, and one waits for the first.
        assert caught.value.retry_after == pytest.approx(8.0)
        assert "2 are running and 1 wait, and it would be number 2" in caught.value.message


async def test_queue_of_length_zero() -> None:
    wrapped = admission(1, max_waiting=0)
    async with wrapped.open(request()):
        with pytest.raises(ProviderUnavailable):
            await ask(wrapped)
    assert (await ask(wrapped)).text == "one two three"


async def test_cancelled_request_leaves_the_queue_at_once() -> None:
    wrapped = admission(1)
    async with trio.open_nursery() as nursery, wrapped.open(request()):
        scope = trio.CancelScope()

        async def wait() -> None:
            with scope:
                await ask(wrapped)

        nursery.start_soon(wait)
        nursery.start_soon(ask, wrapped)
        await wait_all_tasks_blocked()
        assert wrapped.slots.load().waiting == 2
        scope.cancel()
        await wait_all_tasks_blocked()
        assert wrapped.slots.load().waiting == 1
    assert wrapped.slots.load() == Load(slots=1)


async def test_slot_is_not_lost_if_it_is_handed_to_a_cancelled_request() -> None:
    wrapped = admission(1)
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def wait() -> None:
            with scope:
                await ask(wrapped)

        async with wrapped.open(request()):
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
        scope.cancel()  # it was woken, but has not run yet
    assert wrapped.slots.load() == Load(slots=1)
    assert (await ask(wrapped)).text == "one two three"


@pytest.mark.parametrize("text", ["[[echo fail=unavailable]]", "a b [[echo after=1]]"])
async def test_slot_is_given_back_after_a_failure(text: str) -> None:
    wrapped = admission(1)
    for _ in range(3):
        async with wrapped.open(request(text)) as answering:
            with pytest.raises((ProviderUnavailable, StreamInterrupted)):
                await answering.completion()
            assert wrapped.slots.load().running == 0
        assert wrapped.slots.load().running == 0


async def test_slot_is_given_back_if_the_provider_does_not_begin() -> None:
    wrapped = admission(1, context_length=1)
    for _ in range(3):
        with pytest.raises(Exception, match="do not fit"):
            await ask(wrapped)
    assert wrapped.slots.load() == Load(slots=1)


async def test_slot_is_held_until_the_closing_chunk() -> None:
    wrapped = admission(1)
    async with wrapped.open(request("a")) as answering:
        chunks = aiter(answering.chunks)
        assert (await anext(chunks)).text == "a"
        assert wrapped.slots.load().running == 1
        assert (await anext(chunks)).finish_reason == "stop"
        assert wrapped.slots.load().running == 0
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)
        assert wrapped.slots.load().running == 0
    assert wrapped.slots.load().running == 0


async def test_leaving_cancels_the_work() -> None:
    wrapped = admission(1)
    assert isinstance(wrapped.provider, Echo)
    async with wrapped.open(request()) as answering:
        await anext(aiter(answering.chunks))
    assert wrapped.provider.stats().cancelled == 1
    assert wrapped.slots.load().running == 0


async def test_chunks_that_are_a_generator_are_closed() -> None:
    closed = []

    async def chunks() -> AsyncIterator[Chunk]:
        try:
            while True:
                yield Chunk(text="a")
        finally:
            closed.append(True)

    class Generating(Echo):
        @contextlib.asynccontextmanager
        async def open(self, request: GenerateRequest) -> AsyncIterator[Answering]:  # type: ignore[override]
            yield Answering(Origin(), chunks())
            assert closed

    wrapped = Admission(Generating(), slots=1)
    async with wrapped.open(request()) as answering:
        await anext(aiter(answering.chunks))
    assert closed == [True]


async def test_measurements(autojump_clock: MockClock) -> None:
    wrapped = admission(1)
    assert (wrapped.ttft, wrapped.rate) == (None, None)
    await ask(wrapped, "[[echo n=11 first_s=2 gap_s=0.5]]")
    # The closing chunk comes a gap after the last word: 11 words in 11 gaps.
    assert wrapped.ttft == pytest.approx(2)
    assert wrapped.rate == pytest.approx(2)
    await ask(wrapped, "[[echo n=11 first_s=7 gap_s=0.1]]")
    assert wrapped.ttft == pytest.approx(3)
    assert wrapped.rate == pytest.approx(3.6)


async def test_waiting_in_the_queue_is_not_the_providers_slowness(
    autojump_clock: MockClock,
) -> None:
    wrapped = admission(1, first_s=3)
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(ask, wrapped)
    assert wrapped.ttft == pytest.approx(3)


async def test_answer_in_one_piece_is_measured_over_all(autojump_clock: MockClock) -> None:
    wrapped = admission(1)
    await ask(wrapped, "[[echo n=1 first_s=2]]")
    assert wrapped.rate == pytest.approx(0.5)


async def test_failure_is_no_measurement(autojump_clock: MockClock) -> None:
    wrapped = admission(1)
    with pytest.raises(ProviderUnavailable):
        await ask(wrapped, "[[echo first_s=1 fail=unavailable]]")
    assert (wrapped.ttft, wrapped.rate) == (None, None)


# --- who goes first -----------------------------------------------------------------------------


async def in_turn(wrapped: Admission, names: list[str], order: list[str]) -> None:
    """One after the other asks, behind one that has the slot; `own 1` by its priority."""
    async with trio.open_nursery() as nursery, wrapped.open(request()):
        for name in names:
            nursery.start_soon(one, wrapped, name, order)
            await wait_all_tasks_blocked()


async def one(wrapped: Admission, name: str, order: list[str]) -> None:
    priority: Any = name.split()[0]
    try:
        async with wrapped.open(request(priority=priority, id=name)):
            order.append(name)
    except ProviderBusy:
        order.append(f"{name} refused")


async def test_own_requests_go_first_and_what_nobody_waits_for_last() -> None:
    order: list[str] = []
    names = ["background 1", "member 1", "own 1", "background 2", "member 2", "own 2"]
    await in_turn(admission(1), names, order)
    assert order == ["own 1", "own 2", "member 1", "member 2", "background 1", "background 2"]


async def test_a_more_urgent_one_takes_the_place_of_the_last_in_a_full_queue() -> None:
    order: list[str] = []
    names = ["background 1", "background 2", "member 1", "own 1", "own 2", "member 2"]
    await in_turn(admission(1, max_waiting=2), names, order)
    refused = [name for name in order if name.endswith("refused")]
    assert refused == [
        *("background 2 refused", "background 1 refused", "member 1 refused"),
        "member 2 refused",
    ]
    assert order[-2:] == ["own 1", "own 2"]


async def test_the_load_is_what_a_request_of_that_priority_waits_for(
    autojump_clock: MockClock,
) -> None:
    wrapped = admission(1, first_s=10)
    await ask(wrapped)
    async with trio.open_nursery() as nursery:
        for priority in ("own", "background", "own", "member", "background"):
            nursery.start_soon(_completed, wrapped, request(priority=priority))
            await wait_all_tasks_blocked()
        waiting = [wrapped.slots.load(priority).waiting for priority in PRIORITIES]
        waits = [wrapped.slots.load(priority).wait for priority in PRIORITIES]
        assert waiting == [1, 2, 4]
        assert waits == [pytest.approx(seconds) for seconds in (20, 30, 50)]
        assert wrapped.slots.load() == wrapped.slots.load("background")


async def _completed(wrapped: Admission, asked: GenerateRequest) -> None:
    async with wrapped.open(asked) as answering:
        await answering.completion()


async def test_who_waits_is_told_its_place_and_how_long(autojump_clock: MockClock) -> None:
    wrapped = admission(1, first_s=10)
    async with trio.open_nursery() as nursery:
        for number, priority in enumerate(("own", "background", "member", "own")):
            asked = request(priority=priority, id=f"r{number}")
            nursery.start_soon(_completed, wrapped, asked)
            await wait_all_tasks_blocked()
        assert wrapped.slots.waiting("r3") == Waiting(place=1, of=3)  # nothing was measured
        await trio.sleep(14)  # r0 is done, and r3 has the slot
        assert [wrapped.slots.waiting(f"r{n}") for n in (0, 3, 4)] == [None] * 3
        assert wrapped.slots.waiting("") is None
        assert wrapped.slots.waiting("r2") == Waiting(place=1, of=2, wait=6.0)
        assert wrapped.slots.waiting("r1") == Waiting(place=2, of=2, wait=16.0)
        wrapped.slots.urge("r1", "own")
        assert wrapped.slots.waiting("r1") == Waiting(place=1, of=2, wait=6.0)


async def test_a_flood_of_own_requests_lets_a_member_have_its_turn(
    autojump_clock: MockClock,
) -> None:
    wrapped = admission(1, first_s=1)
    order: list[str] = []

    async def own(number: int) -> None:
        while True:
            await _completed(wrapped, request(priority="own"))
            order.append("own")

    async with trio.open_nursery() as nursery:
        for number in range(2):
            nursery.start_soon(own, number)
        await trio.sleep(0.5)
        await _completed(wrapped, request(priority="member"))
        nursery.cancel_scope.cancel()
    assert len(order) == MOST_OVERTAKEN + 2  # with those that came before it


# --- deadlines ----------------------------------------------------------------------------------


async def test_who_would_wait_in_vain_is_refused_at_once(autojump_clock: MockClock) -> None:
    wrapped = admission(1, first_s=10)
    await ask(wrapped)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, wrapped)
        await wait_all_tasks_blocked()
        started = trio.current_time()
        with trio.fail_after(9), pytest.raises(ProviderBusy, match="too late") as caught:
            await ask(wrapped)
        assert trio.current_time() == started
        assert caught.value.retry_after == pytest.approx(10)
        with trio.move_on_after(11) as limit:  # its turn comes, but no answer
            await ask(wrapped)
        assert limit.cancelled_caught
        assert trio.current_time() - started == pytest.approx(11)
    assert wrapped.slots.load() == Load(slots=1)


async def test_one_whose_time_is_over_leaves_the_queue(autojump_clock: MockClock) -> None:
    wrapped = admission(1)
    async with wrapped.open(request()):
        with trio.move_on_after(3) as limit:
            await ask(wrapped)
        assert limit.cancelled_caught
        assert wrapped.slots.load() == Load(running=1, slots=1)


class Visit(NamedTuple):
    """A request: when it comes, how long it holds its slot, when it gives up."""

    comes: int
    holds: int
    gives_up: int | None
    priority: Priority
    fails: bool


visits = st.lists(
    st.builds(
        Visit,
        st.integers(0, 6),
        st.integers(0, 4),
        st.none() | st.integers(0, 8),
        st.sampled_from(PRIORITIES),
        st.booleans(),
    ),
    max_size=14,
)


@settings(deadline=None)
@given(visits, st.integers(1, 3), st.integers(0, 4))
def test_every_slot_is_given_back_exactly_once(
    given: list[Visit], slots: int, max_waiting: int
) -> None:
    """Whoever comes, fails, gives up or is refused at the same moments."""
    trio.run(_visited, given, slots, max_waiting, clock=MockClock(autojump_threshold=0))


async def _visited(given: list[Visit], slots: int, max_waiting: int) -> None:
    wrapped = admission(slots, max_waiting)
    ended = 0

    def check() -> None:
        load = wrapped.slots.load()
        assert 0 <= load.running <= slots
        assert load.waiting <= max_waiting
        assert load.running == slots or not load.waiting

    async def visit(one: Visit) -> None:
        nonlocal ended
        await trio.sleep(one.comes)
        with trio.move_on_after(math.inf if one.gives_up is None else one.gives_up):
            with contextlib.suppress(ProviderUnavailable):
                async with wrapped.open(request(priority=one.priority)):
                    check()
                    await trio.sleep(one.holds)
                    if one.fails:
                        raise ProviderUnavailable("it fails")
        check()
        ended += 1

    async with trio.open_nursery() as nursery:
        for one in given:
            nursery.start_soon(visit, one)
    assert ended == len(given)
    assert wrapped.slots.load() == Load(slots=slots)
    assert not wrapped.slots._gates
