"""Real hosts on loopback: dialling, peers that do not answer, and leaving."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import trio
from hosts import port_of
from libp2p.peer.id import ID
from trio.testing import wait_all_tasks_blocked

from promptmesh.mesh import gossipsub, link, patches, pnet
from promptmesh.mesh.host import HostSettings, Libp2pTransport, open_host
from promptmesh.mesh.transport import Stream, TransportError

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
KEY = b"k" * 32
ECHO = "/test/echo/1"
TOPIC = "/test/topic"
#: Seconds after which something hangs.
SOON = 60.0


@asynccontextmanager
async def host(
    name: str, *, listen: str = LOOPBACK, admits: Callable[[str], bool] = lambda peer: True
) -> AsyncIterator[Libp2pTransport]:
    """A host that echoes."""
    settings = HostSettings(
        seed=name.encode().ljust(32, b"."),
        listen=(listen,),
        psk=KEY,
        topics=frozenset({TOPIC}),
        agent="promptmesh/test",
        admits=admits,
    )
    async with open_host(settings) as transport:
        assert isinstance(transport, Libp2pTransport)
        transport.handle(ECHO, echo)
        yield transport


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another task is about to do."""
    with trio.fail_after(SOON):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await trio.sleep(0.001)


class Tunnel:
    """Carries connections to a port, until it is told to swallow them."""

    def __init__(self, nursery: trio.Nursery, target: int) -> None:
        self._nursery = nursery
        self._target = target
        self._flows = trio.Event()
        self._flows.set()
        self.port = 0

    async def open(self) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        self._nursery.start_soon(trio.serve_listeners, self._carry, [listener])

    def swallow(self) -> None:
        """From now on nothing passes, and nobody is told: a stopped process, a cut cable."""
        self._flows = trio.Event()

    async def _carry(self, near: trio.SocketStream) -> None:
        far = await trio.open_tcp_stream("127.0.0.1", self._target)
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, near, far)
            nursery.start_soon(self._pump, far, near)

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await source.receive_some():
                await self._flows.wait()
                await sink.send_all(data)
            await sink.aclose()


async def connect_by_tunnel(
    nursery: trio.Nursery, a: Libp2pTransport, b: Libp2pTransport
) -> Tunnel:
    tunnel = Tunnel(nursery, port_of(b))
    await tunnel.open()
    await a.connect(b.peer_id, [f"/ip4/127.0.0.1/tcp/{tunnel.port}"])
    return tunnel


# --- who and where --------------------------------------------------------------------------------


async def test_the_seed_is_the_identity() -> None:
    async with open_host(HostSettings(seed=bytes(range(32)), listen=(LOOPBACK,))) as transport:
        assert transport.peer_id == "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB"
        assert transport.addresses[0].endswith(transport.peer_id)


def test_settings_do_not_show_their_secrets() -> None:
    shown = repr(HostSettings(seed=b"s" * 32, psk=b"p" * 32))
    assert "ssss" not in shown
    assert "pppp" not in shown


async def test_a_host_on_every_interface_can_be_dialled_at_each_address() -> None:
    async with host("a") as a, host("b", listen="/ip4/0.0.0.0/tcp/0") as b:
        assert "/0.0.0.0/" not in "".join(b.addresses)
        for address in b.addresses:
            assert await a.connect(b.peer_id, [address]) == address
            await a.disconnect(b.peer_id)


@pytest.mark.parametrize("listen", ["/ip4/192.0.2.1/tcp/0", "/ip4/127.0.0.1/udp/1", "x"])
async def test_a_host_that_cannot_listen_says_so(listen: str) -> None:
    with pytest.raises(TransportError, match="cannot listen on " + listen):
        async with host("a", listen=listen):
            pytest.fail("it listens")


async def test_two_hosts_do_not_share_a_port() -> None:
    async with host("a") as a:
        taken = f"/ip4/127.0.0.1/tcp/{port_of(a)}"
        with pytest.raises(TransportError, match="cannot listen"):
            async with host("b", listen=taken):
                pytest.fail("it listens")


async def test_what_fails_inside_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with host("a"):
            raise KeyError


# --- dialling -------------------------------------------------------------------------------------


async def test_an_address_that_does_not_answer_does_not_hold_up_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patches, "HANDSHAKE_TIMEOUT", 10 * SOON)
    (silent,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with silent, host("a") as a, host("b") as b:
        dead = f"/ip4/127.0.0.1/tcp/{silent.socket.getsockname()[1]}"
        with trio.fail_after(SOON):
            at = await a.connect(b.peer_id, [dead, *b.addresses], timeout=10 * SOON)
            assert at == b.addresses[0]
            assert list(b.connected()) == [a.peer_id]


async def test_connecting_has_a_time_limit_and_can_be_cancelled() -> None:
    (silent,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with silent, host("a") as a, host("b") as b:
        dead = f"/ip4/127.0.0.1/tcp/{silent.socket.getsockname()[1]}"
        with trio.fail_after(SOON), pytest.raises(TransportError, match="no answer in time"):
            await a.connect(b.peer_id, [dead], timeout=0.1)
        with trio.move_on_after(0.05) as scope:
            await a.connect(b.peer_id, [dead])
        assert scope.cancelled_caught
        await a.connect(b.peer_id, b.addresses)


async def test_a_dial_is_shared_and_taken_over_if_its_task_is_cancelled() -> None:
    (silent,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with silent, host("a") as a, host("b") as b, trio.open_nursery() as nursery:
        dead = f"/ip4/127.0.0.1/tcp/{silent.socket.getsockname()[1]}"
        scope = trio.CancelScope()

        async def lead() -> None:
            with scope:
                await a.connect(b.peer_id, [dead])

        nursery.start_soon(lead)
        await wait_all_tasks_blocked(0.01)
        with trio.fail_after(SOON):
            nursery.start_soon(a.connect, b.peer_id, b.addresses)
            await wait_all_tasks_blocked(0.01)
            assert not a.connected()
            scope.cancel()
            await until(lambda: bool(a.connected()))


async def test_three_hundred_connections_in_one_life() -> None:
    async with host("a") as a, host("b") as b:
        with trio.fail_after(60):
            for _ in range(300):
                await a.connect(b.peer_id, b.addresses)
                await a.disconnect(b.peer_id)
            await until(lambda: not b.connected())
            await a.connect(b.peer_id, b.addresses)
        assert await a.ping(b.peer_id) < SOON


async def test_only_a_few_connections_to_one_peer_are_kept() -> None:
    async with host("a") as a, host("b") as b:
        await a.connect(b.peer_id, b.addresses)
        (peer_id,) = a.network.connections
        for _ in range(3 * patches.MAX_CONNECTIONS_TO_PEER):
            await a.network.dial("127.0.0.1", port_of(b), peer_id, address="")
        links = a.network.connections[peer_id]
        await until(lambda: len(links) <= patches.MAX_CONNECTIONS_TO_PEER)
        stream = await a.open_stream(b.peer_id, ECHO)
        await stream.send_all(b"still here")
        assert await stream.receive_some() == b"still here"


# --- peers that do not answer ---------------------------------------------------------------------


async def test_a_ping_of_a_stopped_peer_waits_until_it_is_cancelled(nursery: trio.Nursery) -> None:
    async with host("a") as a, host("b") as b:
        tunnel = await connect_by_tunnel(nursery, a, b)
        assert await a.ping(b.peer_id) < SOON
        tunnel.swallow()
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.1):
            await a.ping(b.peer_id)
        await a.disconnect(b.peer_id)
        assert not a.connected()


async def test_opening_a_stream_to_a_stopped_peer_fails_in_time(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "NEGOTIATE_TIMEOUT", 0.1)
    async with host("a") as a, host("b") as b:
        (await connect_by_tunnel(nursery, a, b)).swallow()
        with trio.fail_after(SOON), pytest.raises(TransportError, match="in time"):
            await a.open_stream(b.peer_id, ECHO)


async def test_a_socket_that_takes_nothing_ends_its_connection(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pnet, "WRITE_TIMEOUT", 0.2)
    async with host("a") as a, host("b") as b:
        tunnel = await connect_by_tunnel(nursery, a, b)
        streams = [await a.open_stream(b.peer_id, ECHO) for _ in range(60)]
        tunnel.swallow()

        async def send(stream: Stream) -> None:
            with pytest.raises(TransportError):
                await stream.send_all(bytes(1_000_000))

        with trio.fail_after(SOON):
            async with trio.open_nursery() as sending:
                for stream in streams:
                    sending.start_soon(send, stream)
        await until(lambda: not a.connected())


async def test_leaving_takes_little_time_whatever_the_peers_do(nursery: trio.Nursery) -> None:
    async with host("b") as b, host("c") as c:
        # Long before the peer's side of the socket counts as one that takes nothing.
        with trio.fail_after(0.8 * pnet.WRITE_TIMEOUT):
            async with host("a") as a:
                with trio.CancelScope(shield=True):
                    tunnel = await connect_by_tunnel(nursery, a, b)
                    await a.connect(c.peer_id, c.addresses)
                    stream = await a.open_stream(b.peer_id, ECHO)
                    tunnel.swallow()

                async def fill() -> None:
                    with suppress(TransportError):
                        await stream.send_all(bytes(5_000_000))

                nursery.start_soon(fill)
                await wait_all_tasks_blocked(0.01)
        await until(lambda: a.peer_id not in c.connected())


async def test_leaving_frees_the_port_and_ends_the_handlers() -> None:
    ended = trio.Event()

    async def work(stream: Stream) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with host("b") as b:
        port = 0
        for _ in range(3):
            async with host("a", listen=f"/ip4/127.0.0.1/tcp/{port}") as a:
                port = port_of(a)
                a.handle("/test/job/1", work)
                await b.connect(a.peer_id, a.addresses)
                await b.open_stream(a.peer_id, "/test/job/1")
            await ended.wait()
            with pytest.raises(OSError, match="connect"):
                await trio.open_tcp_stream("127.0.0.1", port)
            await until(lambda: not b.connected())


async def test_a_cancelled_host_leaves_too() -> None:
    async with host("b") as b:
        with trio.move_on_after(0.2):
            async with host("a") as a:
                await b.connect(a.peer_id, a.addresses)
                await trio.sleep_forever()
        await until(lambda: not b.connected())


# --- gossip ---------------------------------------------------------------------------------------


async def test_gossip_has_its_topics_and_its_size() -> None:
    async with host("a") as a:
        with pytest.raises(ValueError, match="not a topic"):
            await a.subscribe("/other", lambda _peer, _data: True)
        with pytest.raises(ValueError, match="too many"):
            await a.publish(TOPIC, bytes(gossipsub.MAX_MESSAGE + 1))


async def test_gossip_outlives_the_connection_that_it_was_on() -> None:
    heard: dict[str, list[bytes]] = {"a": [], "b": []}

    def hear(name: str) -> Callable[[str, bytes], bool]:
        def take(peer: str, data: bytes) -> bool:
            heard[name].append(data)
            return True

        return take

    async def said(speaker: Libp2pTransport, name: str) -> None:
        heard[name].clear()
        with trio.fail_after(SOON):
            while not heard[name]:  # what is said before the other has subscribed is lost
                await speaker.publish(TOPIC, b"news")
                await trio.sleep(0.05)

    async with host("a") as a, host("b") as b:
        await a.subscribe(TOPIC, hear("a"))
        await b.subscribe(TOPIC, hear("b"))
        await a.connect(b.peer_id, b.addresses)
        await said(a, "b")
        await said(b, "a")
        peer_id = ID.from_base58(b.peer_id)
        for _ in range(3):
            old = a.network.link(peer_id)
            await a.network.dial("127.0.0.1", port_of(b), peer_id, address="another")
            await old.close()
            await said(a, "b")  # first one end, and only then the other
            await said(b, "a")


async def test_gossip_of_a_full_size_and_after_a_handler_failed() -> None:
    async with host("a") as a, host("b") as b:
        heard: list[bytes] = []

        def listen(_author: str, data: bytes) -> bool:
            heard.append(data)
            if data.startswith(b"fail"):
                raise RuntimeError("a bug")
            return True

        await a.subscribe(TOPIC, lambda _peer, _data: True)
        await b.subscribe(TOPIC, listen)
        await a.connect(b.peer_id, b.addresses)
        with trio.fail_after(SOON):
            # What is said while two are just meeting may be lost: it is said until it is heard.
            for sent in (b"fail", bytes(gossipsub.MAX_MESSAGE)):
                while sent not in heard:
                    await a.publish(TOPIC, sent)
                    await trio.sleep(0.01)


async def test_message_numbers_are_not_used_again_by_a_node_that_comes_back() -> None:
    async with host("a") as a:
        for _ in range(100):
            await a.publish(TOPIC, b"much to say")
        used = a.gossip.counter
    async with host("a") as a:
        assert a.gossip.counter > used


async def test_a_peer_that_is_not_admitted_is_not_connected_from_either_side() -> None:
    blocked: set[str] = set()
    async with host("a", admits=lambda peer: peer not in blocked) as a, host("b") as b:
        blocked.add(b.peer_id)
        with pytest.raises(TransportError, match="is blocked on this node"):
            await a.connect(b.peer_id, b.addresses)
        with suppress(TransportError):  # who dials may think that it is connected, for a moment
            await b.connect(a.peer_id, a.addresses)
        await until(lambda: not b.connected())
        assert not a.connected()
        blocked.clear()
        await b.connect(a.peer_id, a.addresses)
        await until(lambda: list(a.connected()) == [b.peer_id])
