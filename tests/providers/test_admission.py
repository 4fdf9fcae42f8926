"""Slots and the queue around a provider."""

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from promptmesh.providers.admission import LEFT, MAX_KINDS, Admission, Load
from promptmesh.providers.base import (
    Completion,
    GenerateRequest,
    Message,
    Provider,
    ProviderUnavailable,
    Sampling,
    StreamInterrupted,
    Text,
)
from promptmesh.providers.echo import Echo, EchoSettings


def request(text: str = "one two three", max_tokens: int | None = None) -> GenerateRequest:
    return GenerateRequest(
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
        assert wrapped.load == Load(running=2, waiting=3, slots=2)
        go[1].set()
        await wait_all_tasks_blocked()
        assert order == [0, 1, 2]
        assert (wrapped.load.running, wrapped.load.waiting) == (2, 2)
        go[0].set()
        await wait_all_tasks_blocked()
        assert order == [0, 1, 2, 3]
        for event in go:
            event.set()
    assert order == [0, 1, 2, 3, 4]
    assert wrapped.load == Load(slots=2)


async def test_the_wait_is_told_by_what_those_inside_are_expected_to_take(
    autojump_clock: MockClock,
) -> None:
    """Short ones take 2 s and long ones 20 s, in two slots."""
    wrapped = admission(2)

    async def one(tokens: int, seconds: float) -> None:
        async with wrapped.open(request(max_tokens=tokens)):
            await trio.sleep(seconds)

    async with trio.open_nursery() as nursery:
        assert wrapped.load.wait is None
        for tokens, seconds in ((10, 2.0), (1000, 20.0)):
            await one(tokens, seconds)
        assert wrapped.load.wait is None  # a slot is free
        nursery.start_soon(one, 10, 2.0)
        nursery.start_soon(one, 1000, 50.0)
        await trio.sleep(0.5)
        assert wrapped.load.wait == pytest.approx(1.5)
        nursery.start_soon(one, 1000, 20.0)
        await trio.sleep(0.5)
        assert wrapped.load.wait == pytest.approx(19.0)  # behind the other long one's slot
        await trio.sleep(20.0)  # the first long one takes longer than was expected, and may go on
        assert wrapped.load.wait == pytest.approx(LEFT * 20.0)


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
                assert wrapped.load.wait == pytest.approx(3.0)
    assert len(wrapped._held_by_kind) == MAX_KINDS


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
        assert wrapped.load == Load(running=50)
        nursery.cancel_scope.cancel()
    assert wrapped.load == Load()


async def test_full_queue(autojump_clock: MockClock) -> None:
    wrapped = admission(2, max_waiting=1, first_s=8)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask, wrapped)
        await wait_all_tasks_blocked()
        with pytest.raises(ProviderUnavailable, match="queue of echo is full") as caught:
            await ask(wrapped)
        assert caught.value.retry_after == 1.0  # nothing was measured
        assert wrapped.load == Load(running=2, waiting=1, slots=2)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask, wrapped)
        await wait_all_tasks_blocked()
        with pytest.raises(ProviderUnavailable) as caught:
            await ask(wrapped)
        # A request takes 8 s and there are two slots.
        assert caught.value.retry_after == pytest.approx(4.0)


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
        assert wrapped.load.waiting == 2
        scope.cancel()
        await wait_all_tasks_blocked()
        assert wrapped.load.waiting == 1
    assert wrapped.load == Load(slots=1)


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
    assert wrapped.load == Load(slots=1)
    assert (await ask(wrapped)).text == "one two three"


@pytest.mark.parametrize("text", ["[[echo fail=unavailable]]", "a b [[echo after=1]]"])
async def test_slot_is_given_back_after_a_failure(text: str) -> None:
    wrapped = admission(1)
    for _ in range(3):
        async with wrapped.open(request(text)) as answering:
            with pytest.raises((ProviderUnavailable, StreamInterrupted)):
                await answering.completion()
            assert wrapped.load.running == 0
        assert wrapped.load.running == 0


async def test_slot_is_given_back_if_the_provider_does_not_begin() -> None:
    wrapped = admission(1, context_length=1)
    for _ in range(3):
        with pytest.raises(Exception, match="do not fit"):
            await ask(wrapped)
    assert wrapped.load == Load(slots=1)


async def test_slot_is_held_until_the_closing_chunk() -> None:
    wrapped = admission(1)
    async with wrapped.open(request("a")) as answering:
        chunks = aiter(answering.chunks)
        assert (await anext(chunks)).text == "a"
        assert wrapped.load.running == 1
        assert (await anext(chunks)).finish_reason == "stop"
        assert wrapped.load.running == 0
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)
        assert wrapped.load.running == 0
    assert wrapped.load.running == 0


async def test_leaving_cancels_the_work() -> None:
    wrapped = admission(1)
    assert isinstance(wrapped.provider, Echo)
    async with wrapped.open(request()) as answering:
        await anext(aiter(answering.chunks))
    assert wrapped.provider.stats().cancelled == 1
    assert wrapped.load.running == 0


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
