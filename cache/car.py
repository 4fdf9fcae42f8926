"""CAR files: blocks with their CIDs in one row of bytes, version 1.

    varint, {"roots": [link, ...], "version": 1} in dag-cbor, and for each block: varint, CID, bytes

Source of the form: https://ipld.io/specs/transport/car/carv1/. A file may come from a stranger:
reading bounds it, and gives no block that is not what its CID names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import cbrrr
import msgspec

from . import varint
from .blocks import MAX_BLOCK
from .cid import DIGEST_SIZE, PREFIX, cid_text, verify
from .links import V0, stored

#: Bytes of a header: 64 roots take 3 KB.
MAX_HEADER = 4096

_PREFIXES = (*PREFIX.values(), V0)
_LONGEST_CID = max(len(prefix) for prefix in PREFIX.values()) + DIGEST_SIZE


class CarError(ValueError):
    """Not a CAR file that we read. The message says why."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What is read of a file at most."""

    #: How many blocks, and the bytes of one and of the whole file.
    blocks: int = 4096
    block_bytes: int = MAX_BLOCK
    bytes: int = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Car:
    """What is in a CAR file."""

    #: As the header has them, of version 0 or 1.
    roots: tuple[bytes, ...]
    #: By CID of version 1, in the order of the file.
    blocks: dict[bytes, bytes] = field(default_factory=dict)


def header(roots: Sequence[bytes]) -> bytes:
    """The beginning of a CAR file, to be followed by a `section` of each block."""
    links: Any = [cbrrr.CID(root) for root in roots]
    plain = cbrrr.encode_dag_cbor({"roots": links, "version": 1})
    return varint.encode(len(plain)) + plain


def section(cid: bytes, block: bytes) -> bytes:
    """One block with its CID."""
    return varint.encode(len(cid) + len(block)) + cid + block


def write(roots: Sequence[bytes], blocks: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A CAR file of blocks by CID."""
    return header(roots) + b"".join(section(cid, block) for cid, block in blocks)


def read(data: bytes, limits: Limits | None = None) -> Car:
    """What is in a CAR file. The roots need not be among the blocks.

    Raises `CarError` for anything else, for more than the limits, and for a block that is not what
    its CID names.
    """
    limits = limits or Limits()
    if len(data) > limits.bytes:
        raise CarError(f"{len(data)} bytes; {limits.bytes} is the most")
    start, end = _length(data, 0, MAX_HEADER, "the header")
    car = Car(_roots(data[start:end]))
    for count, (cid, block) in enumerate(_sections(data, end, limits.block_bytes), 1):
        if count > limits.blocks:
            raise CarError(f"more than {limits.blocks} blocks")
        car.blocks[cid] = block
    return car


# --- the form -----------------------------------------------------------------------------------


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Literal[1]
    roots: Annotated[tuple[cbrrr.CID, ...], msgspec.Meta(max_length=64)]


def _roots(plain: bytes) -> tuple[bytes, ...]:
    try:
        roots = msgspec.convert(cbrrr.decode_dag_cbor(plain), _Header).roots
        for root in roots:
            stored(root.cid_bytes)
    except (ValueError, RecursionError) as error:  # msgspec.ValidationError is a ValueError
        raise CarError(f"not the header of a CAR file of version 1: {error}") from error
    return tuple(root.cid_bytes for root in roots)


def _sections(data: bytes, at: int, most: int) -> Iterator[tuple[bytes, bytes]]:
    count = 0
    while at < len(data):
        count += 1
        start, at = _length(data, at, most + _LONGEST_CID, f"block {count}")
        prefix = next((p for p in _PREFIXES if data.startswith(p, start)), b"")
        body = start + len(prefix) + DIGEST_SIZE
        if not prefix or body > at:
            raise CarError(f"block {count} has no CID with sha2-256 that we read")
        cid, block = stored(data[start:body]), data[body:at]
        if not verify(cid, block):
            raise CarError(f"block {count} is not what its CID names, {cid_text(cid)}")
        yield cid, block


def _length(data: bytes, at: int, most: int, what: str) -> tuple[int, int]:
    """Where the part with its length at `at` begins and ends."""
    try:
        number, start = varint.decode(data, at)
    except ValueError as error:
        raise CarError(f"the length of {what}: {error}") from None
    if number > most:
        raise CarError(f"{what} has {number} bytes; {most} is the most")
    if start + number > len(data):
        raise CarError(f"the file ends within {what}")
    return start, start + number
