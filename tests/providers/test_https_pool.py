"""httpx behind the interface of our own pool, against a real TLS server on loopback."""

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from certificates import self_signed
from fakes_http import (
    CHUNKED_HEAD,
    LAST_CHUNK,
    Script,
    ScriptedServer,
    ServerSide,
    always,
    chunk,
    reply,
)
from ports import listener_on_loopback

from promptmesh.providers import https_pool
from promptmesh.providers.http_address import parse_base_url
from promptmesh.providers.http_reply import BrokenReply, HttpFailure, NotConnected, TimedOut
from promptmesh.providers.https_pool import HttpsPool

Contexts = tuple[ssl.SSLContext, ssl.SSLContext]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Contexts:
    """The server's and the client's context, for a certificate of 127.0.0.1 signed by itself."""
    path = self_signed(tmp_path_factory.mktemp("tls") / "server.pem")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cafile=path)


@asynccontextmanager
async def served(
    tls: Contexts, script: Script, *, trusted: bool = True, read_timeout: float = 10.0
) -> AsyncIterator[tuple[ScriptedServer, HttpsPool]]:
    listener = await listener_on_loopback()
    server = ScriptedServer(listener.socket.getsockname()[1])
    listeners = [trio.SSLListener(listener, tls[0])]

    async def handle(stream: trio.SSLStream) -> None:
        server.connections += 1
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError:
            return  # it does not trust us
        await script(ServerSide(stream, server))

    pool = HttpsPool(
        parse_base_url(f"https://127.0.0.1:{server.port}/v1"),
        {"authorization": "Bearer k"},
        read_timeout=read_timeout,
        tls=tls[1] if trusted else None,
    )
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, handle, listeners)
            yield server, pool
            await pool.aclose()
            nursery.cancel_scope.cancel()


async def test_request_and_reply(tls: Contexts) -> None:
    data = reply(200, "ok", "X-A: 1")
    async with served(tls, always(data)) as (server, pool):
        for _ in range(2):
            async with pool.request("POST", "/chat/completions", b"{}") as got:
                assert got.status == 200
                assert got.headers["x-a"] == "1"
                assert [piece async for piece in got] == [b"ok"]
        assert server.connections == 1
    sent = server.requests[0]
    assert (sent.method, sent.path, sent.body) == ("POST", "/v1/chat/completions", b"{}")
    assert sent.headers["authorization"] == "Bearer k"
    assert sent.headers["content-type"] == "application/json"
    assert sent.headers["accept-encoding"] == "identity"


async def test_redirect_is_not_followed(tls: Contexts) -> None:
    data = reply(302, "", "Location: https://127.0.0.1:1/")
    async with served(tls, always(data)) as (_, pool), pool.request("GET", "/models") as got:
        assert got.status == 302


async def test_pieces_come_as_they_arrive_and_leaving_closes(tls: Contexts) -> None:
    left = trio.Event()

    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(CHUNKED_HEAD, chunk(b"one"))
        await side.wait_closed()
        left.set()

    async with served(tls, script) as (_, pool):
        async with pool.request("GET", "/") as got:
            assert await got.receive() == b"one"
        await left.wait()


async def test_cancelling_closes_the_connection(tls: Contexts) -> None:
    left = trio.Event()

    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(CHUNKED_HEAD, chunk(b"one"))
        await side.wait_closed()
        left.set()

    async with served(tls, script) as (_, pool):
        with trio.CancelScope() as scope:
            async with pool.request("GET", "/") as got:
                async for _piece in got:
                    scope.cancel()
        assert scope.cancelled_caught
        await left.wait()


async def test_finish_keeps_the_connection(tls: Contexts) -> None:
    more = trio.Event()

    async def script(side: ServerSide) -> None:
        while await side.request_or_end():
            await side.send(CHUNKED_HEAD, chunk(b"all"))
            await more.wait()
            await side.send(LAST_CHUNK)

    async with served(tls, script) as (server, pool):
        for _ in range(2):
            async with pool.request("GET", "/") as got:
                assert await got.receive() == b"all"
                more.set()
                await got.finish()
        assert server.connections == 1


async def failure(pool: HttpsPool) -> HttpFailure:
    try:
        async with pool.request("GET", "/") as got:
            async for _piece in got:
                pass
    except HttpFailure as error:
        return error
    raise AssertionError("there was a whole reply")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "ended before"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel", "ended before"),
        (CHUNKED_HEAD + chunk(b"hel"), "ended before"),
        (b"SSH-2.0\r\n\r\n", "ended before"),
        (reply(200, b"\x1f\x8b", "Content-Encoding: gzip"), "compressed"),
    ],
)
async def test_broken_reply(tls: Contexts, data: bytes, why: str) -> None:
    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(data)

    async with served(tls, script) as (_, pool):
        error = await failure(pool)
    assert isinstance(error, BrokenReply)
    assert why in str(error)


async def test_body_without_end(tls: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(https_pool, "MAX_BODY", 1000)
    async with served(tls, always(reply(200, "a" * 2000))) as (_, pool):
        assert "larger than 1000 bytes" in str(await failure(pool))


async def test_certificate_that_is_not_trusted(tls: Contexts) -> None:
    async with served(tls, always(reply(200)), trusted=False) as (_, pool):
        error = await failure(pool)
    assert isinstance(error, NotConnected)
    assert "the certificate is not valid" in str(error)


async def test_refused_connection() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, not listening: nobody else gets the port
        pool = HttpsPool(parse_base_url(f"https://127.0.0.1:{free.getsockname()[1]}/v1"), {})
        error = await failure(pool)
        await pool.aclose()
    assert isinstance(error, NotConnected)
    assert str(error).endswith(": connection refused")


async def test_silence_has_a_limit(tls: Contexts) -> None:
    async def script(side: ServerSide) -> None:
        await side.request()
        await side.wait_closed()

    async with served(tls, script, read_timeout=0.05) as (_, pool):
        error = await failure(pool)
    assert isinstance(error, TimedOut)
    assert "nothing for 0.05 s" in str(error)
