"""The read-only IPFS gateway: blocks and CAR files by CID, so that anybody can check the bytes.

Follows https://specs.ipfs.tech/http-gateways/trustless-gateway/. Nothing is rendered, and no path
is followed: what is given is the bytes that the CID names, and what is below them. dag-json is
there beside it, for people who want to read an answer.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, cast, get_args

from ..cache import dag_json, dags, unixfs
from ..cache.cid import cid_text, split
from ..cache.dags import PathError
from ..cache.links import link_text, parse_link, stored
from ..cache.unixfs import NotAFile
from .accept import preferred
from .api_kubo_dags import car_of
from .http_server import Request, Responder
from .permissions import WITHHELD
from .routes import send_problem

logger = logging.getLogger(__name__)

Form = Literal["raw", "car", "dag-json"]
Scope = Literal["block", "entity", "all"]

#: What can be asked for by `?format=` or by `Accept`; what stands first is given for `*/*`.
TYPES: dict[str, Form] = {
    "application/vnd.ipld.raw": "raw",
    "application/vnd.ipld.car": "car",
    "application/vnd.ipld.dag-json": "dag-json",
}
_FORMS: dict[Form, str] = {form: name for name, form in TYPES.items()}
_ENDINGS: dict[Form, str] = {"raw": "bin", "car": "car", "dag-json": "json"}
#: What a CAR file is like, beside its content: blocks in the order of a walk, each once.
_CAR_PARAMETERS = "; version=1; order=dfs; dups=n"
_KNOWN = " or ".join(f"?format={form}" for form in _FORMS)

#: The CID of nothing, whose (empty) content it holds itself: clients ask for it to see whether this
#: is a gateway (the specification, "Dedicated probe paths").
PROBE = "bafkqaaa"
#: The bytes of a CID never change.
_IMMUTABLE = "public, max-age=29030400, immutable"


class Reader(Protocol):
    """Reads blocks for programs (`node.reading.Reading`)."""

    async def read(self, cid: bytes) -> bytes | None: ...

    async def read_local(self, cid: bytes) -> bytes | None: ...


class _Problem(Exception):
    """Why it is not given: a status and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is asked for."""

    #: The CID as the request has it, as a link to it, and as it is kept.
    requested: str
    named: bytes
    cid: bytes
    form: Form
    #: How much of what is below the block goes into a CAR file.
    scope: Scope

    @property
    def text(self) -> str:
        return link_text(self.named)

    @property
    def etag(self) -> str:
        """Names the bytes of the answer; a CAR's are weak, since others may write it otherwise."""
        if self.form != "car":
            return f'"{self.text}.{self.form}"'
        shape = hashlib.sha256(f"{_CAR_PARAMETERS}; scope={self.scope}".encode()).hexdigest()[:12]
        return f'W/"{self.text}.car.{shape}"'

    @property
    def location(self) -> str:
        """Where just this is, for whoever keeps it: `Accept` is no part of an address."""
        scope = f"&dag-scope={self.scope}" if self.form == "car" else ""
        return f"/ipfs/{self.requested}?format={self.form}{scope}"

    def headers(self) -> list[tuple[str, str]]:
        name = f"{self.text}.{_ENDINGS[self.form]}"
        return [
            ("cache-control", _IMMUTABLE),
            ("etag", self.etag),
            ("vary", "accept"),
            ("content-location", self.location),
            ("x-ipfs-path", f"/ipfs/{self.requested}"),
            ("x-ipfs-roots", self.text),
            ("content-disposition", f'attachment; filename="{name}"'),
            ("x-content-type-options", "nosniff"),
        ]


class IpfsApi:
    """The handlers of `/ipfs/*`."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    async def content(self, request: Request, responder: Responder, name: str) -> None:
        """`GET /ipfs/CID`."""
        try:
            if name == PROBE and _form(request) == "raw":
                await responder.send(200, content_type=_FORMS["raw"])
                return
            await self._give(request, responder, _asked(request, name))
        except _Problem as problem:
            await send_problem(responder, problem.status, str(problem))

    async def _give(self, request: Request, responder: Responder, asked: _Asked) -> None:
        block = await self._root(request, asked)
        headers = asked.headers()
        if _matches(request.headers.get("if-none-match", ""), asked.etag):
            await responder.send(304, content_type="", headers=headers)
        elif asked.form == "car":
            await self._give_car(request, responder, asked, _is_deep(asked, block))
        else:
            body = block
            if asked.form == "dag-json":
                body = await dags.aside(partial(_as_json, asked.cid, block), len(block))
            await responder.send(200, body, content_type=_FORMS[asked.form], headers=headers)

    async def _root(self, request: Request, asked: _Asked) -> bytes:
        if "only-if-cached" in request.headers.get("cache-control", ""):
            block = await self._reader.read_local(asked.cid)
            status = 412
        else:
            block = await self._reader.read(asked.cid)
            status = 404
        if block is None:
            raise _Problem(status, WITHHELD.format(cid=asked.text))
        return block

    async def _give_car(
        self, request: Request, responder: Responder, asked: _Asked, deep: bool
    ) -> None:
        """A missing block in the middle of it cuts the answer, so that the client sees it."""
        kind = _FORMS["car"] + _CAR_PARAMETERS
        headers = [*asked.headers(), ("accept-ranges", "none")]
        await responder.start(200, content_type=kind, headers=headers)
        if request.method != "HEAD":
            try:
                async with aclosing(car_of(self._fetch, asked.named, deep=deep)) as pieces:
                    await _write(responder, pieces)
            except (PathError, _Problem) as error:
                logger.warning("the CAR of %s was cut: %s", asked.text, error)
                return
        await responder.end()

    async def _fetch(self, cid: bytes) -> bytes:
        block = await self._reader.read(cid)
        if block is None:
            raise _Problem(404, WITHHELD.format(cid=link_text(cid)))
        return block


async def _write(responder: Responder, pieces: AsyncIterator[bytes]) -> None:
    async for piece in pieces:
        await responder.write(piece)


def _asked(request: Request, name: str) -> _Asked:
    """Raises `_Problem`."""
    text, _, below = name.partition("/")
    try:
        named = parse_link(text)
        cid = stored(named)
    except ValueError as error:
        raise _Problem(400, f"{text[:100]!r} is no CID of a block here: {error}") from error
    if below:
        hint = f"`dag/get?arg={text}/...` of /api/v0 follows it"
        raise _Problem(400, f"this gateway gives blocks, and follows no path below a CID: {hint}")
    form = _form(request)
    if form is None:
        # The specification wants 400 where the client does not say what it can read.
        status = 406 if request.headers.get("accept") or "format" in request.query else 400
        raise _Problem(status, f"this gateway gives blocks and nothing else: ask with {_KNOWN}")
    if form == "car":
        _check_car(request)
    return _Asked(text, named, cid, form, _scope(request))


def _form(request: Request) -> Form | None:
    """`format` stands over `Accept`."""
    asked = request.query.get("format")
    if asked:
        return next((form for form in _FORMS if form == asked[0]), None)
    accept = request.headers.get("accept", "")
    # Without a word of what it wants, a client would not know what to do with a block.
    found = preferred(accept, list(TYPES)) if "application/vnd.ipld" in accept else None
    return TYPES[found] if found else None


def _check_car(request: Request) -> None:
    """Refuse a kind of CAR file that is not written here."""
    accept = request.headers.get("accept", "")
    for name, taken in (("version", ("1",)), ("order", ("dfs", "unk")), ("dups", ("n",))):
        wanted = request.query.get(f"car-{name}", [""])[0] or _parameter(accept, name)
        if wanted and wanted not in taken:
            raise _Problem(400, f"a CAR file with {name}={wanted[:20]} is not written here")
    if "entity-bytes" in request.query:
        raise _Problem(400, "entity-bytes is not understood here: ask for the whole")


def _scope(request: Request) -> Scope:
    scope = request.query.get("dag-scope", ["all"])[0]
    for known in get_args(Scope):
        if scope == known:
            return cast(Scope, known)
    raise _Problem(400, f"dag-scope is block, entity or all, not {scope[:20]!r}")


def _is_deep(asked: _Asked, block: bytes) -> bool:
    """Does what is below the block belong into the CAR file?"""
    if asked.scope != "entity":
        return asked.scope == "all"
    try:
        unixfs.file_size(asked.cid, block)
    except NotAFile:
        return False
    return True


def _as_json(cid: bytes, block: bytes) -> bytes:
    codec, _ = split(cid)
    if codec not in ("dag-cbor", "dag-json"):
        raise _Problem(406, f"a {codec} block has no dag-json here: ask with ?format=raw or car")
    try:
        return block if codec == "dag-json" else dag_json.encode(dags.decode(codec, block))
    except (ValueError, RecursionError) as error:
        raise _Problem(406, f"{cid_text(cid)} has no dag-json: {error}") from error


def _parameter(accept: str, name: str) -> str:
    """A parameter of the CAR type in `Accept`."""
    for kind in accept.split(","):
        media, *parameters = (part.strip() for part in kind.split(";"))
        if media.lower() == _FORMS["car"]:
            for parameter in parameters:
                key, _, value = parameter.partition("=")
                if key.strip().lower() == name:
                    return value.strip(' "')
    return ""


def _matches(if_none_match: str, etag: str) -> bool:
    """The weak comparison of RFC 9110, 8.8.3.2."""
    wanted = etag.removeprefix("W/")
    tags = [tag.strip() for tag in if_none_match.split(",")]
    return "*" in tags or any(tag.removeprefix("W/") == wanted for tag in tags)
