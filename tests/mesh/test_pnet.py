"""The private network: its key, its cipher, and who is kept out of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from promptmesh.mesh import patches
from promptmesh.mesh.host import HostSettings, open_host
from promptmesh.mesh.pnet import (
    GREETING,
    NotInThisNetwork,
    Protection,
    SocketWire,
    hsalsa20,
    xsalsa20,
)
from promptmesh.mesh.swarm_key import KEY_SIZE, format_swarm_key, parse_swarm_key
from promptmesh.mesh.transport import Stream, Transport, TransportError

KEY, OTHER_KEY = b"k" * KEY_SIZE, b"o" * KEY_SIZE
ECHO = "/test/echo/1"
#: Seconds after which something hangs.
SOON = 60.0
#: Times 256 bytes: more than the kernel holds for a connection.
BULK = 28 * 1024

# --- the key --------------------------------------------------------------------------------------


def test_a_swarm_key_is_what_kubo_writes() -> None:
    key = bytes(range(32))
    text = (
        "/key/swarm/psk/1.0.0/\n/base16/\n"
        "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\n"
    )
    assert format_swarm_key(key) == text
    assert parse_swarm_key(text) == key
    assert parse_swarm_key(text.replace("\n", "\r\n")) == key
    assert parse_swarm_key(text.replace("0a0b0c", "0A0B0C")) == key


@given(st.binary(min_size=KEY_SIZE, max_size=KEY_SIZE))
def test_any_key_survives_its_text(key: bytes) -> None:
    assert parse_swarm_key(format_swarm_key(key)) == key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cafe" * 16,
        format_swarm_key(KEY).replace("1.0.0", "2.0.0"),
        format_swarm_key(KEY).replace("base16", "base64"),
        format_swarm_key(KEY)[:-2],
        format_swarm_key(KEY).rstrip() + "ff",
        format_swarm_key(KEY).rstrip()[:-1] + "z",
        format_swarm_key(KEY) + "more",
    ],
)
def test_what_is_no_swarm_key_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(ValueError, match="swarm key") as caught:
        parse_swarm_key(text)
    assert KEY.hex()[:8] not in str(caught.value)
    assert caught.value.__cause__ is None


def test_only_32_bytes_are_a_key() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        format_swarm_key(b"short")


# --- the cipher -----------------------------------------------------------------------------------


def test_hsalsa20_of_nacl() -> None:
    """Sections 8 and 10 of Bernstein's Cryptography in NaCl."""
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    first_key = bytes.fromhex("1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389")
    nonce = bytes.fromhex("69696ee955b62b73cd62bda875fc73d6")
    second_key = bytes.fromhex("dc908dda0b9344a953629b733820778880f3ceb421bb61b91cbd4c3e66256ce4")
    assert hsalsa20(shared, bytes(16)) == first_key
    assert hsalsa20(first_key, nonce) == second_key


def test_xsalsa20_of_nacl() -> None:
    key = bytes.fromhex("1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389")
    nonce = bytes.fromhex("69696ee955b62b73cd62bda875fc73d68219e0036b7a0b37")
    stream = bytes.fromhex("eea6a7251c1e72916d11c2cb214d3c252539121d8e234e652d651fa4c8cff880")
    assert xsalsa20(key, nonce).encrypt(bytes(32)) == stream


@given(st.lists(st.binary(max_size=50)), st.integers(1, 60))
def test_protected_bytes_arrive_in_any_pieces(messages: list[bytes], at_once: int) -> None:
    sender, receiver = Protection(KEY), Protection(KEY)
    sent = b"".join(sender.encrypt(message) for message in (GREETING, *messages))
    received = b"".join(
        receiver.decrypt(sent[start : start + at_once]) for start in range(0, len(sent), at_once)
    )
    assert received == GREETING + b"".join(messages)
    assert len(sent) == 24 + len(received)


def test_two_connections_never_share_a_key_stream() -> None:
    first, second = Protection(KEY), Protection(KEY)
    assert first.encrypt(GREETING)[24:] != second.encrypt(GREETING)[24:]


@pytest.mark.parametrize("at_once", [1, 7, 100])
@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (Protection(OTHER_KEY).encrypt(GREETING), "the key of another"),
        (GREETING + b"\x07/noise\n", "not in a private network"),
        (GREETING, "not in a private network"),
        (b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n", "the key of another"),
    ],
    ids=["protected", "noise", "multistream", "HTTP"],
)
def test_others_are_known_by_their_first_bytes(sent: bytes, why: str, at_once: int) -> None:
    protection = Protection(KEY)
    pieces = [sent[start : start + at_once] for start in range(0, len(sent), at_once)]
    with pytest.raises(NotInThisNetwork, match=why):
        b"".join(map(protection.decrypt, pieces))


# --- the socket -----------------------------------------------------------------------------------


@asynccontextmanager
async def wires() -> AsyncIterator[tuple[SocketWire, SocketWire]]:
    """The two ends of a connection."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        near = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        far = await listener.accept()
    ends = (
        SocketWire(near, initiator=True, key=KEY),
        SocketWire(far, initiator=False, key=KEY),
    )
    try:
        yield ends
    finally:
        for end in ends:
            end.abort()


async def test_what_the_socket_does_not_take_is_sent_in_its_turn() -> None:
    async with wires() as (near, far):
        data = GREETING + bytes(range(256)) * BULK
        for start in range(0, len(data), 100_000):
            near.queue(data[start : start + 100_000])
        assert near.pending
        received = b""
        with trio.fail_after(SOON):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(near.drain)
                while len(received) < len(data):
                    received += await far.receive()
        assert received == data
        assert not near.pending


async def test_a_cancelled_write_leaves_the_cipher_in_step() -> None:
    async with wires() as (near, far):
        data = GREETING + bytes(range(256)) * BULK
        with trio.move_on_after(0.01) as scope:
            await near.write(data)
        assert scope.cancelled_caught
        near.queue(b"the end")
        received = b""
        with trio.fail_after(SOON):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(near.drain)
                while not received.endswith(b"the end"):
                    received += await far.receive()
        assert received == data + b"the end"


async def test_a_socket_that_takes_nothing_is_given_up(
    autojump_clock: MockClock,
) -> None:
    async with wires() as (near, _):
        with pytest.raises(Exception, match="took nothing for 10 s"):
            await near.write(bytes(7_000_000))
        near.queue(b"more")
        assert near.pending == 0


async def test_who_makes_us_answer_and_does_not_read_is_given_up() -> None:
    async with wires() as (near, _):
        for _answer in range(30):
            near.queue(bytes(1_000_000))
        assert near.pending == 0
        with pytest.raises(Exception, match="does not read"):
            await near.drain()


async def test_a_closed_socket_ends_who_waits_for_it() -> None:
    async with wires() as (near, _):
        near.queue(bytes(7_000_000))

        async def drain() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await near.drain()

        with trio.fail_after(SOON):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(drain)
                nursery.start_soon(near.wait_low)
                nursery.start_soon(near.wait_empty)
                await wait_all_tasks_blocked()
                near.abort()


# --- hosts ----------------------------------------------------------------------------------------


@asynccontextmanager
async def host(name: str, key: bytes | None) -> AsyncIterator[Transport]:
    """A host that echoes."""
    settings = HostSettings(
        seed=name.encode().ljust(32, b"."), listen=("/ip4/127.0.0.1/tcp/0",), psk=key
    )
    async with open_host(settings) as transport:
        transport.handle(ECHO, echo)
        yield transport


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def check_echo(a: Transport, b: Transport) -> None:
    """The one connects to the other and is answered."""
    with trio.fail_after(SOON):
        await a.connect(b.peer_id, b.addresses)
        stream = await a.open_stream(b.peer_id, ECHO)
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"


@pytest.mark.parametrize("key", [KEY, None])
async def test_nodes_with_the_same_key_meet_both_ways(key: bytes | None) -> None:
    async with host("a", key) as a, host("b", key) as b:
        await check_echo(a, b)
        stream = await b.open_stream(a.peer_id, ECHO)
        await stream.send_all(b"back")
        assert await stream.receive_some() == b"back"


@pytest.mark.parametrize(("mine", "theirs"), [(KEY, OTHER_KEY), (KEY, None), (None, KEY)])
async def test_others_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, mine: bytes | None, theirs: bytes | None
) -> None:
    monkeypatch.setattr(patches, "HANDSHAKE_TIMEOUT", 10 * SOON)
    async with host("a", mine) as a, host("b", theirs) as b:
        with trio.fail_after(SOON), pytest.raises(TransportError):
            await a.connect(b.peer_id, b.addresses, timeout=10 * SOON)
        assert not a.connected()
        assert not b.connected()


async def test_the_dialler_is_told_what_is_wrong() -> None:
    async with host("a", KEY) as a, host("b", OTHER_KEY) as b, host("c", None) as c:
        with pytest.raises(TransportError, match="private network"):
            await a.connect(b.peer_id, b.addresses)
        with pytest.raises(TransportError, match="private network"):
            await a.connect(c.peer_id, c.addresses)


def port_of(transport: Transport) -> int:
    return int(transport.addresses[0].split("/")[4])


async def test_who_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "HANDSHAKE_TIMEOUT", 0.05)
    async with host("a", KEY) as a:
        silent = await trio.open_tcp_stream("127.0.0.1", port_of(a))
        with trio.fail_after(SOON):
            while await silent.receive_some():
                pass
        await silent.aclose()


async def test_of_many_who_say_nothing_the_oldest_give_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patches, "MAX_HANDSHAKES", 3)
    monkeypatch.setattr(patches, "HANDSHAKE_TIMEOUT", 10 * SOON)
    async with host("a", KEY) as a, host("b", KEY) as b, AsyncExitStack() as stack:
        silent = []
        for _ in range(5):
            silent.append(await trio.open_tcp_stream("127.0.0.1", port_of(b)))
            await stack.enter_async_context(silent[-1])
            assert len(await silent[-1].receive_some(24)) == 24  # it was accepted
        with trio.fail_after(SOON):
            for early in silent[:2]:
                while await early.receive_some():
                    pass
        await check_echo(a, b)
        with trio.move_on_after(0.01) as scope:
            while await silent[-1].receive_some():
                pass
        assert scope.cancelled_caught


async def test_idle_sockets_and_garbage_do_not_stop_a_node() -> None:
    async with host("a", KEY) as a, host("b", KEY) as b, AsyncExitStack() as stack:
        with trio.fail_after(SOON):
            for _ in range(300):
                idle = await trio.open_tcp_stream("127.0.0.1", port_of(b))
                await stack.enter_async_context(idle)
            garbage = await trio.open_tcp_stream("127.0.0.1", port_of(b))
            await stack.enter_async_context(garbage)
            with suppress(trio.BrokenResourceError):
                await garbage.send_all(bytes(range(256)) * 4096)
        await check_echo(a, b)
