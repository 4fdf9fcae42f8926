"""Nodes over a network in memory: what one has, all can ask."""

import json
import logging
from collections import Counter
from typing import Any

import pytest
import trio
import trio.testing
from fakes import MemoryNetwork
from fakes_mesh import FakeProvider, Node, asking, mesh_of, wait_until

from promptmesh.mesh.adverts import Advert, seal
from promptmesh.mesh.asking import Deadlines
from promptmesh.mesh.backend_id import BackendId
from promptmesh.mesh.frames import encode_value
from promptmesh.mesh.network import GREETINGS
from promptmesh.mesh.pool import MAX_IDLE, MAX_UNREAD
from promptmesh.mesh.route import Route
from promptmesh.mesh.transport import TransportError
from promptmesh.providers.base import (
    ContentFiltered,
    DeadlineExceeded,
    ModelNotFound,
    ModelOffer,
    Policy,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
    TimeLimits,
)

#: A test names the clock itself: it works only for who does.
Clock = trio.testing.MockClock


@pytest.fixture
def network(nursery: trio.Nursery) -> MemoryNetwork:
    return MemoryNetwork(nursery)


async def three(
    nursery: trio.Nursery, network: MemoryNetwork, *providers: FakeProvider
) -> tuple[Node, Node, Node]:
    """Nodes a, b and c; b and c have a provider each if two are given, c if one is."""
    *of_b, of_c = providers
    nodes = Node(network, "a"), Node(network, "b", *of_b), Node(network, "c", of_c)
    await mesh_of(nursery, *nodes)
    return nodes


async def test_a_prompt_to_a_is_answered_by_c(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    provider = FakeProvider("vllm")
    a, b, c = await three(nursery, network, provider)
    async with a.manager.open(asking(id="r1")) as answering:
        first = answering.origin
        chunks = [chunk async for chunk in answering.chunks]
    assert "".join(chunk.text for chunk in chunks) == "one two three"
    assert (first.peer, first.node, first.provider) == (c.peer_id, "c", "vllm")
    assert (first.model, first.policy, first.attempts) == ("m", "round_robin", 1)
    assert first.engine == "fake 1"
    assert chunks[-1].origin is None  # nobody took over
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    assert provider.requests[0].id == "r1"
    assert (provider.requests[0].provider, provider.requests[0].peer) == ("vllm", None)
    assert a.claims == [(c.peer_id, b"claim for bafy-fake", "bafy-fake")]
    assert [str(tried) for tried in a.routes["r1"].tried] == ["c:vllm: answered"]
    assert "r1" not in b.routes


async def test_requests_one_after_the_other_use_one_stream(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, _, c = await three(nursery, network, FakeProvider())
    opened = count_streams(a)
    for _ in range(5):
        await a.ask()
    assert opened == [c.peer_id] or opened == []  # the greeting may have left one


def count_streams(node: Node) -> list[str]:
    opened: list[str] = []
    open_stream = node.transport.open_stream

    async def counting(peer: str, *protocols: str) -> object:
        opened.append(peer)
        return await open_stream(peer, *protocols)

    node.transport.open_stream = counting  # type: ignore[method-assign, assignment]
    return opened


async def test_many_at_once_and_few_streams_kept(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, _, c = await three(nursery, network, FakeProvider(delay=1.0, slots=50))
    async with trio.open_nursery() as inner:
        for _ in range(50):
            inner.start_soon(a.ask)
    assert a.network._pool is not None
    assert a.network._pool.idle(c.peer_id) == MAX_IDLE


async def test_failover_before_the_first_token(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    broken = FakeProvider("broken", fail=ProviderUnavailable("CUDA is gone"))
    a, _b, _c = await three(nursery, network, broken, FakeProvider("works"))
    a.manager._policy = "round_robin"
    answered = [await a.ask() for _ in range(6)]
    assert {text for text, _ in answered} == {"one two three"}
    assert {origin.node for _, origin in answered} == {"c"}
    assert max(origin.attempts for _, origin in answered) == 2
    # Two errors in a row, and b was left alone.
    assert len(broken.requests) == 2


async def test_a_provider_that_dies_before_its_first_token(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    slow = FakeProvider("slow", delay=30.0)
    a, b, c = await three(nursery, network, slow, FakeProvider("quick"))
    results = []
    request = asking(policy="least_loaded")

    async def ask() -> None:
        async with a.manager.open(request, key=b"any") as answering:
            results.append((answering.origin, [c.text async for c in answering.chunks]))

    c.providers[0].running = 100  # b is the less loaded
    c.network.changed()
    await trio.sleep(2)
    nursery.start_soon(ask)
    await wait_until(lambda: slow.running == 1)
    killed = trio.current_time()
    await b.kill()
    await wait_until(lambda: bool(results), timeout=2.0)
    ((origin, texts),) = results
    assert (origin.node, origin.attempts) == ("c", 2)
    assert "".join(texts) == "one two three"
    assert trio.current_time() - killed < 1.0


async def test_all_failed_names_each_with_its_reason(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, _, _ = await three(
        nursery,
        network,
        FakeProvider("x", fail=ProviderUnavailable("out of memory", retry_after=7.0)),
        FakeProvider("y", fail=KeyError("a bug")),
    )
    error = await a.ask_raises()
    assert type(error) is ProviderUnavailable
    assert "b:x: out of memory" in error.message
    assert "c:y: " in error.message
    assert error.retry_after == 7.0
    error = await a.ask_raises()  # now b is left alone, as it asked
    assert "b:x: it failed and is left alone for" in error.message


async def test_a_rejected_request_is_not_tried_elsewhere(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    rejecting = RequestRejected("temperature must be below 2", field="temperature")
    providers = FakeProvider("x", fail=rejecting), FakeProvider("y", fail=rejecting)
    a, _, _ = await three(nursery, network, *providers)
    for _ in range(4):  # and it opens no breaker
        error = await a.ask_raises()
        assert type(error) is RequestRejected
        assert (error.message, error.field) == ("temperature must be below 2", "temperature")
    assert sum(len(p.requests) for p in providers) == 4


@pytest.mark.parametrize(
    "unknown",
    [{"x": 2**64}, {"x": [0] * 20_000}, {"x": json.loads("[" * 99 + "]" * 99)}],
    ids=["number", "list", "depth"],
)
async def test_a_request_that_cannot_be_sent_is_nobodys_fault_but_its_own(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork, unknown: dict[str, Any]
) -> None:
    a, _, _ = await three(nursery, network, FakeProvider("vllm"))
    for _ in range(8):
        error = await a.ask_raises(asking(extra=unknown))
        assert type(error) is RequestRejected
        assert error.message.startswith("no peer can be sent this request: ")
    assert (await a.ask())[0] == "one two three"  # so nobody is left alone


async def test_a_stale_peer_is_passed_over(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    gone = FakeProvider("x")
    a, _b, _c = await three(nursery, network, gone, FakeProvider("y"))
    gone.offers = ()  # its next advert will say so
    answered = [await a.ask() for _ in range(4)]
    assert {origin.node for _, origin in answered} == {"c"}
    assert gone.requests == []


async def test_no_such_model_says_what_there_is(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, _, _ = await three(nursery, network, FakeProvider(offers=(ModelOffer(id="llama"),)))
    error = await a.ask_raises(asking("gpt-9"))
    assert type(error) is ModelNotFound
    assert error.message == "nobody offers the model `gpt-9`; there are: llama"


async def test_leaving_a_cancels_the_provider_on_c(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    provider = FakeProvider(words=["word "] * 1000, gap=1.0)
    a, _, _ = await three(nursery, network, provider)
    async with a.manager.open(asking()) as answering:
        assert (await anext(aiter(answering.chunks))).text
        assert provider.running == 1
    assert await wait_until(lambda: provider.running == 0) < 0.1
    assert (provider.cancelled, provider.served) == (1, 0)


async def test_cancelling_before_the_first_token_cancels_the_provider_on_c(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    provider = FakeProvider(delay=100.0)
    a, _, _ = await three(nursery, network, provider)
    with trio.move_on_after(1.0):
        await a.ask()
    assert await wait_until(lambda: provider.running == 0) < 0.1
    assert provider.cancelled == 1
    provider.delay = 0.0
    assert (await a.ask())[0] == "one two three"  # and nothing is held against c


async def test_kill_in_mid_stream_is_an_interruption_with_the_text_so_far(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, _b, c = await three(
        nursery, network, FakeProvider(words=[f"{i} " for i in range(100)], gap=1.0)
    )
    texts: list[str] = []

    async def ask() -> None:
        async with a.manager.open(asking()) as answering:
            async for chunk in answering.chunks:
                texts.append(chunk.text)
                if len(texts) == 3:
                    await c.kill()

    with pytest.raises(StreamInterrupted) as raised:
        await ask()
    assert texts == ["0 ", "1 ", "2 "]
    assert raised.value.partial == "0 1 2 "
    assert "c:fake broke off its answer" in raised.value.message


@pytest.mark.parametrize("after", [1, 2])
async def test_an_error_or_a_cut_after_the_first_token(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork, after: int
) -> None:
    provider = FakeProvider(gap=0.5, fail_after=(after, ProviderUnavailable("the GPU fell off")))
    a, _, _ = await three(nursery, network, provider)
    error = await a.ask_raises()
    assert type(error) is StreamInterrupted
    assert "the GPU fell off" in error.message
    assert error.partial == "".join(("one ", "two ")[:after])
    provider.fail_after, provider.cut = None, True
    error = await a.ask_raises()
    assert type(error) is StreamInterrupted
    assert error.partial == "one two three"


async def test_a_filter_that_wakes_up_late_leaves_the_text_so_far(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    provider = FakeProvider(gap=0.5, fail_after=(2, ContentFiltered("not that")))
    a, _, _ = await three(nursery, network, provider)
    error = await a.ask_raises()
    assert type(error) is ContentFiltered
    assert (error.message, error.partial) == ("not that", "one two ")


async def test_an_answer_that_was_not_read_here_is_not_held_against_its_peer(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    words = ["x" * 100_000] * (2 * MAX_UNREAD // 100_000)
    a, _, c = await three(nursery, network, FakeProvider(words=words, gap=0.01))

    async def read_slowly() -> None:
        async with a.manager.open(asking()) as answering:
            await trio.sleep(100)
            await answering.completion()

    with pytest.raises(StreamInterrupted, match="not read here"):
        await read_slowly()
    for provider in ("", "fake"):
        breaker = a.manager.experience.breakers.get(BackendId(c.peer_id, provider))
        assert breaker is None or not breaker.failures


async def test_a_black_hole_is_noticed(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, b, c = await three(nursery, network, FakeProvider("x", delay=1e6), FakeProvider("y"))
    b.providers[0].slots = 1000  # b is the least loaded
    request = asking(policy="least_loaded", peer=None)
    c.providers[0].running = 5
    c.network.changed()
    b.network.changed()
    await trio.sleep(2)
    answered: list[str] = []

    async def ask() -> None:
        _, origin = await a.ask(request)
        answered.append(origin.node)

    nursery.start_soon(ask)
    await wait_until(lambda: b.providers[0].running == 1)
    network.cut(b.transport)
    seconds = await wait_until(lambda: bool(answered))
    assert seconds < 5.0
    assert answered == ["c"]
    assert a.state_of(b) == "unreachable"
    state = a.table.get(b.peer_id)
    assert state is not None
    assert "did not answer 2 pings" in state.reason or "dial" in state.reason
    # Its place is known, its advert not yet over: it says why it is none.
    error = await a.ask_raises(asking(peer="b"))
    assert "b:x: its node is not reachable" in error.message
    network.heal(b.transport)
    await wait_until(lambda: a.state_of(b) == "connected")
    await wait_until(lambda: bool(a.table.offers("m")))


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded", "best_performance"])
async def test_a_dead_peer_gets_no_more_work_and_is_out_in_time(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork, policy: Policy
) -> None:
    """A black hole: nothing comes back, and nobody says why."""
    a, b, _c = await three(nursery, network, FakeProvider("x"), FakeProvider("y"))
    await trio.sleep(30)
    network.cut(b.transport)
    cut_at = trio.current_time()
    routes: list[tuple[float, float, Route]] = []

    async def ask(number: int) -> None:
        began = trio.current_time() - cut_at
        _, origin = await a.ask(asking(policy=policy, id=f"r{number}"))
        assert origin.node == "c"
        routes.append((began, trio.current_time() - cut_at, a.routes[f"r{number}"]))

    out_at = gone_at = None
    for number in range(120):
        nursery.start_soon(ask, number)
        await trio.sleep(0.25)
        passed = trio.current_time() - cut_at
        if out_at is None and a.state_of(b) == "unreachable":
            out_at = passed
        if gone_at is None and [o.peer.node for o in a.table.offers("m")] == ["c"]:
            gone_at = passed
    await wait_until(lambda: len(routes) == 120)
    asked_b = [r for r in routes if any(t.candidate.node == "b" for t in r[2].tried)]
    assert bool(asked_b) == (policy != "best_performance")  # it asks first how busy b is
    failed_at = min((ended for _, ended, _ in asked_b), default=0.0)
    assert failed_at <= 8.0
    assert all(began <= failed_at for began, _, _ in asked_b)
    assert out_at is not None
    assert out_at <= 8.0
    assert gone_at is not None
    assert gone_at <= 15.0
    network.heal(b.transport)
    await wait_until(lambda: len(a.table.offers("m")) == 2)
    assert a.state_of(b) == "connected"


async def test_leaving_is_announced(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, b, c = await three(nursery, network, FakeProvider("x"), FakeProvider("y"))
    await b.stop()
    await trio.sleep(0.1)
    assert a.state_of(b) == c.state_of(b) == "gone"
    assert [offered.peer.node for offered in a.table.offers("m")] == ["c"]
    dialled = b.transport.dialled
    await trio.sleep(300)
    assert (a.state_of(b), b.transport.dialled) == ("gone", dialled)


async def test_a_killed_node_is_out_at_once_and_forgotten_in_time(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, b, _c = await three(nursery, network, FakeProvider("x"), FakeProvider("y"))
    await b.kill()
    await trio.sleep(0.1)
    assert a.state_of(b) == "unreachable"
    assert {(await a.ask())[1].node for _ in range(3)} == {"c"}
    await trio.sleep(12)
    assert [offered.peer.node for offered in a.table.offers("m")] == ["c"]


async def test_a_restarted_node_finds_its_mesh_and_is_itself_again_at_once(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, b, c = await three(nursery, network, FakeProvider("x"), FakeProvider("y"))
    await wait_until(lambda: len(c.saved) == 2)
    await c.kill()
    await trio.sleep(60)
    again = Node(network, "c", FakeProvider("new"), epoch=2, known=c.saved)
    nursery.start_soon(again.run)
    seconds = await wait_until(
        lambda: all("new" in names(node, again) for node in (a, b)) and len(again.table) == 2
    )
    assert seconds < 2.0
    assert {(await again.ask(asking(provider="x")))[1].node for _ in range(2)} == {"b"}
    assert (await a.ask(asking(provider="new")))[1].node == "c"


def names(node: Node, other: Node) -> list[str]:
    """The providers of another node, as this one knows them."""
    state = node.table.get(other.peer_id)
    return [provider.name for provider in state.providers] if state else []


async def test_a_node_whose_clock_went_back_is_heard_again(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a = Node(network, "a")
    b = Node(network, "b", FakeProvider("old"), epoch=1000)
    await mesh_of(nursery, a, b)
    await b.kill()
    await trio.sleep(30)
    again = Node(network, "b", FakeProvider("new"), epoch=5, bootstrap=a.transport.addresses)
    nursery.start_soon(again.run)
    assert await wait_until(lambda: names(a, again) == ["new"]) < 5.0


async def test_a_twin_is_noticed_by_the_node_that_starts_beside_it(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    """A copied home folder: what is told to the second of itself goes on rising."""
    a, b = Node(network, "a"), Node(network, "b", FakeProvider("x"), epoch=5)
    await mesh_of(nursery, a, b)
    await b.kill()
    await trio.sleep(20)
    again = Node(network, "b", FakeProvider("x"), epoch=9, bootstrap=a.transport.addresses)
    speaking = True

    async def speak_as_the_first() -> None:
        number = 100
        while speaking:
            advert = Advert(peer=b.peer_id, node="b", epoch=5, seq=number, ttl=17.5)
            told[:] = [encode_value(seal(advert, again.transport.sign))]
            number += 1
            await trio.sleep(5)

    told: list[bytes] = []
    heard = a.network._gossip.relayed
    a.network._serving._table = lambda asker: [*heard(asker), *told]
    nursery.start_soon(speak_as_the_first)
    nursery.start_soon(again.run)
    await wait_until(lambda: "runs with the identity" in again.network.problem)
    speaking = False
    assert a.network.problem == ""


async def test_a_restart_is_no_twin(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, b = Node(network, "a"), Node(network, "b", FakeProvider("x"), epoch=5)
    await mesh_of(nursery, a, b)
    for epoch in (6, 3, 7):
        await b.kill()
        b = Node(network, "b", FakeProvider("x"), epoch=epoch, bootstrap=a.transport.addresses)
        nursery.start_soon(b.run)
        await trio.sleep(30)
        assert a.table.offers("m")
        assert b.network.problem == ""


async def test_a_partition_heals_by_itself(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, b, c = await three(nursery, network, FakeProvider("x"), FakeProvider("y"))
    network.cut(a.transport)
    await trio.sleep(600)
    assert a.state_of(b) == b.state_of(a) == "unreachable"
    assert b.state_of(c) == "connected"
    network.heal(a.transport)
    await wait_until(lambda: a.state_of(b) == a.state_of(c) == "connected")
    await wait_until(lambda: len(a.table.offers("m")) == 2)


async def test_who_was_lost_meanwhile_is_not_waited_for(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    """A node that is cut off answers by its own provider as soon as it knows that it is alone."""
    a, *others = (Node(network, name, FakeProvider("x")) for name in "abcd")
    await mesh_of(nursery, a, *others)
    network.cut(a.transport)
    began = trio.current_time()
    finished: list[float] = []

    async def ask() -> None:
        _, origin = await a.ask()
        assert origin.node == "a"
        finished.append(trio.current_time() - began)

    async with trio.open_nursery() as asking_all:
        for _ in range(8):
            asking_all.start_soon(ask)
    assert max(finished) < 4.0  # two missed pings, and no time to connect


async def test_bootstrap_is_enough_to_know_everybody(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a = Node(network, "a")
    others = [Node(network, name, bootstrap=a.transport.addresses) for name in "bcdef"]
    for node in (a, *others):
        nursery.start_soon(node.run)
    everybody = [a, *others]
    await wait_until(
        lambda: all(x.state_of(y) == "connected" for x in everybody for y in everybody if x != y)
    )
    # One connection for each pair: the two do not both dial.
    assert sum(node.transport.dialled for node in everybody) == 15


async def test_found_on_the_lan(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, b = Node(network, "a"), Node(network, "b", FakeProvider())
    for node in (a, b):
        nursery.start_soon(node.run)
    await trio.testing.wait_all_tasks_blocked()
    a.network.found(b.peer_id, b.transport.addresses)
    b.network.found(a.peer_id, a.transport.addresses)
    a.network.found(a.peer_id, a.transport.addresses)  # it also hears itself
    await wait_until(lambda: bool(a.table.offers("m")))
    assert len(a.table) == 1
    assert (await a.ask())[1].node == "b"


async def test_round_robin_over_own_and_peers(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    nodes = [Node(network, name, FakeProvider(name)) for name in "abc"]
    await mesh_of(nursery, *nodes)
    counts = Counter([(await nodes[0].ask())[1].node for _ in range(30)])
    assert counts == {"a": 10, "b": 10, "c": 10}
    assert (await nodes[0].ask())[1].peer in {node.peer_id for node in nodes}


async def test_least_loaded_follows_the_load_that_comes_with_the_answers(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    x, y = FakeProvider("x", slots=4), FakeProvider("y", slots=4)
    a, _, _ = await three(nursery, network, x, y)
    x.running = 3  # others keep it busy
    for _ in range(2):
        await a.ask(asking(policy="round_robin"))  # a hears of it
    for _ in range(5):
        assert (await a.ask(asking(policy="least_loaded")))[1].provider == "y"


async def test_least_loaded_counts_our_own_in_flight(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    x, y = FakeProvider("x", delay=5.0), FakeProvider("y", delay=5.0)
    a, _, _ = await three(nursery, network, x, y)
    async with trio.open_nursery() as inner:
        for _ in range(10):
            inner.start_soon(a.ask, asking(policy="least_loaded"))
            await trio.sleep(0.01)
        assert (x.running, y.running) == (5, 5)


async def test_best_performance_finds_the_fast_one(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    fast, slow = FakeProvider("fast", delay=0.1), FakeProvider("slow", delay=3.0)
    a, _, _ = await three(nursery, network, slow, fast)
    chosen = [(await a.ask(asking(policy="best_performance")))[1].provider for _ in range(20)]
    assert "slow" in chosen[:2]  # it was tried
    assert chosen[2:] == ["fast"] * 18


async def test_an_instant_failer_gets_little(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    failer = FakeProvider("failer", fail=ProviderUnavailable("no"))
    a, _, _ = await three(nursery, network, failer, FakeProvider("works", delay=0.5))
    for _ in range(60):
        await a.ask(asking(policy="best_performance"))
    assert len(failer.requests) < 10


# --- who may ask whom


async def test_a_provider_that_is_not_shared_serves_only_its_own_node(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, b = Node(network, "a"), Node(network, "b", FakeProvider())
    await mesh_of(nursery, a, b)
    b.shared = False  # a has not heard of it yet
    error = await a.ask_raises()
    assert type(error) is ModelNotFound
    assert b.providers[0].requests == []
    assert (await b.ask())[0] == "one two three"


async def test_a_peer_serves_from_its_own_providers_only(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, b, c = await three(nursery, network, FakeProvider("x"), FakeProvider("y"))
    b.providers[0].fail = ProviderUnavailable("no")
    error = await a.ask_raises(asking(peer="b"))
    assert "b:x" in error.message
    assert c.providers[0].requests == []  # b did not pass it on


async def test_a_peer_without_permission_is_refused(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, b = Node(network, "a"), Node(network, "b", FakeProvider())
    await mesh_of(nursery, a, b)
    b.allowed = False
    error = await a.ask_raises()
    assert "does not let this node use it" in error.message
    assert b.providers[0].requests == []


@pytest.mark.parametrize("privacy", ["local", "mesh"])
async def test_privacy_is_refused_rather_than_widened(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork, privacy: str
) -> None:
    vendor = FakeProvider(offers=(ModelOffer(id="m", egress=privacy == "mesh"),))
    a, b = Node(network, "a"), Node(network, "b", vendor)
    await mesh_of(nursery, a, b)
    error = await a.ask_raises(asking(privacy=privacy))
    assert type(error) is RequestRejected
    assert f"privacy is `{privacy}`" in error.message
    assert vendor.requests == []


# --- deadlines


async def test_each_deadline(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    limits = Deadlines(connect=5.0, first_token=20.0, gap=10.0)
    a = Node(network, "a", deadlines=limits)
    b = Node(network, "b", FakeProvider(delay=1e6))
    await mesh_of(nursery, a, b)
    provider = b.providers[0]
    started = trio.current_time()
    error = await a.ask_raises()
    assert type(error) is DeadlineExceeded
    assert "b:fake: no token within 20 s" in error.message
    assert trio.current_time() - started == pytest.approx(20.0)
    await wait_until(lambda: provider.running == 0)

    await trio.sleep(10)  # its breaker
    provider.delay, provider.gap = 0.0, 1e6
    started = trio.current_time()
    error = await a.ask_raises()
    assert type(error) is StreamInterrupted
    assert error.partial == "one "
    assert "no token for 10 s" in error.message
    assert trio.current_time() - started == pytest.approx(10.0)
    await wait_until(lambda: provider.running == 0)


async def test_who_asks_may_wait_longer_for_a_peer_than_the_peer_does(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a = Node(network, "a", deadlines=Deadlines(first_token=5.0))
    provider = FakeProvider(delay=50.0)
    b = Node(network, "b", provider, deadlines=Deadlines(first_token=20.0))
    await mesh_of(nursery, a, b)
    text, _ = await a.ask(asking(limits=TimeLimits(connect=3.0, first_token=60.0)))
    assert text == "one two three"
    assert type(await a.ask_raises()) is DeadlineExceeded


async def test_the_whole_has_a_deadline(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a = Node(network, "a", FakeProvider(gap=1.0, words=["w "] * 100), deadlines=Deadlines(whole=9))
    await mesh_of(nursery, a)
    started = trio.current_time()
    assert type(await a.ask_raises()) is DeadlineExceeded
    assert trio.current_time() - started == pytest.approx(9.0)
    assert a.providers[0].running == 0


async def test_the_deadline_travels_less_what_has_passed(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    failing = FakeProvider("failing", delay=2.0, fail=ProviderUnavailable("no"))
    works = FakeProvider("works")
    a, _, _ = await three(nursery, network, failing, works)
    for _ in range(2):
        await a.ask(asking(deadline=30.0))
    assert failing.requests[0].deadline == pytest.approx(30.0, abs=0.1)
    assert sorted(r.deadline or 0 for r in works.requests)[0] == pytest.approx(28.0, abs=0.1)


# --- own providers


async def test_without_a_network_the_own_providers_answer(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a = Node(network, "a", FakeProvider())
    a.manager.detach()
    text, origin = await a.ask()
    assert (text, origin.node, origin.peer) == ("one two three", "a", a.peer_id)


async def test_leaving_the_mesh_keeps_the_own_and_drops_the_peers(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a = Node(network, "a", FakeProvider("own"))
    b = Node(network, "b", FakeProvider("far", offers=(ModelOffer(id="far"),)))
    await mesh_of(nursery, a, b)
    assert {s.provider for s in a.manager.sources()} == {"own", "far"}
    assert {m.id for m in a.manager.models()} == {"m", "far"}
    a.scope.cancel()
    a.manager.detach()
    assert {s.provider for s in a.manager.sources()} == {"own"}
    assert type(await a.ask_raises(asking("far"))) is ModelNotFound
    assert (await a.ask())[0] == "one two three"


# --- blocks and claims


async def test_blocks(autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork) -> None:
    a, b, _ = await three(nursery, network, FakeProvider())
    b.blocks[b"cid"] = b"data" * 1000
    assert await a.network.fetch_block(b.peer_id, b"cid") == b"data" * 1000
    assert await a.network.fetch_block(b.peer_id, b"other") is None
    with pytest.raises(TransportError):
        await a.network.fetch_block("nobody", b"cid")
    await a.network.fetch_block(b.peer_id, b"cid", b"proof")
    assert b.proofs == [b"", b"", b"proof"]


async def test_claims_by_gossip_and_by_asking(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, b, c = await three(nursery, network, FakeProvider())
    await a.network.announce_claims(b"batch")
    await wait_until(lambda: bool(b.gossiped_claims and c.gossiped_claims))
    assert b.gossiped_claims == c.gossiped_claims == [(a.peer_id, b"batch")]
    b.batches = [bytes([n % 256]) * 1000 for n in range(3000)]  # more than one frame
    assert await a.network.ask_claims(b.peer_id, {}) == b.batches
    known = {b.peer_id: (1, ((0, 2997),))}
    assert await a.network.ask_claims(b.peer_id, known) == b.batches[-2:]


async def test_claims_at_their_homes(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, b, c = await three(nursery, network, FakeProvider())
    assert sorted(a.network.member_ids()) == sorted(node.peer_id for node in (a, b, c))
    await a.network.put_claims(b.peer_id, [b"one", b"two"])
    assert b.put == [(a.peer_id, (b"one", b"two"))]
    keys = [b"k" * 32, b"l" * 32]
    assert await a.network.find_claims(b.peer_id, keys) == [b"claim of " + key for key in keys]
    with pytest.raises(TransportError):
        await a.network.put_claims("nobody", [b"one"])
    await c.stop()
    await wait_until(lambda: len(a.network.member_ids()) == 2)


async def test_whoever_connects_is_met_after_its_table_was_read(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    met: list[tuple[str, int]] = []

    async def on_met(peer: str) -> None:
        await trio.lowlevel.checkpoint()
        met.append((peer, len(a.table.offers("m"))))

    a = Node(network, "a", on_met=on_met)
    b = Node(network, "b", FakeProvider())
    await mesh_of(nursery, a, b)
    await wait_until(lambda: bool(met))
    assert met == [(b.peer_id, 1)]


async def test_a_foreign_peer_is_known_as_one_and_left_alone(
    autojump_clock: Clock,
    nursery: trio.Nursery,
    network: MemoryNetwork,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As a Kubo with the mesh secret: it speaks nothing of the mesh, for an hour."""
    caplog.set_level(logging.INFO)
    kubo = network.transport("kubo")
    kubo.program = "kubo/0.22.0/"
    a, b = Node(network, "a", bootstrap=kubo.addresses), Node(network, "b", FakeProvider())
    await mesh_of(nursery, a, b)
    opened = count_streams(a)
    await kubo.connect(b.peer_id, b.transport.addresses)
    await wait_until(lambda: all(is_ipfs(node, kubo.peer_id) for node in (a, b)))
    await trio.sleep(3600)
    assert a.table.get(kubo.peer_id).state == "connected"  # type: ignore[union-attr]
    assert (await a.ask())[1].node == "b"
    assert kubo.dialled == 1
    assert opened.count(kubo.peer_id) <= GREETINGS
    assert len([record for record in caplog.records if "kubo" in record.getMessage()]) == 2
    # It is no member: it is neither counted nor asked for claims.
    assert a.network.members() == b.network.members() == 2
    assert list(a.network.connected()) == [b.peer_id]

    await kubo.aclose()
    await trio.sleep(600)
    assert b.table.get(kubo.peer_id) is None
    assert (await a.ask())[1].node == "b"


def is_ipfs(node: Node, peer: str) -> bool:
    state = node.table.get(peer)
    return state is not None and state.foreign and state.agent == "kubo/0.22.0"


async def test_a_node_that_starts_slowly_is_no_foreign_peer(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, b = Node(network, "a"), Node(network, "b", FakeProvider())
    nursery.start_soon(a.run)
    await trio.testing.wait_all_tasks_blocked()
    await a.transport.connect(b.peer_id, b.transport.addresses)
    await trio.sleep(60)
    state = a.table.get(b.peer_id)
    assert state is not None
    assert state.agent == "promptmesh"
    nursery.start_soon(b.run)
    await wait_until(lambda: a.table.is_member(b.peer_id))
    assert not state.foreign
    assert list(a.network.connected()) == [b.peer_id]
    assert (await a.ask())[1].node == "b"


async def test_after_it_ended_the_network_asks_nobody(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, b, _ = await three(nursery, network, FakeProvider())
    a.scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(TransportError, match="not in the mesh"):
        await a.network.fetch_block(b.peer_id, b"cid")
    error = await a.ask_raises()
    assert "not in the mesh" in error.message


async def test_a_peer_that_is_reached_directly_now_is_shown_so(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, b, _ = await three(nursery, network, FakeProvider())
    state = a.table.get(b.peer_id)
    assert state is not None
    direct = state.address
    a.transport.reroute(b.peer_id, f"/ip4/10.9.9.9/tcp/1/p2p/{b.peer_id}/p2p-circuit")
    await wait_until(lambda: state.via == "relayed")
    a.transport.reroute(b.peer_id, direct)
    await wait_until(lambda: state.via == "direct")
    since = state.since
    await a.transport.disconnect(b.peer_id)
    await wait_until(lambda: state.since > since)
