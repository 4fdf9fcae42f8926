"""Blocks by what is in them: their values, their links, and the paths that lead through them.

A path is `CID/name/0/...`, with `/ipfs/` or `ipfs://` before it or without: names go into maps,
numbers into lists, and a link leads into the next block.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import cbrrr
import trio

from . import dag_json, dag_pb
from .cid import Codec, cid_text, split
from .links import parse_link, stored

T = TypeVar("T")

#: Names of a path, and characters of all of it.
MAX_SEGMENTS = 64
MAX_PATH = 4096
#: Links of a block that are followed; an index of an answer's leaves has 64.
MAX_LINKS = 8192

#: Blocks of a whole that is walked through; 65,536 leaves of a file hold 16 GiB.
MAX_BLOCKS = 65_536

#: Bytes that are taken apart where they are asked for: 20 ms at most.
INLINE = 64 * 1024

_limiter = trio.CapacityLimiter(2)
#: A place in a list.
_INDEX = re.compile("[0-9]{1,9}")

#: Gets a block by its CID of version 1, and raises where it cannot.
Fetch = Callable[[bytes], Awaitable[bytes]]


class PathError(ValueError):
    """No path, or one that leads nowhere. The message says why."""


@dataclass(frozen=True, slots=True)
class Path:
    """A CID and the names behind it."""

    #: As it was written, of version 0 or 1.
    named: bytes
    segments: tuple[str, ...] = ()

    @property
    def root(self) -> bytes:
        """The CID as this node keeps it."""
        return stored(self.named)


@dataclass(frozen=True, slots=True)
class Found:
    """Where a path ends: in which block, by what names inside of it, and at what value."""

    cid: bytes
    inside: tuple[str, ...]
    value: Any


def decode(codec: Codec, block: bytes) -> Any:
    """The value of a block. Raises `ValueError` for bytes that are not of that codec."""
    if codec == "raw":
        return block
    if codec == "dag-pb":
        return dag_pb.as_value(dag_pb.decode(block))
    return cbrrr.decode_dag_cbor(block) if codec == "dag-cbor" else dag_json.decode(block)


def encode(codec: Codec, value: Any) -> bytes:
    """The block of a value. Raises `ValueError` for a value that the codec does not take."""
    if codec == "dag-json":
        return dag_json.encode(value)
    if codec == "dag-pb":
        raise ValueError("dag-pb is written by `add` and `block put` only")
    if codec == "raw":
        if not isinstance(value, bytes):
            raise ValueError("a raw block is bytes")
        return value
    try:
        return cbrrr.encode_dag_cbor(value)
    except TypeError as error:
        raise ValueError(str(error)) from error


def links(codec: Codec, block: bytes) -> list[bytes]:
    """The CIDs that a block links to, each once, in their order.

    Raises `ValueError` for bytes that are not of that codec, and for too many.
    """
    if codec == "raw":
        return []
    found: dict[bytes, None] = {}
    waiting = [decode(codec, block)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, cbrrr.CID):
            found[value.cid_bytes] = None
            if len(found) > MAX_LINKS:
                raise ValueError(f"a block with more than {MAX_LINKS} links")
        elif isinstance(value, dict):
            waiting += reversed(value.values())
        elif isinstance(value, list):
            waiting += reversed(value)
    return list(found)


def parse_path(text: str) -> Path:
    """Raises `PathError` that says what is wrong with it."""
    if len(text) > MAX_PATH:
        raise PathError(f"a path of more than {MAX_PATH} characters")
    plain = text
    for start in ("/ipfs/", "ipfs://", "ipfs:"):
        if text.startswith(start):
            plain = text.removeprefix(start)
            break
    name, *segments = plain.split("/")
    segments = [segment for segment in segments if segment]
    if len(segments) > MAX_SEGMENTS:
        raise PathError(f"a path of more than {MAX_SEGMENTS} names")
    try:
        named = parse_link(name)
        stored(named)
        return Path(named, tuple(segments))
    except ValueError as error:
        raise PathError(f"invalid path {text[:200]!r}: {error}") from error


async def aside(work: Callable[[], T], size: int) -> T:
    """Take so many bytes apart, where they are many in a thread: 2 MiB can take a second."""
    if size <= INLINE:
        return work()
    return await trio.to_thread.run_sync(work, limiter=_limiter)


async def resolve(fetch: Fetch, path: Path) -> Found:
    """Follow a path. Raises `PathError`, and what `fetch` raises."""
    cid, inside = path.root, 0
    value = await _fetched(fetch, cid)
    for at, segment in enumerate(path.segments):
        value = _step(cid, value, segment, at == inside)
        # A path that ends at a link means what is behind it, as in Kubo.
        if isinstance(value, cbrrr.CID):
            cid, inside = _followed(value.cid_bytes), at + 1
            value = await _fetched(fetch, cid)
    return Found(cid, path.segments[inside:], value)


async def walk(
    fetch: Fetch, root: bytes, *, deep: bool = True
) -> AsyncGenerator[tuple[bytes, bytes], None]:
    """A block and all that is below it, each once, by its CID as the link to it says.

    A block comes before those it links to, and they in their order. Raises `PathError` for a block
    that is not what its codec says or a link that cannot be followed, and what `fetch` raises.
    """
    seen: set[bytes] = set()
    waiting = [root]
    while waiting:
        named = waiting.pop()
        cid = _followed(named)
        if cid in seen:
            continue
        seen.add(cid)
        if len(seen) > MAX_BLOCKS:
            raise PathError(f"more than {MAX_BLOCKS} blocks")
        block = await fetch(cid)
        yield named, block
        if deep:
            waiting += reversed(await aside(partial(_links, cid, block), len(block)))


def _links(cid: bytes, block: bytes) -> list[bytes]:
    codec, _ = split(cid)
    try:
        return links(codec, block)
    except (ValueError, RecursionError) as error:
        raise PathError(f"{cid_text(cid)} is not {codec}: {error}") from error


def _followed(link: bytes) -> bytes:
    try:
        return stored(link)
    except ValueError as error:
        raise PathError(str(error)) from error


async def _fetched(fetch: Fetch, cid: bytes) -> Any:
    block = await fetch(cid)
    return await aside(partial(_decoded, cid, block), len(block))


def _decoded(cid: bytes, block: bytes) -> Any:
    codec, _ = split(cid)
    try:
        return decode(codec, block)
    except (ValueError, RecursionError) as error:
        raise PathError(f"{cid_text(cid)} is not {codec}: {error}") from error


def _step(cid: bytes, value: Any, segment: str, at_root: bool) -> Any:
    if isinstance(value, dict):
        if segment in value:
            return value[segment]
        if at_root and split(cid)[0] == "dag-pb":
            for link in value["Links"]:
                if link.get("Name") == segment:
                    return link["Hash"]
    elif isinstance(value, list) and _INDEX.fullmatch(segment) and int(segment) < len(value):
        return value[int(segment)]
    raise PathError(f"no link named {segment[:200]!r} under {cid_text(cid)}")
