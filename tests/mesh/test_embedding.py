"""Embeddings through the backend manager and over a network in memory."""

import math
import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from fakes import MemoryNetwork
from fakes_mesh import FakeProvider, Node, asking, embedding_of, mesh_of
from hypothesis import given, settings
from hypothesis import strategies as st

from promptmesh.mesh.embedding import MAX_PIECE, closing, pieces, whole
from promptmesh.mesh.frames import Done, Embed, Frame, Head, Piece, RemoteProtocolError
from promptmesh.mesh.pool import MAX_UNREAD
from promptmesh.mesh.protocol import Asker, Server
from promptmesh.providers.base import (
    Chunk,
    ContextTooLong,
    Embedding,
    EmbedRequest,
    GenerateError,
    ModelNotFound,
    ModelOffer,
    Origin,
    ProviderUnavailable,
    Ready,
    RequestRejected,
    Usage,
)

#: A test names the clock itself: it works only for who does.
Clock = trio.testing.MockClock

VECTORS = ModelOffer(id="v", tasks=("embed",))


def embedding(*inputs: Any, **fields: Any) -> EmbedRequest:
    return EmbedRequest(model="v", inputs=inputs or ("hi",), **fields)


def embedder(name: str = "embedder", **fields: Any) -> FakeProvider:
    return FakeProvider(name, offers=(VECTORS,), **fields)


@pytest.fixture
def network(nursery: trio.Nursery) -> MemoryNetwork:
    return MemoryNetwork(nursery)


async def embed(node: Node, request: EmbedRequest) -> tuple[Sequence[Embedding], Origin]:
    async with node.manager.open(request) as answering:
        (chunk,) = [chunk async for chunk in answering.chunks]
        assert chunk.finish_reason == "stop"
        return chunk.embeddings, answering.origin


async def error_of(node: Node, request: Any) -> GenerateError:
    with pytest.raises(GenerateError) as raised:
        async with node.manager.open(request):
            pass
    return raised.value


# --- who is asked ---------------------------------------------------------------------------------


async def test_a_peer_answers(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    provider = embedder()
    a, b = Node(network, "a"), Node(network, "b", provider)
    await mesh_of(nursery, a, b)
    found, origin = await embed(a, embedding("one", (1, 2), id="r1"))
    assert found == (embedding_of("one"), embedding_of((1, 2)))
    assert (origin.node, origin.provider, origin.model) == ("b", "embedder", "v")
    assert (origin.attempts, origin.policy) == (1, "round_robin")
    (asked,) = provider.embed_requests
    assert (asked.id, asked.provider, asked.inputs) == ("r1", "embedder", ("one", (1, 2)))
    assert await a.manager.embed(embedding("one")) == [embedding_of("one")]


async def test_a_model_is_asked_only_for_what_it_is_for(
    autojump_clock: Clock, network: MemoryNetwork
) -> None:
    both = ModelOffer(id="both", tasks=("generate", "embed"))
    one = FakeProvider("one", offers=(VECTORS, ModelOffer(id="m"), both))
    a = Node(network, "a", one)
    wrong = await error_of(a, asking("v"))
    assert type(wrong) is RequestRejected
    assert "it is not for chats" in wrong.message
    wrong = await error_of(a, EmbedRequest(model="m", inputs=("hi",)))
    assert type(wrong) is RequestRejected
    assert "it makes no embeddings" in wrong.message
    assert type(await error_of(a, EmbedRequest(model="x", inputs=("hi",)))) is ModelNotFound
    assert (one.requests, one.embed_requests) == ([], [])
    assert (await a.ask(asking("both")))[0] == "one two three"
    assert await a.manager.embed(EmbedRequest(model="both", inputs=("hi",)))


async def test_of_two_with_one_name_the_one_for_it_answers(
    autojump_clock: Clock, network: MemoryNetwork
) -> None:
    chat = FakeProvider("chat", offers=(ModelOffer(id="v"),))
    a = Node(network, "a", chat, embedder())
    for _ in range(4):
        assert (await embed(a, embedding()))[1].provider == "embedder"
        assert (await a.ask(asking("v")))[1].provider == "chat"


async def test_an_input_that_cannot_fit_is_not_sent(
    autojump_clock: Clock, network: MemoryNetwork
) -> None:
    small = FakeProvider(offers=(msgspec.structs.replace(VECTORS, context_length=3),))
    a = Node(network, "a", small)
    assert type(await error_of(a, embedding("ok", (1, 2, 3, 4)))) is ContextTooLong
    assert type(await error_of(a, embedding("x" * 100))) is ContextTooLong
    assert await a.manager.embed(embedding("ok", (1, 2, 3)))


# --- failing well ---------------------------------------------------------------------------------

GOOD = embedding_of("x")
NAN = Embedding(vector=struct.pack("<3f", 1, math.nan, 2))
BAD: list[Sequence[Embedding]] = [
    [],
    [GOOD],
    [GOOD, GOOD, GOOD],
    [GOOD, Embedding(vector=GOOD.vector[:8])],
    [GOOD, NAN],
    [Embedding(vector=b"abc"), Embedding(vector=b"abc")],
    [Embedding(vector=b""), Embedding(vector=b"")],
]


@pytest.mark.parametrize("bad", BAD)
async def test_no_good_embeddings_of_one_are_asked_of_another(
    bad: Sequence[Embedding], autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    broken, works = embedder("broken", embeddings=bad), embedder("works")
    a, b = Node(network, "a", broken), Node(network, "b", works)
    await mesh_of(nursery, a, b)
    for _ in range(3):
        found, origin = await embed(a, embedding("one", "two"))
        assert (origin.provider, len(found)) == ("works", 2)
    assert 0 < len(broken.embed_requests) <= 3


async def test_a_peer_that_sends_no_good_embeddings_has_failed(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    a, b = Node(network, "a"), Node(network, "b", embedder(embeddings=[GOOD]))
    await mesh_of(nursery, a, b)
    error = await error_of(a, embedding("one", "two"))
    assert type(error) is ProviderUnavailable
    assert "1 embeddings for 2 inputs" in error.message


async def test_other_dimensions_than_asked_for_are_no_answer(
    autojump_clock: Clock, network: MemoryNetwork
) -> None:
    a = Node(network, "a", embedder())
    assert "4 were asked for" in (await error_of(a, embedding(dimensions=4))).message
    assert await a.manager.embed(embedding(dimensions=3))


async def test_leaving_stops_the_work_on_the_peer(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    slow = embedder(delay=100)
    a, b = Node(network, "a"), Node(network, "b", slow)
    await mesh_of(nursery, a, b)
    with trio.move_on_after(1) as limit:
        await a.manager.embed(embedding())
    assert limit.cancelled_caught
    await trio.sleep(1)
    assert (slow.cancelled, slow.running) == (1, 0)


async def test_speed_and_failures_are_learnt_as_for_chats(
    autojump_clock: Clock, network: MemoryNetwork
) -> None:
    a = Node(network, "a", embedder("slow", delay=2), embedder("fast", delay=0.1))
    for _ in range(2):
        await embed(a, embedding())
    for _ in range(4):
        _, origin = await embed(a, embedding(policy="best_performance"))
        assert origin.provider == "fast"


# --- on the wire ----------------------------------------------------------------------------------


async def test_more_vectors_than_may_wait_unread_come_in_pieces(
    autojump_clock: Clock, nursery: trio.Nursery, network: MemoryNetwork
) -> None:
    large = [Embedding(vector=struct.pack("<4096f", *[float(i)] * 4096)) for i in range(700)]
    assert sum(len(e.vector) for e in large) > MAX_UNREAD
    a, b = Node(network, "a"), Node(network, "b", embedder(embeddings=large))
    await mesh_of(nursery, a, b)
    found, _ = await embed(a, embedding(*map(str, range(700))))
    assert [e.vector for e in found] == [e.vector for e in large]


VECTOR = st.binary(min_size=1, max_size=16).map(lambda b: b * 4)
EMBEDDING = st.builds(
    Embedding,
    vector=VECTOR,
    usage=st.builds(Usage, prompt_tokens=st.integers(0, 9), exact=st.booleans()),
    cid=st.none() | st.just("bafy"),
)


@settings(deadline=None)
@given(st.lists(EMBEDDING, min_size=1, max_size=5), st.integers(1, 200))
def test_any_embeddings_pass_the_wire_byte_for_byte(found: list[Embedding], size: int) -> None:
    server, asker = Server(), Asker()
    request = embedding(*map(str, range(len(found))))
    assert server.receive(asker.send(Embed(request=request))) == [Embed(request=request)]
    *before, last = pieces(closing(found), size)
    frames: list[Frame] = [
        Head(origin=Origin()),
        *(Piece(chunk=c) for c in before),
        Done(chunk=last),
    ]
    received = [frame for f in frames for frame in asker.receive(server.send(f))]
    assert received == frames
    assert asker.idle
    chunks = [frame.chunk for frame in received[1:]]
    assert [e for chunk in chunks for e in chunk.embeddings] == found
    assert all(
        len(chunk.embeddings) == 1 or sum(len(e.vector) for e in chunk.embeddings) <= size
        for chunk in chunks
    )
    assert chunks[-1].usage == closing(found).usage


def raw(**fields: Any) -> bytes:
    return msgspec.msgpack.encode({"kind": "embed", "request": {"model": "v", **fields}})


@pytest.mark.parametrize(
    "data",
    [
        raw(inputs=[]),
        raw(inputs=["x"] * 2049),
        raw(inputs=[[]]),
        raw(inputs=[[1.5]]),
        raw(inputs=[[-1]]),
        raw(inputs=[[2**31]]),
        raw(inputs=[b"x"]),
        raw(inputs=[[1] * 16_385]),
        raw(inputs="x"),
        raw(inputs=["x"], dimensions=0),
        raw(inputs=["x"], dimensions=4097),
        raw(inputs=["x"], extra={"a": b"bytes"}),
        raw(inputs=["x"], deadline=-1.0),
        raw(),
    ],
)
def test_requests_that_no_honest_peer_sends(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Server().receive(data)


@pytest.mark.parametrize("size", [0, 4 * 4096 + 4])
def test_vectors_that_no_honest_peer_sends(size: int) -> None:
    asker = Asker()
    asker.send(Embed(request=embedding()))
    chunk = {"embeddings": [{"vector": bytes(size)}], "finish_reason": "stop"}
    asker.receive(msgspec.msgpack.encode({"kind": "head", "origin": {}}))
    with pytest.raises(RemoteProtocolError):
        asker.receive(msgspec.msgpack.encode({"kind": "done", "chunk": chunk}))


async def test_a_peer_that_sends_ever_more_is_left() -> None:
    read = 0

    class Endless(Ready):
        async def __anext__(self) -> Chunk:
            nonlocal read
            read += 1
            return Chunk(embeddings=(GOOD,) * 3)

    with pytest.raises(ProviderUnavailable, match="more than the 7"):
        async for _ in whole(Endless(()), embedding(*"abcdefg")):
            pass
    assert read == 3


async def test_an_answer_that_was_cut_is_none() -> None:
    cut = Ready([Chunk(embeddings=(GOOD,))])
    assert [chunk async for chunk in whole(cut, embedding())] == []


def test_pieces_of_a_usual_answer() -> None:
    assert pieces(closing([GOOD])) == [closing([GOOD])]
    assert MAX_PIECE < MAX_UNREAD
