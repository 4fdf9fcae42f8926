"""A second candidate is asked when the first token is late: the first that comes is taken."""

from random import Random
from typing import Any

import pytest
import trio
import trio.testing
from fakes_mesh import FakeProvider, asking

from promptmesh.mesh.backend_id import BackendId, Measured
from promptmesh.mesh.backends import BackendManager
from promptmesh.mesh.hedging import HEDGE_SHARE, MOST_HEDGES
from promptmesh.mesh.measure import ENOUGH, RECENT, Speed
from promptmesh.mesh.peers import PeerTable
from promptmesh.mesh.route import Route
from promptmesh.providers.base import (
    Asked,
    ModelOffer,
    Origin,
    Price,
    ProviderUnavailable,
    RequestRejected,
)

Clock = trio.testing.MockClock

#: Requests after which the usual time is known, and one may be sent twice.
WARM = 20


class Setup:
    """Two providers, of which the first is asked first."""

    def __init__(
        self, *, hedge: bool = True, first: FakeProvider | None = None, **offer: Any
    ) -> None:
        self.first = first or FakeProvider("first", slots=100)
        self.second = FakeProvider("second", slots=50, running=5)
        self.second.offers = (ModelOffer(id="m", **offer),)
        backends = [self.first.backend(), self.second.backend()]
        self.routes: list[Route] = []
        self.manager = BackendManager(
            local=lambda: backends,
            peers=PeerTable("me"),
            policy="least_loaded",
            peer_id="me",
            node="mine",
            rng=Random(1),
            hedge=hedge,
            prefer="any",
            on_route=self._route,
        )

    def _route(self, request: Asked, local_only: bool, route: Route) -> None:
        self.routes.append(route)

    async def ask(self, **fields: Any) -> tuple[str, Origin]:
        async with self.manager.open(asking(**fields)) as answering:
            text = "".join([chunk.text async for chunk in answering.chunks])
            return text, answering.origin

    async def warm(self, count: int = WARM, **fields: Any) -> None:
        """Ask so often. Each answer comes a little sooner than the last, so none is late."""
        for _ in range(count):
            self.first.delay = 0.2 - 0.0001 * len(self.first.requests)
            await self.ask(**fields)

    def speed(self, name: str) -> Speed:
        speed = self.manager.experience.measures.get(Measured("me", name, "m"))
        assert speed is not None
        return speed


async def test_the_first_token_that_comes_is_taken_and_the_other_cancelled(
    autojump_clock: Clock,
) -> None:
    s = Setup()
    await s.warm()
    assert not s.second.requests
    s.first.delay, s.second.delay = 60.0, 1.0
    started = trio.current_time()
    text, origin = await s.ask()
    assert trio.current_time() - started == pytest.approx(0.2 + 1.0, abs=0.01)
    assert (text, origin.provider, origin.attempts) == ("one two three", "second", 2)
    await trio.testing.wait_all_tasks_blocked()
    assert s.first.cancelled == 1
    assert s.manager.experience.loads.in_flight(BackendId("me", "first")) == 0
    slow, taken = s.routes[-1].tried
    assert "mine:second was faster" in slow.error
    assert not taken.error
    assert [(t.role, t.outcome) for t in (slow, taken)] == [
        ("turn", "outrun"),
        ("hedge", "answered"),
    ]


async def test_who_was_outrun_was_slow_and_has_not_failed(autojump_clock: Clock) -> None:
    s = Setup()
    await s.warm()
    s.first.delay, s.second.delay = 60.0, 1.0
    await s.ask()
    speed = s.speed("first")
    assert speed.ttft is not None
    assert speed.ttft > 0.2  # it took 1.2 s at least
    assert (speed.row, speed.errors_at(trio.current_time())) == (0, 0.0)
    assert s.manager.experience.breakers.refusal(BackendId("me", "first"), 0.0) is None
    s.first.delay = 0.2
    assert (await s.ask())[1].provider == "first"


async def test_the_first_may_still_win(autojump_clock: Clock) -> None:
    s = Setup()
    await s.warm()
    s.first.delay, s.second.delay = 0.5, 10.0
    started = trio.current_time()
    _, origin = await s.ask()
    assert trio.current_time() - started == pytest.approx(0.5)
    assert (origin.provider, origin.attempts) == ("first", 1)
    await trio.testing.wait_all_tasks_blocked()
    assert s.second.cancelled == 1


async def test_who_is_in_time_is_not_hedged(autojump_clock: Clock) -> None:
    s = Setup()
    await s.warm(60)
    assert not s.second.requests


async def test_it_is_off_unless_the_node_or_the_request_says_so(autojump_clock: Clock) -> None:
    off, on = Setup(hedge=False), Setup()
    for s, fields, hedged in ((off, {}, 0), (on, {"hedge": False}, 0), (on, {}, 1)):
        await s.warm()
        s.first.delay = 5.0
        await s.ask(**fields)
        assert len(s.second.requests) == hedged
    await off.warm(hedge=True)
    off.first.delay = 5.0
    await off.ask(hedge=True)
    assert len(off.second.requests) == 1
    assert off.second.requests[0].hedge is None  # whoever is asked has nobody to ask


@pytest.mark.parametrize("offer", [{"price": Price(completion=1.0)}, {"egress": True}])
async def test_never_where_the_second_costs_or_is_a_third_party(
    autojump_clock: Clock, offer: dict[str, Any]
) -> None:
    s = Setup(**offer)
    await s.warm()
    s.first.delay = 5.0
    await s.ask()
    assert not s.second.requests


async def test_never_where_the_first_is_paid(autojump_clock: Clock) -> None:
    paid = ModelOffer(id="m", price=Price(prompt=1.0))
    s = Setup(first=FakeProvider("first", (paid,), slots=100))
    await s.warm()
    s.first.delay = 5.0
    await s.ask()
    assert not s.second.requests


async def test_no_more_than_its_share_is_sent_twice(autojump_clock: Clock) -> None:
    """All are late from some moment on: then it would only be more work."""
    s = Setup()
    await s.warm()
    s.first.delay = s.second.delay = 30.0
    rounds, at_once = 20, 20
    for _ in range(rounds):
        async with trio.open_nursery() as nursery:
            for _ in range(at_once):
                nursery.start_soon(s.ask)
    twice = len(s.first.requests) + len(s.second.requests) - WARM - rounds * at_once
    assert 0 < twice <= HEDGE_SHARE * (WARM + rounds * at_once) <= MOST_HEDGES * rounds


async def test_one_that_fails_leaves_the_other_to_it(autojump_clock: Clock) -> None:
    s = Setup()
    await s.warm()
    s.first.delay, s.first.fail = 1.0, ProviderUnavailable("crashed")
    s.second.delay = 3.0
    assert (await s.ask())[1].provider == "second"
    s = Setup()
    await s.warm()
    s.first.delay, s.second.fail = 1.0, ProviderUnavailable("crashed")
    assert (await s.ask())[1].provider == "first"
    s = Setup()
    await s.warm()
    s.first.delay, s.first.fail = 1.0, ProviderUnavailable("crashed")
    s.second.fail = ProviderUnavailable("crashed, too")
    with pytest.raises(ProviderUnavailable, match=r"crashed.*crashed"):
        await s.ask()
    s = Setup()
    await s.warm()
    s.first.delay, s.second.fail = 9.0, RequestRejected("it is wrong")
    with pytest.raises(RequestRejected):
        await s.ask()
    await trio.testing.wait_all_tasks_blocked()
    assert s.first.cancelled == 1


async def test_who_was_outrun_may_go_on_where_the_other_breaks(autojump_clock: Clock) -> None:
    s = Setup(can_continue=True)
    s.first.offers = s.second.offers
    await s.warm()
    s.first.delay, s.second.delay = 60.0, 1.0
    s.second.gap, s.second.fail_after = 0.1, (1, ProviderUnavailable("broke"))
    text, _ = await s.ask()
    assert text == "one one two three"  # this provider takes no heed of the prefix
    assert s.first.requests[-1].prefix == "one "


def test_what_is_late_is_told_by_the_last_times() -> None:
    speed = Speed()
    for number in range(ENOUGH - 1):
        speed.first_token(1.0, float(number))
    assert speed.late is None
    speed.first_token(9.0, 99.0)
    assert speed.late == 1.0  # one of twenty
    speed.first_token(9.0, 99.0)
    assert speed.late == 9.0
    for _ in range(RECENT):
        speed.first_token(2.0, 100.0)
    assert speed.late == 2.0
