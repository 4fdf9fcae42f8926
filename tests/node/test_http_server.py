"""The HTTP server over memory streams and over real sockets: what clients see and handlers get."""

from __future__ import annotations

import errno
import logging
import math
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
import trio
import trio.testing
from ports import free_port

from promptmesh.node.http_server import (
    Handler,
    HttpServer,
    Limits,
    Request,
    Responder,
    open_listeners,
)

GET = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
JSON = "application/json"
EVENTS = "text/event-stream"

both = pytest.mark.parametrize("kind", ["memory", "sockets"])


class Client:
    """A client that reads answers strictly."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self._received = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def read_until(self, end: bytes) -> bytes:
        while end not in self._received:
            data = await self.stream.receive_some()
            assert data, f"the server closed after {self._received!r}"
            self._received += data
        before, _, self._received = self._received.partition(end)
        return before

    async def read_exactly(self, size: int) -> bytes:
        while len(self._received) < size:
            data = await self.stream.receive_some()
            assert data, f"the server closed after {self._received!r}"
            self._received += data
        data, self._received = self._received[:size], self._received[size:]
        return data

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await self.read_until(b"\r\n\r\n")).decode().split("\r\n")
        fields = [(line.split(": ", 1)[0], line.split(": ", 1)[1]) for line in lines[1:]]
        assert len(dict(fields)) == len(fields)
        return int(lines[0].split(" ")[1]), dict(fields)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        status, headers = await self.head()
        if "transfer-encoding" not in headers:
            return status, headers, await self.read_exactly(int(headers["content-length"]))
        body = b""
        while chunk := await self.chunk():
            body += chunk
        return status, headers, body

    async def chunk(self) -> bytes:
        data = await self.read_exactly(int(await self.read_until(b"\r\n"), 16))
        assert await self.read_exactly(2) == b"\r\n"
        return data

    async def rest(self) -> bytes:
        """Everything until the server closes."""
        async for data in self.stream:
            self._received += data
        return self._received

    async def ask(self, data: bytes = GET) -> tuple[int, dict[str, str], bytes]:
        await self.send(data)
        return await self.answer()

    async def leave(self) -> None:
        await self.stream.aclose()

    async def reset(self) -> None:
        if isinstance(self.stream, trio.SocketStream):
            linger = struct.pack("ii", 1, 0)
            self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        await trio.aclose_forcefully(self.stream)


#: In memory nothing blocks a sender; in lockstep everything does, until it is read.
PAIRS = {
    "memory": trio.testing.memory_stream_pair,
    "lockstep": trio.testing.lockstep_stream_pair,
}


class Served:
    """A server under test."""

    def __init__(self, server: HttpServer, connect: Callable[[], Awaitable[Client]]) -> None:
        self.server = server
        self.connect = connect


#: Seconds for a test whose clock jumps: longer than any of the server's limits.
LONG = 1e6


@asynccontextmanager
async def serving(
    handler: Handler, kind: str = "memory", limits: Limits | None = None, within: float = 60
) -> AsyncIterator[Served]:
    server = HttpServer(handler, limits)
    clients: list[Client] = []
    async with trio.open_nursery() as nursery:
        if kind == "sockets":
            listeners = await open_listeners("127.0.0.1", 0)
            await nursery.start(server.serve, listeners)

        async def connect() -> Client:
            stream: trio.abc.HalfCloseableStream
            if kind == "sockets":
                stream = await trio.testing.open_stream_to_socket_listener(listeners[0])
            else:
                stream, ours = PAIRS[kind]()
                nursery.start_soon(server.serve_connection, ours)
            clients.append(Client(stream))
            return clients[-1]

        try:
            with trio.fail_after(within):
                yield Served(server, connect)
        finally:
            for client in clients:
                await trio.aclose_forcefully(client.stream)
            nursery.cancel_scope.cancel()


async def echo(request: Request, responder: Responder) -> None:
    await responder.send(200, request.body or request.target.encode(), content_type="text/plain")


class Gate:
    """A handler that answers when it is let, and says how it ended."""

    def __init__(self) -> None:
        self.entered = trio.Event()
        self.opened = trio.Event()
        self.cancelled = trio.Event()
        self.seen: list[str] = []

    async def __call__(self, request: Request, responder: Responder) -> None:
        self.seen.append(request.target)
        self.entered.set()
        try:
            await self.opened.wait()
        except trio.Cancelled:
            self.cancelled.set()
            raise
        await responder.send(200, request.target.encode(), content_type="text/plain")


def post(body: bytes, *fields: str, path: str = "/") -> bytes:
    head = [f"POST {path} HTTP/1.1", "Host: here", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


# --- requests -----------------------------------------------------------------------------------


@both
async def test_a_request_reaches_its_handler_whole(kind: str) -> None:
    seen: list[Request] = []

    async def handler(request: Request, responder: Responder) -> None:
        seen.append(request)
        await responder.send(201, b"{}", content_type=JSON, headers=[("x-node", "höhle")])

    async with serving(handler, kind) as served:
        client = await served.connect()
        target = "/a%20b/%C3%A4?x=1&x=%32&y="
        status, headers, body = await client.ask(post(b"hello", "X-A: 1", "x-a:  2 ", path=target))
    assert (status, body) == (201, b"{}")
    assert headers == {"content-type": JSON, "content-length": "2", "x-node": "höhle"}
    (request,) = seen
    assert (request.method, request.target, request.path) == ("POST", target, "/a b/ä")
    assert request.query == {"x": ["1", "2"], "y": [""]}
    assert request.headers == {"host": "here", "content-length": "5", "x-a": "1, 2"}
    assert request.body == b"hello"
    assert request.client_host == ("127.0.0.1" if kind == "sockets" else "")


@both
async def test_a_connection_serves_many_requests(kind: str) -> None:
    async with serving(echo, kind) as served:
        client = await served.connect()
        for number in range(3):
            status, headers, body = await client.ask(post(b"%d" % number))
            assert (status, body) == (200, b"%d" % number)
            assert "connection" not in headers
        status, headers, body = await client.ask(post(b"last", "Connection: Close"))
        assert (headers["connection"], body) == ("close", b"last")
        assert await client.rest() == b""


@both
async def test_http_1_0(kind: str) -> None:
    async with serving(echo, kind) as served:
        client = await served.connect()
        _, headers, body = await client.ask(b"GET /1 HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n")
        assert (headers["connection"], body) == ("keep-alive", b"/1")
        _, headers, body = await client.ask(b"GET /2 HTTP/1.0\r\n\r\n")
        assert (headers["connection"], body) == ("close", b"/2")
        assert await client.rest() == b""


@both
async def test_chunked_request(kind: str) -> None:
    async with serving(echo, kind) as served:
        client = await served.connect()
        head = b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: Chunked\r\n\r\n"
        body = b'5;name="value"\r\nhello\r\n00A\r\n, chunked.\r\n0\r\nX-Sum: 1\r\n\r\n'
        assert (await client.ask(head + body))[2] == b"hello, chunked."
        assert (await client.ask(head + b"0\r\n\r\n"))[2] == b"/"
        assert (await client.ask())[2] == b"/"


async def test_the_absolute_form_names_the_host() -> None:
    async def handler(request: Request, responder: Responder) -> None:
        body = f"{request.headers['host']} {request.path} {request.query}"
        await responder.send(200, body.encode())

    async with serving(handler) as served:
        client = await served.connect()
        head = b"GET http://there:80/x?y=1 HTTP/1.1\r\nHost: here\r\n\r\n"
        assert (await client.ask(head))[2] == b"there:80 /x {'y': ['1']}"
        assert (await client.ask(head.replace(b"/x", b"")))[2] == b"there:80 / {'y': ['1']}"
        options = b"OPTIONS * HTTP/1.1\r\nHost: [::1]:7411\r\n\r\n"
        assert (await client.ask(options))[2] == b"[::1]:7411 * {}"


async def test_a_wish_for_another_protocol_is_ignored() -> None:
    async with serving(echo) as served:
        client = await served.connect()
        upgrade = ("Upgrade: h2c, websocket", "Connection: Upgrade, HTTP2-Settings")
        assert (await client.ask(post(b"a", *upgrade)))[2] == b"a"
        assert (await client.ask(post(b"b")))[2] == b"b"


@both
async def test_pipelined_requests_are_answered_in_turn(kind: str) -> None:
    running = 0

    async def handler(request: Request, responder: Responder) -> None:
        nonlocal running
        running += 1
        assert running == 1
        await trio.testing.wait_all_tasks_blocked()
        running -= 1
        await echo(request, responder)

    async with serving(handler, kind) as served:
        client = await served.connect()
        requests = [post(b"%d" % n) for n in range(5)]
        await client.send(b"".join(requests)[:-1])
        for number in range(4):
            assert (await client.answer())[2] == b"%d" % number
        await client.send(b"4")
        assert (await client.answer())[2] == b"4"


async def test_a_client_cannot_get_far_ahead() -> None:
    gate = Gate()
    limits = Limits(max_read_ahead=1000)
    small = GET * 10_000
    sent = 0

    async with serving(gate, "lockstep", limits) as served, trio.open_nursery() as nursery:
        client = await served.connect()

        async def send() -> None:
            nonlocal sent
            for start in range(0, len(small), 100):
                await client.send(small[start : start + 100])
                sent += 100

        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        # The first piece began the answer; the bound may be passed by one piece.
        assert 1000 <= sent <= 1300
        gate.opened.set()
        for _ in range(1000):
            await client.answer()
        # Each answer makes room for no more than its own request.
        assert sent <= 1000 * len(GET) + 1300
        nursery.cancel_scope.cancel()


# --- Expect: 100-continue -----------------------------------------------------------------------


@both
async def test_continue_is_said_before_the_body(kind: str) -> None:
    async with serving(echo, kind) as served:
        client = await served.connect()
        request = post(b"hello", "Expect: 100-Continue")
        for _ in range(2):
            await client.send(request[:-5])
            assert await client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue"
            assert (await client.ask(b"hello"))[2] == b"hello"
        # Here it has come already, or there is none: the answer comes first.
        assert (await client.ask(request))[2] == b"hello"
        assert (await client.ask(post(b"", "Expect: 100-continue")))[2] == b"/"


@both
async def test_no_continue_for_a_body_that_is_not_wanted(kind: str) -> None:
    async with serving(echo, kind, Limits(max_body=4)) as served:
        client = await served.connect()
        head = post(b"hello", "Expect: 100-continue")[:-5]
        assert (await client.ask(head))[0] == 413
        assert await client.rest() == b""
        client = await served.connect()
        assert (await client.ask(post(b"hell", "Expect: a-miracle")[:-4]))[0] == 417


async def test_continue_for_a_pipelined_request() -> None:
    gate = Gate()
    async with serving(gate) as served:
        client = await served.connect()
        await client.send(GET + post(b"hello", "Expect: 100-continue", path="/2")[:-5])
        await gate.entered.wait()
        gate.opened.set()
        assert (await client.answer())[2] == b"/"
        assert await client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue"
        assert (await client.ask(b"hello"))[2] == b"/2"


async def test_a_body_that_comes_while_continue_is_said() -> None:
    gate = Gate()
    async with serving(gate, "lockstep") as served:
        client = await served.connect()
        await client.send(GET + post(b"hello", "Expect: 100-continue", path="/2")[:-5])
        await gate.entered.wait()
        gate.opened.set()
        assert (await client.answer())[2] == b"/"
        await trio.testing.wait_all_tasks_blocked()
        await client.send(b"hello")  # "100 Continue" is still not read
        assert await client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue"
        assert (await client.answer())[2] == b"/2"


# --- answers ------------------------------------------------------------------------------------


@both
async def test_a_streamed_answer(kind: str) -> None:
    step = trio.Event()

    async def handler(request: Request, responder: Responder) -> None:
        await responder.start(200, content_type=EVENTS, headers=[("x-a", "b")])
        assert responder.started
        await responder.write(b"one")
        await responder.write(b"")  # not taken for the end
        await step.wait()
        await responder.write(b"two" * 10)
        await responder.end()

    async with serving(handler, kind) as served:
        client = await served.connect()
        await client.send(GET)
        status, headers = await client.head()
        assert status == 200
        assert headers == {"content-type": EVENTS, "x-a": "b", "transfer-encoding": "chunked"}
        assert await client.chunk() == b"one"
        step.set()
        assert await client.chunk() == b"two" * 10
        assert await client.chunk() == b""
        assert (await client.ask())[2] == b"one" + b"two" * 10


@both
async def test_a_streamed_answer_of_http_1_0_ends_with_the_connection(kind: str) -> None:
    async def handler(request: Request, responder: Responder) -> None:
        await responder.start(200, content_type=EVENTS)
        await responder.write(b"all")
        await responder.end()

    async with serving(handler, kind) as served:
        client = await served.connect()
        await client.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        _, headers = await client.head()
        assert headers == {"content-type": EVENTS, "connection": "close"}
        assert await client.rest() == b"all"


@both
async def test_answers_without_a_body(kind: str) -> None:
    async def handler(request: Request, responder: Responder) -> None:
        if request.path == "/stream":
            await responder.start(200, content_type=EVENTS)
            await responder.write(b"nothing of this is sent")
            await responder.end()
        else:
            await responder.send(int(request.path[1:]), b"12345", content_type="")

    async with serving(handler, kind) as served:
        client = await served.connect()
        for target, field in [
            ("HEAD /200", "content-length: 5"),
            ("GET /204", None),
            ("GET /304", None),
            ("HEAD /stream", "transfer-encoding: chunked"),
            ("HEAD /200", "content-length: 5"),
        ]:
            await client.send(GET.replace(b"GET /", target.encode()))
            lines = (await client.read_until(b"\r\n\r\n")).decode().split("\r\n")
            assert [line for line in lines[1:] if "content-type" not in line] == [field] * bool(
                field
            )


@both
async def test_a_large_answer(kind: str) -> None:
    body = bytes(range(256)) * 8_000

    async def handler(request: Request, responder: Responder) -> None:
        if request.path == "/whole":
            await responder.send(200, body)
        else:
            await responder.start(200, content_type=JSON)
            await responder.write(body)
            await responder.end()

    async with serving(handler, kind) as served:
        client = await served.connect()
        assert (await client.ask(GET.replace(b"/ ", b"/whole ")))[2] == body
        assert (await client.ask())[2] == body


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-a", "b\r\nx-c: d"),
        ("x-a", "b\nx-c: d"),
        ("x-a", "\r"),
        ("x-a", "\0"),
        ("x-a\r\nx-b", "c"),
        ("x a", "b"),
        ("", "b"),
        ("x-ä", "b"),
        ("Content-Length", "1"),
        ("connection", "keep-alive"),
    ],
)
async def test_a_header_cannot_be_injected(name: str, value: str) -> None:
    async def handler(request: Request, responder: Responder) -> None:
        with pytest.raises(ValueError, match="header"):
            await responder.send(200, headers=[(name, value)])
        with pytest.raises(ValueError, match="header"):
            await responder.start(200, content_type=EVENTS, headers=[(name, value)])
        with pytest.raises(ValueError, match="content-type"):
            await responder.send(200, content_type="text/plain\r\nx-a: b")
        await responder.send(200, b"fine", content_type="")

    async with serving(handler) as served:
        client = await served.connect()
        assert await client.ask() == (200, {"content-length": "4"}, b"fine")


async def test_a_responder_gives_one_answer() -> None:
    async def handler(request: Request, responder: Responder) -> None:
        with pytest.raises(RuntimeError):
            await responder.write(b"too early")
        with pytest.raises(RuntimeError):
            await responder.end()
        with pytest.raises(ValueError, match="status"):
            await responder.send(101)
        with pytest.raises(ValueError, match="no body"):
            await responder.start(204, content_type=JSON)
        await responder.start(200, content_type=JSON)
        with pytest.raises(RuntimeError):
            await responder.send(200)
        await responder.end()
        with pytest.raises(RuntimeError):
            await responder.write(b"too late")
        with pytest.raises(RuntimeError):
            await responder.end()

    async with serving(handler) as served:
        client = await served.connect()
        assert (await client.ask())[2] == b""
        assert (await client.ask())[2] == b""


async def test_two_tasks_cannot_mix_their_pieces() -> None:
    failed: list[BaseException] = []

    async def handler(request: Request, responder: Responder) -> None:
        await responder.start(200, content_type=EVENTS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(responder.write, b"a" * 1000)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(RuntimeError) as caught:
                await responder.write(b"b")
            failed.append(caught.value)
        await responder.end()

    async with serving(handler, "lockstep") as served:
        client = await served.connect()
        await client.send(GET)
        await client.head()
        while not failed:
            await trio.testing.wait_all_tasks_blocked()
        assert await client.chunk() == b"a" * 1000
        assert await client.chunk() == b""


async def test_writes_that_never_wait_give_others_a_turn() -> None:
    turns = 0

    async def handler(request: Request, responder: Responder) -> None:
        nonlocal turns
        await responder.start(200, content_type=EVENTS)
        before = turns
        for _ in range(100):
            await responder.write(b"x")
        turns -= before
        await responder.end()

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with serving(handler, "sockets") as served, trio.open_nursery() as nursery:
        nursery.start_soon(count)
        client = await served.connect()
        assert (await client.ask())[2] == b"x" * 100
        nursery.cancel_scope.cancel()
        assert turns >= 5


# --- failures of the handler --------------------------------------------------------------------


@both
async def test_a_failure_before_the_answer(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: Request, responder: Responder) -> None:
        if request.path == "/fails":
            raise RuntimeError("sk-secret")
        if request.path == "/fails-in-a-nursery":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(handler_of_nothing)
        # Otherwise it forgets to answer.

    async def handler_of_nothing() -> None:
        raise KeyError("sk-secret")

    async with serving(handler, kind) as served:
        client = await served.connect()
        for path in (b"/fails", b"/fails-in-a-nursery", b"/forgets"):
            caplog.clear()
            status, headers, body = await client.ask(GET.replace(b"/ ", path + b" "))
            assert (status, headers["content-type"]) == (500, JSON)
            message = b'{"error":{"message":"internal server error","type":"server_error"}}'
            assert body == message
            assert [record.levelno for record in caplog.records] == [logging.ERROR]
            assert path.decode() in caplog.text


@both
async def test_a_failure_after_the_start_cuts_the_answer(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Request, responder: Responder) -> None:
        await responder.start(200, content_type=EVENTS)
        await responder.write(b"part")
        if request.path == "/fails":
            raise RuntimeError("broken")
        # Otherwise it forgets to end.

    async with serving(handler, kind) as served:
        for path in (b"/fails", b"/forgets"):
            client = await served.connect()
            await client.send(GET.replace(b"/ ", path + b" "))
            await client.head()
            assert await client.rest() == b"4\r\npart\r\n"
            assert path.decode() in caplog.text


async def test_a_cut_answer_of_http_1_0_is_a_reset() -> None:
    async def handler(request: Request, responder: Responder) -> None:
        await responder.start(200, content_type=EVENTS)
        raise RuntimeError("broken")

    async with serving(handler, "sockets") as served:
        client = await served.connect()
        await client.send(b"GET / HTTP/1.0\r\n\r\n")
        with pytest.raises(trio.BrokenResourceError):
            await client.rest()


async def test_a_time_limit_of_the_handler_cannot_spoil_the_stream() -> None:
    tried = trio.Event()

    async def handler(request: Request, responder: Responder) -> None:
        await responder.start(200, content_type=EVENTS)
        try:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(responder.write, b"x" * 10_000)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await responder.write(b"y")
                await responder.end()
            tried.set()

    async with serving(handler, "lockstep") as served:
        client = await served.connect()
        await client.send(GET)
        await client.head()
        await tried.wait()
        # Some of the piece is out (in lockstep all of it): nothing may follow it.
        assert await client.rest() == b"2710\r\n" + b"x" * 10_000 + b"\r\n"


# --- clients that leave or stall ----------------------------------------------------------------


@both
@pytest.mark.parametrize("how", ["closes", "resets", "half-closes"])
async def test_a_client_that_leaves_cancels_its_handler(
    kind: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    async with serving(gate, kind) as served:
        client = await served.connect()
        await client.send(GET)
        await gate.entered.wait()
        if how == "closes":
            await client.leave()
        elif how == "resets":
            await client.reset()
        else:
            await client.stream.send_eof()
        await gate.cancelled.wait()
    assert caplog.records == []


@both
async def test_a_client_that_leaves_a_stream_cancels_its_handler(kind: str) -> None:
    ended = trio.Event()
    shielded = trio.Event()

    async def handler(request: Request, responder: Responder) -> None:
        await responder.start(200, content_type=EVENTS)
        try:
            while True:
                await responder.write(b"token ")
                await trio.lowlevel.checkpoint()
        finally:
            ended.set()
            with trio.CancelScope(shield=True):
                await responder.write(b"does nothing, and does not fail")
            shielded.set()

    async with serving(handler, kind) as served:
        client = await served.connect()
        await client.send(GET)
        await client.head()
        await client.chunk()
        await client.leave()
        await ended.wait()
        await shielded.wait()


async def test_a_client_that_left_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()

    async def handler(request: Request, responder: Responder) -> None:
        await responder.start(200, content_type=EVENTS)
        with trio.CancelScope(shield=True):  # it has something to tidy up, then gives up
            gate.entered.set()
            await gate.opened.wait()

    async with serving(handler) as served:
        client = await served.connect()
        await client.send(GET)
        await gate.entered.wait()
        await client.leave()
        await trio.testing.wait_all_tasks_blocked()
        gate.opened.set()
        await trio.testing.wait_all_tasks_blocked()
    assert caplog.records == []


@pytest.mark.parametrize(
    ("sent", "limit"),
    [(b"", "idle_timeout"), (GET[:-1], "head_timeout"), (post(b"ab")[:-1], "body_timeout")],
)
async def test_waiting_for_a_request_has_an_end(
    sent: bytes, limit: str, autojump_clock: trio.testing.MockClock
) -> None:
    limits = Limits(idle_timeout=500, head_timeout=300, body_timeout=200)
    async with serving(echo, limits=limits, within=LONG) as served:
        client = await served.connect()
        assert (await client.ask())[2] == b"/"  # it starts anew after each answer
        before = trio.current_time()
        await client.send(sent)
        answer = await client.rest()
        assert trio.current_time() - before == pytest.approx(getattr(limits, limit))
        assert answer.startswith(b"HTTP/1.1 408 " if sent else b"")
        assert bool(sent) == bool(answer)


PATIENCE = Limits(idle_timeout=120, head_timeout=15, body_timeout=60, send_timeout=30)


@pytest.mark.parametrize(("request_", "limit"), [(GET, 15), (post(b"x" * 100), 60)])
async def test_a_trickle_does_not_move_the_limit(
    request_: bytes, limit: float, autojump_clock: trio.testing.MockClock
) -> None:
    head_size = request_.index(b"\r\n\r\n") + 4
    async with (
        serving(echo, limits=PATIENCE, within=LONG) as served,
        trio.open_nursery() as nursery,
    ):
        client = await served.connect()
        # The part that is limited comes byte by byte.
        start = 0 if head_size == len(request_) else head_size
        await client.send(request_[:start])

        async def trickle() -> None:
            for byte in request_[start:-1]:
                await client.send(bytes([byte]))
                await trio.sleep(0.9)

        before = trio.current_time()
        nursery.start_soon(trickle)
        assert (await client.answer())[0] == 408
        assert trio.current_time() - before == pytest.approx(limit)
        nursery.cancel_scope.cancel()


async def test_a_request_that_is_whole_just_in_time(mock_clock: trio.testing.MockClock) -> None:
    gate = Gate()
    async with serving(gate, limits=PATIENCE, within=LONG) as served:
        client = await served.connect()
        await client.send(GET[:-1])
        await trio.testing.wait_all_tasks_blocked()
        await client.send(GET[-1:])
        mock_clock.jump(PATIENCE.head_timeout)  # before the server could run
        await gate.entered.wait()
        mock_clock.jump(1000)
        await trio.testing.wait_all_tasks_blocked()
        gate.opened.set()
        assert (await client.ask())[2] == b"/"
        assert (await client.answer())[2] == b"/"


async def test_nothing_limits_the_handler(autojump_clock: trio.testing.MockClock) -> None:
    async def handler(request: Request, responder: Responder) -> None:
        await trio.sleep(10_000)
        await responder.send(200, b"at last")

    async with serving(handler, limits=PATIENCE, within=LONG) as served:
        client = await served.connect()
        assert (await client.ask())[2] == b"at last"


@both
async def test_no_limit_of_the_reading_is_seen_by_the_handler(kind: str) -> None:
    """Who asks how much time is left, before it first waits, hears nothing of what has ended."""
    seen: list[float] = []

    async def handler(request: Request, responder: Responder) -> None:
        seen.append(trio.current_effective_deadline())
        await responder.send(200, request.body)

    async with serving(handler, kind, within=math.inf) as served:
        client = await served.connect()
        await client.ask()
        await client.ask(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 1\r\n\r\nx")
        await client.ask(GET + GET)
        await client.answer()
    assert seen == [math.inf] * 4


async def test_a_stalled_client_is_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    ended: list[float] = []

    async def handler(request: Request, responder: Responder) -> None:
        await responder.start(200, content_type=EVENTS)
        try:
            await responder.write(b"x" * 1_000_000)
        finally:
            ended.append(trio.current_time())

    async with serving(handler, "lockstep", PATIENCE, LONG) as served:
        client = await served.connect()
        await client.send(GET)
        await client.head()
        before = trio.current_time()
        await trio.sleep(1000)
        assert ended == [pytest.approx(before + PATIENCE.send_timeout)]


async def test_a_slow_client_is_not_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    body = b"x" * 1_000_000

    async def handler(request: Request, responder: Responder) -> None:
        await responder.send(200, body if request.path == "/large" else b"small")

    async with serving(handler, "lockstep", PATIENCE, LONG) as served:
        client = await served.connect()
        before = trio.current_time()
        await client.send(GET.replace(b"/ ", b"/large "))
        received = bytearray()
        while len(received) < len(body):
            await trio.sleep(10)
            received += await client.stream.receive_some(60_000)
        assert trio.current_time() - before > 5 * PATIENCE.send_timeout
        # The connection is as good as new.
        assert received.endswith(b"x")
        await trio.testing.wait_all_tasks_blocked()
        assert (await client.ask())[2] == b"small"


async def test_a_stalled_client_on_a_socket_is_cut_off(
    mock_clock: trio.testing.MockClock,
) -> None:
    ended = trio.Event()

    async def handler(request: Request, responder: Responder) -> None:
        await responder.start(200, content_type=EVENTS)
        try:
            while True:
                await responder.write(b"x" * 100_000)
        finally:
            ended.set()

    async with serving(handler, "sockets", Limits(send_timeout=5)) as served:
        client = await served.connect()
        await client.send(GET)
        await client.head()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not ended.is_set()
        mock_clock.jump(6)
        await ended.wait()


# --- refusals -----------------------------------------------------------------------------------


@both
async def test_garbage_hurts_nobody_else(kind: str) -> None:
    async with serving(echo, kind) as served:
        good = await served.connect()
        assert (await good.ask())[0] == 200
        for garbage in (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"\0" * 100_000,
            b"hello?",
        ):
            bad = await served.connect()
            await bad.send(garbage)
            answer = await bad.rest()
            assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
            assert b'"type":"invalid_request_error"' in answer
        assert (await good.ask())[0] == 200


@both
async def test_a_client_can_read_why_its_body_is_refused(kind: str) -> None:
    """Closing at once would reset the connection under a client that is still sending."""
    async with serving(echo, kind, Limits(max_body=1000, linger_timeout=60)) as served:
        client = await served.connect()
        body = b"x" * 3_000_000
        await client.send(post(body))
        status, headers, answer = await client.answer()
        assert (status, headers["connection"]) == (413, "close")
        assert b"larger than 1000 bytes" in answer
        await client.stream.send_eof()
        assert await client.rest() == b""


async def test_a_refused_client_cannot_stay(autojump_clock: trio.testing.MockClock) -> None:
    async with serving(echo, limits=PATIENCE, within=LONG) as served:
        client = await served.connect()
        await client.send(b"?")
        assert (await client.answer())[0] == 400
        before = trio.current_time()
        assert await client.rest() == b""
        assert trio.current_time() == before
        with pytest.raises(trio.BrokenResourceError):
            await send_for_ever(client)
        assert trio.current_time() - before == pytest.approx(PATIENCE.linger_timeout, abs=0.5)


async def send_for_ever(client: Client) -> None:
    while True:
        await client.send(b"more")
        await trio.sleep(0.25)


@both
async def test_too_many_connections(kind: str) -> None:
    async with serving(echo, kind, Limits(max_connections=2)) as served:
        clients = [await served.connect() for _ in range(2)]
        for client in clients:
            assert (await client.ask())[0] == 200
        third = await served.connect()
        await third.send(GET)
        status, headers, body = await third.answer()
        assert (status, headers["connection"], headers["retry-after"]) == (503, "close", "1")
        assert body == b'{"error":{"message":"too many connections","type":"server_error"}}'
        await third.leave()
        await clients[0].leave()
        await trio.testing.wait_all_tasks_blocked()
        assert (await (await served.connect()).ask())[0] == 200


async def test_too_many_refused_connections_are_only_closed() -> None:
    async with serving(echo, limits=Limits(max_connections=0)) as served:
        clients = [await served.connect() for _ in range(70)]
        await trio.testing.wait_all_tasks_blocked()
        answers = [await client.rest() for client in clients]
        assert answers.count(b"") == 6
        assert sum(answer.startswith(b"HTTP/1.1 503 ") for answer in answers) == 64


SMALL = Limits(max_head=300, max_fields=5, max_body=50)
HOST = b"Host: here\r\n"
POST = b"POST / HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: here\r\n\r\n"

REFUSED = {
    # two lengths
    "both lengths": (
        400,
        POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    "both, other order": (
        400,
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    ),
    "two lengths": (400, POST + b"Content-Length: 0\r\nContent-Length: 5\r\n\r\n"),
    "equal lengths": (400, POST + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n"),
    # lengths that are none
    "length +5": (400, POST + b"Content-Length: +5\r\n\r\nhello"),
    "length -0": (400, POST + b"Content-Length: -0\r\n\r\n"),
    "length 5_0": (400, POST + b"Content-Length: 5_0\r\n\r\nhello"),
    "length list": (400, POST + b"Content-Length: 5, 5\r\n\r\nhello"),
    "length 0x5": (400, POST + b"Content-Length: 0x5\r\n\r\nhello"),
    "length 5 0": (400, POST + b"Content-Length: 5 0\r\n\r\nhello"),
    "length empty": (400, POST + b"Content-Length: \r\n\r\n"),
    "length superscript": (400, POST + b"Content-Length: \xb2\r\n\r\nhello"),
    "length huge": (400, POST + b"Content-Length: 99999999999999999999\r\n\r\n"),
    "length 2**64 + 5": (400, POST + b"Content-Length: 18446744073709551621\r\n\r\nhello"),
    "length too large": (413, POST + b"Content-Length: 51\r\n\r\n"),
    # codings that are not chunked
    "coding identity": (400, POST + b"Transfer-Encoding: identity\r\n\r\n"),
    "coding list": (400, POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    "coding twice": (400, POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"),
    "coding in two fields": (
        400,
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    ),
    "coding xchunked": (400, POST + b"Transfer-Encoding: xchunked\r\n\r\n"),
    "coding quoted": (400, POST + b'Transfer-Encoding: "chunked"\r\n\r\n'),
    "coding with parameter": (400, POST + b"Transfer-Encoding: chunked;a=b\r\n\r\n0\r\n\r\n"),
    "coding with tab": (400, POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n"),
    "coding empty": (400, POST + b"Transfer-Encoding: \r\n\r\n"),
    "coding of 1.0": (400, b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    # lines
    "bare LF": (400, b"GET / HTTP/1.1\n" + HOST + b"\r\n"),
    "only LF": (400, b"GET / HTTP/1.1\nHost: here\n\n"),
    "bare LF in a field": (400, b"GET / HTTP/1.1\r\nHost: here\nX: y\r\n\r\n"),
    "bare LF at the end": (400, b"GET / HTTP/1.1\r\nHost: here\r\n\n"),
    "bare CR in a value": (400, b"GET / HTTP/1.1\r\nHost: here\r\nX: y\rZ: 1\r\n\r\n"),
    "bare CR in the first line": (400, b"GET /\r HTTP/1.1\r\n" + HOST + b"\r\n"),
    "bare CR at the end": (400, b"GET / HTTP/1.1\r\nHost: here\r\r\n\r\n"),
    "folded field": (400, b"GET / HTTP/1.1\r\nHost: here\r\nX: y\r\n z\r\n\r\n"),
    "folded coding": (400, POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n"),
    "folded first field": (400, b"GET / HTTP/1.1\r\n Host: here\r\n\r\n"),
    "space before colon": (400, POST + b"Content-Length : 0\r\n\r\n"),
    "tab before colon": (400, POST + b"Transfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n"),
    "NUL in a value": (400, b"GET / HTTP/1.1\r\nHost: here\r\nX: a\0b\r\n\r\n"),
    "NUL in a name": (400, b"GET / HTTP/1.1\r\nHost: here\r\nX\0: a\r\n\r\n"),
    "DEL in a value": (400, b"GET / HTTP/1.1\r\nHost: here\r\nX: a\x7fb\r\n\r\n"),
    "no colon": (400, b"GET / HTTP/1.1\r\nHost: here\r\nX\r\n\r\n"),
    "no name": (400, b"GET / HTTP/1.1\r\nHost: here\r\n: x\r\n\r\n"),
    "name with parentheses": (400, b"GET / HTTP/1.1\r\nHost: here\r\nX(y): z\r\n\r\n"),
    "name not ASCII": (400, b"GET / HTTP/1.1\r\nHost: here\r\nX\xe4: z\r\n\r\n"),
    # the first line
    "two spaces": (400, b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n"),
    "tab": (400, b"GET\t/ HTTP/1.1\r\n" + HOST + b"\r\n"),
    "space at the end": (400, b"GET / HTTP/1.1 \r\n" + HOST + b"\r\n"),
    "space in the target": (400, b"GET /a b HTTP/1.1\r\n" + HOST + b"\r\n"),
    "no version": (400, b"GET /\r\n" + HOST + b"\r\n"),
    "small letters": (400, b"get / HTTP/1.1\r\n" + HOST + b"\r\n"),
    "unknown method": (501, b"GIVE / HTTP/1.1\r\n" + HOST + b"\r\n"),
    "not ASCII": (400, b"GET /\xc3\xa4 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "fragment": (400, b"GET /#a HTTP/1.1\r\n" + HOST + b"\r\n"),
    "broken percent": (400, b"GET /%ff HTTP/1.1\r\n" + HOST + b"\r\n"),
    "too many query fields": (400, b"GET /?" + b"&a" * 101 + b" HTTP/1.1\r\n" + HOST + b"\r\n"),
    "relative target": (400, b"GET a HTTP/1.1\r\n" + HOST + b"\r\n"),
    "asterisk": (400, b"GET * HTTP/1.1\r\n" + HOST + b"\r\n"),
    "authority": (400, b"GET here:80 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "other scheme": (400, b"GET ftp://here/ HTTP/1.1\r\n" + HOST + b"\r\n"),
    "user in the authority": (400, b"GET http://me@here/ HTTP/1.1\r\n" + HOST + b"\r\n"),
    "no authority": (400, b"GET http:///x HTTP/1.1\r\n" + HOST + b"\r\n"),
    "CONNECT": (501, b"CONNECT here:80 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "HTTP/0.9": (505, b"GET / HTTP/0.9\r\n" + HOST + b"\r\n"),
    "HTTP/1.2": (505, b"GET / HTTP/1.2\r\n" + HOST + b"\r\n"),
    "HTTP/2": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/01.1": (400, b"GET / HTTP/01.1\r\n" + HOST + b"\r\n"),
    # the host
    "no host": (400, b"GET / HTTP/1.1\r\nX: y\r\n\r\n"),
    "no fields": (400, b"GET / HTTP/1.1\r\n\r\n"),
    "two hosts": (400, b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n"),
    "empty host": (400, b"GET / HTTP/1.1\r\nHost:\r\n\r\n"),
    "host with a path": (400, b"GET / HTTP/1.1\r\nHost: here/there\r\n\r\n"),
    "host with a user": (400, b"GET / HTTP/1.1\r\nHost: me@here\r\n\r\n"),
    "host list": (400, b"GET / HTTP/1.1\r\nHost: here, there\r\n\r\n"),
    "host not an address": (400, b"GET / HTTP/1.1\r\nHost: [:::1]\r\n\r\n"),
    "two origins": (400, b"GET / HTTP/1.1\r\nHost: here\r\nOrigin: a\r\nOrigin: b\r\n\r\n"),
    # sizes
    "large head": (431, b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"y" * 300 + b"\r\n\r\n"),
    "endless head": (431, b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"y" * 1000),
    "long target": (414, b"GET /" + b"y" * 1000),
    "many fields": (431, b"GET / HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 5 + b"\r\n"),
    # chunks
    "chunk too large": (413, CHUNKED + b"33\r\n"),
    "chunks too large": (413, CHUNKED + b"32\r\n" + b"x" * 50 + b"\r\n1\r\n"),
    "chunk size overflows": (400, CHUNKED + b"10000000000000005\r\nhello\r\n0\r\n\r\n"),
    "chunk size huge": (413, CHUNKED + b"fffffffffffffff\r\n"),
    "chunk size missing": (400, CHUNKED + b"\r\nhello\r\n0\r\n\r\n"),
    "chunk size signed": (400, CHUNKED + b"+5\r\nhello\r\n0\r\n\r\n"),
    "chunk size 0x5": (400, CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n"),
    "chunk size with a space": (400, CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n"),
    "chunk size after a space": (400, CHUNKED + b" 5\r\nhello\r\n0\r\n\r\n"),
    "chunk size ends in LF": (400, CHUNKED + b"5\nhello\r\n0\r\n\r\n"),
    "chunk data longer": (400, CHUNKED + b"5\r\nhello!\r\n0\r\n\r\n"),
    "chunk data ends in LF": (400, CHUNKED + b"5\r\nhello\n0\r\n\r\n"),
    "chunk data ends in CR": (400, CHUNKED + b"5\r\nhello\r0\r\n\r\n"),
    "chunk extension with LF": (400, CHUNKED + b"5;a\nb\r\nhello\r\n0\r\n\r\n"),
    "chunk extension with CR": (400, CHUNKED + b"5;a\rb\r\nhello\r\n0\r\n\r\n"),
    "chunk extension too long": (400, CHUNKED + b"5;" + b"a" * 300 + b"\r\nhello\r\n0\r\n\r\n"),
    "chunk extension endless": (400, CHUNKED + b"5;" + b"a" * 300),
    "trailer folded": (400, CHUNKED + b"0\r\nA: b\r\n c\r\n\r\n"),
    "trailer with LF": (400, CHUNKED + b"0\r\nA: b\nC: d\r\n\r\n"),
    "trailers too long": (431, CHUNKED + b"0\r\n" + b"A: b\r\n" * 2000 + b"\r\n"),
    "trailer endless": (431, CHUNKED + b"0\r\nA: " + b"b" * 9000),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refused(name: str, autojump_clock: trio.testing.MockClock) -> None:
    status, data = REFUSED[name]
    handled: list[str] = []

    async def handler(request: Request, responder: Responder) -> None:
        handled.append(request.target)
        await responder.send(200)

    async with serving(handler, limits=SMALL) as served:
        client = await served.connect()
        await client.send(data + SMUGGLED if data.endswith(b"\n") else data)
        before = trio.current_time()
        got, headers, _ = await client.answer()
        assert (got, headers["connection"]) == (status, "close")
        assert trio.current_time() == before  # at once, and not by a time limit
        assert await client.rest() == b""
    assert handled == []


async def test_many_chunk_extensions_are_refused() -> None:
    async with serving(echo) as served:
        client = await served.connect()
        await client.send(CHUNKED + (b"1;" + b"a" * 200 + b"\r\nx\r\n") * 100)
        assert (await client.answer())[0] == 400


async def test_empty_lines_before_a_request_are_passed_over() -> None:
    async with serving(echo) as served:
        client = await served.connect()
        assert (await client.ask(b"\r\n\r\n" + GET))[0] == 200
        await client.send(b"\r")
        await trio.testing.wait_all_tasks_blocked()
        assert (await client.ask(b"\n" + GET))[0] == 200


# --- stopping -----------------------------------------------------------------------------------


@both
async def test_stop_lets_answers_finish(kind: str) -> None:
    gate = Gate()
    async with serving(gate, kind) as served, trio.open_nursery() as nursery:
        idle = await served.connect()
        half = await served.connect()
        await half.send(post(b"hello")[:-1])
        busy = await served.connect()
        await busy.send(GET)
        await gate.entered.wait()
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(served.server.stop, 10)
        assert await idle.rest() == b""
        assert await half.rest() == b""
        await busy.send(GET)  # comes too late to be answered
        await trio.testing.wait_all_tasks_blocked()
        gate.opened.set()
        _, headers, body = await busy.answer()
        assert (headers["connection"], body) == ("close", b"/")
        assert await busy.rest() == b""
    assert gate.seen == ["/"]


async def test_stop_ends_serving() -> None:
    server = HttpServer(echo)
    listeners = await open_listeners("127.0.0.1", free_port())
    address = listeners[0].socket.getsockname()
    async with trio.open_nursery() as nursery:
        with trio.fail_after(60):
            await nursery.start(server.serve, listeners)
            client = Client(await trio.testing.open_stream_to_socket_listener(listeners[0]))
            assert (await client.ask())[0] == 200
            await server.stop(10)
            assert await client.rest() == b""
            await client.leave()
            with pytest.raises(OSError, match="all attempts to connect"):
                await trio.open_tcp_stream(*address)
    # The nursery is empty: serve() returned.
    await server.stop(0)


async def test_stop_does_not_wait_for_clients_to_close(
    autojump_clock: trio.testing.MockClock,
) -> None:
    gate = Gate()
    async with serving(gate) as served, trio.open_nursery() as nursery:
        client = await served.connect()
        await client.send(GET)
        await gate.entered.wait()
        before = trio.current_time()
        nursery.start_soon(served.server.stop, 10)
        await trio.testing.wait_all_tasks_blocked()
        gate.opened.set()
        assert (await client.answer())[0] == 200
    assert trio.current_time() == before


async def test_stop_cancels_what_takes_too_long(autojump_clock: trio.testing.MockClock) -> None:
    gate = Gate()
    async with serving(gate) as served:
        client = await served.connect()
        await client.send(GET)
        await gate.entered.wait()
        before = trio.current_time()
        await served.server.stop(7)
        assert trio.current_time() - before == pytest.approx(7)
        assert gate.cancelled.is_set()


async def test_stop_with_a_stalled_client() -> None:
    stalled = trio.Event()

    async def handler(request: Request, responder: Responder) -> None:
        await responder.start(200, content_type=EVENTS)
        try:
            while True:
                await responder.write(b"x" * 100_000)
        finally:
            stalled.set()

    async with serving(handler, "sockets") as served:
        client = await served.connect()
        await client.send(GET)
        await client.head()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not stalled.is_set()
        await served.server.stop(0)
        assert stalled.is_set()


async def test_stop_returns_though_a_handler_does_not_end(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()

    async def handler(request: Request, responder: Responder) -> None:
        with trio.CancelScope(shield=True):
            await gate(request, responder)

    async with serving(handler) as served:
        client = await served.connect()
        await client.send(GET)
        await gate.entered.wait()
        await served.server.stop(0)
        assert "do not end" in caplog.text
        gate.opened.set()


async def test_stop_does_not_wait_for_refused_clients(
    mock_clock: trio.testing.MockClock,
) -> None:
    server = HttpServer(echo, Limits(max_connections=0))
    listeners = await open_listeners("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, listeners)
        client = Client(await trio.testing.open_stream_to_socket_listener(listeners[0]))
        assert (await client.answer())[0] == 503
        await server.stop(10)
    # serve() returned, though the client keeps its side open and no time passes.
    await client.leave()


async def test_nobody_can_connect_while_the_last_answers_finish() -> None:
    gate = Gate()
    server = HttpServer(gate)
    listeners = await open_listeners("127.0.0.1", free_port())
    address = listeners[0].socket.getsockname()
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, listeners)
        client = Client(await trio.testing.open_stream_to_socket_listener(listeners[0]))
        await client.send(GET)
        await gate.entered.wait()
        nursery.start_soon(server.stop, 10)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream(*address)
        gate.opened.set()
        assert (await client.answer())[0] == 200
        await client.leave()


async def test_no_connection_is_served_after_stop() -> None:
    async with serving(echo) as served:
        await served.server.stop(0)
        client = await served.connect()
        assert await client.rest() == b""


async def test_a_cancelled_server_cancels_its_handlers() -> None:
    gate = Gate()
    async with serving(gate, "sockets") as served:
        client = await served.connect()
        await client.send(GET)
        await gate.entered.wait()
    assert gate.cancelled.is_set()


# --- sockets ------------------------------------------------------------------------------------


async def test_a_port_in_use_is_said_clearly() -> None:
    (listener,) = await open_listeners("127.0.0.1", 0)
    async with listener:
        port = listener.socket.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen on 127.0.0.1:{port}: .*in use") as info:
            await open_listeners("127.0.0.1", port)
    assert info.value.errno == errno.EADDRINUSE


async def test_an_address_of_another_machine_is_said_clearly() -> None:
    with pytest.raises(OSError, match=r"cannot listen on 192.0.2.1:7411: "):
        await open_listeners("192.0.2.1", 7411)


async def test_ipv6() -> None:
    try:
        (listener,) = await open_listeners("::1", 0)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    hosts: list[str] = []

    async def handler(request: Request, responder: Responder) -> None:
        hosts.append(request.client_host)
        await echo(request, responder)

    server = HttpServer(handler)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, [listener])
        client = Client(await trio.testing.open_stream_to_socket_listener(listener))
        assert (await client.ask())[0] == 200
        await client.leave()
        nursery.cancel_scope.cancel()
    assert hosts == ["::1"]


async def test_small_writes_do_not_wait_for_acknowledgements() -> None:
    (listener,) = await open_listeners("127.0.0.1", 0)
    async with listener:
        client = await trio.testing.open_stream_to_socket_listener(listener)
        async with client, await listener.accept() as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


async def test_httpx_as_the_client() -> None:
    async def handler(request: Request, responder: Responder) -> None:
        if request.path == "/whole":
            await responder.send(200, request.body, content_type=JSON)
            return
        await responder.start(200, content_type=EVENTS)
        for number in range(3):
            await responder.write(b"data: %d\n\n" % number)
        await responder.end()

    server = HttpServer(handler)
    listeners = await open_listeners("127.0.0.1", 0)
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, listeners)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            for _ in range(2):
                answer = await client.post("/whole", json={"a": "b" * 200_000})
                assert answer.json() == {"a": "b" * 200_000}
                async with client.stream("GET", "/stream") as stream:
                    lines = [line async for line in stream.aiter_lines() if line]
                assert lines == ["data: 0", "data: 1", "data: 2"]
        with trio.fail_after(60):
            await server.stop(5)
