"""The backend manager with providers of its own node: choice, failures, breakers, clean ends."""

import gc
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import trio
import trio.testing
from fakes_mesh import FakeProvider, asking

from promptmesh.mesh.asking import TRIAL, TRIAL_LEAST, TRIAL_TIMES, Deadlines
from promptmesh.mesh.backend_id import BackendId, Measured
from promptmesh.mesh.backends import BackendManager
from promptmesh.mesh.breakers import FIRST_PAUSE, LONGEST_PAUSE
from promptmesh.mesh.candidates import LocalBackend
from promptmesh.mesh.loads import Busy
from promptmesh.mesh.peers import PeerTable
from promptmesh.mesh.policies import Candidate
from promptmesh.mesh.pool import NoPlace
from promptmesh.mesh.route import Route
from promptmesh.providers.base import (
    Answering,
    Asked,
    Chunk,
    ContentFiltered,
    DeadlineExceeded,
    Declined,
    GenerateError,
    GenerateRequest,
    ModelNotFound,
    ModelOffer,
    Origin,
    Policy,
    ProviderBusy,
    ProviderRefused,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
    TimeLimits,
    Usage,
)

#: A test names the clock itself: it works only for who does.
Clock = trio.testing.MockClock


def manager_of(
    *providers: FakeProvider,
    policy: Policy = "round_robin",
    deadlines: Deadlines | None = None,
    private: Sequence[str] = (),
    on_route: Callable[[Asked, bool, Route], None] = lambda request, local_only, route: None,
    limits: Callable[[Candidate], TimeLimits | None] = lambda candidate: None,
    options_fault: Callable[[str, Mapping[str, Any]], str] = lambda kind, extra: "",
) -> BackendManager:
    backends = [p.backend(shared=p.name not in private) for p in providers]
    return BackendManager(
        local=lambda: backends,
        peers=PeerTable("me"),
        policy=policy,
        peer_id="me",
        node="mine",
        rng=Random(1),
        deadlines=deadlines,
        on_route=on_route,
        limits=limits,
        options_fault=options_fault,
    )


async def ask(manager: BackendManager, **fields: Any) -> tuple[str, Origin]:
    text = ""
    async with manager.open(asking(**fields)) as answering:
        origin = answering.origin
        async for chunk in answering.chunks:
            text += chunk.text
            origin = chunk.origin or origin
    return text, origin


async def error_of(manager: BackendManager, **fields: Any) -> GenerateError:
    with pytest.raises(GenerateError) as raised:
        await ask(manager, **fields)
    return raised.value


async def test_the_policy_of_the_request_runs_and_is_named(autojump_clock: Clock) -> None:
    busy, idle = FakeProvider("busy", running=3), FakeProvider("idle")
    manager = manager_of(busy, idle, policy="round_robin")
    counts = Counter([(await ask(manager))[1].provider for _ in range(10)])
    assert counts == {"busy": 5, "idle": 5}
    for _ in range(4):
        _, origin = await ask(manager, policy="least_loaded")
        assert (origin.provider, origin.policy) == ("idle", "least_loaded")
    assert (await ask(manager))[1].policy == "round_robin"


async def test_what_an_origin_lacks_is_filled_in_from_the_offer(autojump_clock: Clock) -> None:
    offer = ModelOffer(id="m", weights="sha256:1", engine="other", numerics="float32/invariant")
    _, origin = await ask(manager_of(FakeProvider(offers=(offer,))))
    assert origin == Origin(
        peer="me",
        node="mine",
        provider="fake",
        model="m",
        policy="round_robin",
        attempts=1,
        weights="sha256:1",
        engine="fake 1",
        numerics="float32/invariant",
    )


async def test_who_does_not_take_an_option_is_not_asked(autojump_clock: Clock) -> None:
    def fault(kind: str, extra: Mapping[str, Any]) -> str:
        return f"no option {next(iter(extra))!r}" if kind == "strict" else ""

    strict, lax = FakeProvider("strict", kind="strict"), FakeProvider("lax")
    manager = manager_of(strict, lax, options_fault=fault)
    assert {(await ask(manager))[1].provider for _ in range(4)} == {"strict", "lax"}
    for _ in range(4):
        assert (await ask(manager, extra={"top_a": 1}))[1].provider == "lax"
    alone = manager_of(strict, options_fault=fault)
    error = await error_of(alone, extra={"top_a": 1})
    assert type(error) is RequestRejected, "whoever asks must mend it"
    assert "mine:strict: no option 'top_a'" in error.message


async def test_the_request_is_pinned_to_the_candidate_when_it_is_passed_on(
    autojump_clock: Clock,
) -> None:
    provider = FakeProvider()
    await ask(manager_of(provider), policy="least_loaded", peer="mine", deadline=5.0)
    (request,) = provider.requests
    assert (request.provider, request.peer, request.policy) == ("fake", None, None)
    assert request.deadline == 5.0


async def test_empty_chunks_do_not_count_as_the_first_token(autojump_clock: Clock) -> None:
    broken = FakeProvider("broken", words=["", ""], fail_after=(1, ProviderUnavailable("crash")))
    manager = manager_of(broken, FakeProvider("works"))
    for _ in range(3):
        text, origin = await ask(manager)
        assert (text, origin.provider) == ("one two three", "works")
    assert len(broken.requests) >= 1


async def test_an_answer_without_text_is_one(autojump_clock: Clock) -> None:
    text, origin = await ask(manager_of(FakeProvider(words=())))
    assert (text, origin.provider) == ("", "fake")


async def test_an_end_without_its_marker_before_any_token_leads_elsewhere(
    autojump_clock: Clock,
) -> None:
    cut = FakeProvider("cut", words=(), cut=True)
    manager = manager_of(cut, FakeProvider("works"))
    assert {(await ask(manager))[1].provider for _ in range(4)} == {"works"}


async def test_a_filter_that_wakes_up_late_is_passed_on_as_it_is(autojump_clock: Clock) -> None:
    provider = FakeProvider(fail_after=(1, ContentFiltered("no")))
    assert type(await error_of(manager_of(provider))) is ContentFiltered


async def test_a_group_of_one_error_is_that_error(autojump_clock: Clock) -> None:
    group = ExceptionGroup("from a nursery", [RequestRejected("bad")])
    assert type(await error_of(manager_of(FakeProvider(fail=group)))) is RequestRejected


async def test_two_errors_in_a_row_open_the_breaker_and_a_probe_closes_it(
    autojump_clock: Clock,
) -> None:
    provider = FakeProvider(fail=ProviderUnavailable("500"))
    manager = manager_of(provider)
    await error_of(manager)
    await error_of(manager)
    error = await error_of(manager)
    assert len(provider.requests) == 2
    assert type(error) is ProviderUnavailable
    assert "mine:fake: it failed and is left alone for" in error.message
    assert error.retry_after is not None
    provider.fail = None
    await trio.sleep(error.retry_after)
    assert (await ask(manager))[0] == "one two three"
    assert (await ask(manager))[0] == "one two three"


async def test_a_key_that_is_refused_is_not_tried_again_and_again(autojump_clock: Clock) -> None:
    refusing, healthy = FakeProvider("refusing"), FakeProvider("healthy")
    refusing.fail = ProviderRefused("401, check the key")
    ready = {"refusing"}
    local = [
        replace(refusing.backend(), available=lambda: "refusing" in ready),
        healthy.backend(),
    ]
    manager = BackendManager(
        local=lambda: local,
        peers=PeerTable("me"),
        policy="round_robin",
        peer_id="me",
        node="mine",
        rng=Random(1),
    )
    for _ in range(100):  # 50 s
        assert (await ask(manager))[1].provider == "healthy"
        await trio.sleep(0.5)
    assert 3 <= len(refusing.requests) <= 6  # after 2, 4, 8, 16 and 32 s
    assert manager.experience.breakers.get(BackendId("me", "refusing")) is None
    error = await error_of(manager, provider="refusing")
    assert "it refused such a request and is left alone for" in str(error)
    assert "check the key" in str(error)
    assert error.retry_after is not None
    refusing.fail = None
    ready.clear()
    manager.health_changed()
    ready.add("refusing")
    manager.health_changed()
    assert (await ask(manager, provider="refusing"))[1].provider == "refusing"


async def test_a_model_that_a_server_does_not_have_leaves_its_others_alone(
    autojump_clock: Clock,
) -> None:
    offers = ModelOffer(id="m"), ModelOffer(id="gone")
    server = FakeProvider(offers=offers)
    manager = manager_of(server)
    server.fail = ProviderRefused("404")
    await error_of(manager, model="gone")
    server.fail = None
    assert "is left alone" in str(await error_of(manager, model="gone"))
    assert (await ask(manager))[0]


async def test_a_peer_is_told_that_a_server_refuses(autojump_clock: Clock) -> None:
    server = FakeProvider()
    server.fail = ProviderRefused("401")
    manager = manager_of(server)
    for _ in range(2):  # as it is asked, and as it is left alone
        with pytest.raises(ProviderRefused) as refused:
            async with manager.open(asking(), local_only=True):
                pass
    assert refused.value.retry_after is not None
    assert len(server.requests) == 1


async def test_half_open_lets_one_through(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    provider = FakeProvider(fail=ProviderUnavailable("busy", retry_after=5.0))
    manager = manager_of(provider)
    await error_of(manager)
    provider.fail, provider.delay = None, 3.0
    await trio.sleep(5.0)
    nursery.start_soon(ask, manager)
    await trio.sleep(1.0)
    assert "left alone" in (await error_of(manager)).message
    await trio.sleep(3.0)
    assert (await ask(manager))[0] == "one two three"


async def test_a_silent_one_costs_callers_little_when_it_is_tried_again(
    autojump_clock: Clock,
) -> None:
    silent, healthy = FakeProvider("silent", delay=math.inf), FakeProvider("healthy", delay=0.5)
    manager = manager_of(silent, healthy, policy="least_loaded")
    healthy.running = 1  # so that the other one would always be asked first
    started = trio.current_time()
    assert (await ask(manager))[1].provider == "healthy"
    assert trio.current_time() - started == pytest.approx(120.5)  # the first time
    waits = []
    for _ in range(200):
        started = trio.current_time()
        assert (await ask(manager))[1].provider == "healthy"
        waits.append(trio.current_time() - started)
    assert max(waits) == pytest.approx(TRIAL + 0.5)
    assert len(silent.requests) < 20
    silent.delay = 0.5
    await trio.sleep(LONGEST_PAUSE)
    assert (await ask(manager))[1].provider == "silent"
    assert (await ask(manager))[1].provider == "silent"


async def test_a_trial_takes_its_time_where_nobody_else_could_be_asked(
    autojump_clock: Clock,
) -> None:
    slow = FakeProvider("slow", delay=math.inf)
    manager = manager_of(slow)
    assert isinstance(await error_of(manager), DeadlineExceeded)
    await trio.sleep(FIRST_PAUSE)
    slow.delay = 4 * TRIAL
    assert (await ask(manager))[1].provider == "slow"


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({}, TRIAL),
        ({"said_ttft": 0.1}, TRIAL_LEAST),
        ({"said_ttft": 5.0}, TRIAL_TIMES * 5.0),
        ({"said_ttft": 60.0}, 120.0),
        ({"said_ttft": 0.1, "busy": Busy(told=3, wait=7.0)}, TRIAL_LEAST + 7.0),
        ({"offer": ModelOffer(id="m", loaded=False)}, 120.0),
    ],
)
def test_how_long_a_trial_may_take(fields: dict[str, Any], seconds: float) -> None:
    known: dict[str, Any] = {"peer": "p", "node": "n", "provider": "x", "offer": ModelOffer(id="m")}
    assert Deadlines().on_trial(Candidate(**(known | fields))).first_token == seconds


async def test_a_probe_that_is_cancelled_says_nothing(autojump_clock: Clock) -> None:
    provider = FakeProvider(fail=ProviderUnavailable("busy", retry_after=5.0))
    manager = manager_of(provider)
    await error_of(manager)
    provider.fail, provider.delay = None, 3.0
    await trio.sleep(5.0)
    with trio.move_on_after(1.0):
        await ask(manager)
    assert (await ask(manager))[0] == "one two three"


async def test_the_breaker_is_seen_again_before_the_next_attempt(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    """Ten requests wait for one provider while the other one breaks."""
    slow = FakeProvider("slow", delay=10.0, fail=ProviderUnavailable("no"))
    broken = FakeProvider("broken", delay=1.0, fail=ProviderUnavailable("no", retry_after=60.0))
    manager = manager_of(slow, broken)
    errors: list[GenerateError] = []

    async def one() -> None:
        errors.append(await error_of(manager))

    async with trio.open_nursery() as inner:
        for _ in range(10):
            inner.start_soon(one)
    assert len(errors) == 10
    assert len(broken.requests) == 5  # none of those that began with the slow one


async def test_in_flight_is_counted_to_the_last_byte_and_no_further(
    autojump_clock: Clock,
) -> None:
    manager = manager_of(FakeProvider(gap=1.0))
    what = BackendId("me", "fake")

    def in_flight() -> int:
        return manager.experience.loads.get(what, FakeProvider().load()).in_flight

    async with manager.open(asking()) as answering:
        assert in_flight() == 1
        async for chunk in answering.chunks:
            assert in_flight() == (0 if chunk.finish_reason else 1)
    assert in_flight() == 0
    with trio.move_on_after(0.5):
        await ask(manager)
    assert in_flight() == 0
    await error_of(manager_of(FakeProvider(fail=ProviderUnavailable("x"))))


async def test_speed_is_measured(autojump_clock: Clock) -> None:
    manager = manager_of(FakeProvider(delay=0.5, gap=0.1, words=["w "] * 21))
    await ask(manager)
    speed = manager.experience.measures.get(Measured("me", "fake", "m"))
    assert speed is not None
    assert speed.ttft == pytest.approx(0.5)
    assert speed.rate == pytest.approx(10.0)
    assert manager.experience.measures.length("m") == 21


async def test_a_wait_for_a_slot_is_not_the_time_to_the_first_token(autojump_clock: Clock) -> None:
    manager = manager_of(FakeProvider(delay=9.0, slots=2, running=2))
    await ask(manager)
    speed = manager.experience.measures.get(Measured("me", "fake", "m"))
    assert speed is None or speed.ttft is None


async def test_a_stored_answer_says_nothing_of_the_speed(autojump_clock: Clock) -> None:
    class Stored(FakeProvider):
        @asynccontextmanager
        async def open(self, request: GenerateRequest) -> AsyncIterator[Answering]:
            async def chunks() -> AsyncIterator[Chunk]:
                yield Chunk(text="stored")
                yield Chunk(finish_reason="stop", usage=Usage(completion_tokens=99))

            yield Answering(Origin(provider="cache", cache="hit-local"), chunks())

    manager = manager_of(Stored())
    _, origin = await ask(manager)
    assert origin.provider == "cache"
    speed = manager.experience.measures.get(Measured("me", "fake", "m"))
    assert speed is not None
    assert (speed.ttft, speed.rate, speed.answers) == (None, None, 0)
    assert manager.experience.measures.length("m", 5.0) == 5.0


async def test_deadlines_hold_for_own_providers_too(autojump_clock: Clock) -> None:
    limits = Deadlines(first_token=5.0, gap=3.0)
    stuck = FakeProvider("stuck", delay=1e6)
    manager = manager_of(stuck, FakeProvider("works"), deadlines=limits)
    started = trio.current_time()
    assert {(await ask(manager))[1].provider for _ in range(2)} == {"works"}
    assert trio.current_time() - started == pytest.approx(5.0)
    assert stuck.cancelled == 1
    silent = FakeProvider(gap=1e6)
    error = await error_of(manager_of(silent, deadlines=limits))
    assert type(error) is StreamInterrupted
    assert error.partial == "one "
    assert silent.running == 0


async def test_a_provider_and_a_request_may_have_times_of_their_own(autojump_clock: Clock) -> None:
    slow, stuck = FakeProvider("slow", delay=30.0), FakeProvider("stuck", delay=1e6)
    own = {"slow": TimeLimits(first_token=60.0, gap=50.0), "stuck": TimeLimits(first_token=2.0)}

    async def seconds(provider: FakeProvider, **fields: Any) -> float:
        manager = manager_of(
            provider,
            deadlines=Deadlines(first_token=10.0, gap=10.0),
            limits=lambda candidate: own.get(candidate.provider),
        )
        started = trio.current_time()
        with suppress(DeadlineExceeded, StreamInterrupted):
            await ask(manager, **fields)
        return trio.current_time() - started

    assert await seconds(slow) == pytest.approx(30.0)
    assert await seconds(stuck) == pytest.approx(2.0)
    assert await seconds(FakeProvider("other", delay=1e6)) == pytest.approx(10.0)
    # What the request says counts most, and what it does not say stays.
    assert await seconds(slow, limits=TimeLimits(first_token=7.0)) == pytest.approx(7.0)
    slow.delay, slow.gap = 0.0, 1e6
    assert await seconds(slow, limits=TimeLimits(first_token=7.0)) == pytest.approx(50.0)


async def test_a_first_token_in_time_frees_the_rest_of_that_limit(autojump_clock: Clock) -> None:
    manager = manager_of(
        FakeProvider(delay=4.0, gap=4.0), deadlines=Deadlines(first_token=5.0, gap=5.0)
    )
    assert (await ask(manager))[0] == "one two three"


async def test_a_slow_reader_is_not_a_slow_provider(autojump_clock: Clock) -> None:
    manager = manager_of(FakeProvider(), deadlines=Deadlines(first_token=5.0, gap=5.0))
    async with manager.open(asking()) as answering:
        texts = []
        async for chunk in answering.chunks:
            await trio.sleep(60)
            texts.append(chunk.text)
    assert "".join(texts) == "one two three"


async def test_the_callers_own_errors_are_not_the_providers(autojump_clock: Clock) -> None:
    provider, other = FakeProvider("a"), FakeProvider("b")
    manager = manager_of(provider, other)

    async def fail(error: Exception) -> None:
        async with manager.open(asking()):
            raise error

    for error in (OSError("the client left"), ProviderUnavailable("the caller's")):
        for _ in range(4):
            with pytest.raises(type(error)) as raised:
                await fail(error)
            assert raised.value is error
    assert len(provider.requests) + len(other.requests) == 8  # no second attempts
    assert (await ask(manager))[0] == "one two three"  # and no breaker


@pytest.mark.parametrize("kind", [ProviderBusy, Declined])
async def test_a_full_queue_or_a_refusal_is_no_fault(
    kind: type[GenerateError], autojump_clock: Clock
) -> None:
    """What one request is refused for, a more urgent or a cheaper one is not."""
    provider = FakeProvider("a", fail=kind("full", retry_after=60))
    manager = manager_of(provider)
    for _ in range(4):
        error = await error_of(manager)
        assert error.retry_after == 60
        assert type(error) is (kind if kind is ProviderBusy else ProviderUnavailable)
    provider.fail = None
    assert (await ask(manager))[0] == "one two three"


async def test_a_limit_of_this_node_is_no_fault_of_the_peer(autojump_clock: Clock) -> None:
    provider = FakeProvider("a", fail=NoPlace("160 requests to it are under way"))
    manager = manager_of(provider)
    for _ in range(4):
        assert type(await error_of(manager)) is ProviderBusy
    provider.fail = None
    assert (await ask(manager))[0] == "one two three"


async def test_the_whole_deadline_reaches_a_reader_that_waits(autojump_clock: Clock) -> None:
    manager = manager_of(FakeProvider(gap=2.0), deadlines=Deadlines(whole=3.0))
    assert type(await error_of(manager)) is DeadlineExceeded


async def test_local_only_sees_the_shared_ones_and_blames_no_request(
    autojump_clock: Clock,
) -> None:
    third = ModelOffer(id="vendor", egress=True)
    manager = manager_of(
        FakeProvider("shared"),
        FakeProvider("private", offers=(ModelOffer(id="secret"), third)),
        FakeProvider("vendor", offers=(third,)),
        private=["private"],
    )

    async def refused(model: str, **fields: Any) -> GenerateError:
        with pytest.raises(GenerateError) as raised:
            async with manager.open(asking(model, **fields), local_only=True):
                raise AssertionError("it was answered")
        return raised.value

    error = await refused("secret")
    assert type(error) is ModelNotFound
    assert "secret" not in error.message.split("there are")[1]
    assert type(await refused("vendor", privacy="mesh")) is ProviderUnavailable
    async with manager.open(asking(), local_only=True) as answering:
        assert answering.origin.provider == "shared"


async def test_what_there_is(autojump_clock: Clock) -> None:
    two = (ModelOffer(id="m", context_length=5), ModelOffer(id="n"))
    manager = manager_of(FakeProvider("a"), FakeProvider("b", offers=two), private=["b"])
    assert [(s.provider, s.offer.id, s.own) for s in manager.sources()] == [
        ("a", "m", True),
        ("b", "m", True),
        ("b", "n", True),
    ]
    assert [m.id for m in manager.models()] == ["m", "n"]
    assert list(manager.loads()) == ["a"]
    assert (await manager.check()).state == "ready"
    assert (await manager_of().check()).state == "unavailable"


async def test_how_a_request_goes_is_told(autojump_clock: Clock) -> None:
    broken = FakeProvider("broken", delay=2.0, fail=ProviderUnavailable("no"))
    small = FakeProvider("small", offers=(ModelOffer(id="m", context_length=1),))
    routes: dict[str, Route] = {}
    manager = manager_of(
        broken,
        small,
        on_route=lambda request, local_only, route: routes.update({request.id: route}),
    )
    await error_of(manager, id="one", text="a rather long prompt")
    route = routes["one"]
    assert route.policy == "round_robin"
    assert [str(tried) for tried in route.tried] == ["mine:broken: no"]
    assert (route.tried[0].code, route.tried[0].seconds) == ("provider_unavailable", 2.0)
    assert "does not fit" in str(route.ruled_out[0])
    assert [d.chosen.provider for d in route.decisions] == ["broken"]
    assert (route.usage, route.finish_reason) == (None, None)
    broken.fail = None
    await ask(manager, id="two")
    route = routes["two"]
    assert [str(tried) for tried in route.tried] == ["mine:broken: answered"]
    assert route.finish_reason == "stop"
    assert route.usage is not None
    assert route.usage.completion_tokens == 3


async def test_what_is_told_keeps_no_request_alive(autojump_clock: Clock) -> None:
    """An error holds the frames it went through, and they hold the prompt."""
    routes: list[Route] = []
    broken = FakeProvider("broken", fail=ProviderUnavailable("no"))
    manager = manager_of(broken, on_route=lambda request, local_only, route: routes.append(route))
    await error_of(manager, id="dropped")
    broken.requests.clear()
    broken.fail = None
    gc.collect()
    assert [str(tried) for tried in routes[0].tried] == ["mine:broken: no"]
    # Not `isinstance`, which asks each object for its class: proxies of other packages then warn.
    kept = [o for o in gc.get_objects() if type(o) is GenerateRequest and o.id == "dropped"]
    assert kept == []


async def test_a_provider_that_was_removed_is_passed_over(autojump_clock: Clock) -> None:
    backends: list[LocalBackend] = [FakeProvider("a").backend()]
    manager = BackendManager(
        local=lambda: backends,
        peers=PeerTable("me"),
        policy="round_robin",
        peer_id="me",
        node="mine",
        rng=Random(1),
    )

    assert (await ask(manager))[0] == "one two three"
    backends.clear()
    assert type(await error_of(manager)) is ModelNotFound
