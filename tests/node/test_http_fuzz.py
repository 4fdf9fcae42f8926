"""The HTTP server against chance: bytes in any pieces, damaged requests, noise.

What must hold: how the bytes were cut never matters; nothing a client sends raises out of a
connection or keeps it for ever; and what is accepted is read as another careful parser (h11) reads
it, or h11 refuses it: no two servers in a row can see different requests.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import pairwise

import h11
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from promptmesh.node.http_messages import Limits, RefusedRequest
from promptmesh.node.http_reader import RequestReader
from promptmesh.node.http_server import HttpServer, Request, Responder

LIMITS = Limits(max_head=400, max_fields=10, max_body=300, max_read_ahead=200)

Read = tuple[str, str, bytes]


@dataclass
class Outcome:
    """What one connection came to."""

    requests: list[Read]
    answers: bytes
    logged: list[str]


class Ear(logging.Handler):
    """Hears what a connection complains of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


async def connection(pieces: list[bytes], *, leaves: bool = False) -> Outcome:
    """Send these pieces to a server, each when it has taken the last one."""
    requests: list[Read] = []

    async def handler(request: Request, responder: Responder) -> None:
        requests.append((request.method, request.target, request.body))
        await trio.lowlevel.checkpoint()
        if request.path.endswith("s"):
            await responder.start(200, content_type="text/plain")
            await responder.write(request.target.encode())
            await responder.end()
        else:
            await responder.send(200, request.target.encode(), content_type="text/plain")

    server = HttpServer(handler, LIMITS)
    theirs, ours = trio.testing.memory_stream_pair()
    answers = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_connection, ours)
        try:
            for piece in pieces:
                await theirs.send_all(piece)
                await trio.testing.wait_all_tasks_blocked()
            if leaves:
                await theirs.send_eof()
            async for data in theirs:
                answers += data
        except trio.BrokenResourceError:
            async for data in theirs:
                answers += data
        # The server has closed its side: its task must end too, after its last time limit.
    return Outcome(requests, answers, [])


def run(pieces: list[bytes], *, leaves: bool = False) -> Outcome:
    """The outcome, with all time limits jumped over. Raises `trio.TooSlowError` if it has none."""

    async def main() -> Outcome:
        with trio.fail_after(10_000):
            return await connection(pieces, leaves=leaves)

    ear = Ear()
    log = logging.getLogger("promptmesh.node.http_server")
    log.addHandler(ear)
    try:
        outcome = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        log.removeHandler(ear)
    outcome.logged = ear.heard
    return outcome


def read(pieces: list[bytes]) -> tuple[list[Read], int | None]:
    """The requests in these pieces, and the status of the refusal that ended them."""
    reader = RequestReader(LIMITS)
    found: list[Read] = []
    for piece in pieces:
        reader.feed(piece)
        try:
            while request := reader.next_request():
                found.append((request.method, request.target, request.body))
                if not request.keep_alive:
                    return found, None
        except RefusedRequest as refused:
            return found, refused.status
    return found, None


# --- requests, whole and damaged ----------------------------------------------------------------

names = st.sampled_from(["X-A", "x-b", "Accept", "User-Agent", "Cookie", "Connection", "Expect"])
values = st.sampled_from(["", "a", "a b", "keep-alive", "100-continue", "close", "ü", "1" * 30])
targets = st.sampled_from(["/", "/whole", "/streams", "/?a=1", "/%20", "http://there/x", "/" * 9])
bodies = st.binary(max_size=40)


@st.composite
def chunked(draw: st.DrawFn, body: bytes) -> bytes:
    out = b""
    while body:
        size = draw(st.integers(1, len(body)))
        extension = draw(st.sampled_from([b"", b"", b";a", b' ;a="b c"']))
        digits = draw(st.sampled_from([b"%x", b"%X", b"%04x"])) % size
        out += digits + extension + b"\r\n" + body[:size] + b"\r\n"
        body = body[size:]
    return out + b"0\r\n" + draw(st.sampled_from([b"", b"", b"X-Sum: 1\r\n"])) + b"\r\n"


@st.composite
def a_request(draw: st.DrawFn) -> tuple[Read, bytes]:
    method = draw(st.sampled_from(["GET", "POST", "HEAD", "PUT", "OPTIONS"]))
    target = draw(targets)
    fields = draw(st.lists(st.tuples(names, values), max_size=4))
    fields = [
        (name, value)
        for name, value in fields
        if (name != "Expect" or value == "100-continue")
        and (name != "Connection" or value != "close")
    ]
    if sum(name == "Expect" for name, _ in fields) > 1:
        fields = [field for field in fields if field[0] != "Expect"]
    head = f"{method} {target} HTTP/1.1\r\nHost: here\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in fields)
    body = draw(bodies)
    how = draw(st.sampled_from(["length", "chunked", "none"]))
    if how == "none":
        return (method, target, b""), head.encode("latin-1") + b"\r\n"
    if how == "length":
        head += f"Content-Length: {len(body)}\r\n\r\n"
        return (method, target, body), head.encode("latin-1") + body
    head += "Transfer-Encoding: chunked\r\n\r\n"
    return (method, target, body), head.encode("latin-1") + draw(chunked(body))


series = st.lists(a_request(), min_size=1, max_size=4)


@st.composite
def cut(draw: st.DrawFn, data: bytes) -> list[bytes]:
    places = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
    edges = [0, *places, len(data)]
    return [data[a:b] for a, b in pairwise(edges) if a < b]


TROUBLE = [
    *(b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b"\t", b"\x0b", b"\x7f", b"\x85", b":"),
    *(b";", b",", b"0", b"5", b"+", b"-", b"_", b"x", b"#", b"?", b"%", b"GET ", b"HTTP/1.0"),
    *(b"Content-Length: 3\r\n", b"content-length:0\r\n", b"Content-Length : 3\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"transfer-encoding:\tchunked\r\n"),
    *(b"Transfer-Encoding: identity\r\n", b"Host: there\r\n", b" folded\r\n"),
    *(b"Connection: close\r\n", b"Connection: upgrade\r\nUpgrade: h2c\r\n", b"0\r\n\r\n"),
    b"GET /smuggled HTTP/1.1\r\nHost: here\r\n\r\n",
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(b"".join(raw for _, raw in draw(series)))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        drop = draw(st.sampled_from([0, 0, 0, 1, 2, 5]))
        data[place : place + drop] = draw(
            st.one_of(st.just(b""), st.sampled_from(TROUBLE), st.binary(max_size=3))
        )
    return bytes(data)


# --- how it is cut does not matter --------------------------------------------------------------

HOST = b"Host: here\r\n"
CHUNKED = b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
EXAMPLES = {
    "get": b"\r\nGET /?a=1 HTTP/1.1\r\n" + HOST + b"X:\r\n\r\n",
    "length": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 7\r\n\r\nhe\r\n\r\no",
    "chunked": CHUNKED + b"3 ;a\r\nhe\r\r\n00a\r\n\n\r\n0\r\n\r\n12\r\n0\r\nA: b\r\n\r\n",
    "old": b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
}
FLAWED = {
    "LF": b"GET / HTTP/1.1\nHost: here\r\n\r\n",
    "CR": b"GET / HTTP/1.1\r\nHost: here\rX: y\r\n\r\n",
    "fold": b"GET / HTTP/1.1\r\nHost:\r\n here\r\n\r\n",
    "two lengths": b"GET / HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\nContent-Length: 1\r\n\r\n",
    "large": b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"y" * 500 + b"\r\n\r\n",
    "chunk": CHUNKED + b"5\nhello\r\n0\r\n\r\n",
    "trailer": CHUNKED + b"0\r\nA:\rb\r\n\r\n",
}
NEXT = b"GET /next HTTP/1.1\r\n" + HOST + b"\r\n"


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_request_cut_anywhere_is_the_same(name: str) -> None:
    data = EXAMPLES[name] + NEXT
    whole = read([data])
    assert [target for _, target, _ in whole[0]][1:] == ["/next"]
    assert whole[1] is None
    for place in range(len(data) + 1):
        assert read([data[:place], data[place:]]) == whole
    assert read([bytes([byte]) for byte in data]) == whole


@pytest.mark.parametrize("name", FLAWED)
def test_a_flaw_cut_anywhere_is_refused_the_same(name: str) -> None:
    data = NEXT + FLAWED[name] + NEXT
    whole = read([data])
    assert len(whole[0]) == 1
    assert whole[1] in (400, 431)
    for place in range(len(data) + 1):
        assert read([data[:place], data[place:]]) == whole
    assert read([bytes([byte]) for byte in data]) == whole


@pytest.mark.parametrize(
    ("first", "flaw"),
    [(b"G", b"\0"), (b"GET / HTTP/1.1", b"\n"), (b"GET / HTTP/1.1\r", b"X"), (b"\r", b"\r")],
)
def test_a_flaw_is_refused_before_the_head_is_whole(first: bytes, flaw: bytes) -> None:
    assert read([first]) == ([], None)
    assert read([first, flaw]) == ([], 400)


@given(st.data())
@settings(max_examples=150)
def test_requests_in_any_pieces_get_the_same_answers(data: st.DataObject) -> None:
    drawn = data.draw(series)
    sent = b"".join(raw for _, raw in drawn)
    expected = [request for request, _ in drawn]
    whole = run([sent])
    assert whole.requests == expected
    assert whole.answers.count(b"HTTP/1.1 200 OK\r\n") == len(expected)
    pieces = run(data.draw(cut(sent)))
    assert pieces.requests == expected
    # Only this depends on the cut: it is said where a body was not there yet.
    assert pieces.answers.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"") == whole.answers
    assert whole.logged == pieces.logged == []


@given(st.data())
@settings(max_examples=200)
def test_damaged_requests_in_any_pieces_are_read_the_same(data: st.DataObject) -> None:
    sent = data.draw(damaged())
    whole_requests, whole_status = read([sent])
    requests, status = read(data.draw(cut(sent)))
    assert requests == whole_requests
    # Which flaw is met first may depend on the cut, but not whether there is one.
    assert (status is None) == (whole_status is None)


# --- noise --------------------------------------------------------------------------------------


def check_sane(outcome: Outcome) -> None:
    assert outcome.logged == []
    answers = outcome.answers
    assert answers == b"" or answers.startswith(b"HTTP/1.1 ")
    # Nothing follows a refusal.
    assert answers.count(b'{"error":') <= 1
    assert answers.count(b"HTTP/1.1 200 OK\r\n") <= len(outcome.requests)


@given(st.lists(st.binary(max_size=200), max_size=5), st.booleans())
@settings(max_examples=100)
def test_noise_harms_nothing(pieces: list[bytes], leaves: bool) -> None:
    outcome = run(pieces, leaves=leaves)
    check_sane(outcome)
    assert outcome.requests == []


@given(st.data(), st.booleans())
@settings(max_examples=200)
def test_damage_harms_nothing(data: st.DataObject, leaves: bool) -> None:
    check_sane(run(data.draw(cut(data.draw(damaged()))), leaves=leaves))


# --- another parser -----------------------------------------------------------------------------


def read_with_h11(data: bytes, count: int) -> list[Read]:
    """The first requests as h11 reads them. Raises `h11.RemoteProtocolError` where it refuses."""
    server = h11.Connection(h11.SERVER, max_incomplete_event_size=1000)
    server.receive_data(data)
    found: list[Read] = []
    while len(found) < count:
        request = server.next_event()
        assert isinstance(request, h11.Request), request
        body = b""
        while not isinstance(event := server.next_event(), h11.EndOfMessage):
            assert isinstance(event, h11.Data), event
            body += event.data
        found.append((request.method.decode(), request.target.decode("latin-1"), body))
        if len(found) < count:
            server.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            server.send(h11.EndOfMessage())
            server.start_next_cycle()
    return found


@given(damaged())
@settings(max_examples=400)
def test_what_is_accepted_is_read_as_h11_reads_it(sent: bytes) -> None:
    requests, _ = read([sent])
    while requests:
        try:
            assert read_with_h11(sent, len(requests)) == requests
            return
        except h11.RemoteProtocolError:
            requests.pop()  # h11 is stricter there; what came before must agree


def test_h11_would_be_noticed_to_differ() -> None:
    """The comparison above can fail: h11 takes lines that end in a bare LF, and so sees two."""
    sent = b"GET /a HTTP/1.1\nHost: here\n\n" + NEXT
    assert read([sent]) == ([], 400)
    assert [target for _, target, _ in read_with_h11(sent, 2)] == ["/a", "/next"]
