"""Files as IPFS blocks, the way Kubo's `ipfs add` makes them, so that the CIDs are the same.

Source of the form: https://specs.ipfs.tech/unixfs/. A file is cut into leaves of 256 KiB. Where
there is one, it is the file; else a balanced tree of dag-pb nodes stands over them, up to 174 links
each. With CID version 1 leaves are raw blocks, with version 0 they are dag-pb nodes too.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass

from . import dag_pb
from .cid import cid_bytes, split
from .dag_pb import Link, Node, field, fields
from .links import stored, version_0

#: Bytes of a leaf, and links of a node, as in Kubo.
LEAF = 262_144
MAX_LINKS = 174
#: Levels of a file that is read; four hold 240 TB.
MAX_LEVELS = 8

#: The types of UnixFS that are read.
_RAW, _DIRECTORY, _FILE, _SHARD = 0, 1, 2, 5

#: Gets a block by its CID of version 1, and raises where it cannot.
Fetch = Callable[[bytes], Awaitable[bytes]]


class NotAFile(ValueError):
    """The CID names something else. The message says what."""


@dataclass(frozen=True, slots=True)
class Built:
    """A block of a file: its CID as links write it, and the bytes of it and of all below it."""

    cid: bytes
    block: bytes
    size: int
    #: Bytes of the file in it and below it.
    content: int


def build(data: bytes, *, version: int = 1, raw_leaves: bool | None = None) -> Iterator[Built]:
    """The blocks of a file; the last one is its root.

    `raw_leaves` is what the version says where it is None.
    """
    raw = version == 1 if raw_leaves is None else raw_leaves
    level: list[Built] = []
    for start in range(0, len(data) or 1, LEAF):
        leaf = _leaf(data[start : start + LEAF], version, raw)
        yield leaf
        level.append(Built(leaf.cid, b"", leaf.size, leaf.content))
    while len(level) > 1:
        above = [
            _node(level[start : start + MAX_LINKS], version)
            for start in range(0, len(level), MAX_LINKS)
        ]
        yield from above
        level = above


async def read(
    fetch: Fetch, cid: bytes, *, offset: int = 0, length: int | None = None
) -> AsyncGenerator[bytes, None]:
    """The bytes of a file, or some of them, a leaf at a time.

    Raises `NotAFile`, and what `fetch` raises.
    """
    end = None if length is None else offset + length
    # (CID, where it begins in the file, level); the next one last.
    waiting = [(cid, 0, 0)]
    while waiting:
        cid, start, level = waiting.pop()
        data, children = _opened(cid, await fetch(cid))
        if level > MAX_LEVELS:
            raise NotAFile(f"a file of more than {MAX_LEVELS} levels")
        piece = data[max(0, offset - start) : None if end is None else max(0, end - start)]
        if piece:
            yield piece
        below = []
        start += len(data)
        for child, size in children:
            if start + size > offset and (end is None or start < end):
                below.append((child, start, level + 1))
            start += size
        waiting += reversed(below)


def file_size(cid: bytes, block: bytes) -> int:
    """How many bytes the file has, by its root block. Raises `NotAFile`."""
    data, children = _opened(cid, block)
    return len(data) + sum(size for _, size in children)


# --- writing ------------------------------------------------------------------------------------


def _leaf(data: bytes, version: int, raw: bool) -> Built:
    if raw:
        return Built(cid_bytes(data, "raw"), data, len(data), len(data))
    content = field(2, data) if data else b""
    block = dag_pb.encode(Node(data=field(1, _FILE) + content + field(3, len(data))))
    return Built(_name(block, version), block, len(block), len(data))


def _node(children: list[Built], version: int) -> Built:
    links = tuple(Link(child.cid, child.size) for child in children)
    content = sum(child.content for child in children)
    sizes = b"".join(field(4, child.content) for child in children)
    block = dag_pb.encode(Node(links, field(1, _FILE) + field(3, content) + sizes))
    return Built(_name(block, version), block, dag_pb.total(links, block), content)


def _name(block: bytes, version: int) -> bytes:
    cid = cid_bytes(block, "dag-pb")
    return cid if version == 1 else version_0(cid)


# --- reading ------------------------------------------------------------------------------------


def _opened(cid: bytes, block: bytes) -> tuple[bytes, list[tuple[bytes, int]]]:
    """The bytes that are in a block itself, and its children with the bytes each has of the file.

    Raises `NotAFile`.
    """
    codec, _ = split(cid)
    if codec == "raw":
        return block, []
    if codec != "dag-pb":
        raise NotAFile(f"a {codec} block is no file: `dag get` reads it")
    try:
        node = dag_pb.decode(block)
        data, sizes = _content(node.data or b"")
        if len(sizes) != len(node.links):
            raise ValueError("its links and sizes do not fit each other")
        return data, [
            (stored(link.cid), size) for link, size in zip(node.links, sizes, strict=True)
        ]
    except NotAFile:
        raise
    except ValueError as error:
        raise NotAFile(f"not a file: {error}") from error


def _content(message: bytes) -> tuple[bytes, list[int]]:
    kind, data, sizes = None, b"", []
    for number, value in fields(message):
        if number == 1 and isinstance(value, int):
            kind = value
        elif number == 2 and isinstance(value, bytes):
            data = value
        elif number == 4 and isinstance(value, int):
            sizes.append(value)
    if kind in (_DIRECTORY, _SHARD):
        raise NotAFile("this dag node is a directory")
    if kind not in (_RAW, _FILE):
        raise NotAFile("this dag node is neither a file nor a directory")
    return data, sizes
