"""The vendors' servers on loopback, in every dialect that a CLI or an SDK of theirs speaks.

The base URL's path says how a server behaves, so that a client is driven into each failure without
a line of code::

    async with vendors() as server:
        base_url = server.base("e429-7") + "/v1"     # http://127.0.0.1:PORT/m/e429-7/v1

========================= ===================================================================
`ok`                      answers `faults.WHOLE`, in two pieces where it is streamed
`echo`                    answers with the last text of the user, whole
`big-N`                   answers with N characters
`reason` `nousage`        answers after some reasoning; without saying what it cost
`truncate` `filter`       says `faults.PARTIAL`, and that the limit, or a filter, ended it
`empty`                   an answer without text
`eCODE` `eCODE-N`         that status; with `Retry-After: N`
`context` `badkey`        the vendor's own errors for a prompt too long, and for a bad key
`flaky-N-CODE`            that status N times, then `ok`
`hang` `hanghead`         no reply at all; its head, and nothing more
`stall` `slow-MS`         half of it, and nothing more; a pause before each event
`drop` `reset`            half of it, and the connection ends in good order, or is cut
`badjson` `html`          a body that is no JSON; a proxy's web page with status 502
`streamerr`               half of it, and then an error inside the stream
========================= ===================================================================

What a key refuses (401, 403, `badkey`), or a server that is down (5xx), it also refuses to the free
calls: lists of models, counts of tokens. What the server saw it remembers.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import trio
from fakes_http import (
    CHUNKED_HEAD,
    LAST_CHUNK,
    NotHttp,
    Received,
    ScriptedServer,
    ServerSide,
    chunk,
    json_reply,
    reply,
)
from faults import PARTIAL, WHOLE, Call, Seen
from ports import listener_on_loopback
from vendor_anthropic import Messages
from vendor_free import free_reply
from vendor_gemini import GenerateContent
from vendor_openai import Chat, Responses
from vendor_replies import CONTEXT_MESSAGE, MESSAGES, Dialect, Said

#: End of a path -> who answers it. The first that matches.
GENERATIONS: tuple[tuple[re.Pattern[str], Dialect], ...] = (
    (re.compile(r"/chat/completions$"), Chat()),
    (re.compile(r"/responses$"), Responses()),
    (re.compile(r"/v1/messages$"), Messages()),
    (re.compile(r"/v1(beta)?/models/[^/]+:(stream)?[gG]enerateContent$"), GenerateContent()),
)
_PIECES = (PARTIAL, WHOLE.removeprefix(PARTIAL))
#: Characters of a long answer that are streamed at a time.
_PIECE = 4096
_JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@dataclass
class Asked(Seen):
    """A request for an answer; `fault` is the mode."""

    dialect: str = ""

    @property
    def text(self) -> str:
        """The last text of the user."""
        (dialect,) = (d for _, d in GENERATIONS if d.name == self.dialect)
        return dialect.last_text(self.request.json)


class VendorServer(ScriptedServer):
    """See the module. `requests` has all requests, `seen` those for an answer."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.seen: list[Asked] = []
        self._arrival = trio.lowlevel.ParkingLot()

    def base(self, mode: str = "ok") -> str:
        """The URL of a server of that mode, without the version that some vendors put behind."""
        return f"{self.origin}/m/{mode}"

    def of(self, mode: str) -> list[Asked]:
        """The requests for an answer that came to that mode."""
        return [asked for asked in self.seen if asked.fault == mode]

    async def asked(self, mode: str, times: int = 1) -> list[Asked]:
        """The same when there are so many."""
        while len(self.of(mode)) < times:
            await self._arrival.park()
        return self.of(mode)

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve one connection until one of both ends it."""
        self.connections += 1
        async with stream:
            side = ServerSide(stream, self)
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError, NotHttp):
                while received := await side.request_or_end():
                    await self._answer(received, side)

    async def _answer(self, received: Received, side: ServerSide) -> None:
        mode, path = _split(received.path)
        dialect = next((d for pattern, d in GENERATIONS if pattern.search(path)), None)
        if received.method != "POST" or dialect is None:
            await side.send(free_reply(received, path, _refusal(mode)))
            return
        asked = Asked(mode, received, dialect=dialect.name)
        self.seen.append(asked)
        self._arrival.unpark_all()
        try:
            await _Answer(Call(side, asked), dialect, received, len(self.of(mode))).send(mode)
        except trio.BrokenResourceError:
            asked.left = True
            raise
        finally:
            asked.over.set()


def _split(path: str) -> tuple[str, str]:
    """The mode, and the path without it and without its query."""
    path = path.partition("?")[0]
    match = re.match(r"/m/([^/]+)(/.*)?$", path)
    return (match[1], match[2] or "/") if match else ("ok", path)


def _refusal(mode: str) -> int | None:
    """The status with which a mode refuses free calls, too."""
    match = re.match(r"e(401|403|5\d\d)\b", mode)
    return int(match[1]) if match else 401 if mode == "badkey" else None


class _Answer:
    """The answer to one request."""

    def __init__(self, call: Call, dialect: Dialect, request: Received, nth: int) -> None:
        self._call = call
        self._dialect = dialect
        self._request = request
        #: The how manieth request to its mode it is, from 1.
        self._nth = nth
        self._streamed = dialect.wants_stream(request)

    async def send(self, mode: str) -> None:
        name, *numbers = mode.split("-")
        if (answer := getattr(self, f"do_{name}", None)) is not None:
            await answer(*map(int, numbers))
        elif match := re.fullmatch(r"e(\d{3})", name):
            await self._error(int(match[1]), int(numbers[0]) if numbers else None)
        else:
            await self._say(_said(name, numbers))

    async def _say(self, said: Said, pause: float = 0.0) -> None:
        if not self._streamed:
            await trio.sleep(pause)
            await self._call.send(json_reply(200, self._dialect.whole(said)))
            return
        await self._call.send(CHUNKED_HEAD)
        for event in [piece for part in self._dialect.events(said) for piece in part]:
            await trio.sleep(pause)
            await self._call.send(chunk(event))
        await self._call.send(LAST_CHUNK)

    async def _begin(self) -> None:
        """Send half of an answer."""
        if self._streamed:
            begun = self._dialect.events(Said(_PIECES)).begun
            await self._call.send(CHUNKED_HEAD + chunk(b"".join(begun)))
        else:
            body = json.dumps(self._dialect.whole(Said(_PIECES))).encode()
            await self._call.send(_JSON_HEAD % len(body) + body[: len(body) // 2])

    async def _error(self, status: int, retry_after: int | None = None, code: str = "") -> None:
        message = CONTEXT_MESSAGE if code == "context" else MESSAGES.get(status, "it failed")
        body = self._dialect.error(status, message, code, retry_after)
        wait = [] if retry_after is None else [f"Retry-After: {retry_after}"]
        await self._call.send(json_reply(status, body, *wait))

    # --- the modes that are more than another text ---

    async def do_echo(self) -> None:
        await self._say(Said(_cut(self._dialect.last_text(self._request.json))))

    async def do_slow(self, milliseconds: int) -> None:
        await self._say(Said(_PIECES), milliseconds / 1000)

    async def do_context(self) -> None:
        await self._error(400, code="context")

    async def do_badkey(self) -> None:
        await self._error(400 if self._dialect.name == "gemini" else 401, code="key")

    async def do_flaky(self, failures: int, status: int) -> None:
        await (self._error(status) if self._nth <= failures else self._say(Said(_PIECES)))

    async def do_hang(self) -> None:
        await self._call.until_left()

    async def do_hanghead(self) -> None:
        await self._call.send(CHUNKED_HEAD)
        await self._call.until_left()

    async def do_stall(self) -> None:
        await self._begin()
        await self._call.until_left()

    async def do_drop(self) -> None:
        await self._begin()
        await self._call.close()

    async def do_reset(self) -> None:
        await self._begin()
        self._call.reset()

    async def do_badjson(self) -> None:
        kind = "text/event-stream" if self._streamed else "application/json"
        await self._call.send(reply(200, 'data: {"id": "1", "cho\n\n', f"Content-Type: {kind}"))

    async def do_html(self) -> None:
        await self._call.send(reply(502, "<html>Bad Gateway</html>", "Content-Type: text/html"))

    async def do_streamerr(self) -> None:
        if not self._streamed:
            await self._error(500)
            return
        await self._begin()
        await self._call.send(chunk(self._dialect.failed()) + LAST_CHUNK)


def _cut(text: str) -> tuple[str, ...]:
    return tuple(text[i : i + _PIECE] for i in range(0, len(text), _PIECE))


def _said(mode: str, numbers: list[str]) -> Said:
    match mode:
        case "ok":
            return Said(_PIECES)
        case "reason":
            return Said(_PIECES, reasoning="How do tales begin?")
        case "nousage":
            return Said(_PIECES, usage=False)
        case "truncate":
            return Said((PARTIAL,), "length")
        case "filter":
            return Said((PARTIAL,), "filter")
        case "empty":
            return Said(())
        case "big":
            return Said(_cut("x" * int(numbers[0])))
    raise ValueError(f"no such mode: {mode}")


@asynccontextmanager
async def vendors() -> AsyncIterator[VendorServer]:
    """A `VendorServer` on a free port while inside."""
    listener = await listener_on_loopback()
    server = VendorServer(listener.socket.getsockname()[1])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, server.serve, [listener])
        yield server
        nursery.cancel_scope.cancel()


@contextmanager
def vendors_in_a_thread() -> Iterator[VendorServer]:
    """The same for a test that is not trio's."""
    ready = threading.Event()
    made: list[Any] = []

    async def run() -> None:
        async with vendors() as server:
            end = trio.Event()
            made.extend([server, trio.lowlevel.current_trio_token(), end])
            ready.set()
            await end.wait()

    thread = threading.Thread(target=trio.run, args=(run,))
    thread.start()
    assert ready.wait(60)
    server, token, end = made
    try:
        yield server
    finally:
        token.run_sync_soon(end.set)
        thread.join(60)
