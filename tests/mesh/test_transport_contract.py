"""What a `Transport` does, on the network in memory and on real libp2p hosts alike."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import fakes
import pytest
import trio
from fakes import MemoryNetwork
from trio.testing import wait_all_tasks_blocked

from promptmesh.mesh import yamux_stream
from promptmesh.mesh.host import HostSettings, open_host
from promptmesh.mesh.transport import NotSpoken, PeerId, Stream, Transport, TransportError

ECHO = "/test/echo/1"
TOPIC = "/test/topic"
#: Seconds after which something hangs.
SOON = 60.0

MakeNode = Callable[[str], Awaitable[Transport]]


@pytest.fixture(params=["memory", "libp2p"])
def node(request: pytest.FixtureRequest, nursery: trio.Nursery) -> MakeNode:
    """Makes nodes of one network."""
    network = MemoryNetwork(nursery)

    async def make(name: str) -> Transport:
        if request.param == "memory":
            return network.transport(name)
        host: Transport = await nursery.start(run_host, name)
        return host

    return make


async def run_host(name: str, *, task_status: Any) -> None:
    settings = HostSettings(
        seed=name.encode().ljust(32, b"."),
        listen=("/ip4/127.0.0.1/tcp/0",),
        psk=b"k" * 32,
        topics=frozenset({TOPIC}),
    )
    async with open_host(settings) as host:
        task_status.started(host)
        await trio.sleep_forever()


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def receive_exactly(stream: Stream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = await stream.receive_some()
        assert piece, "the stream ended early"
        data += piece
    return data


async def pair(node: MakeNode) -> tuple[Transport, Transport]:
    """Two connected nodes; the second one echoes."""
    a, b = await node("a"), await node("b")
    b.handle(ECHO, echo)
    await a.connect(b.peer_id, b.addresses)
    return a, b


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another task is about to do."""
    with trio.fail_after(SOON):
        while not condition():  # noqa: ASYNC110 - a Transport has no event for it
            await trio.sleep(0.001)


# --- connections ----------------------------------------------------------------------------------


async def test_a_node_has_a_peer_id_and_addresses(node: MakeNode) -> None:
    a, b = await node("a"), await node("b")
    assert a.peer_id.startswith("12D3KooW")
    assert a.peer_id != b.peer_id
    assert a.addresses
    assert all(address.endswith(f"/p2p/{a.peer_id}") for address in a.addresses)


async def test_connecting_is_seen_by_both(node: MakeNode) -> None:
    a, b = await node("a"), await node("b")
    seen: list[tuple[str, PeerId, bool]] = []
    a.on_connection(lambda peer, connected: seen.append(("a", peer, connected)))
    b.on_connection(lambda peer, connected: seen.append(("b", peer, connected)))
    assert await a.connect(b.peer_id, b.addresses) == b.addresses[0]
    await until(lambda: len(seen) == 2)
    assert sorted(seen) == [("a", b.peer_id, True), ("b", a.peer_id, True)]
    assert a.connected() == {b.peer_id: b.addresses[0]}
    assert list(b.connected()) == [a.peer_id]

    # Once more changes nothing.
    assert await a.connect(b.peer_id, []) == b.addresses[0]
    assert len(seen) == 2

    seen.clear()
    await b.disconnect(a.peer_id)
    await until(lambda: len(seen) == 2)
    assert sorted(seen) == [("a", b.peer_id, False), ("b", a.peer_id, False)]
    assert not a.connected()
    assert not b.connected()
    await b.disconnect(a.peer_id)
    await b.disconnect("nobody")


async def test_all_addresses_are_dialled(node: MakeNode) -> None:
    a, b, other = await node("a"), await node("b"), await node("other")
    dead = f"/ip4/127.0.0.1/tcp/1/p2p/{b.peer_id}"
    elsewhere = other.addresses[0].replace(other.peer_id, b.peer_id)
    nonsense = "nonsense"
    with trio.fail_after(SOON):
        reached = await a.connect(b.peer_id, [dead, elsewhere, nonsense, *b.addresses])
    assert reached == b.addresses[0]
    assert list(a.connected()) == [b.peer_id]
    assert a.peer_id not in other.connected()


async def test_a_failure_to_connect_names_each_address(node: MakeNode) -> None:
    a, b, other = await node("a"), await node("b"), await node("other")
    dead = f"/ip4/127.0.0.1/tcp/1/p2p/{b.peer_id}"
    elsewhere = other.addresses[0].replace(other.peer_id, b.peer_id)
    with trio.fail_after(SOON), pytest.raises(TransportError) as caught:
        await a.connect(b.peer_id, [dead, elsewhere])
    for address in (dead, elsewhere):
        assert address.partition("/p2p/")[0] in str(caught.value)
    with pytest.raises(TransportError, match="no addresses"):
        await a.connect(b.peer_id, [])
    with pytest.raises(TransportError):
        await a.connect(a.peer_id, a.addresses)
    with pytest.raises(TransportError):
        await a.connect("nobody", b.addresses)
    assert not a.connected()


async def test_many_tasks_may_connect_at_once(node: MakeNode) -> None:
    a, b = await node("a"), await node("b")
    seen: list[bool] = []
    a.on_connection(lambda _peer, connected: seen.append(connected))
    with trio.fail_after(SOON):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(a.connect, b.peer_id, b.addresses)
                nursery.start_soon(b.connect, a.peer_id, a.addresses)
    assert seen == [True]
    b.handle(ECHO, echo)
    stream = await a.open_stream(b.peer_id, ECHO)
    await stream.send_all(b"still one peer")
    assert await receive_exactly(stream, 14) == b"still one peer"


async def test_a_peer_can_be_pinged(node: MakeNode) -> None:
    a, b = await pair(node)
    assert 0 <= await a.ping(b.peer_id) < SOON
    await a.disconnect(b.peer_id)
    with pytest.raises(TransportError):
        await a.ping(b.peer_id)


# --- streams --------------------------------------------------------------------------------------


async def test_a_stream_carries_bytes_both_ways_and_ends(node: MakeNode) -> None:
    a, b = await pair(node)
    stream = await a.open_stream(b.peer_id, ECHO)
    assert stream.peer == b.peer_id
    for message in (b"first", b"second"):
        await stream.send_all(message)
        assert await receive_exactly(stream, len(message)) == message
    await stream.send_all(b"")
    await stream.aclose()
    await stream.aclose()
    with pytest.raises(TransportError):
        await stream.send_all(b"late")
    with pytest.raises(TransportError):
        await stream.receive_some()


async def test_the_end_arrives_after_what_was_sent(node: MakeNode) -> None:
    a, b = await pair(node)

    async def say_goodbye(stream: Stream) -> None:
        await stream.send_all(b"goodbye")

    b.handle("/test/goodbye/1", say_goodbye)
    stream = await a.open_stream(b.peer_id, "/test/goodbye/1")
    assert await receive_exactly(stream, 7) == b"goodbye"
    assert await stream.receive_some() == b""
    assert await stream.receive_some() == b""


async def test_receiving_takes_no_more_than_asked(node: MakeNode) -> None:
    a, b = await pair(node)
    stream = await a.open_stream(b.peer_id, ECHO)
    await stream.send_all(b"0123456789")
    assert await stream.receive_some(4) == b"0123"
    assert await receive_exactly(stream, 6) == b"456789"


async def test_much_is_sent_at_the_pace_of_the_reader(node: MakeNode) -> None:
    a, b = await pair(node)
    stream = await a.open_stream(b.peer_id, ECHO)
    data = bytes(range(256)) * (12 * 1024)  # 3 MiB: more than any window
    with trio.fail_after(SOON):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            assert await receive_exactly(stream, len(data)) == data


async def test_streams_do_not_mix(node: MakeNode) -> None:
    a, b = await pair(node)

    async def ask(number: int) -> None:
        stream = await a.open_stream(b.peer_id, ECHO)
        for _ in range(20):
            message = bytes((number,)) * 1000
            await stream.send_all(message)
            assert await receive_exactly(stream, len(message)) == message
        await stream.aclose()

    with trio.fail_after(SOON):
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(ask, number)


async def test_a_reset_is_an_error_at_the_other_end(node: MakeNode) -> None:
    a, b = await pair(node)
    told: list[str] = []

    async def wait_for_more(stream: Stream) -> None:
        await stream.send_all(b"!")
        try:
            await stream.receive_some()
        except TransportError as error:
            told.append(str(error))
            raise

    b.handle("/test/wait/1", wait_for_more)
    stream = await a.open_stream(b.peer_id, "/test/wait/1")
    assert await stream.receive_some() == b"!"
    await stream.reset()
    await stream.reset()
    await until(lambda: bool(told))
    with pytest.raises(TransportError):
        await stream.receive_some()
    with pytest.raises(TransportError):
        await stream.send_all(b"late")


async def test_a_handler_that_fails_resets_its_stream_and_nothing_else(node: MakeNode) -> None:
    a, b = await pair(node)

    async def fail(stream: Stream) -> None:
        raise RuntimeError("a bug")

    b.handle("/test/fail/1", fail)
    other = await a.open_stream(b.peer_id, ECHO)
    for _ in range(5):
        stream = await a.open_stream(b.peer_id, "/test/fail/1")
        with pytest.raises(TransportError), trio.fail_after(SOON):
            await stream.receive_some()
        with pytest.raises(TransportError):
            await stream.send_all(b"late")
    await other.send_all(b"alive")
    assert await receive_exactly(other, 5) == b"alive"


async def test_opening_a_stream_can_fail(node: MakeNode) -> None:
    a, b = await pair(node)
    with pytest.raises(NotSpoken):
        await a.open_stream(b.peer_id, "/test/unknown/1", "/test/unknown/2")
    await a.disconnect(b.peer_id)
    with pytest.raises(TransportError):
        await a.open_stream(b.peer_id, ECHO)


async def test_a_stream_is_of_the_first_protocol_that_the_peer_speaks(node: MakeNode) -> None:
    a, b = await pair(node)
    heard: list[str] = []

    async def hear(stream: Stream) -> None:
        heard.append(stream.protocol)

    b.handle("/test/old/1", hear)
    b.handle("/test/older/1", hear)
    stream = await a.open_stream(b.peer_id, "/test/new/1", "/test/old/1", "/test/older/1")
    assert stream.protocol == "/test/old/1"
    assert await stream.receive_some() == b""
    assert heard == ["/test/old/1"]


async def test_a_peer_says_which_program_it_is(node: MakeNode) -> None:
    a, b = await pair(node)
    assert await a.agent(b.peer_id) == "promptmesh"
    await a.disconnect(b.peer_id)
    with pytest.raises(TransportError):
        await a.agent(b.peer_id)


async def test_who_sends_to_a_closed_stream_is_told(node: MakeNode) -> None:
    a, b = await pair(node)

    async def leave(stream: Stream) -> None:
        await stream.send_all(b"no more of that")

    b.handle("/test/leave/1", leave)
    stream = await a.open_stream(b.peer_id, "/test/leave/1")
    assert await receive_exactly(stream, 15) == b"no more of that"

    async def send_for_ever() -> None:
        while True:
            await stream.send_all(b"more" * 1000)

    with pytest.raises(TransportError), trio.fail_after(SOON):
        await send_for_ever()


async def test_a_reader_that_takes_nothing_is_given_up(
    node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yamux_stream, "WINDOW_TIMEOUT", 0.05)
    monkeypatch.setattr(fakes, "WINDOW_TIMEOUT", 0.05)
    a, b = await pair(node)

    async def sleep(stream: Stream) -> None:
        await trio.sleep_forever()

    b.handle("/test/sleep/1", sleep)
    stream = await a.open_stream(b.peer_id, "/test/sleep/1")
    with pytest.raises(TransportError, match="took nothing"), trio.fail_after(SOON):
        await stream.send_all(bytes(2_000_000))
    assert await a.ping(b.peer_id) < SOON


async def test_a_lost_connection_is_an_error_and_ends_its_handlers(node: MakeNode) -> None:
    a, b = await pair(node)
    ended = trio.Event()

    async def work(stream: Stream) -> None:
        try:
            await stream.send_all(b"!")
            await trio.sleep_forever()
        finally:
            ended.set()

    b.handle("/test/job/1", work)
    stream = await a.open_stream(b.peer_id, "/test/job/1")
    await stream.receive_some()
    failed = trio.Event()

    async def receive() -> None:
        with pytest.raises(TransportError):
            await stream.receive_some()
        failed.set()

    with trio.fail_after(SOON):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            await a.disconnect(b.peer_id)
            await failed.wait()
            await ended.wait()
    with pytest.raises(TransportError):
        await stream.send_all(b"late")


async def test_a_cancelled_receive_loses_nothing(node: MakeNode) -> None:
    a, b = await pair(node)
    stream = await a.open_stream(b.peer_id, ECHO)
    for number in range(20):
        with trio.move_on_after(0):
            await stream.receive_some()
        with trio.move_on_after(0.001):
            await stream.receive_some()
        await stream.send_all(bytes((number,)))
        assert await stream.receive_some() == bytes((number,))


async def test_a_cancelled_send_breaks_the_stream_and_nothing_else(node: MakeNode) -> None:
    a, b = await pair(node)

    async def sleep(stream: Stream) -> None:
        await trio.sleep_forever()

    b.handle("/test/sleep/1", sleep)
    other = await a.open_stream(b.peer_id, ECHO)
    for _ in range(5):
        stream = await a.open_stream(b.peer_id, "/test/sleep/1")
        with trio.move_on_after(0.01):
            await stream.send_all(bytes(2_000_000))
        with pytest.raises(TransportError):
            await stream.send_all(b"more")
        await stream.aclose()
    await other.send_all(b"alive")
    assert await receive_exactly(other, 5) == b"alive"


async def test_a_stream_has_one_reader_and_one_writer(node: MakeNode) -> None:
    a, b = await pair(node)

    async def sleep(stream: Stream) -> None:
        await trio.sleep_forever()

    b.handle("/test/sleep/1", sleep)
    stream = await a.open_stream(b.peer_id, "/test/sleep/1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.receive_some)
        nursery.start_soon(stream.send_all, bytes(2_000_000))
        await wait_all_tasks_blocked(0.01)
        with pytest.raises(trio.BusyResourceError):
            await stream.receive_some()
        with pytest.raises(trio.BusyResourceError):
            await stream.send_all(b"x")
        nursery.cancel_scope.cancel()


async def test_closing_is_safe_while_cancelled(node: MakeNode) -> None:
    a, b = await pair(node)
    ended: list[str] = []

    async def tell(stream: Stream) -> None:
        try:
            await echo(stream)
        except TransportError:
            ended.append("reset")
            raise
        ended.append("end")

    b.handle("/test/tell/1", tell)
    first = await a.open_stream(b.peer_id, "/test/tell/1")
    second = await a.open_stream(b.peer_id, "/test/tell/1")
    with trio.CancelScope() as scope:
        scope.cancel()
        await first.aclose()
    with trio.CancelScope() as scope:
        scope.cancel()
        await second.reset()
    await until(lambda: len(ended) == 2)
    assert sorted(ended) == ["end", "reset"]


# --- gossip and signatures ------------------------------------------------------------------------


async def test_gossip_reaches_everybody_once_with_its_author(node: MakeNode) -> None:
    a, middle, c = await node("a"), await node("middle"), await node("c")
    heard: dict[str, list[tuple[PeerId, bytes]]] = {"a": [], "middle": [], "c": []}
    for name, transport in (("a", a), ("middle", middle), ("c", c)):

        def listen(author: PeerId, data: bytes, name: str = name) -> bool:
            heard[name].append((author, data))
            return not data.startswith(b"not further")

        await transport.subscribe(TOPIC, listen)
    await a.connect(middle.peer_id, middle.addresses)
    await c.connect(middle.peer_id, middle.addresses)

    # What is said while they are just meeting may be lost, so it is said until it is heard.
    with trio.fail_after(SOON):
        for text, name in (("hello", "c"), ("not further", "middle"), ("last", "c")):
            sent = 0
            while not any(data.startswith(text.encode()) for _, data in heard[name]):
                await a.publish(TOPIC, f"{text} {sent}".encode())
                sent += 1
                await trio.sleep(0.01)
    assert {author for author, _ in heard["c"]} == {a.peer_id}
    assert heard["a"] == []
    assert not any(data.startswith(b"not further") for _, data in heard["c"])
    for name in heard:
        assert len(heard[name]) == len(set(heard[name])), name


async def test_what_was_flushed_is_heard_though_its_author_goes_at_once(node: MakeNode) -> None:
    a, b = await pair(node)
    heard: list[bytes] = []

    def listen(author: PeerId, data: bytes) -> bool:
        heard.append(data)
        return True

    for transport in (a, b):
        await transport.subscribe(TOPIC, listen)
    with trio.fail_after(SOON):
        # Until the subscriptions are known; what is said at that moment may be lost.
        for text in ("hello", "hello again"):
            while text.encode() not in heard:
                await a.publish(TOPIC, text.encode())
                await trio.sleep(0.01)
    await a.publish(TOPIC, b"goodbye")
    await a.flush()
    await a.disconnect(b.peer_id)
    await until(lambda: heard[-1] == b"goodbye")


async def test_publishing_to_nobody_is_no_error(node: MakeNode) -> None:
    a = await node("a")
    await a.publish(TOPIC, b"is anybody there?")


async def test_a_gossiped_message_has_its_size(node: MakeNode) -> None:
    a = await node("a")
    await a.publish(TOPIC, bytes(64 * 1024))
    with pytest.raises(ValueError, match="too many"):
        await a.publish(TOPIC, bytes(64 * 1024 + 1))


async def test_signatures_bind_to_the_peer_and_the_bytes(node: MakeNode) -> None:
    a, b = await node("a"), await node("b")
    signature = a.sign(b"this")
    assert b.verify(a.peer_id, b"this", signature)
    assert not b.verify(a.peer_id, b"that", signature)
    assert not b.verify(b.peer_id, b"this", signature)
    assert not b.verify(a.peer_id, b"this", signature[:-1])
    assert not b.verify(a.peer_id, b"this", b"")
    assert not b.verify("", b"this", signature)
    assert not b.verify("0OIl not base58", b"this", signature)
    assert not b.verify(a.peer_id + "1", b"this", signature)
