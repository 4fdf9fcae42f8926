"""Streams to a peer, kept and used again."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import trio
import trio.testing
from fakes import MemoryNetwork, MemoryTransport
from fakes_mesh import asking, wait_until

from promptmesh.mesh import pool
from promptmesh.mesh.frames import (
    AskBlock,
    Block,
    Done,
    Failed,
    Generate,
    Head,
    Piece,
    RemoteProtocolError,
)
from promptmesh.mesh.pool import PeerAnswer, StreamPool
from promptmesh.mesh.protocol import PROTOCOL, Server
from promptmesh.mesh.transport import PeerId, Stream, TransportError
from promptmesh.providers.base import Chunk, GenerateError, Origin, ProviderUnavailable

#: A test names the clock itself: it works only for who does.
Clock = trio.testing.MockClock
ASK = AskBlock(cid=b"cid")


class World:
    """A node with a pool, and a peer that serves each stream by the function it is given."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.network = MemoryNetwork(nursery)
        self.here = self.network.transport("here")
        self.there: MemoryTransport = self.network.transport("there")
        self.peer: PeerId = self.there.peer_id
        self.streams = 0
        self.reached: list[PeerId] = []
        self.pool = StreamPool(self.here, nursery, reach=self._reach)

    async def _reach(self, peer: PeerId) -> None:
        self.reached.append(peer)
        await self.here.connect(peer, self.there.addresses)

    def serve(self, handler: Callable[[Stream, int], Awaitable[None]]) -> None:
        """`handler` is told the number of its stream, from 1."""

        async def numbered(stream: Stream) -> None:
            self.streams += 1
            await handler(stream, self.streams)

        self.there.handle(PROTOCOL, numbered)

    async def block(self) -> bytes | None:
        async with self.pool.ask(self.peer, ASK) as stream:
            (frame,) = stream.take_frames()
            assert isinstance(frame, Block)
            return frame.block


@pytest.fixture
def world(nursery: trio.Nursery) -> World:
    return World(nursery)


async def next_request(stream: Stream, server: Server) -> bool:
    """Wait for a request; False at the end."""
    while data := await stream.receive_some():
        if server.receive(data):
            return True
    return False


async def honest(stream: Stream, number: int) -> None:
    """Answers every request with the number of its stream."""
    server = Server()
    while await next_request(stream, server):
        await stream.send_all(server.send(Block(block=bytes([number]))))


async def test_a_stream_is_used_again(autojump_clock: Clock, world: World) -> None:
    world.serve(honest)
    assert [await world.block() for _ in range(5)] == [b"\x01"] * 5
    assert world.reached == [world.peer]
    assert world.pool.idle(world.peer) == 1


async def test_two_at_once_are_two_streams(
    autojump_clock: Clock, nursery: trio.Nursery, world: World
) -> None:
    world.serve(honest)
    async with world.pool.ask(world.peer, ASK), world.pool.ask(world.peer, ASK):
        assert world.streams == 2
        assert world.pool.idle(world.peer) == 0


async def test_an_idle_stream_that_ends_is_dropped(autojump_clock: Clock, world: World) -> None:
    async def one_request(stream: Stream, number: int) -> None:
        server = Server()
        await next_request(stream, server)
        await stream.send_all(server.send(Block(block=bytes([number]))))
        await trio.sleep(1)

    world.serve(one_request)
    assert await world.block() == b"\x01"
    assert world.pool.idle(world.peer) == 1
    await trio.sleep(2)
    assert world.pool.idle(world.peer) == 0
    assert await world.block() == b"\x02"


async def test_a_better_connection_gets_what_is_new(world: World) -> None:
    ended: list[int] = []

    async def serve(stream: Stream, number: int) -> None:
        with suppress(TransportError):  # who asked has let go of it
            await honest(stream, number)
        ended.append(number)

    world.serve(serve)
    assert await world.block() == b"\x01"
    assert await world.block() == b"\x01"
    async with world.pool.ask(world.peer, ASK):
        world.here.reroute(world.peer, "/ip4/10.9.9.9/tcp/1")
    assert world.pool.idle(world.peer) == 0  # it was under way, and is over
    assert await world.block() == b"\x02"
    world.here.reroute(world.peer, "/ip4/10.9.9.9/tcp/2")
    assert await world.block() == b"\x03"  # one that was idle is not used
    world.here.reroute(world.peer, "/ip4/10.9.9.9/tcp/3")
    await world.pool.renew(world.peer)  # nor kept
    assert world.pool.idle(world.peer) == 0
    await trio.testing.wait_all_tasks_blocked()
    assert ended == [1, 2, 3]


async def test_a_reused_stream_that_ends_unanswered_is_tried_on_a_new_one(
    autojump_clock: Clock, world: World
) -> None:
    requests = 0

    async def handler(stream: Stream, number: int) -> None:
        nonlocal requests
        server = Server()
        while await next_request(stream, server):
            requests += 1
            if requests == 2:
                return
            await stream.send_all(server.send(Block(block=bytes([number]))))

    world.serve(handler)
    assert await world.block() == b"\x01"
    assert await world.block() == b"\x02"
    assert (requests, world.streams) == (3, 2)


async def test_it_is_tried_once_more_and_not_again(autojump_clock: Clock, world: World) -> None:
    requests = 0

    async def handler(stream: Stream, number: int) -> None:
        nonlocal requests
        server = Server()
        while await next_request(stream, server):
            requests += 1
            if requests > 1:
                return
            await stream.send_all(server.send(Block(block=b"")))

    world.serve(handler)
    await world.block()
    with pytest.raises(TransportError):
        await world.block()
    assert requests == 3


async def test_a_new_stream_that_ends_unanswered_is_a_failure(
    autojump_clock: Clock, world: World
) -> None:
    async def handler(stream: Stream, number: int) -> None:
        await next_request(stream, Server())

    world.serve(handler)
    with pytest.raises(TransportError):
        await world.block()
    assert world.streams == 1


async def test_after_a_byte_of_the_reply_it_is_not_tried_again(
    autojump_clock: Clock, world: World
) -> None:
    requests = 0

    async def handler(stream: Stream, number: int) -> None:
        nonlocal requests
        server = Server()
        while await next_request(stream, server):
            requests += 1
            reply = server.send(Block(block=b"data"))
            await stream.send_all(reply if requests == 1 else reply[:1])
            if requests == 2:
                return

    world.serve(handler)
    await world.block()
    with pytest.raises(TransportError):
        await world.block()
    assert requests == 2


async def test_a_peer_that_is_gone_is_not_tried_again(
    autojump_clock: Clock, nursery: trio.Nursery, world: World
) -> None:
    requests = 0

    async def handler(stream: Stream, number: int) -> None:
        nonlocal requests
        server = Server()
        while await next_request(stream, server):
            requests += 1
            if requests == 2:
                await trio.sleep_forever()
            await stream.send_all(server.send(Block(block=b"")))

    world.serve(handler)
    await world.block()
    nursery.start_soon(world.there.disconnect, world.here.peer_id)
    with pytest.raises(TransportError):
        await world.block()
    assert world.reached == [world.peer]


async def test_nonsense_is_an_error_and_ends_the_stream(
    autojump_clock: Clock, world: World
) -> None:
    async def handler(stream: Stream, number: int) -> None:
        server = Server()
        await next_request(stream, server)
        if number == 1:
            await stream.send_all(b"\xc1" * 10)
        else:
            await stream.send_all(server.send(Block(block=b"ok")))
        await trio.sleep_forever()

    world.serve(handler)
    with pytest.raises(RemoteProtocolError):
        await world.block()
    assert world.pool.idle(world.peer) == 0
    assert await world.block() == b"ok"


async def test_what_comes_unasked_ends_an_idle_stream(autojump_clock: Clock, world: World) -> None:
    async def handler(stream: Stream, number: int) -> None:
        server = Server()
        await next_request(stream, server)
        reply = server.send(Block(block=b"ok"))
        await stream.send_all(reply)
        await trio.sleep(1)
        await stream.send_all(reply)
        await trio.sleep_forever()

    world.serve(handler)
    assert await world.block() == b"ok"
    await trio.sleep(2)
    assert world.pool.idle(world.peer) == 0


async def test_leaving_early_resets_the_stream(autojump_clock: Clock, world: World) -> None:
    ended: list[float] = []

    async def handler(stream: Stream, number: int) -> None:
        server = Server()
        await next_request(stream, server)
        await stream.send_all(server.send(Head(origin=Origin())))
        try:
            await stream.receive_some()
        except TransportError:
            ended.append(trio.current_time())

    world.serve(handler)
    async with world.pool.ask(world.peer, Generate(request=asking())):
        await trio.sleep(1)
        assert ended == []
        left = trio.current_time()
    await wait_until(lambda: bool(ended))
    assert ended[0] - left < 0.1
    assert world.pool.idle(world.peer) == 0


async def test_a_peer_that_cannot_be_reached_in_time(autojump_clock: Clock, world: World) -> None:
    world.serve(honest)
    world.network.cut(world.there)
    started = trio.current_time()
    with pytest.raises(TransportError, match="within 3 s"):
        async with world.pool.ask(world.peer, ASK, connect=3.0):
            raise AssertionError("it was reached")
    assert trio.current_time() - started == pytest.approx(3.0)


async def test_requests_at_once_are_limited(
    autojump_clock: Clock,
    nursery: trio.Nursery,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "MAX_AT_ONCE", 2)
    world.serve(honest)

    async def hold(seconds: float) -> None:
        async with world.pool.ask(world.peer, ASK):
            await trio.sleep(seconds)

    nursery.start_soon(hold, 100.0)
    nursery.start_soon(hold, 2.0)
    await trio.sleep(0.1)
    started = trio.current_time()
    async with world.pool.ask(world.peer, ASK):  # waits for the second to end
        assert trio.current_time() - started == pytest.approx(1.9)
        with pytest.raises(pool.NoPlace, match="2 requests"):
            async with world.pool.ask(world.peer, ASK):
                raise AssertionError("there was a place")


async def test_a_slow_reader_is_given_up_and_does_not_hold_up_the_peer(
    autojump_clock: Clock, world: World
) -> None:
    text = "x" * 100_000
    sent = 0

    async def handler(stream: Stream, number: int) -> None:
        nonlocal sent
        server = Server()
        await next_request(stream, server)
        await stream.send_all(server.send(Head(origin=Origin())))
        while True:
            await stream.send_all(server.send(Piece(chunk=Chunk(text=text))))
            sent += len(text)

    world.serve(handler)

    async def read_slowly() -> int:
        taken = 0
        async with world.pool.ask(world.peer, Generate(request=asking())) as stream:
            answer = PeerAnswer(stream)
            await answer.wait_head()
            await trio.sleep(100)
            async for chunk in answer:
                taken += len(chunk.text)
        return taken

    with pytest.raises(pool.NotRead, match="not read here"):
        await read_slowly()
    assert pool.MAX_UNREAD <= sent < pool.MAX_UNREAD + 2**20


# --- answers


@asynccontextmanager
async def answer_of(
    world: World, *writes: list[Head | Piece | Done | Failed]
) -> AsyncIterator[PeerAnswer]:
    """A peer's answer that comes in these writes, a second apart; read to its head."""

    async def handler(stream: Stream, number: int) -> None:
        server = Server()
        await next_request(stream, server)
        for frames in writes:
            await stream.send_all(b"".join(server.send(frame) for frame in frames))
            await trio.sleep(1)

    world.serve(handler)
    async with world.pool.ask(world.peer, Generate(request=asking())) as stream:
        answer = PeerAnswer(stream)
        await answer.wait_head()
        yield answer


HEAD = Head(origin=Origin(provider="vllm"))
DONE = Done(chunk=Chunk(finish_reason="stop"), claim=b"claim")


async def test_chunks_that_came_together_are_one(autojump_clock: Clock, world: World) -> None:
    pieces = [Piece(chunk=Chunk(text=text)) for text in "abc"]
    async with answer_of(world, [HEAD, *pieces], [*pieces, DONE]) as answer:
        assert answer.origin.provider == "vllm"
        assert [chunk.text async for chunk in answer] == ["abc", "abc", ""]
        assert answer.closing == DONE


async def test_an_error_instead_of_an_answer(autojump_clock: Clock, world: World) -> None:
    failed = Failed(code="provider_unavailable", message="full", retry_after=2.0)
    with pytest.raises(ProviderUnavailable, match="full") as raised:
        async with answer_of(world, [HEAD, failed]):
            raise AssertionError("it was answered")
    assert raised.value.retry_after == 2.0


async def test_an_error_after_some_text(autojump_clock: Clock, world: World) -> None:
    failed = Failed(code="provider_unavailable", message="crash")
    texts = []

    async def read() -> None:
        async with answer_of(world, [HEAD, Piece(chunk=Chunk(text="a"))], [failed]) as answer:
            async for chunk in answer:
                texts.append(chunk.text)

    with pytest.raises(GenerateError, match="crash"):
        await read()
    assert texts == ["a"]
