"""The pooled HTTP/1.1 client against a real server that the test scripts byte by byte."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
from fakes_http import (
    CHUNKED_HEAD,
    LAST_CHUNK,
    Script,
    ScriptedServer,
    ServerSide,
    always,
    chunk,
    reply,
    scripted_server,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from promptmesh.providers import http_pool
from promptmesh.providers.http_address import parse_base_url
from promptmesh.providers.http_pool import HttpPool
from promptmesh.providers.http_reply import (
    BrokenReply,
    HttpFailure,
    HttpReply,
    NotConnected,
    TimedOut,
)


@asynccontextmanager
async def served(
    *scripts: Script, read_timeout: float = 600.0, max_idle: int = 8
) -> AsyncIterator[tuple[ScriptedServer, HttpPool]]:
    """A server, and a pool for it."""
    async with scripted_server(*scripts) as server:
        address = parse_base_url(server.base_url)
        headers = {"authorization": "Bearer k"}
        pool = HttpPool(address, headers, read_timeout=read_timeout, max_idle=max_idle)
        try:
            yield server, pool
        finally:
            await pool.aclose()


async def whole(reply: HttpReply) -> bytes:
    return b"".join([piece async for piece in reply])


async def fetch(*scripts: Script) -> bytes:
    """The body of one reply."""
    async with served(*scripts) as (_, pool), pool.request("GET", "/models") as got:
        return await whole(got)


async def failure(*scripts: Script) -> HttpFailure:
    """Why there is no whole reply."""
    async with served(*scripts) as (_, pool):
        try:
            async with pool.request("GET", "/models") as got:
                await whole(got)
        except HttpFailure as error:
            return error
    raise AssertionError("there was a whole reply")


async def test_request_as_the_server_sees_it() -> None:
    async with served(always(reply(200, "ok"))) as (server, pool):
        async with pool.request("POST", "/chat/completions", b'{"a":1}') as got:
            assert got.status == 200
            assert await whole(got) == b"ok"
        async with pool.request("GET", "/models"):
            pass
    post, get = server.requests
    assert (post.method, post.path, post.body) == ("POST", "/v1/chat/completions", b'{"a":1}')
    assert post.headers == {
        "host": f"127.0.0.1:{server.port}",
        "authorization": "Bearer k",
        "content-type": "application/json",
        "content-length": "7",
    }
    assert (get.method, get.path) == ("GET", "/v1/models")
    assert "content-length" not in get.headers


async def test_headers_of_the_reply() -> None:
    data = reply(429, "", "Retry-After: 7", "X-A: 1", "x-a: 2")
    async with served(always(data)) as (_, pool), pool.request("GET", "/models") as got:
        assert got.status == 429
        assert got.headers["retry-after"] == "7"
        assert got.headers["x-a"] == "1, 2"


REPLIES = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "chunked": CHUNKED_HEAD + chunk(b"he") + b"3;x=y\r\nllo\r\n0\r\nX-Trailer: 1\r\n\r\n",
    "until close": b"HTTP/1.1 200 OK\r\n\r\nhello",
    "http 1.0": b"HTTP/1.0 200 OK\r\n\r\nhello",
    "after 100 and 103": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
}


@pytest.mark.parametrize("name", REPLIES)
async def test_body(name: str) -> None:
    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(REPLIES[name])

    assert await fetch(script) == b"hello"


@pytest.mark.parametrize("name", REPLIES)
async def test_body_byte_by_byte(name: str) -> None:
    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send_bytewise(REPLIES[name])

    assert await fetch(script) == b"hello"


@pytest.mark.parametrize("status", [204, 304])
async def test_status_without_a_body(status: int) -> None:
    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(b"HTTP/1.1 %d No\r\n\r\n" % status)
        await side.wait_closed()

    assert await fetch(script) == b""


async def test_pieces_come_as_they_arrive() -> None:
    more = trio.Event()

    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(CHUNKED_HEAD)
        await side.send(chunk(b"one"))
        await more.wait()
        await side.send(chunk(b"two") + chunk(b"three") + LAST_CHUNK)

    async with served(script) as (_, pool), pool.request("GET", "/") as got:
        assert await got.receive() == b"one"
        more.set()
        assert await got.receive() == b"twothree"
        assert await got.receive() == b""
        assert await got.receive() == b""


async def test_connection_is_used_again() -> None:
    async with served(always(reply(200, "ok"))) as (server, pool):
        for _ in range(3):
            async with pool.request("GET", "/") as got:
                await whole(got)
            assert pool.idle == 1
        assert server.connections == 1


async def test_connection_is_used_again_although_the_caller_failed() -> None:
    async with served(always(reply(200, "ok"))) as (_, pool):
        with suppress(KeyError):
            async with pool.request("GET", "/") as got:
                await whole(got)
                raise KeyError
        assert pool.idle == 1


async def test_concurrent_requests_have_a_connection_each_and_the_pool_is_bounded() -> None:
    arrived = trio.Event()
    waiting = 0

    async def script(side: ServerSide) -> None:
        nonlocal waiting
        while await side.request_or_end():
            waiting += 1
            if waiting == 3:
                arrived.set()
            await arrived.wait()
            await side.send(reply(200, "ok"))

    async with served(script, max_idle=2) as (server, pool):

        async def ask() -> None:
            async with pool.request("GET", "/") as got:
                await whole(got)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
        assert server.connections == 3
        assert pool.idle == 2


@pytest.mark.parametrize(
    "data",
    [
        reply(200, "ok", "Connection: close"),
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        reply(200, "ok") + b"HTTP/1.1 200 OK\r\n",
        reply(200, "ok") + b"garbage",
    ],
)
async def test_connection_that_must_not_be_used_again(data: bytes) -> None:
    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(data)
        await side.wait_closed()

    async with served(script) as (server, pool):
        for _ in range(2):
            async with pool.request("GET", "/") as got:
                assert await whole(got) == b"ok"
            assert pool.idle == 0
        assert server.connections == 2


async def test_unasked_bytes_on_an_idle_connection() -> None:
    """What comes before the question cannot be its answer."""
    sent = trio.Event()

    async def first(side: ServerSide) -> None:
        await side.request()
        await side.send(reply(200, "ok"))
        await wait_all_tasks_blocked()
        await side.send(reply(200, "forged"))
        sent.set()
        await side.wait_closed()

    async with served(first, always(reply(200, "true"))) as (_, pool):
        async with pool.request("GET", "/") as got:
            await whole(got)
        assert pool.idle == 1
        await sent.wait()
        async with pool.request("GET", "/") as got:
            assert await whole(got) == b"true"


async def test_connection_closed_while_idle() -> None:
    closed = trio.Event()

    async def first(side: ServerSide) -> None:
        await side.request()
        await side.send(reply(200, "one"))
        await side.stream.aclose()
        closed.set()

    async with served(first, always(reply(200, "two"))) as (server, pool):
        async with pool.request("GET", "/") as got:
            assert await whole(got) == b"one"
        await closed.wait()
        async with pool.request("POST", "/", b"{}") as got:
            assert await whole(got) == b"two"
        assert server.connections == 2
        assert len(server.requests) == 2


async def test_connection_closed_in_the_moment_it_is_used_again() -> None:
    """The request is sent once more, on a fresh connection."""

    async def first(side: ServerSide) -> None:
        await side.request()
        await side.send(reply(200, "one"))
        await side.request()

    async with served(first, always(reply(200, "two"))) as (server, pool):
        async with pool.request("GET", "/") as got:
            assert await whole(got) == b"one"
        async with pool.request("POST", "/", b'{"a":1}') as got:
            assert await whole(got) == b"two"
    assert [r.body for r in server.requests] == [b"", b'{"a":1}', b'{"a":1}']
    assert server.connections == 2


async def test_request_is_not_sent_a_third_time() -> None:
    async def first(side: ServerSide) -> None:
        await side.request()
        await side.send(reply(200, "one"))
        await side.request()

    async def silent(side: ServerSide) -> None:
        await side.request()

    async with served(first, silent) as (server, pool):
        async with pool.request("GET", "/") as got:
            await whole(got)
        with pytest.raises(BrokenReply, match="without a reply"):
            async with pool.request("POST", "/", b"{}"):
                pass
    assert len(server.requests) == 3


async def test_request_is_not_sent_again_after_the_first_byte_of_a_reply() -> None:
    async def first(side: ServerSide) -> None:
        await side.request()
        await side.send(reply(200, "one"))
        await side.request()
        await side.send(b"H")

    async with served(first) as (server, pool):
        async with pool.request("GET", "/") as got:
            await whole(got)
        with pytest.raises(BrokenReply, match="before the reply did"):
            async with pool.request("POST", "/", b"{}"):
                pass
    assert len(server.requests) == 2


async def test_fresh_connection_that_closes_without_a_reply() -> None:
    async def silent(side: ServerSide) -> None:
        await side.request()

    async with served(silent) as (server, pool):
        with pytest.raises(BrokenReply, match="without a reply"):
            async with pool.request("GET", "/"):
                pass
    assert len(server.requests) == 1


async def test_idle_connection_grows_old(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_pool, "IDLE_LIFETIME", 3.0)
    async with served(always(reply(200, "ok"))) as (server, pool):
        for wait, connections in ((0.0, 1), (2.9, 1), (3.1, 2)):
            await trio.sleep(wait)
            async with pool.request("GET", "/") as got:
                await whole(got)
            assert server.connections == connections


async def test_connections_that_grew_old_are_closed(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_pool, "IDLE_LIFETIME", 3.0)
    async with served(always(reply(200, "ok"))) as (_, pool):
        async with pool.request("GET", "/") as one, pool.request("GET", "/") as two:
            await whole(one)
            await whole(two)
        assert pool.idle == 2
        await trio.sleep(2)
        async with pool.request("GET", "/") as got:
            await whole(got)
        assert pool.idle == 2
        await trio.sleep(2)
        async with pool.request("GET", "/") as got:
            await whole(got)
        assert pool.idle == 1


# --- leaving -------------------------------------------------------------------------------------


async def test_leaving_early_closes_the_connection() -> None:
    left = trio.Event()

    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(CHUNKED_HEAD, chunk(b"one"))
        await side.wait_closed()
        left.set()

    async with served(script) as (_, pool):
        async with pool.request("GET", "/") as got:
            assert await got.receive() == b"one"
        assert pool.idle == 0
        await left.wait()


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\n", CHUNKED_HEAD])
async def test_cancelling_closes_the_connection(head: bytes) -> None:
    reading = trio.Event()
    left = trio.Event()

    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(head) if head else None
        reading.set()
        await side.wait_closed()
        left.set()

    async with served(script) as (_, pool):
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                async with pool.request("GET", "/") as got:
                    await whole(got)

            nursery.start_soon(ask)
            await reading.wait()
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await left.wait()
        assert pool.idle == 0


async def test_finish_waits_for_the_end_of_the_body() -> None:
    more = trio.Event()

    async def script(side: ServerSide) -> None:
        while await side.request_or_end():
            await side.send(CHUNKED_HEAD, chunk(b"all"))
            await more.wait()
            await side.send(LAST_CHUNK)

    async with served(script) as (_, pool):
        async with pool.request("GET", "/") as got:
            assert await got.receive() == b"all"
            more.set()
            await got.finish()
        assert pool.idle == 1


async def test_finish_does_not_wait_long(autojump_clock: MockClock) -> None:
    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(CHUNKED_HEAD, chunk(b"all"))
        await side.wait_closed()

    async with served(script) as (_, pool):
        async with pool.request("GET", "/") as got:
            assert await got.receive() == b"all"
            began = trio.current_time()
            await got.finish()
            assert trio.current_time() - began < 0.5
        assert pool.idle == 0


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel", "before the reply did"),
        (CHUNKED_HEAD + chunk(b"hel"), "before the reply did"),
        (CHUNKED_HEAD + b"5\r\nhel", "before the reply did"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "before the reply did"),
        (b"SSH-2.0-OpenSSH_9\r\n", "not valid HTTP"),
        (b"<html></html>", "not valid HTTP"),
        (CHUNKED_HEAD + b"zz\r\n", "not valid HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na", "not valid HTTP"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\na",
            "not valid HTTP",
        ),
        (b"HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", "not valid HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", "head of the reply"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 4000, "head of the reply"),
        (CHUNKED_HEAD + b"0\r\nX: " + b"a" * 140_000, "head of the reply"),
        (reply(200, b"\x1f\x8b", "Content-Encoding: gzip"), "compressed"),
    ],
)
async def test_broken_reply(data: bytes, why: str) -> None:
    async def script(side: ServerSide) -> None:
        await side.request()
        with suppress(trio.BrokenResourceError):  # the client may have seen enough
            await side.send(data)

    error = await failure(script)
    assert isinstance(error, BrokenReply)
    assert why in str(error)


async def test_what_came_before_the_break_is_given() -> None:
    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(CHUNKED_HEAD + chunk(b"good") + b"bad\n")
        await side.wait_closed()

    async with served(script) as (_, pool), pool.request("GET", "/") as got:
        assert await got.receive() == b"good"
        with pytest.raises(BrokenReply):
            await got.receive()


async def test_body_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_pool, "MAX_BODY", 1000)

    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(b"HTTP/1.1 200 OK\r\n\r\n")
        with suppress(trio.BrokenResourceError):
            while True:
                await side.send(b"a" * 500)

    assert "larger than 1000 bytes" in str(await failure(script))


async def test_reset_connection() -> None:
    async def script(side: ServerSide) -> None:
        assert isinstance(side.stream, trio.SocketStream)
        await side.request()
        await side.send(CHUNKED_HEAD)
        # No lingering: closing sends a reset.
        side.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    assert "connection reset" in str(await failure(script))


async def test_refused_connection_names_the_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, not listening: nobody else gets the port
        port = free.getsockname()[1]
        pool = HttpPool(parse_base_url(f"http://127.0.0.1:{port}/v1"), {})
        with pytest.raises(NotConnected) as caught:
            async with pool.request("GET", "/"):
                pass
    assert str(caught.value) == f"cannot connect to 127.0.0.1:{port}: connection refused"


async def test_connecting_has_a_limit(autojump_clock: MockClock) -> None:
    with socket.socket() as full, socket.socket() as first:
        full.bind(("127.0.0.1", 0))
        full.listen(0)  # room for one that nobody accepts; the next gets no answer
        first.connect(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        pool = HttpPool(parse_base_url(url), {}, connect_timeout=5.0)
        began = trio.current_time()
        with pytest.raises(TimedOut, match=r"no connection to .* within 5 s"):
            async with pool.request("GET", "/"):
                pass
        assert trio.current_time() - began == pytest.approx(5.0)


@pytest.mark.parametrize("head", [b"", CHUNKED_HEAD])
async def test_silence_has_a_limit(head: bytes, autojump_clock: MockClock) -> None:
    async def script(side: ServerSide) -> None:
        await side.request()
        if head:
            await side.send(head)
        await side.wait_closed()

    async with served(script, read_timeout=7.0) as (_, pool):
        with pytest.raises(TimedOut, match="nothing for 7 s"):
            async with pool.request("GET", "/") as got:
                await whole(got)
        assert pool.idle == 0


async def test_long_request_to_a_slow_reader() -> None:
    body = bytes(range(256)) * (64 << 10)

    async with served(always(reply(200, "ok"))) as (server, pool):
        async with pool.request("POST", "/", body) as got:
            assert await whole(got) == b"ok"
        assert pool.idle == 1
        assert server.requests[0].body == body


async def test_long_request_that_is_refused_unread() -> None:
    answered = trio.Event()

    async def script(side: ServerSide) -> None:
        await side.stream.receive_some(100)
        await side.send(reply(413, "too long"))
        await answered.wait()

    async with served(script) as (_, pool):
        async with pool.request("POST", "/", b"a" * (16 << 20)) as got:
            assert got.status == 413
            assert await whole(got) == b"too long"
        assert pool.idle == 0
        answered.set()


async def test_long_request_that_nobody_reads(autojump_clock: MockClock) -> None:
    done = trio.Event()

    async def script(side: ServerSide) -> None:
        await done.wait()

    async with served(script, read_timeout=7.0) as (_, pool):
        with pytest.raises(TimedOut, match="read nothing for 7 s"):
            async with pool.request("POST", "/", b"a" * (16 << 20)):
                pass
        done.set()


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200), valid_head=st.booleans())
def test_random_bytes_raise_nothing_but_failures(data: bytes, valid_head: bool) -> None:
    async def main() -> None:
        async def script(side: ServerSide) -> None:
            await side.request()
            await side.send(CHUNKED_HEAD * valid_head + data)

        async with served(script) as (_, pool):
            try:
                async with pool.request("GET", "/") as got:
                    await whole(got)
            except HttpFailure:
                pass

    trio.run(main)


async def test_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        (listener,) = await trio.open_tcp_listeners(0, host="::1")
    except OSError:
        pytest.skip("no IPv6 loopback")
    port = listener.socket.getsockname()[1]
    server = ScriptedServer(port)
    async with trio.open_nursery() as nursery:

        async def handle(stream: trio.SocketStream) -> None:
            async with stream:
                await always(reply(200, "six"))(ServerSide(stream, server))

        nursery.start_soon(trio.serve_listeners, handle, [listener])
        pool = HttpPool(parse_base_url(f"http://[::1]:{port}/v1"), {})
        async with pool.request("GET", "/models") as got:
            assert await whole(got) == b"six"
        await pool.aclose()
        nursery.cancel_scope.cancel()
    assert server.requests[0].headers["host"] == f"[::1]:{port}"


async def test_small_writes_are_not_held_back() -> None:
    async with served(always(reply(200, "ok"))) as (_, pool):
        connection = await pool.connect()
        assert connection.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        connection.socket.close()
