"""The exchange of blocks, on the network in memory and between real libp2p hosts."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
import trio
from fakes import MemoryNetwork, MemoryTransport
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from promptmesh.cache.cid import cid_bytes
from promptmesh.mesh import bitswap_peer
from promptmesh.mesh.bitswap import MAX_STREAMS, MAX_UNFINISHED, MESSAGE_PAUSE, Bitswap
from promptmesh.mesh.bitswap_messages import (
    MAX_BLOCK,
    PROTOCOLS,
    V100,
    V110,
    V120,
    Message,
    Presence,
    Reader,
    Want,
    encode,
)
from promptmesh.mesh.bitswap_peer import BURST, IDLE, MAX_MISSING, MAX_WAITING, RATE, SMALL
from promptmesh.mesh.bitswap_search import HEAD_START, PATIENCE
from promptmesh.mesh.host import HostSettings, open_host
from promptmesh.mesh.transport import PeerId, Stream, Transport, TransportError

#: Seconds after which something hangs.
SOON = 60.0

MakeTransport = Callable[[str], Awaitable[Transport]]

BLOCK = b"a block"
CID = cid_bytes(BLOCK, "raw")
LARGE = os.urandom(100_000)


class Node:
    """A node with blocks in memory."""

    def __init__(self, transport: Transport, *members: PeerId) -> None:
        self.transport = transport
        self.peer_id = transport.peer_id
        self.blocks: dict[bytes, bytes] = {}
        #: Which blocks were asked of it, by whom; and whom it gives nothing.
        self.asked: list[tuple[PeerId, bytes]] = []
        self.refused: set[PeerId] = set()
        self.bitswap = Bitswap(transport, get=self.get, is_member=lambda peer: peer in self.members)
        self.members = set(members)

    async def get(self, peer: PeerId, cid: bytes) -> bytes | None:
        await trio.lowlevel.checkpoint()
        self.asked.append((peer, cid))
        return None if peer in self.refused else self.blocks.get(cid[-32:])

    def put(self, block: bytes) -> bytes:
        cid = cid_bytes(block, "raw")
        self.blocks[cid[-32:]] = block
        return cid

    async def fetch(self, cid: bytes, timeout: float = SOON) -> bytes:
        return await self.bitswap.fetch(cid, timeout=timeout)


class Stranger:
    """A peer that says what a test wants, and hears what it is told."""

    def __init__(self, transport: Transport, *protocols: str) -> None:
        self.transport = transport
        self.peer_id = transport.peer_id
        self.heard: list[Message] = []
        self.streams: list[Stream] = []
        self._news = trio.Event()
        for protocol in protocols or PROTOCOLS:
            transport.handle(protocol, self._hear)

    async def _hear(self, stream: Stream) -> None:
        self.streams.append(stream)
        reader = Reader()
        while data := await stream.receive_some():
            for message in reader.receive(data):
                self.heard.append(message)
                self._news.set()

    async def say(self, to: Node, *messages: Message, protocol: str = V120) -> Stream:
        """On a new stream."""
        stream = await self.transport.open_stream(to.peer_id, protocol)
        await stream.send_all(b"".join(map(encode, messages)))
        return stream

    async def hears(self, count: int) -> Message:
        """All of the first so many messages, as one."""
        with trio.fail_after(SOON):
            while len(self.heard) < count:
                await self._news.wait()
                self._news = trio.Event()
        whole = Message()
        for message in self.heard:
            whole.wants += message.wants
            whole.blocks += message.blocks
            whole.presences += message.presences
        return whole


@pytest.fixture(params=["memory", "libp2p"])
def make(request: pytest.FixtureRequest, nursery: trio.Nursery) -> MakeTransport:
    """Makes the transports of one network."""
    network = MemoryNetwork(nursery)

    async def make_one(name: str) -> Transport:
        if request.param == "memory":
            return network.transport(name)
        host: Transport = await nursery.start(run_host, name)
        return host

    return make_one


async def run_host(name: str, *, task_status: Any) -> None:
    settings = HostSettings(
        seed=name.encode().ljust(32, b"."), listen=("/ip4/127.0.0.1/tcp/0",), psk=b"k" * 32
    )
    async with open_host(settings) as host:
        task_status.started(host)
        await trio.sleep_forever()


async def start(nursery: trio.Nursery, transport: Transport, *to: Transport) -> Node:
    """A node that runs, connected to those transports."""
    node = Node(transport)
    await nursery.start(node.bitswap.run)
    for other in to:
        await transport.connect(other.peer_id, other.addresses)
    return node


async def node_and_stranger(
    nursery: trio.Nursery, make: MakeTransport, *protocols: str
) -> tuple[Node, Stranger]:
    stranger = Stranger(await make("stranger"), *protocols)
    return await start(nursery, await make("node"), stranger.transport), stranger


@pytest.fixture
def memory(nursery: trio.Nursery) -> MakeTransport:
    """As `make`, in memory only: for what is about time or faults."""
    network = MemoryNetwork(nursery)

    async def make_one(name: str) -> MemoryTransport:
        return network.transport(name)

    return make_one


# --- getting blocks -------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [b"", BLOCK, LARGE, os.urandom(MAX_BLOCK)], ids=len)
async def test_a_block_is_got(nursery: trio.Nursery, make: MakeTransport, block: bytes) -> None:
    a = await start(nursery, await make("a"))
    b = await start(nursery, await make("b"), a.transport)
    assert await b.fetch(a.put(block)) == block
    assert a.asked == [(b.peer_id, cid_bytes(block, "raw"))]


async def test_many_blocks_are_got_at_once_from_whoever_has_them(
    nursery: trio.Nursery, make: MakeTransport
) -> None:
    a = await start(nursery, await make("a"))
    b = await start(nursery, await make("b"), a.transport)
    c = await start(nursery, await make("c"), a.transport, b.transport)
    blocks = [os.urandom(1 + 977 * i) for i in range(60)]
    cids = [(a, b)[i % 2].put(block) for i, block in enumerate(blocks)]
    got: dict[bytes, bytes] = {}

    async def fetch(cid: bytes) -> None:
        got[cid] = await c.fetch(cid)

    async with trio.open_nursery() as fetching:
        for cid in cids:
            fetching.start_soon(fetch, cid)
    assert [got[cid] for cid in cids] == blocks


async def test_fetches_of_one_block_share_a_want(
    nursery: trio.Nursery, make: MakeTransport
) -> None:
    a = await start(nursery, await make("a"))
    b = await start(nursery, await make("b"), a.transport)
    cid = a.put(LARGE)
    async with trio.open_nursery() as fetching:
        for _ in range(20):
            fetching.start_soon(b.fetch, cid)
    assert len(a.asked) == 1


async def test_what_nobody_has_fails_at_once(nursery: trio.Nursery, make: MakeTransport) -> None:
    a = await start(nursery, await make("a"))
    with pytest.raises(TransportError, match="no connected peer"):
        await a.fetch(CID)
    b = await start(nursery, await make("b"), a.transport)
    with pytest.raises(TransportError, match="no connected peer"), trio.fail_after(SOON / 2):
        await b.fetch(CID)


async def test_another_hash_cannot_be_got(nursery: trio.Nursery, memory: MakeTransport) -> None:
    a = await start(nursery, await memory("a"))
    with pytest.raises(TransportError, match="sha2-256"):
        await a.fetch(b"\x01\x55\x13\x20" + bytes(32))


async def test_without_a_network_nothing_is_got(memory: MakeTransport) -> None:
    with pytest.raises(TransportError, match="no network"):
        await Node(await memory("a")).fetch(CID)


async def test_a_fetch_ends_with_the_network(nursery: trio.Nursery, memory: MakeTransport) -> None:
    stranger = Stranger(await memory("stranger"))
    node, scope = await nursery.start(run_cancellable, await memory("a"), stranger.transport)
    nursery.start_soon(cancel_after, stranger.hears, scope)
    with pytest.raises(TransportError, match="left"):
        await node.fetch(CID)


async def run_cancellable(transport: Transport, other: Transport, *, task_status: Any) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            task_status.started((await start(nursery, transport, other), scope))


async def test_other_bytes_are_not_taken(nursery: trio.Nursery, make: MakeTransport) -> None:
    node, liar = await node_and_stranger(nursery, make)
    honest = await start(nursery, await make("honest"))
    honest.put(BLOCK)

    async def lie() -> None:
        await liar.hears(1)
        await liar.say(node, Message(blocks=[(CID, b"other bytes")]))
        await node.transport.connect(honest.peer_id, honest.transport.addresses)

    nursery.start_soon(lie)
    assert await node.fetch(CID) == BLOCK


async def test_what_is_pushed_unasked_is_dropped(
    nursery: trio.Nursery, make: MakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, pusher = await node_and_stranger(nursery, make)
    monkeypatch.setattr(
        "promptmesh.mesh.bitswap.digest", lambda block: pytest.fail("it was hashed")
    )
    stream = await pusher.say(node, *[Message(blocks=[(CID, bytes(MAX_BLOCK))])] * 5)
    await stream.send_all(encode(Message(wants=[Want(CID, send_dont_have=True)])))
    # It was read to the end, and is not here.
    assert (await pusher.hears(1)).presences == [Presence(CID, have=False)]
    monkeypatch.undo()
    assert not node.bitswap._fetches


async def test_a_block_that_is_too_large_is_not_taken(
    nursery: trio.Nursery, make: MakeTransport
) -> None:
    node, stranger = await node_and_stranger(nursery, make)
    block = bytes(MAX_BLOCK + 1)

    async def answer() -> None:
        await stranger.hears(1)
        cid = cid_bytes(block, "raw")
        await stranger.say(node, Message(blocks=[(cid, block)], presences=[Presence(cid, False)]))

    nursery.start_soon(answer)
    with pytest.raises(TransportError, match="no connected peer"):
        await node.fetch(cid_bytes(block, "raw"))


async def test_who_says_have_is_asked_for_the_block(
    nursery: trio.Nursery, make: MakeTransport
) -> None:
    node, one = await node_and_stranger(nursery, make)
    other = Stranger(await make("other"))
    await node.transport.connect(other.peer_id, other.transport.addresses)
    fetched = trio.Event()

    async def fetch() -> None:
        assert await node.fetch(CID) == BLOCK
        fetched.set()

    nursery.start_soon(fetch)
    wants = [(await peer.hears(1)).wants for peer in (one, other)]
    lacking, having = (other, one) if wants[0][0].have else (one, other)
    assert lacking.heard[0].wants == [Want(CID, send_dont_have=True)]
    assert having.heard[0].wants == [Want(CID, have=True, send_dont_have=True)]
    await having.say(node, Message(presences=[Presence(CID, have=True)]))
    await lacking.say(node, Message(presences=[Presence(CID, have=False)]))
    assert (await having.hears(2)).wants[1] == Want(CID, send_dont_have=True)
    await having.say(node, Message(blocks=[(CID, BLOCK)]))
    await fetched.wait()
    # Who gave it has forgotten the want; the other remembers it until it is told.
    assert (await lacking.hears(2)).wants[1:] == [Want(CID, cancel=True)]
    await wait_all_tasks_blocked()
    assert len(having.heard) == 2


async def test_a_fetch_that_is_given_up_is_cancelled_at_the_peer(
    nursery: trio.Nursery, make: MakeTransport
) -> None:
    node, silent = await node_and_stranger(nursery, make)
    async with trio.open_nursery() as fetching:
        fetching.start_soon(node.fetch, CID)
        with trio.CancelScope() as other:
            fetching.start_soon(cancel_after, silent.hears, other)
            await node.fetch(CID)
        assert len(silent.heard) == 1  # one still waits
        fetching.cancel_scope.cancel()
    assert (await silent.hears(2)).wants == [
        Want(CID, send_dont_have=True),
        Want(CID, cancel=True),
    ]


async def cancel_after(what: Callable[[int], Awaitable[Any]], scope: trio.CancelScope) -> None:
    await what(1)
    scope.cancel()


async def test_a_fetch_ends_after_its_time(
    nursery: trio.Nursery, memory: MakeTransport, autojump_clock: MockClock
) -> None:
    node, silent = await node_and_stranger(nursery, memory)
    with pytest.raises(TransportError, match="within 3 s"):
        await node.fetch(CID, timeout=3)
    assert trio.current_time() == pytest.approx(3)
    await silent.hears(2)


async def test_a_peer_that_keeps_silent_is_not_waited_for(
    nursery: trio.Nursery, memory: MakeTransport, autojump_clock: MockClock
) -> None:
    node, silent = await node_and_stranger(nursery, memory)
    honest = await start(nursery, await memory("honest"), node.transport)
    assert await node.fetch(honest.put(LARGE)) == LARGE
    assert trio.current_time() <= PATIENCE
    await silent.hears(2)


async def test_members_are_asked_after_foreign_peers(
    nursery: trio.Nursery, memory: MakeTransport, autojump_clock: MockClock
) -> None:
    node, foreign = await node_and_stranger(nursery, memory)
    member = await start(nursery, await memory("member"), node.transport)
    node.members.add(member.peer_id)
    assert await node.fetch(member.put(BLOCK)) == BLOCK
    assert HEAD_START <= trio.current_time() < PATIENCE
    assert (await foreign.hears(1)).wants[0].cid == CID


async def test_a_peer_that_goes_is_not_waited_for(
    nursery: trio.Nursery, make: MakeTransport
) -> None:
    node, stranger = await node_and_stranger(nursery, make)

    async def go() -> None:
        await stranger.hears(1)
        await node.transport.disconnect(stranger.peer_id)

    nursery.start_soon(go)
    with pytest.raises(TransportError, match="no connected peer"):
        await node.fetch(CID)
    await node.transport.connect(stranger.peer_id, stranger.transport.addresses)

    async def answer() -> None:
        await stranger.hears(2)
        await stranger.say(node, Message(blocks=[(CID, BLOCK)]))

    nursery.start_soon(answer)
    assert await node.fetch(CID) == BLOCK


async def test_who_does_not_speak_it_is_asked_once_for_each_connection(
    nursery: trio.Nursery, make: MakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = await make("other")
    node = await start(nursery, await make("node"), other)
    opened: list[PeerId] = []
    open_stream = node.transport.open_stream

    async def counting(peer: PeerId, *protocols: str) -> Stream:
        opened.append(peer)
        return await open_stream(peer, *protocols)

    monkeypatch.setattr(node.transport, "open_stream", counting)
    for expected in (1, 2):
        for _ in range(3):
            with pytest.raises(TransportError, match="no connected peer"):
                await node.fetch(CID)
        assert len(opened) == expected
        await node.transport.disconnect(other.peer_id)
        await node.transport.connect(other.peer_id, other.addresses)


async def test_who_speaks_it_after_all_is_asked(nursery: trio.Nursery, make: MakeTransport) -> None:
    """A node that was still starting when it was asked first."""
    other = await make("other")
    node = await start(nursery, await make("node"), other)
    with pytest.raises(TransportError, match="no connected peer"):
        await node.fetch(CID)
    late = Node(other)
    await nursery.start(late.bitswap.run)
    with pytest.raises(TransportError, match="no connected peer"):
        await late.fetch(cid_bytes(b"unknown"))
    assert await node.fetch(late.put(BLOCK)) == BLOCK


# --- giving blocks --------------------------------------------------------------------------------


async def test_what_a_peer_wants_is_answered_on_a_stream_of_our_own(
    nursery: trio.Nursery, make: MakeTransport
) -> None:
    node, stranger = await node_and_stranger(nursery, make)
    small, large = node.put(bytes(SMALL)), node.put(LARGE)
    wants = [
        Want(small, have=True),
        Want(large, have=True),
        Want(cid_bytes(b"1"), have=True, send_dont_have=True),
        Want(cid_bytes(b"2"), have=True),
        Want(b"no cid", send_dont_have=True),
        Want(large[2:], send_dont_have=True),  # a CIDv0
    ]
    theirs = await stranger.say(node, Message(wants=wants))
    heard = await stranger.hears(1)
    assert heard.presences == [
        Presence(large, have=True),
        Presence(cid_bytes(b"1"), have=False),
        Presence(b"no cid", have=False),
    ]
    assert [block for _, block in heard.blocks] == [bytes(SMALL), LARGE]
    # Nothing comes on the stream that the peer opened, and it stays open.
    with trio.move_on_after(0.05) as waiting:
        await theirs.receive_some()
    assert waiting.cancelled_caught
    assert stranger.streams[0].protocol == V120


@pytest.mark.parametrize("protocol", [V100, V110])
async def test_old_versions_are_spoken(
    nursery: trio.Nursery, make: MakeTransport, protocol: str
) -> None:
    node, old = await node_and_stranger(nursery, make, protocol)
    await old.say(node, Message(wants=[Want(node.put(LARGE))]), protocol=protocol)
    assert [block for _, block in (await old.hears(1)).blocks] == [LARGE]
    assert old.streams[0].protocol == protocol

    async def answer() -> None:
        await old.hears(2)
        await old.say(node, Message(blocks=[(CID, BLOCK)]), protocol=protocol)

    nursery.start_soon(answer)
    assert await node.fetch(CID) == BLOCK


async def test_who_may_not_have_a_block_hears_that_it_is_not_here(
    nursery: trio.Nursery, make: MakeTransport
) -> None:
    node, stranger = await node_and_stranger(nursery, make)
    node.refused.add(stranger.peer_id)
    await stranger.say(node, Message(wants=[Want(node.put(BLOCK), send_dont_have=True)]))
    heard = await stranger.hears(1)
    assert (heard.presences, heard.blocks) == ([Presence(CID, have=False)], [])


async def test_a_store_that_fails_has_nothing(
    nursery: trio.Nursery, memory: MakeTransport, caplog: pytest.LogCaptureFixture
) -> None:
    node, stranger = await node_and_stranger(nursery, memory)
    node.blocks = None  # type: ignore[assignment]
    for count in (1, 2):
        await stranger.say(node, Message(wants=[Want(CID, send_dont_have=True)]))
        assert len((await stranger.hears(count)).presences) == count
    assert "could not be read" in caplog.text


async def test_a_want_is_remembered_until_the_block_is_here(
    nursery: trio.Nursery, make: MakeTransport
) -> None:
    node, stranger = await node_and_stranger(nursery, make)
    wanted, cancelled, forbidden = b"1", b"2", b"3"
    cids = [cid_bytes(block, "raw") for block in (wanted, cancelled, forbidden)]
    await stranger.say(node, Message(wants=[Want(cid, send_dont_have=True) for cid in cids]))
    assert len((await stranger.hears(1)).presences) == 3
    last = [Want(cids[1], cancel=True), Want(CID, send_dont_have=True)]
    await stranger.say(node, Message(wants=last))
    await stranger.hears(2)
    asked = len(node.asked)
    for block in (cancelled, wanted):
        node.bitswap.stored(node.put(block))
    node.bitswap.stored(b"no cid")
    assert [block for _, block in (await stranger.hears(3)).blocks] == [wanted]
    assert len(node.asked) == asked + 1  # and whether the peer may have it is asked again


async def test_a_full_wantlist_replaces_what_was_wanted_before(
    nursery: trio.Nursery, make: MakeTransport
) -> None:
    node, stranger = await node_and_stranger(nursery, make)
    await stranger.say(
        node,
        Message(wants=[Want(CID)]),
        Message(wants=[Want(cid_bytes(b"other"), send_dont_have=True)], full=True),
    )
    await stranger.hears(1)
    node.bitswap.stored(node.put(BLOCK))
    await stranger.say(node, Message(wants=[Want(node.put(b"last"))]))
    assert [block for _, block in (await stranger.hears(2)).blocks] == [b"last"]


# --- bounds ---------------------------------------------------------------------------------------


async def test_wants_are_looked_up_at_a_bounded_rate(
    nursery: trio.Nursery, memory: MakeTransport, autojump_clock: MockClock
) -> None:
    node, greedy = await node_and_stranger(nursery, memory)
    cids = [cid_bytes(i.to_bytes(4), "raw") for i in range(int(BURST + 3 * RATE))]
    batches = [cids[i : i + 500] for i in range(0, len(cids), 500)]
    await greedy.say(node, *[Message(wants=[Want(cid) for cid in batch]) for batch in batches])
    await wait_for(lambda: len(node.asked) == len(cids))
    assert trio.current_time() == pytest.approx(3, abs=0.2)
    correspondent = node.bitswap._correspondents[greedy.peer_id]
    assert len(correspondent._missing) == MAX_MISSING


async def wait_for(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await trio.sleep(0.01)


async def test_a_peer_that_does_not_read_holds_one_message_and_few_wants(
    nursery: trio.Nursery, memory: MakeTransport
) -> None:
    node, greedy = await node_and_stranger(nursery, memory)

    async def read_nothing(stream: Stream) -> None:
        await trio.sleep_forever()

    for protocol in PROTOCOLS:
        greedy.transport.handle(protocol, read_nothing)
    cids = [node.put(i.to_bytes(4) * 16_000) for i in range(3 * MAX_WAITING)]
    messages = [Message(wants=list(map(Want, cids[i : i + 64]))) for i in range(0, len(cids), 64)]
    nursery.start_soon(greedy.say, node, *messages)
    await wait_all_tasks_blocked(0.02)
    correspondent = node.bitswap._correspondents[greedy.peer_id]
    assert len(correspondent._waiting) == MAX_WAITING
    assert len(node.asked) <= 2 * bitswap_peer.FULL_BYTES // 64_000 + 2


async def test_streams_of_a_peer_are_few_and_the_most_silent_goes(
    nursery: trio.Nursery, make: MakeTransport
) -> None:
    node, stranger = await node_and_stranger(nursery, make)
    first, *others = [await stranger.say(node) for _ in range(MAX_STREAMS)]
    await wait_for(lambda: len(node.bitswap._inbound.get(stranger.peer_id, ())) == MAX_STREAMS)
    await first.send_all(encode(Message(wants=[Want(CID, send_dont_have=True)])))
    await stranger.hears(1)
    await stranger.say(node)
    with pytest.raises(TransportError, match="reset"):
        await others[0].receive_some()
    await first.send_all(encode(Message(wants=[Want(node.put(BLOCK))])))
    assert (await stranger.hears(2)).blocks


@pytest.mark.parametrize(
    "nonsense",
    [b"\xff\xff\xff\xff\x0f", encode(Message())[:0] + b"\x02\x0a\x05", b"\x80\x80\x80\x03"],
    ids=["length", "cut", "large"],
)
async def test_nonsense_resets_the_stream_and_nothing_else(
    nursery: trio.Nursery, make: MakeTransport, nonsense: bytes
) -> None:
    node, stranger = await node_and_stranger(nursery, make)
    stream = await stranger.transport.open_stream(node.peer_id, V120)
    await stream.send_all(nonsense)
    with pytest.raises(TransportError, match="reset"):
        await stream.receive_some()
    await stranger.say(node, Message(wants=[Want(node.put(BLOCK))]))
    assert (await stranger.hears(1)).blocks


async def test_a_message_that_does_not_go_on_is_given_up(
    nursery: trio.Nursery, memory: MakeTransport, autojump_clock: MockClock
) -> None:
    node, stranger = await node_and_stranger(nursery, memory)
    silent = await stranger.say(node)
    halting = await stranger.transport.open_stream(node.peer_id, V120)
    await halting.send_all(encode(Message(blocks=[(CID, BLOCK)]))[:-1])
    with pytest.raises(TransportError, match="reset"):
        await halting.receive_some()
    assert trio.current_time() == pytest.approx(MESSAGE_PAUSE)
    with trio.move_on_after(10 * MESSAGE_PAUSE) as waiting:  # between messages there is time
        await silent.receive_some()
    assert waiting.cancelled_caught


async def test_unfinished_messages_are_bounded_over_all_streams(
    nursery: trio.Nursery, make: MakeTransport
) -> None:
    node, stranger = await node_and_stranger(nursery, make)
    unfinished = encode(Message(blocks=[(CID, bytes(MAX_BLOCK))]))[:-1]
    streams = []
    for _ in range(MAX_UNFINISHED // MAX_BLOCK):
        streams.append(await stranger.transport.open_stream(node.peer_id, V120))
        await streams[-1].send_all(unfinished)
    with pytest.raises(TransportError, match="reset"):
        await streams[-1].receive_some()


# --- streams that end -----------------------------------------------------------------------------


async def test_a_peer_that_ends_its_side_is_told_on_a_new_stream(
    nursery: trio.Nursery, make: MakeTransport
) -> None:
    """As Helia does: it finishes its side of each stream at once, and goes on reading."""
    node, stranger = await node_and_stranger(nursery, make)
    counted: list[int] = []

    async def one_sided(stream: Stream) -> None:
        if hasattr(stream, "send_eof"):
            await stream.send_eof()
        else:
            stream._outgoing.finished = True  # type: ignore[attr-defined]
            stream._wake()  # type: ignore[attr-defined]
        counted.append(0)
        await stranger._hear(stream)

    for protocol in PROTOCOLS:
        stranger.transport.handle(protocol, one_sided)
    for count in (1, 2, 3):
        await stranger.say(node, Message(wants=[Want(node.put(LARGE + bytes(count)))]))
        await stranger.hears(count)
        await wait_for(lambda: node.bitswap._correspondents[stranger.peer_id]._stream is None)
    assert len(counted) == 3


async def test_a_kept_stream_that_broke_is_replaced(
    nursery: trio.Nursery, make: MakeTransport
) -> None:
    node, stranger = await node_and_stranger(nursery, make)
    for count in (1, 2, 3):
        await stranger.say(node, Message(wants=[Want(node.put(bytes(count)))]))
        await stranger.hears(count)
        await stranger.streams[-1].reset()
    assert len(stranger.streams) == 3


async def test_an_idle_stream_is_let_go_of(
    nursery: trio.Nursery, memory: MakeTransport, autojump_clock: MockClock
) -> None:
    node, stranger = await node_and_stranger(nursery, memory)
    for count in (1, 2):
        await stranger.say(node, Message(wants=[Want(node.put(bytes(count)))]))
        await stranger.hears(count)
        await trio.sleep(IDLE + 1)
        assert node.bitswap._correspondents[stranger.peer_id]._stream is None
    assert len(stranger.streams) == 2


async def test_an_answer_on_our_own_stream_is_heard(
    nursery: trio.Nursery, make: MakeTransport
) -> None:
    """As py-libp2p does."""
    node, stranger = await node_and_stranger(nursery, make)

    async def answer(stream: Stream) -> None:
        await stream.receive_some()
        await stream.send_all(encode(Message(blocks=[(CID, BLOCK)])))
        await stream.receive_some()

    for protocol in PROTOCOLS:
        stranger.transport.handle(protocol, answer)
    assert await node.fetch(CID) == BLOCK


# --- anything at all ------------------------------------------------------------------------------

cids = st.sampled_from([CID, CID[2:], cid_bytes(b"x"), b"", b"\x01\x55\x13\x20" + bytes(32)])
hostile = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.builds(
            lambda wants, full, blocks, presences: encode(Message(wants, full, blocks, presences)),
            st.lists(st.builds(Want, cids, *[st.booleans()] * 3, st.just(1)), max_size=4),
            st.booleans(),
            st.lists(st.tuples(st.just(CID), st.sampled_from([BLOCK, b"wrong"])), max_size=2),
            st.lists(st.builds(Presence, cids, st.booleans()), max_size=3),
        ),
    ),
    max_size=6,
)


@settings(max_examples=50, deadline=None)
@given(hostile, st.booleans())
def test_no_bytes_of_a_peer_disturb_the_others(pieces: Sequence[bytes], fetching: bool) -> None:
    trio.run(be_hostile, pieces, fetching, clock=MockClock(autojump_threshold=0))


async def be_hostile(pieces: Sequence[bytes], fetching: bool) -> None:
    async with trio.open_nursery() as nursery:
        network = MemoryNetwork(nursery)
        eve = Stranger(network.transport("eve"))
        node = await start(nursery, network.transport("node"), eve.transport)
        honest = await start(nursery, network.transport("honest"), node.transport)
        if fetching:
            nursery.start_soon(node.fetch, honest.put(BLOCK))
        for piece in pieces:
            try:
                stream = await eve.transport.open_stream(node.peer_id, V120)
                await stream.send_all(piece)
            except TransportError:
                continue
        assert await node.fetch(honest.put(LARGE)) == LARGE
        assert await honest.fetch(node.put(b"another")) == b"another"
        nursery.cancel_scope.cancel()
