"""dag-pb: the blocks of IPFS files, links with names and sizes and some bytes in protobuf.

Source of the form: https://ipld.io/specs/codecs/dag-pb/spec/. Written by hand, since protobuf's own
library puts the fields in another order, and would let other forms of the same block pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from . import varint
from .links import as_link

_VARINT, _BYTES = 0, 2


@dataclass(frozen=True, slots=True)
class Link:
    """To another block; `size` counts the bytes of all that is below it."""

    cid: bytes
    size: int | None = None
    name: str | None = ""


@dataclass(frozen=True, slots=True)
class Node:
    """What is in a block."""

    links: tuple[Link, ...] = ()
    data: bytes | None = None


def encode(node: Node) -> bytes:
    """The block of a node."""
    out = b"".join(field(2, _link(link)) for link in node.links)
    return out if node.data is None else out + field(1, node.data)


def decode(block: bytes) -> Node:
    """The node of a block. Raises `ValueError` for anything but what `encode` makes."""
    links: list[Link] = []
    data: bytes | None = None
    for number, value in fields(block):
        if number == 2 and isinstance(value, bytes) and data is None:
            links.append(_read_link(value))
        elif number == 1 and isinstance(value, bytes) and data is None:
            data = value
        else:
            raise ValueError("not a dag-pb block: a field that has no place there")
    node = Node(tuple(links), data)
    if encode(node) != block:
        raise ValueError("not the one form of a dag-pb block")
    return node


def as_value(node: Node) -> dict[str, Any]:
    """As IPLD sees it, for dag-json and for paths."""
    links = []
    for link in node.links:
        plain: dict[str, Any] = {"Hash": as_link(link.cid)}
        if link.name is not None:
            plain["Name"] = link.name
        if link.size is not None:
            plain["Tsize"] = link.size
        links.append(plain)
    value: dict[str, Any] = {"Links": links}
    return value if node.data is None else {"Data": node.data} | value


# --- protobuf -----------------------------------------------------------------------------------


def field(number: int, value: int | bytes) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, int):
        return varint.encode(number << 3 | _VARINT) + varint.encode(value)
    return varint.encode(number << 3 | _BYTES) + varint.encode(len(value)) + value


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message in order. Raises `ValueError` for a cut one or another kind."""
    at = 0
    while at < len(message):
        key, at = varint.decode(message, at)
        value, at = varint.decode(message, at)
        if key & 7 == _VARINT:
            yield key >> 3, value
        elif key & 7 == _BYTES and at + value <= len(message):
            yield key >> 3, message[at : at + value]
            at += value
        else:
            raise ValueError("a protobuf field that is cut, or of a kind that has no place here")


def _link(link: Link) -> bytes:
    out = field(1, link.cid)
    if link.name is not None:
        out += field(2, link.name.encode())
    return out if link.size is None else out + field(3, link.size)


def _read_link(message: bytes) -> Link:
    cid, name, size = b"", None, None
    for number, value in fields(message):
        if number == 1 and isinstance(value, bytes):
            cid = value
        elif number == 2 and isinstance(value, bytes):
            name = value.decode()
        elif number == 3 and isinstance(value, int):
            size = value
        else:
            raise ValueError("not a dag-pb link: a field that has no place there")
    if not cid:
        raise ValueError("not a dag-pb link: it has no CID")
    return Link(cid, size, name)


def total(links: Sequence[Link], block: bytes) -> int:
    """The bytes of a block and of all below it."""
    return len(block) + sum(link.size or 0 for link in links)
