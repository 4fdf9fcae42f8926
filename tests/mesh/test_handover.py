"""An answer whose backend breaks off is gone on with by another one, or ends in an error."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from fakes import MemoryNetwork
from fakes_mesh import FakeProvider, Node, asking, mesh_of, wait_until

from promptmesh.mesh.asking import Deadlines
from promptmesh.mesh.backend_id import BackendId, Measured
from promptmesh.mesh.backends import BackendManager
from promptmesh.mesh.peers import PeerTable
from promptmesh.mesh.pool import NotRead
from promptmesh.mesh.route import Route
from promptmesh.providers.base import (
    Answering,
    Asked,
    CacheControl,
    Chunk,
    Completion,
    ContentFiltered,
    Declined,
    GenerateError,
    GenerateRequest,
    Health,
    ModelOffer,
    Origin,
    ProviderBusy,
    ProviderUnavailable,
    RequestRejected,
    Sampling,
    StreamInterrupted,
    ToolCallDelta,
    Usage,
)

Clock = trio.testing.MockClock

CONTINUES = ModelOffer(id="m", can_continue=True)
SAME = ModelOffer(id="m", weights="sha256:1", engine="hf 1", numerics="float32", repeatable=True)
PLAIN = ModelOffer(id="m")
GREEDY = Sampling(temperature=0.0)
#: Characters of one to four bytes, and of two code points.
TEXT = "né€😀e\u0301 👩\u200d🚀\r\n."
GONE = ProviderUnavailable("the GPU fell off")


@dataclass
class Continuing(FakeProvider):
    """Gives `words` from where the request's prefix ends, a character at a time."""

    @asynccontextmanager
    async def open(self, request: GenerateRequest) -> AsyncIterator[Answering]:
        async with super().open(request) as answering:
            text = "".join(self.words)
            assert text.startswith(request.prefix)
            answering.chunks = self._characters(text[len(request.prefix) :])
            yield answering

    async def _characters(self, text: str) -> AsyncIterator[Chunk]:
        for number, character in enumerate(text):
            await trio.sleep(self.gap)
            if self.fail_after is not None and number == self.fail_after[0]:
                raise self.fail_after[1]
            yield Chunk(text=character)
        usage = Usage(prompt_tokens=5, completion_tokens=len(text))
        yield Chunk(finish_reason="stop", usage=usage, cid="bafy-rest")


@dataclass
class Scripted(FakeProvider):
    """Gives these chunks."""

    chunks: Sequence[Chunk] = ()

    async def _chunks(self) -> AsyncIterator[Chunk]:
        for number, chunk in enumerate(self.chunks):
            if self.fail_after is not None and number == self.fail_after[0]:
                raise self.fail_after[1]
            await trio.sleep(self.gap)
            yield chunk


def manager_of(
    *providers: FakeProvider,
    deadlines: Deadlines | None = None,
    on_route: Callable[[Asked, bool, Route], None] = lambda request, local_only, route: None,
) -> BackendManager:
    """The first provider is asked first."""
    backends = [p.backend() for p in providers]
    manager = BackendManager(
        local=lambda: backends,
        peers=PeerTable("me"),
        policy="least_loaded",
        peer_id="me",
        node="mine",
        rng=Random(1),
        deadlines=deadlines,
        on_route=on_route,
    )
    for number, provider in enumerate(providers):
        provider.slots = 100 - number * 10
        provider.running = number * 10
    return manager


async def stream_of(manager: BackendManager, request: GenerateRequest) -> list[Chunk]:
    async with manager.open(request) as answering:
        return [chunk async for chunk in answering.chunks]


async def error_of(manager: BackendManager, request: GenerateRequest) -> GenerateError:
    with pytest.raises(GenerateError) as raised:
        await stream_of(manager, request)
    return raised.value


def text_of(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


# --- continuing


@pytest.mark.parametrize("cut", range(1, len(TEXT) + 1))
async def test_another_continues_at_every_character(autojump_clock: Clock, cut: int) -> None:
    breaks = Continuing("breaks", (CONTINUES,), TEXT, fail_after=(cut, GONE))
    if cut == len(TEXT):
        breaks = Continuing("breaks", (CONTINUES,), TEXT)
        breaks._characters = _cut_off  # type: ignore[method-assign]
    goes_on = Continuing("goes on", (CONTINUES,), TEXT)
    chunks = await stream_of(manager_of(breaks, goes_on), asking())
    assert text_of(chunks) == TEXT
    assert goes_on.requests[0].prefix == TEXT[:cut]
    last = chunks[-1]
    assert last.cid is None
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.exact) == (5, False)
    assert last.usage.completion_tokens >= len(TEXT), "its tokens are characters"
    assert last.origin is not None
    assert (last.origin.provider, last.origin.begun_by) == ("goes on", "mine:breaks")
    assert last.origin.attempts == 2


async def _cut_off(text: str) -> AsyncIterator[Chunk]:
    for character in text:
        yield Chunk(text=character)


async def test_what_was_broken_off_is_counted_as_a_failure_and_nothing_else(
    autojump_clock: Clock,
) -> None:
    breaks = Continuing("breaks", (CONTINUES,), TEXT, fail_after=(3, GONE))
    goes_on = Continuing("goes on", (CONTINUES,), TEXT)
    manager = manager_of(breaks, goes_on)
    await stream_of(manager, asking())
    measures, loads = manager.experience.measures, manager.experience.loads
    broken = measures.get(Measured("me", "breaks", "m"))
    assert broken is not None
    assert (broken.answers, broken.row) == (0, 1)
    assert loads.in_flight(BackendId("me", "breaks")) == 0
    assert loads.in_flight(BackendId("me", "goes on")) == 0
    assert measures.length("m", 99.0) == 99.0  # a rest is not as long as an answer
    assert breaks.running == 0


async def test_silence_is_left_and_another_goes_on(autojump_clock: Clock) -> None:
    silent = Continuing("silent", (CONTINUES,), TEXT)

    async def fall_silent(text: str) -> AsyncIterator[Chunk]:
        yield Chunk(text=text[:2])
        await trio.sleep_forever()

    silent._characters = fall_silent  # type: ignore[method-assign]
    goes_on = Continuing("goes on", (CONTINUES,), TEXT, gap=1.0)
    manager = manager_of(silent, goes_on, deadlines=Deadlines(gap=3.0))
    async with manager.open(asking()) as answering:
        chunks = []
        async for chunk in answering.chunks:
            chunks.append(chunk)
            if len(chunks) == 2:
                assert silent.running == 0  # it was cancelled when it was given up
    assert text_of(chunks) == TEXT


async def test_it_goes_on_from_one_to_the_next(autojump_clock: Clock) -> None:
    providers = [
        Continuing(f"number {n}", (CONTINUES,), TEXT, fail_after=(2, GONE)) for n in range(3)
    ]
    last = Continuing("last", (CONTINUES,), TEXT)
    chunks = await stream_of(manager_of(*providers, last), asking())
    assert text_of(chunks) == TEXT
    assert [p.requests[0].prefix for p in providers] == [TEXT[:0], TEXT[:2], TEXT[:4]]
    origin = chunks[-1].origin
    assert origin is not None
    assert origin.begun_by == "mine:number 0"


@pytest.mark.parametrize("offer", [CONTINUES, SAME])
async def test_a_bypass_is_one_to_the_end(autojump_clock: Clock, offer: ModelOffer) -> None:
    breaks = Continuing("breaks", (offer,), TEXT, fail_after=(2, GONE))
    goes_on = Continuing("goes on", (offer,), TEXT)
    cache = CacheControl(mode="bypass")
    request = asking(cache=cache, sampling=GREEDY)
    last = (await stream_of(manager_of(breaks, goes_on), request))[-1]
    assert last.origin is not None
    assert last.origin.cache == "bypass"


async def test_who_went_on_for_whom_and_where_is_told(autojump_clock: Clock) -> None:
    providers = [
        Continuing(f"number {n}", (CONTINUES,), TEXT, fail_after=(2, GONE)) for n in range(2)
    ]
    last = Continuing("last", (CONTINUES,), TEXT)
    routes: list[Route] = []
    manager = manager_of(*providers, last, on_route=lambda r, local, route: routes.append(route))
    await stream_of(manager, asking())
    assert [(t.role, t.outcome, t.after and t.after.provider, t.at) for t in routes[0].tried] == [
        ("turn", "broke", None, 0),
        ("continue", "broke", "number 0", 2),
        ("continue", "answered", "number 1", 4),
    ]


async def test_one_that_cannot_begin_the_rest_is_passed_over(autojump_clock: Clock) -> None:
    breaks = Continuing("breaks", (CONTINUES,), TEXT, fail_after=(2, GONE))
    refuses = Continuing("refuses", (CONTINUES,), TEXT, fail=RequestRejected("no prefix here"))
    goes_on = Continuing("goes on", (CONTINUES,), TEXT)
    assert text_of(await stream_of(manager_of(breaks, refuses, goes_on), asking())) == TEXT


@pytest.mark.parametrize("error", [ProviderBusy("overloaded"), Declined("its money is spent")])
async def test_what_is_no_fault_of_the_backend_is_gone_on_from_too(
    autojump_clock: Clock, error: GenerateError
) -> None:
    breaks = Continuing("breaks", (CONTINUES,), TEXT, fail_after=(2, error))
    goes_on = Continuing("goes on", (CONTINUES,), TEXT)
    assert text_of(await stream_of(manager_of(breaks, goes_on), asking())) == TEXT


async def test_nobody_goes_on_for_a_reader_that_takes_nothing(autojump_clock: Clock) -> None:
    unread = NotRead("the answer was not read here, and was given up")
    breaks = Continuing("breaks", (CONTINUES,), TEXT, fail_after=(2, unread))
    goes_on = Continuing("goes on", (CONTINUES,), TEXT)
    error = await error_of(manager_of(breaks, goes_on), asking())
    assert "not read here" in error.message
    assert not goes_on.requests


async def test_a_failed_continuation_hides_no_failure(autojump_clock: Clock) -> None:
    breaks = Continuing("breaks", (CONTINUES,), TEXT, fail_after=(2, GONE))
    again = Continuing(
        "again", (CONTINUES,), TEXT, fail_after=(3, ProviderUnavailable("out of memory"))
    )
    error = await error_of(manager_of(breaks, again), asking())
    assert type(error) is StreamInterrupted
    assert "mine:breaks broke off its answer: the GPU fell off" in error.message
    assert "mine:again broke off its answer: out of memory" in error.message
    assert error.partial == TEXT[:5]
    never = Continuing("never", (CONTINUES,), TEXT, fail=ContentFiltered("not this"))
    error = await error_of(manager_of(breaks, never), asking())
    assert type(error) is StreamInterrupted
    assert "the GPU fell off" in error.message
    assert "not this" in error.message


async def test_who_cannot_go_on_is_not_asked(autojump_clock: Clock) -> None:
    breaks = Continuing("breaks", (CONTINUES,), TEXT, fail_after=(2, GONE))
    cannot = FakeProvider("cannot", (PLAIN,))
    manager = manager_of(breaks, cannot)
    error = await error_of(manager, asking())
    assert type(error) is StreamInterrupted
    assert "nobody can go on" in error.message
    assert error.partial == TEXT[:2]
    assert not cannot.requests


async def test_a_filter_that_wakes_up_late_is_not_asked_of_another(autojump_clock: Clock) -> None:
    breaks = Continuing("breaks", (CONTINUES,), TEXT, fail_after=(2, ContentFiltered("no")))
    goes_on = Continuing("goes on", (CONTINUES,), TEXT)
    assert type(await error_of(manager_of(breaks, goes_on), asking())) is ContentFiltered
    assert not goes_on.requests


async def test_a_caller_who_leaves_stops_the_work(autojump_clock: Clock) -> None:
    slow = Continuing("slow", (CONTINUES,), TEXT, gap=1.0)
    manager = manager_of(slow, Continuing("other", (CONTINUES,), TEXT))
    async with manager.open(asking()) as answering:
        await anext(aiter(answering.chunks))
    assert slow.running == 0
    assert slow.cancelled == 1
    with trio.move_on_after(1.5):
        await stream_of(manager, asking())
    assert slow.running == 0


async def test_a_callers_own_error_comes_as_it_is(autojump_clock: Clock) -> None:
    manager = manager_of(Continuing("a", (CONTINUES,), TEXT), Continuing("b", (CONTINUES,), TEXT))
    with pytest.raises(OSError, match="the client left"):
        async with manager.open(asking()):
            raise OSError("the client left")


# --- restarting

CALL = ToolCallDelta(index=0, id="call_1", name="größe", arguments='{"a":')
WHOLE = (
    Chunk(reasoning="Hm, 😀"),
    Chunk(reasoning="so."),
    Chunk(text="né", logprobs=({"token": "né", "logprob": -0.1},)),
    Chunk(text="€", logprobs=({"token": "€", "logprob": -0.2},)),
    Chunk(tool_calls=(CALL,)),
    Chunk(tool_calls=(ToolCallDelta(index=0, arguments='"é"}'),)),
    Chunk(
        finish_reason="tool_calls",
        usage=Usage(prompt_tokens=9, completion_tokens=6),
        cid="bafy-whole",
    ),
)


async def completion_of(manager: BackendManager, request: GenerateRequest) -> tuple[Any, Chunk]:
    async with manager.open(request) as answering:
        return await answering.whole()


@pytest.mark.parametrize("cut", range(1, len(WHOLE)))
async def test_a_restart_gives_the_same_answer_at_every_chunk(
    autojump_clock: Clock, cut: int
) -> None:
    whole = await Answering(Origin(), _all(WHOLE)).completion()
    breaks = Scripted("breaks", (SAME,), chunks=WHOLE, fail_after=(cut, GONE))
    again = Scripted("again", (SAME,), chunks=WHOLE)
    got, last = await completion_of(manager_of(breaks, again), asking(sampling=GREEDY))
    assert got == whole
    assert again.requests[0].prefix == ""
    assert last.cid == "bafy-whole"  # one engine made all of it
    assert last.usage == Usage(prompt_tokens=9, completion_tokens=6)
    assert last.origin is not None
    assert (last.origin.provider, last.origin.begun_by) == ("again", "")


async def _all(chunks: Sequence[Chunk]) -> AsyncIterator[Chunk]:
    for chunk in chunks:
        yield chunk


async def test_a_restart_that_differs_ends_in_an_error(autojump_clock: Clock) -> None:
    breaks = FakeProvider("breaks", (SAME,), ["one ", "two "], fail_after=(1, GONE), gap=0.1)
    differs = FakeProvider("differs", (SAME,), ["one", "! ", "two"], gap=0.1)
    third = FakeProvider("third", (SAME,), ["one ", "two "])
    error = await error_of(manager_of(breaks, differs, third), asking(sampling=GREEDY))
    assert type(error) is StreamInterrupted
    assert "the GPU fell off" in error.message
    assert "mine:differs: its text differs from what was sent already" in error.message
    assert error.partial == "one "
    assert differs.cancelled == 1
    assert not third.requests


async def test_a_sampled_answer_is_not_restarted(autojump_clock: Clock) -> None:
    breaks = FakeProvider("breaks", (SAME,), fail_after=(1, GONE), gap=0.1)
    other = FakeProvider("other", (SAME,))
    assert type(await error_of(manager_of(breaks, other), asking())) is StreamInterrupted
    assert not other.requests


async def test_a_tool_call_that_was_begun_is_not_continued(autojump_clock: Clock) -> None:
    offer = msgspec.structs.replace(SAME, can_continue=True)
    breaks = Scripted("breaks", (offer,), chunks=WHOLE[4:], fail_after=(1, GONE))
    other = Scripted("other", (offer,), chunks=WHOLE[4:])
    manager = manager_of(breaks, other)
    assert type(await error_of(manager, asking())) is StreamInterrupted
    assert not other.requests
    got, _ = await completion_of(manager, asking(sampling=GREEDY))
    assert isinstance(got, Completion)
    assert got.tool_calls[0].arguments == '{"a":"é"}'
    assert other.requests[0].prefix == ""


# --- over the mesh


async def test_a_peer_that_dies_is_gone_on_for_by_another(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    network = MemoryNetwork(nursery)
    text = TEXT * 3
    asker = Node(network, "asker")
    peers = [
        Node(network, name, Continuing(name, (CONTINUES,), text, gap=0.5)) for name in ("b", "c")
    ]
    await mesh_of(nursery, asker, *peers)
    async with asker.manager.open(asking()) as answering:
        got, last = "", Chunk()
        async for chunk in answering.chunks:
            got, last = got + chunk.text, chunk
            if len(got) == 5:
                dead = next(p for p in peers if p.name == answering.origin.node)
                await dead.kill()
    assert got == text
    assert last.origin is not None
    assert last.origin.begun_by.startswith(f"{dead.name}:")
    assert last.origin.node != dead.name


async def three(nursery: trio.Nursery) -> tuple[Node, Node, Node]:
    """A node that asks, and two that can go on for each other; the first of these is chosen."""
    network = MemoryNetwork(nursery)
    asker = Node(network, "asker", policy="least_loaded")
    first, second = (
        Node(network, name, Continuing(name, (CONTINUES,), TEXT * 3, gap=0.5))
        for name in ("first", "second")
    )
    second.providers[0].running = 1
    await mesh_of(nursery, asker, first, second)
    return asker, first, second


def says(asker: Node, other: Node, state: str) -> Callable[[], bool]:
    """Does the asker know the other one's provider to be in that state?"""

    def known() -> bool:
        peer = asker.table.get(other.peer_id)
        return peer is not None and [p.state for p in peer.providers] == [state]

    return known


async def test_one_that_was_only_starting_when_the_answer_began_goes_on(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    asker, first, second = await three(nursery)
    second.providers[0].health = Health(state="starting", reason="it was not looked at yet")
    second.network.changed()
    await wait_until(says(asker, second, "starting"))
    async with asker.manager.open(asking()) as answering:
        got, last = "", Chunk()
        async for chunk in answering.chunks:
            got, last = got + chunk.text, chunk
            if len(got) == 5:
                second.providers[0].health = Health()
                second.network.changed()
                await wait_until(says(asker, second, "ready"))
                await first.kill()
    assert got == TEXT * 3
    assert last.origin is not None
    assert (last.origin.node, last.origin.begun_by) == ("second", "first:first")


async def test_one_whose_connection_is_lost_for_a_moment_goes_on(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    asker, first, second = await three(nursery)
    async with asker.manager.open(asking()) as answering:
        got, last = "", Chunk()
        async for chunk in answering.chunks:
            got, last = got + chunk.text, chunk
            if len(got) == 5:
                await asker.network.disconnect(second.peer_id, "it did not answer 2 pings")
                await first.kill()
                assert asker.state_of(second) == "unreachable"
    assert got == TEXT * 3
    assert last.origin is not None
    assert last.origin.node == "second"


# --- once more where it failed


async def test_an_error_of_the_server_is_tried_once_more_where_nobody_else_is(
    autojump_clock: Clock,
) -> None:
    provider = FakeProvider(fail=ProviderUnavailable("500", again=True))
    manager = manager_of(provider)

    async def mend() -> None:
        await trio.sleep(0.01)
        provider.fail = None

    async with trio.open_nursery() as nursery:
        nursery.start_soon(mend)
        assert text_of(await stream_of(manager, asking())) == "one two three"
    assert len(provider.requests) == 2
    provider.fail = ProviderUnavailable("500", again=True)
    error = await error_of(manager, asking())
    assert len(provider.requests) == 4
    assert error.message.count("500") == 2


async def test_a_short_retry_after_is_waited_for(autojump_clock: Clock) -> None:
    provider = FakeProvider(fail=ProviderUnavailable("429", retry_after=1.5))
    manager = manager_of(provider)
    started = trio.current_time()
    error = await error_of(manager, asking())
    assert trio.current_time() - started == pytest.approx(1.5)
    assert len(provider.requests) == 2
    assert error.retry_after is not None
    provider.fail = None
    await trio.sleep(9)
    started = trio.current_time()
    provider.fail = ProviderUnavailable("429", retry_after=9.0)
    error = await error_of(manager, asking())
    assert trio.current_time() == started  # longer than a caller is kept waiting
    assert error.retry_after == 9.0


async def test_it_is_not_waited_for_beyond_the_requests_time(autojump_clock: Clock) -> None:
    provider = FakeProvider(fail=ProviderUnavailable("429", retry_after=1.5))
    started = trio.current_time()
    await error_of(manager_of(provider), asking(deadline=1.0))
    assert trio.current_time() == started


async def test_who_was_rate_limited_is_not_asked_while_another_is_there(
    autojump_clock: Clock,
) -> None:
    limited = FakeProvider("limited", fail=ProviderUnavailable("429", retry_after=0.1))
    assert text_of(await stream_of(manager_of(limited, FakeProvider("other")), asking()))
    assert len(limited.requests) == 1


async def test_only_one_of_many_tries_whether_it_is_back(autojump_clock: Clock) -> None:
    provider = FakeProvider(fail=ProviderUnavailable("429", retry_after=1.0), delay=0.1)
    manager = manager_of(provider)
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(error_of, manager, asking())
    assert len(provider.requests) == 11


async def test_a_failing_mesh_is_not_hammered(autojump_clock: Clock) -> None:
    """However many requests fail: what is sent in addition is a share of them."""
    providers = [
        FakeProvider(f"number {n}", fail=ProviderUnavailable("500", again=True)) for n in range(4)
    ]
    manager = manager_of(*providers)
    for breaker in range(400):
        manager.experience.breakers._pauses.clear()  # as if each stood for many nodes
        error = await error_of(manager, asking(id=str(breaker)))
    assert "too many requests were tried again lately" in error.message
    sent = sum(len(p.requests) for p in providers)
    assert 2 * 400 <= sent <= 2 * 400 + 0.2 * 400 + 60
