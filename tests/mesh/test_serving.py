"""Answering a peer's requests, seen from the other end of the stream."""

import dataclasses
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from fakes import MemoryNetwork, MemoryTransport
from fakes_mesh import FakeProvider, asking, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from promptmesh.mesh.embedding import answer_of
from promptmesh.mesh.frames import (
    AskBlock,
    AskClaims,
    AskLoads,
    AskTable,
    Block,
    Done,
    End,
    Failed,
    FindClaims,
    Generate,
    Head,
    Items,
    Load,
    Piece,
    Place,
    PresentLoads,
    PutClaims,
    Request,
)
from promptmesh.mesh.protocol import PROTOCOL, Asker
from promptmesh.mesh.serving import MAX_UNSENT, Services, Serving
from promptmesh.mesh.transport import Stream, TransportError
from promptmesh.providers.base import (
    Answering,
    Asked,
    Chunk,
    ContentFiltered,
    Declined,
    Origin,
    Priority,
    StreamInterrupted,
)

#: A test names the clock itself: it works only for who does.
Clock = trio.testing.MockClock
ASK = Generate(request=asking())


class World:
    """A node that serves with a fake provider, and an asker with a bare stream."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.network = network = MemoryNetwork(nursery)
        self.server: MemoryTransport = network.transport("server")
        self.provider = FakeProvider()
        self.table: list[bytes] = []
        self.block: bytes | Exception | None = None
        self.allowed = True
        self.places: dict[str, Place] = {}
        self.put: list[tuple[str, tuple[bytes, ...]]] = []
        self.writes: list[int] = []
        self.askers: dict[str, MemoryTransport] = {}
        self._serving = Serving(self.services(), lambda peer: self.table)
        self.server.handle(PROTOCOL, self._handle)

    def services(self) -> Services:
        return Services(
            answer=lambda request, peer: answer_of(self.provider, request),
            block=self._block,
            claims=lambda known: [f"{peer} {has[0]}".encode() for peer, has in known.items()],
            put_claims=lambda envelopes, peer: self.put.append((peer, tuple(envelopes))),
            find_claims=lambda keys: [b"claim of " + key for key in keys],
            loads=lambda: {"fake": self.provider.load()},
            claim_for=lambda cid: f"claim for {cid}".encode(),
            place=lambda id, peer: self.places.get(id),
            may_serve=lambda peer: self.allowed,
        )

    async def _handle(self, stream: Stream) -> None:
        await self._serving.handle(self._counted(stream))

    def _counted(self, stream: Stream) -> Stream:
        send_all = stream.send_all

        async def counted(data: bytes) -> None:
            self.writes.append(len(data))
            await send_all(data)

        stream.send_all = counted  # type: ignore[method-assign]
        return stream

    async def _block(self, cid: bytes, peer: str, proof: bytes) -> bytes | None:
        await trio.lowlevel.checkpoint()
        if isinstance(self.block, Exception):
            raise self.block
        return proof or self.block

    async def open(self, name: str = "asker") -> "Line":
        """A stream of the node of that name."""
        asker = self.askers.get(name) or self.network.transport(name)
        self.askers[name] = asker
        await asker.connect(self.server.peer_id, self.server.addresses)
        return Line(await asker.open_stream(self.server.peer_id, PROTOCOL))


class Line:
    """The asker's end of a stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.exchange = Asker()

    async def send(self, request: Request) -> None:
        await self.stream.send_all(self.exchange.send(request))

    async def ask(self, request: Request) -> list[Any]:
        """The whole reply."""
        await self.send(request)
        frames: list[Any] = []
        while not self.exchange.idle:
            data = await self.stream.receive_some()
            assert data, "the stream ended"
            frames += self.exchange.receive(data)
        return frames


@pytest.fixture
def world(nursery: trio.Nursery) -> World:
    return World(nursery)


def text_of(frames: Iterable[Any]) -> str:
    return "".join(frame.chunk.text for frame in frames if isinstance(frame, Piece))


async def test_an_answer_that_is_ready_is_one_write(autojump_clock: Clock, world: World) -> None:
    line = await world.open()
    for _ in range(3):
        world.writes.clear()
        world.provider.delay = 1.0
        head, piece, done = await line.ask(ASK)
        assert head == Head(origin=Origin(provider="fake", model="m", engine="fake 1"))
        assert piece.chunk.text == "one two three"
        assert isinstance(done, Done)
        assert done.chunk.finish_reason == "stop"
        assert done.chunk.origin is None
        assert done.loads == {"fake": Load(running=0, slots=4)}
        assert done.claim == b"claim for bafy-fake"
        assert len(world.writes) == 1


@pytest.mark.parametrize(
    ("said", "taken"), [("own", "member"), ("member", "member"), ("background", "background")]
)
async def test_a_peers_request_is_a_members_at_most(
    autojump_clock: Clock, world: World, said: Priority, taken: Priority
) -> None:
    line = await world.open()
    await line.ask(Generate(request=asking(priority=said)))
    assert [request.priority for request in world.provider.requests] == [taken]


async def test_tokens_go_out_as_they_come(autojump_clock: Clock, world: World) -> None:
    world.provider.gap = 1.0
    line = await world.open()
    await line.send(ASK)
    started, times = trio.current_time(), []
    while not line.exchange.idle:
        line.exchange.receive(await line.stream.receive_some())
        times.append(round(trio.current_time() - started))
    assert times == [0, 1, 2]


async def test_what_gathers_during_a_write_goes_out_in_the_next(
    autojump_clock: Clock, world: World
) -> None:
    world.provider.words = ["x" * 1000] * 2000  # many times the window
    line = await world.open()
    await line.send(ASK)
    await trio.sleep(1)
    # The window is full; the provider waits, with a bounded number of chunks.
    assert world.provider.running == 1
    frames: list[Any] = []
    while not line.exchange.idle:
        frames += line.exchange.receive(await line.stream.receive_some())
    assert len(text_of(frames)) == 2_000_000
    assert len(world.writes) < 20
    assert max(world.writes) < (MAX_UNSENT + 10) * 1100


@pytest.mark.parametrize("how", ["reset", "close", "disconnect", "nonsense", "second request"])
async def test_an_asker_who_leaves_stops_the_provider(
    autojump_clock: Clock, world: World, how: str
) -> None:
    world.provider.delay = 1e6
    line = await world.open()
    await line.send(ASK)
    await wait_until(lambda: world.provider.running == 1)
    if how == "reset":
        await line.stream.reset()
    elif how == "close":
        await line.stream.aclose()
    elif how == "disconnect":
        await world.askers["asker"].disconnect(world.server.peer_id)
    elif how == "nonsense":
        await line.stream.send_all(b"\xc1")
    else:
        await line.stream.send_all(Asker().send(ASK))
    assert await wait_until(lambda: world.provider.running == 0) < 0.1
    assert world.provider.cancelled == 1
    if how in ("nonsense", "second request"):
        with pytest.raises(TransportError):
            await line.stream.receive_some()


async def test_an_asker_who_leaves_between_tokens_stops_the_provider(
    autojump_clock: Clock, world: World
) -> None:
    world.provider.gap = 1e6
    line = await world.open()
    await line.send(ASK)
    frames: list[Any] = []
    while not text_of(frames):
        frames += line.exchange.receive(await line.stream.receive_some())
    assert text_of(frames) == "one "
    await line.stream.reset()
    assert await wait_until(lambda: world.provider.running == 0) < 0.1


async def test_an_error_leaves_the_stream_usable(autojump_clock: Clock, world: World) -> None:
    line = await world.open()
    world.provider.fail = ContentFiltered("no", field="messages")
    (failed,) = await line.ask(ASK)
    assert (failed.code, failed.message, failed.field) == ("content_filtered", "no", "messages")
    assert failed.loads == {"fake": Load(running=0, slots=4)}
    world.provider.fail = KeyError("a bug")
    (failed,) = await line.ask(ASK)
    assert failed.code == "provider_unavailable"
    assert "a bug" not in failed.message  # what is in the log is not the peer's business
    world.provider.fail = None
    assert text_of(await line.ask(ASK)) == "one two three"


async def test_an_error_after_some_text_does_not_send_it_twice(
    autojump_clock: Clock, world: World
) -> None:
    line = await world.open()
    error = StreamInterrupted("crashed", partial="one two ")
    world.provider.fail_after = (2, error)
    frames = await line.ask(ASK)
    assert text_of(frames) == "one two "
    assert frames[-1] == Failed(
        code="stream_interrupted", message="crashed", loads={"fake": Load(slots=4)}
    )
    world.provider.fail_after = (0, error)
    assert (await line.ask(ASK))[-1].partial == "one two "


async def test_a_cut_answer_is_an_error(autojump_clock: Clock, world: World) -> None:
    world.provider.cut = True
    frames = await (await world.open()).ask(ASK)
    assert frames[-1].code == "stream_interrupted"
    assert not any(isinstance(frame, Done) for frame in frames)


async def test_text_that_cannot_be_encoded_ends_the_stream(
    autojump_clock: Clock, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.provider.words = ["half a pair: \ud83d"]
    line = await world.open()
    await line.send(ASK)

    async def read() -> None:
        while await line.stream.receive_some():
            pass
        raise TransportError("an end is an end")

    with pytest.raises(TransportError):
        await read()
    assert "could not be encoded" in caplog.text
    world.provider.words = ["fine"]
    assert text_of(await (await world.open()).ask(ASK)) == "fine"


async def test_without_permission(autojump_clock: Clock, world: World) -> None:
    world.allowed = False
    (failed,) = await (await world.open()).ask(ASK)
    assert failed.code == Declined.code
    assert world.provider.requests == []


async def test_a_probe_is_told_the_load_and_who_else_is_choosing(
    autojump_clock: Clock, world: World, nursery: trio.Nursery
) -> None:
    world.provider.running = 3
    line = await world.open()
    question = AskLoads(model="m", within=0.1)
    load = {"fake": Load(running=3, slots=4)}
    for _ in range(2):  # nobody is a rival of itself
        assert await line.ask(question) == [PresentLoads(loads=load)]
    other = await world.open("other")
    assert await other.ask(question) == [PresentLoads(loads=load, rivals=1)]
    await line.ask(ASK)  # it has chosen
    (said,) = await other.ask(question)
    assert said.rivals == 0
    assert said.loads == load


async def test_a_peer_that_may_not_be_served_learns_no_load(
    autojump_clock: Clock, world: World
) -> None:
    world.allowed = False
    line = await world.open()
    assert await line.ask(AskLoads(model="m")) == [PresentLoads()]


async def test_blocks_claims_and_table(autojump_clock: Clock, world: World) -> None:
    line = await world.open()
    assert await line.ask(AskBlock(cid=b"c")) == [Block(block=None)]
    world.block = b"data"
    assert await line.ask(AskBlock(cid=b"c")) == [Block(block=b"data")]
    assert await line.ask(AskBlock(cid=b"c", proof=b"proof")) == [Block(block=b"proof")]
    world.block = OSError("disk")
    (failed,) = await line.ask(AskBlock(cid=b"c"))
    assert failed.code == "provider_unavailable"
    assert await line.ask(AskTable()) == [End()]
    world.table = [b"x" * 60_000] * 100
    *items, end = await line.ask(AskTable())
    assert end == End()
    assert len(items) > 2
    assert [i for frame in items for i in frame.items] == world.table
    reply = await line.ask(AskClaims(known={"p": (7, ((0, 3),))}))
    assert reply == [Items(items=(b"p 7",)), End()]
    reply = await line.ask(FindClaims(keys=(b"k" * 32,)))
    assert reply == [Items(items=(b"claim of " + b"k" * 32,)), End()]
    assert await line.ask(PutClaims(envelopes=(b"one", b"two"))) == [End()]
    assert world.put == [(world.askers["asker"].peer_id, (b"one", b"two"))]


async def test_a_request_in_pieces_and_two_lines_at_once(
    autojump_clock: Clock, world: World
) -> None:
    one, two = await world.open(), await world.open()
    world.provider.delay = 1.0
    for byte in one.exchange.send(ASK):
        await one.stream.send_all(bytes([byte]))
    assert text_of(await two.ask(ASK)) == "one two three"
    frames: list[Any] = []
    while not one.exchange.idle:
        frames += one.exchange.receive(await one.stream.receive_some())
    assert text_of(frames) == "one two three"


async def test_closing_an_idle_stream_is_quiet(
    autojump_clock: Clock, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    line = await world.open()
    await line.ask(ASK)
    await line.stream.aclose()
    await trio.sleep(1)
    assert not world.server._handling
    assert caplog.text == ""


async def test_a_bug_at_the_end_of_an_answer_is_an_error(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    """A provider that fails while it cleans up has not given a whole answer."""

    @asynccontextmanager
    async def answer(request: Asked, peer: str) -> AsyncIterator[Answering]:
        async def chunks() -> AsyncIterator[Chunk]:
            yield Chunk(text="all")
            yield Chunk(finish_reason="stop")

        yield Answering(Origin(), chunks())
        raise OSError("no space left")

    world = World(nursery)
    services = dataclasses.replace(world.services(), answer=answer)
    world.server.handle(PROTOCOL, Serving(services, lambda peer: []).handle)
    frames = await (await world.open()).ask(ASK)
    assert frames[-1].code == "provider_unavailable"


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=4))
@settings(max_examples=60)
def test_random_bytes_end_the_stream_and_nothing_else(pieces: list[bytes]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery)
            line = await world.open()
            try:
                for piece in pieces:
                    await line.stream.send_all(piece)
                await line.stream.aclose()
            except TransportError:
                pass
            assert text_of(await (await world.open()).ask(ASK)) == "one two three"
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def test_an_asker_learns_where_its_request_stands(
    autojump_clock: Clock, world: World
) -> None:
    line, other = await world.open(), await world.open("other")
    world.places["req-1"] = Place(place=2, of=3, wait=7.5)
    (said,) = await line.ask(AskLoads(request="req-1"))
    assert said.place == Place(place=2, of=3, wait=7.5)
    (said,) = await line.ask(AskLoads(request="req-2"))
    assert said.place is None
    (said,) = await other.ask(AskLoads(model="", within=0.1))
    assert said.rivals == 0  # who asks for a place is about to choose nobody
    world.allowed = False
    (said,) = await line.ask(AskLoads(request="req-1"))
    assert said.place is None
