"""What a peer can do to a host, and could do to an unmended one: a test for each mend.

The mends of the muxer alone are tested in test_yamux.py, those of the private network in
test_pnet.py, and those of dialling and leaving in test_host.py.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.lowlevel
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.ping import PingService
from libp2p.network.config import ConnectionConfig
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb.rpc_pb2 import RPC, Message
from libp2p.pubsub.pubsub import Pubsub
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.tools.anyio_service import background_trio_service
from libp2p.utils import encode_varint_prefixed
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from promptmesh.mesh import gossipsub, patches
from promptmesh.mesh.host import HostSettings, Libp2pTransport, open_host
from promptmesh.mesh.transport import Stream, TransportError
from promptmesh.mesh.yamux_frames import DATA
from promptmesh.mesh.yamux_stream import INITIAL_WINDOW, YamuxStream

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
ECHO = "/test/echo/1"
TOPIC = "/test/topic"
GOSSIP = "/meshsub/1.1.0"
#: Seconds after which something hangs.
SOON = 60.0


@asynccontextmanager
async def host(name: str) -> AsyncIterator[Libp2pTransport]:
    """A host that echoes, open to everybody."""
    settings = HostSettings(
        seed=name.encode().ljust(32, b"."),
        listen=(LOOPBACK,),
        topics=frozenset({TOPIC}),
        agent="promptmesh/test",
    )
    async with open_host(settings) as transport:
        assert isinstance(transport, Libp2pTransport)
        transport.handle(ECHO, echo)
        yield transport


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Libp2pTransport, Libp2pTransport]]:
    async with host("a") as a, host("b") as b:
        await a.connect(b.peer_id, b.addresses)
        yield a, b


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def check_alive(a: Libp2pTransport, b: Libp2pTransport) -> None:
    """The connection works, and is the one that was there before."""
    with trio.fail_after(SOON):
        stream = await a.open_stream(b.peer_id, ECHO)
        await stream.send_all(b"alive")
        assert await stream.receive_some() == b"alive"
        await stream.aclose()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(SOON):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await trio.sleep(0.001)


async def refused(stream: Stream) -> None:
    """The peer ends the stream."""
    with trio.fail_after(SOON):
        try:
            while await stream.receive_some():
                pass
        except TransportError:
            return


# --- the library ----------------------------------------------------------------------------------


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    patches.install()
    patches.install()
    monkeypatch.setattr(patches, "version", lambda _name: "0.9.0")
    with pytest.raises(RuntimeError, match=r"0\.9\.0 is installed"):
        patches.install()


async def test_nothing_goes_to_stderr_or_to_a_handler_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    async with pair() as (a, b):
        await check_alive(a, b)
        with pytest.raises(TransportError):
            await a.connect(ID(b"nobody at all").to_base58(), b.addresses)
    assert logging.root.handlers == []
    assert capfd.readouterr() == ("", "")


async def test_plaintext_is_refused() -> None:
    async with host("a") as a:
        port = int(a.addresses[0].split("/")[4])
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(b"\x13/multistream/1.0.0\n\x11/plaintext/2.0.0\n")
        received = b""
        with trio.fail_after(SOON):
            while not received.endswith(b"\x03na\n"):
                piece = await stream.receive_some()
                assert piece
                received += piece
        assert b"plaintext" not in received
        await stream.aclose()


# --- streams --------------------------------------------------------------------------------------


async def test_four_hundred_cancelled_reads_and_writes_on_one_connection() -> None:
    async with pair() as (a, b):
        rng = random.Random(1)
        lost: list[bool] = []
        a.on_connection(lambda _peer, connected: lost.append(connected))

        async def use() -> None:
            stream = await a.open_stream(b.peer_id, ECHO)
            try:
                await stream.send_all(bytes(rng.randrange(1, 600_000)))
                while await stream.receive_some():
                    pass
            finally:
                await stream.reset()

        for _ in range(400):
            with trio.move_on_after(rng.random() / 500):
                await use()
        await check_alive(a, b)
        assert lost == []


async def test_exceptions_in_handlers_stay_there(caplog: pytest.LogCaptureFixture) -> None:
    async with pair() as (a, b):

        async def fail(stream: Stream) -> None:
            raise RuntimeError("a bug in a handler")

        b.handle("/test/fail/1", fail)
        for _ in range(10):
            await refused(await a.open_stream(b.peer_id, "/test/fail/1"))
        await check_alive(a, b)
    assert caplog.text.count("a bug in a handler") == 10


async def test_a_peer_that_ignores_its_window_is_cut_off() -> None:
    async with pair() as (a, b):

        async def sleep(stream: Stream) -> None:
            await trio.sleep_forever()

        b.handle("/test/sleep/1", sleep)
        stream = await a.open_stream(b.peer_id, "/test/sleep/1")
        assert isinstance(stream, YamuxStream)
        for _ in range(INITIAL_WINDOW // 50_000 + 1):
            stream.session.send(DATA, 0, stream.number, 50_000, bytes(50_000))
        await until(lambda: not a.connected() and not b.connected())


def _id(transport: Libp2pTransport) -> ID:
    return ID.from_base58(transport.peer_id)


@pytest.mark.parametrize(
    "hello",
    [
        b"",
        b"\x00",
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(1000),
        b"\xff\x7f" + bytes(20_000),
        b"\x13/multistream/1.0.0\n" + b"\x04abc\n" * 100,
        b"\x13/multistream/2.0.0\n",
        b"\x14/multistream/1.0.0\n",
        b"\x05\xff\xfe\xfd\xfc\n",
    ],
)
async def test_nonsense_instead_of_a_protocol_resets_the_stream(hello: bytes) -> None:
    async with pair() as (a, b):
        stream = a.network.link(_id(b)).muxed_conn.session.open()
        await stream.send_all(hello)
        await stream.send_eof()
        await refused(stream)
        await check_alive(a, b)


@pytest.mark.parametrize("protocol", ["/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0", GOSSIP])
async def test_nonsense_to_the_library_does_no_harm(protocol: str) -> None:
    rng = random.Random(2)
    async with pair() as (a, b):
        for length in (0, 1, 10, 100, 5000):
            stream = await a.open_stream(b.peer_id, protocol)
            await stream.send_all(rng.randbytes(length))
            await stream.aclose()
            await refused(stream)
        await check_alive(a, b)


# --- gossip ---------------------------------------------------------------------------------------


def gossiped(**fields: Any) -> bytes:
    """An RPC with one message."""
    rpc = RPC()
    rpc.publish.add(topicIDs=[TOPIC], **fields)
    return encode_varint_prefixed(rpc.SerializeToString())


@pytest.mark.parametrize(
    "sent",
    [
        b"\x0a\xff" + b"\xff" * 9,
        b"\xff\xff\xff\xff\x0f",
        encode_varint_prefixed(b"\xff" * 30),
        gossiped(data=b"no signature"),
        gossiped(data=b"x", from_id=b"\x00\x24\x08\x01\x12\x20" + bytes(32), signature=b"s" * 64),
        gossiped(data=b"x", from_id=b"nonsense", key=b"nonsense", signature=b"nonsense"),
        gossiped(data=b"x", key=b"\x08\x01\x12\x01\x00", signature=b"s" * 64, seqno=b"1"),
    ],
)
async def test_malformed_gossip_does_no_harm(sent: bytes) -> None:
    async with pair() as (a, b):
        heard: list[bytes] = []

        def listen(_author: str, data: bytes) -> bool:
            heard.append(data)
            return True

        await a.subscribe(TOPIC, listen)
        await b.subscribe(TOPIC, listen)
        stream = await a.open_stream(b.peer_id, GOSSIP)
        await stream.send_all(sent)
        await check_alive(a, b)
        with trio.fail_after(SOON):
            while b"fine" not in heard:
                await a.publish(TOPIC, b"fine")
                await trio.sleep(0.01)
        assert set(heard) == {b"fine"}


async def test_a_message_cannot_be_replayed_or_forged(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair() as (a, b):
        heard: list[tuple[str, bytes]] = []

        def listen(author: str, data: bytes) -> bool:
            heard.append((author, data))
            return True

        await b.subscribe(TOPIC, listen)
        sent: list[RPC] = []
        monkeypatch.setattr(a.gossip.router, "publish", _keep(sent))
        await a.publish(TOPIC, b"once")
        stream = await a.open_stream(b.peer_id, GOSSIP)
        frame = encode_varint_prefixed(sent[0].SerializeToString())
        await stream.send_all(frame * 5)
        sent[0].publish[0].data = b"forged"
        await stream.send_all(encode_varint_prefixed(sent[0].SerializeToString()))
        await until(lambda: bool(heard))
        await check_alive(a, b)
        assert heard == [(a.peer_id, b"once")]


def _keep(sent: list[RPC]) -> Callable[..., object]:
    async def publish(_forwarder: ID, message: Message) -> None:
        sent.append(RPC(publish=[message]))

    return publish


async def test_control_messages_are_cut_down() -> None:
    router = gossipsub.Router(frozenset({TOPIC}))
    rpc = RPC()
    for topic in [TOPIC, *(f"/other/{n}" for n in range(100)), TOPIC]:
        rpc.control.graft.add(topicID=topic)
        rpc.control.prune.add(topicID=topic, backoff=10**9).peers.add(peerID=b"somebody")
    rpc.control.ihave.add(topicID=TOPIC, messageIDs=[b"%d" % n for n in range(10_000)])
    rpc.control.iwant.add(messageIDs=[b"same"] * 10_000)
    rpc.control.iwant.add(messageIDs=[b"%d" % n for n in range(10_000)])
    kept = router._bounded(rpc.control)
    assert [graft.topicID for graft in kept.graft] == [TOPIC]
    assert [prune.topicID for prune in kept.prune] == [TOPIC]
    assert kept.prune[0].backoff == gossipsub.PRUNE_BACKOFF
    assert not kept.prune[0].peers
    assert [len(offer.messageIDs) for offer in kept.ihave] == [gossipsub.MAX_OFFERED]
    assert [len(request.messageIDs) for request in kept.iwant] == [gossipsub.MAX_REQUESTED]


async def test_subscriptions_to_other_topics_are_not_remembered() -> None:
    async with pair() as (a, b):
        rpc = RPC()
        for number in range(100):
            rpc.subscriptions.add(subscribe=True, topicid=f"/other/{number}")
        stream = await a.open_stream(b.peer_id, GOSSIP)
        await stream.send_all(encode_varint_prefixed(rpc.SerializeToString()))
        await check_alive(a, b)
        assert not b.gossip.peer_topics


# --- the library as a peer ------------------------------------------------------------------------


async def test_an_unmended_py_libp2p_is_a_peer_like_any_other() -> None:
    """Our muxer, negotiation, identify and gossip against the library's own."""
    key_pair = create_new_key_pair()
    listen = [Multiaddr(LOOPBACK)]
    stock = new_host(
        key_pair=key_pair,
        listen_addrs=listen,
        sec_opt={
            NOISE: NoiseTransport(key_pair, noise_privkey=create_noise_key_pair().private_key)
        },
        connection_config=ConnectionConfig(min_connections=0, low_watermark=0),
    )
    router = GossipSub([TProtocol(PROTOCOL_ID_V11)], 6, 4, 12, heartbeat_interval=1)
    pubsub = Pubsub(stock, router)
    stock_id = stock.get_id().to_base58()

    async def stock_echo(stream: object) -> None:
        try:
            while True:
                await stream.write(await stream.read(65536))  # type: ignore[attr-defined]
        except StreamError:
            await stream.close()  # type: ignore[attr-defined]

    stock.set_stream_handler(TProtocol(ECHO), stock_echo)
    async with host("a") as a, stock.run(listen):
        async with background_trio_service(pubsub), background_trio_service(router):
            await pubsub.wait_until_ready()
            with trio.fail_after(2 * SOON):
                await a.connect(stock_id, [str(stock.get_addrs()[0])])
                await _exchange(a, stock_id)
                ours = _id(a)
                stream = await stock.new_stream(ours, [TProtocol(ECHO)])
                await stream.write(bytes(400_000))
                received = 0
                while received < 400_000:
                    received += len(await stream.read(65536))
                await stream.close()
                assert await PingService(stock).ping(ours)
                assert await a.ping(stock_id) < SOON
                await _gossip(a, pubsub)
                store = stock.get_peerstore()
                await until(lambda: store.has_peer(ours) and ECHO in store.get_protocols(ours))
        with trio.CancelScope(shield=True):
            await stock.close()
        await until(lambda: not a.connected())


async def _exchange(a: Libp2pTransport, peer: str) -> None:
    stream = await a.open_stream(peer, ECHO)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, bytes(400_000))
        received = 0
        while received < 400_000:
            received += len(await stream.receive_some())
    await stream.aclose()


async def _gossip(a: Libp2pTransport, pubsub: Pubsub) -> None:
    """Each hears the other."""
    heard: list[bytes] = []

    def listen(_author: str, data: bytes) -> bool:
        heard.append(data)
        return True

    await a.subscribe(TOPIC, listen)
    subscription = await pubsub.subscribe(TOPIC)
    while not heard:
        await pubsub.publish(TOPIC, b"from the library")
        await trio.sleep(0.01)
    async with trio.open_nursery() as nursery:

        async def say() -> None:
            while True:
                await a.publish(TOPIC, b"from us")
                await trio.sleep(0.01)

        nursery.start_soon(say)
        while (await subscription.get()).data != b"from us":
            pass
        nursery.cancel_scope.cancel()
