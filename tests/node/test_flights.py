"""Equal requests share one computation, which lives as long as somebody follows it."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
import trio.testing

from promptmesh.node.flights import Flights
from promptmesh.providers.base import (
    Answering,
    Chunk,
    GenerateError,
    Origin,
    Priority,
    ProviderUnavailable,
    StreamInterrupted,
)


class Work:
    """A computation whose chunks the test releases one by one."""

    def __init__(self, error: GenerateError | None = None) -> None:
        self.started = 0
        self.cancelled = 0
        self.error = error
        self.send, self._receive = trio.open_memory_channel[Chunk](10)

    @asynccontextmanager
    async def compute(self) -> AsyncIterator[Answering]:
        self.started += 1
        if self.error is not None:
            await trio.lowlevel.checkpoint()
            raise self.error
        try:
            yield Answering(Origin(node="n"), self._receive)
        except trio.Cancelled:
            self.cancelled += 1
            raise


async def test_followers_read_one_computation_from_its_start(nursery: trio.Nursery) -> None:
    flights, work = Flights(nursery), Work()
    async with flights.join(b"k", work.compute) as (first, joined):
        assert not joined
        await work.send.send(Chunk(text="a"))
        assert (await anext(aiter(first.chunks))).text == "a"
        async with flights.join(b"k", work.compute) as (second, joined):
            assert joined
            await work.send.send(Chunk(text="b", finish_reason="stop"))
            work.send.close()
            assert (await second.completion()).text == "ab"
        assert [c.text async for c in first.chunks] == ["b"]
    assert work.started == 1
    assert work.cancelled == 0
    await trio.testing.wait_all_tasks_blocked()
    assert len(flights) == 0


async def test_the_work_outlives_its_first_asker(nursery: trio.Nursery) -> None:
    flights, work = Flights(nursery), Work()
    async with flights.join(b"k", work.compute):
        second = flights.join(b"k", work.compute)
        answering, _ = await second.__aenter__()
    work.send.send_nowait(Chunk(text="x", finish_reason="stop"))
    work.send.close()
    assert (await answering.completion()).text == "x"
    await second.__aexit__(None, None, None)
    assert work.cancelled == 0


async def test_the_last_follower_to_leave_cancels_the_work(nursery: trio.Nursery) -> None:
    flights, work = Flights(nursery), Work()
    async with flights.join(b"k", work.compute), flights.join(b"k", work.compute):
        pass
    await trio.testing.wait_all_tasks_blocked()
    assert work.cancelled == 1
    # A later asker starts anew rather than joining what is being given up.
    async with flights.join(b"k", work.compute) as (_, joined):
        assert not joined
    assert work.started == 2


async def test_each_follower_gets_its_own_copy_of_the_error(nursery: trio.Nursery) -> None:
    flights = Flights(nursery)
    work = Work(ProviderUnavailable("full", retry_after=3))
    errors: list[ProviderUnavailable] = []

    async def follow() -> None:
        with pytest.raises(ProviderUnavailable) as caught:
            async with flights.join(b"k", work.compute):
                pass
        errors.append(caught.value)

    async with trio.open_nursery() as askers:
        askers.start_soon(follow)
        askers.start_soon(follow)
    assert work.started == 1
    assert errors[0] is not errors[1]
    assert [(str(e), e.retry_after) for e in errors] == [("full", 3), ("full", 3)]


async def test_a_bug_in_the_work_is_an_error_for_its_followers_only(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    flights, other = Flights(nursery), Work()

    @asynccontextmanager
    async def broken() -> AsyncIterator[Answering]:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError("a bug")
        yield

    async with flights.join(b"other", other.compute) as (answering, _):
        with pytest.raises(GenerateError, match="internal error"):
            async with flights.join(b"k", broken):
                pass
        other.send.send_nowait(Chunk(text="x", finish_reason="stop"))
        other.send.close()
        assert (await answering.completion()).text == "x"
    assert "ZeroDivisionError: a bug" in caplog.text


async def test_work_that_is_cancelled_from_outside_is_not_whole() -> None:
    work = Work()
    async with (
        trio.open_nursery() as flying,
        Flights(flying).join(b"k", work.compute) as (answering, _),
    ):
        work.send.send_nowait(Chunk(text="a"))
        assert (await anext(aiter(answering.chunks))).text == "a"
        with trio.CancelScope(shield=True):
            flying.cancel_scope.cancel()
            with pytest.raises(StreamInterrupted):
                await anext(aiter(answering.chunks))


async def test_the_work_is_as_urgent_as_its_most_urgent_follower(nursery: trio.Nursery) -> None:
    urged: list[tuple[str, Priority]] = []
    flights = Flights(nursery, lambda id, priority: urged.append((id, priority)))
    work = Work()
    priorities: tuple[Priority, ...] = ("background", "background", "member", "own", "member")
    async with AsyncExitStack() as followers:
        for number, priority in enumerate(priorities):
            flight = flights.join(b"k", work.compute, id=f"r{number}", priority=priority)
            await followers.enter_async_context(flight)
        assert urged == [("r0", "member"), ("r0", "own")]


async def test_the_work_has_the_time_of_the_follower_who_has_the_most(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    flights, work = Flights(nursery), Work()

    async def follow(seconds: float) -> None:
        with trio.move_on_after(seconds) as limit:
            async with flights.join(b"k", work.compute) as (answering, _):
                await answering.completion()
        assert limit.cancelled_caught

    for seconds in (3, 9, 5):
        nursery.start_soon(follow, seconds)
    await trio.sleep(8)
    assert (work.started, work.cancelled) == (1, 0)
    await trio.sleep(2)
    assert (work.started, work.cancelled) == (1, 1)


async def test_nobody_joins_a_flight_whose_time_is_over(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    flights, work = Flights(nursery), Work()
    with trio.move_on_after(3):
        async with flights.join(b"k", work.compute):
            with trio.CancelScope(shield=True):
                await trio.sleep(4)
                async with flights.join(b"k", work.compute) as (_, joined):
                    assert not joined


async def test_a_follower_whose_time_is_over_hears_of_nothing_else(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """Its work has ended in the same moment, perhaps before it looks for more of it."""
    flights, work = Flights(nursery), Work()
    with trio.move_on_after(3) as limit:
        async with flights.join(b"k", work.compute) as (answering, _):
            await work.send.send(Chunk(text="a"))
            assert (await anext(aiter(answering.chunks))).text == "a"
            with trio.CancelScope(shield=True):
                await trio.sleep(5)  # as one that is just writing
            assert work.cancelled == 1
            await anext(aiter(answering.chunks))
    assert limit.cancelled_caught


async def test_a_follower_is_told_of_a_change_of_backend_as_a_follower(
    nursery: trio.Nursery,
) -> None:
    flights, work = Flights(nursery), Work()
    last = Chunk(text="a", finish_reason="stop", origin=Origin(node="m", attempts=2))
    async with (
        flights.join(b"k", work.compute) as (leader, _),
        flights.join(b"k", work.compute) as (follower, _),
    ):
        await work.send.send(last)
        work.send.close()
        assert (leader.origin.cache, follower.origin.cache) == ("miss", "coalesced")
        assert [c async for c in leader.chunks] == [last]
        (told,) = [c.origin async for c in follower.chunks]
        assert told == Origin(node="m", attempts=2, cache="coalesced")
