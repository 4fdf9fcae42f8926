"""One call of the Kubo RPC: its arguments and options, the blocks it may read, its answer.

Errors have Kubo's own forms: wrong arguments are 400 in plain text, and what fails is 500 with
`{"Message", "Code", "Type"}`. A stream that fails after its beginning is cut: Kubo says why in a
trailer, which hardly any client reads.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from ..cache.cid import cid_text
from ..cache.dags import Path, PathError, parse_path, resolve
from .http_server import Request, Responder
from .multipart import MultipartError, Part, parse
from .reading import PATIENCE

#: Arguments of one call.
MAX_ARGUMENTS = 64
#: Seconds that a call may take, also if the caller would wait longer.
MAX_TIMEOUT = 600.0

JSON, TEXT = "application/json", "text/plain"

_HEADERS = "X-Stream-Output, X-Chunked-Output, X-Content-Length"
_TRUE, _FALSE = ("", "1", "t", "true"), ("0", "f", "false")
_UNITS = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "μs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}
_SPAN = re.compile(r"([0-9]{1,12}(?:\.[0-9]{0,12})?|\.[0-9]{1,12})(ns|us|µs|μs|ms|s|m|h)")


class Refused(ValueError):
    """The arguments are wrong: 400."""


class Failed(Exception):
    """The command cannot be done: 500."""


class Reader(Protocol):
    """Reads and keeps blocks for programs (`node.reading.Reading`)."""

    async def read(self, cid: bytes, *, timeout: float = ...) -> bytes | None: ...

    async def read_local(self, cid: bytes) -> bytes | None: ...

    async def put(self, cid: bytes, block: bytes) -> bool: ...


@dataclass(slots=True)
class Call:
    """A call under way."""

    request: Request
    responder: Responder
    reader: Reader
    #: Seconds that the whole call may take, and that peers have to give a block.
    timeout: float = MAX_TIMEOUT
    patience: float = PATIENCE

    # --- what was asked

    def arguments(self, name: str, *, needed: bool = True) -> Sequence[str]:
        """All arguments. Raises `Refused` if there are none and one is needed."""
        found = self.request.query.get("arg", [])
        if not found and needed:
            raise Refused(f'argument "{name}" is required')
        if len(found) > MAX_ARGUMENTS:
            raise Refused(f"more than {MAX_ARGUMENTS} arguments")
        return found

    def argument(self, name: str) -> str:
        """The first argument, which must be there."""
        return self.arguments(name)[0]

    def text(self, name: str, default: str = "") -> str:
        """An option."""
        values = self.request.query.get(name, [])
        if len(values) > 1:
            raise Refused(f"expected key {name} to have only a single value, received {values}")
        return values[0] if values else default

    def flag(self, name: str, default: bool) -> bool:
        """A yes or no. Clients write it in several ways."""
        if name not in self.request.query:
            return default
        value = self.text(name)
        if value.lower() not in (*_TRUE, *_FALSE):
            raise Refused(
                f'could not convert value "{value}" to type "bool" (for option "-{name}")'
            )
        return value.lower() in _TRUE

    def number(self, name: str) -> int | None:
        """A whole number, or None where the option was not given."""
        if name not in self.request.query:
            return None
        value = self.text(name)
        if not re.fullmatch(r"-?[0-9]{1,18}", value):
            raise Refused(f'could not convert value "{value}" to type "int" (for option "-{name}")')
        return int(value)

    def files(self, name: str) -> list[Part]:
        """The files in the body. Raises `Refused` if there is none."""
        kind = self.request.headers.get("content-type", "")
        try:
            parts = parse(kind, self.request.body) if kind else []
        except MultipartError as error:
            raise Refused(str(error)) from error
        if not parts:
            raise Refused(f"file argument '{name}' is required")
        return parts

    # --- blocks

    async def fetch(self, cid: bytes) -> bytes:
        """A block, from here or from the mesh. Raises `Failed`."""
        if self.flag("offline", False):
            block = await self.reader.read_local(cid)
        else:
            block = await self.reader.read(cid, timeout=self.patience)
        if block is None:
            raise Failed(missing(cid))
        return block

    async def keep(self, cid: bytes, block: bytes) -> None:
        """Keep a block. Raises `Failed`."""
        try:
            kept = await self.reader.put(cid, block)
        except ValueError as error:
            raise Failed(str(error)) from error
        if not kept:
            raise Failed("the block could not be written")

    async def named(self, text: str) -> bytes:
        """The CID of the block that a path leads to, in the version that it is written in.

        Raises `Failed`.
        """
        path = path_of(text)
        if not path.segments:
            return path.named
        try:
            found = await resolve(self.fetch, path)
        except PathError as error:
            raise Failed(str(error)) from error
        if found.inside:
            raise Failed(f"{text[:200]!r} ends inside of a block")
        return found.cid

    # --- the answer

    async def emit(self, *values: Mapping[str, Any]) -> None:
        """JSON values, a line each: the whole answer."""
        body = b"".join(msgspec.json.encode(value) + b"\n" for value in values)
        await self.responder.send(
            200, body, content_type=JSON, headers=[*_headers(), ("X-Chunked-Output", "1")]
        )

    async def stream(
        self,
        pieces: AsyncGenerator[bytes, None],
        *,
        content_type: str = TEXT,
        length: int | None = None,
    ) -> None:
        """Bytes as they come. The first piece is waited for: until then it can fail in words."""
        headers = [*_headers(), ("X-Stream-Output", "1")]
        if length is not None:
            headers.append(("X-Content-Length", str(length)))
        async with aclosing(pieces):
            first = await anext(pieces, b"")
            await self.responder.start(200, content_type=content_type, headers=headers)
            await self.responder.write(first)
            async for piece in pieces:
                await self.responder.write(piece)
        await self.responder.end()

    async def send(self, data: bytes, *, content_type: str = TEXT) -> None:
        """Bytes that are all here."""
        headers = [*_headers(), ("X-Stream-Output", "1")]
        await self.responder.send(200, data, content_type=content_type, headers=headers)

    async def fail(self, message: str) -> None:
        """Say that it failed."""
        body = {"Message": message, "Code": 0, "Type": "error"}
        await self.responder.send(
            500, msgspec.json.encode(body) + b"\n", content_type=JSON, headers=_headers()
        )


#: Does what one command does.
Command = Callable[[Call], Awaitable[None]]


def path_of(text: str) -> Path:
    """The path that an argument names. Raises `Failed`, as Kubo does not refuse it at once."""
    try:
        return parse_path(text)
    except PathError as error:
        raise Failed(str(error)) from error


def missing(cid: bytes) -> str:
    """What Kubo says of a block that it cannot find, and where else it may be."""
    text = cid_text(cid)
    return f"ipld: could not find {text} (or only `promptmesh cache get {text}` may read it)"


def seconds(text: str) -> float:
    """A time as Go writes it: `5s`, `1m30s`, `0.5h`. Raises `Refused`."""
    spans = list(_SPAN.finditer(text))
    if not spans or "".join(span[0] for span in spans) != text:
        raise Refused(f'time: invalid duration "{text}"')
    return min(MAX_TIMEOUT, sum(float(span[1]) * _UNITS[span[2]] for span in spans))


def _headers() -> list[tuple[str, str]]:
    return [
        ("Access-Control-Allow-Headers", _HEADERS),
        ("Access-Control-Expose-Headers", _HEADERS),
    ]
