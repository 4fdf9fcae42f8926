"""Blocks by CID: the store in `cache.sqlite`, and one in memory.

A block is kept under its digest, so that it is found by its raw and its dag-cbor CID alike. What is
read is always checked against the CID: a damaged block is not there, and is deleted.

Who calls `put` is outside the cache: it has the bytes already, and means others to have them. The
blocks of answers are written by `AnswerCache`, and the index says who may have them.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from . import pins
from .cid import cid_of, cid_text, split, verify
from .database import Database
from .uses import SAME_USE, Uses

logger = logging.getLogger(__name__)

#: Bytes of the largest block that is taken, the same as in Kubo and bitswap.
MAX_BLOCK = 2 * 1024 * 1024
#: Blocks that are listed at a time.
LISTED = 256


#: What can happen to a block that a program, a person or an answer brings about. (Eviction and
#: expiry do not count: they are this store's own affair.)
Change = Literal["put", "pin", "unpin", "delete"]


@dataclass(frozen=True, slots=True)
class StoreSize:
    """How much a store holds."""

    blocks: int
    bytes: int
    pinned: int


class BlockStore(Protocol):
    """Keeps blocks.

    A store that fails is an empty one; only `put` says so, by False. A CID with a hash or a codec
    that we do not use has no block.
    """

    async def put(self, cid: bytes, block: bytes) -> bool:
        """Keep it. Raises `ValueError` if the CID is not of this block, or the block too large."""
        ...

    async def get(self, cid: bytes) -> bytes | None:
        """The block, checked against the CID."""
        ...

    async def has(self, cid: bytes) -> bool:
        """Is it there? (Not checked; `get` may still find it damaged.)"""
        ...

    async def delete(self, cid: bytes) -> bool:
        """Forget it, pinned or not. Was it there?"""
        ...

    async def pin(self, cid: bytes, pinned: bool = True) -> bool:
        """Never evict it, nor the leaves it links to; or again do. Is it there?"""
        ...

    async def size(self) -> StoreSize: ...


class MemoryBlocks:
    """A `BlockStore` in memory, without bound."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, bytes] = {}
        self._pinned: set[bytes] = set()

    async def put(self, cid: bytes, block: bytes) -> bool:
        check(cid, block)
        self._blocks[_digest(cid)] = block
        return True

    async def get(self, cid: bytes) -> bytes | None:
        return self._blocks.get(_digest(cid))

    async def has(self, cid: bytes) -> bool:
        return _digest(cid) in self._blocks

    async def delete(self, cid: bytes) -> bool:
        digest = _digest(cid)
        self._pinned.discard(digest)
        return self._blocks.pop(digest, None) is not None

    async def pin(self, cid: bytes, pinned: bool = True) -> bool:
        digest = _digest(cid)
        if digest in self._blocks:
            (self._pinned.add if pinned else self._pinned.discard)(digest)
        return digest in self._blocks

    async def size(self) -> StoreSize:
        held = sum(len(block) for block in self._blocks.values())
        return StoreSize(len(self._blocks), held, len(self._pinned))


class SqliteBlocks:
    """A `BlockStore` over `cache.sqlite`, and what `AnswerCache` needs inside a transaction."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        #: What was read; `AnswerCache` writes it down.
        self.uses = Uses(database)
        #: Told of each change, before it is certain: what it finds here later is what holds.
        self.on_change: Callable[[Change, bytes], None] | None = None

    async def put(self, cid: bytes, block: bytes) -> bool:
        check(cid, block)

        def put() -> bool:
            with self._database.transaction() as connection:
                self.write(connection, [(cid, block)], self._clock(), put=True)
            return True

        return self._database.attempt("putting a block", put, False)

    async def keep(self, cid: bytes, block: bytes) -> bool:
        """Keep it like `put`, but only for this node: nobody outside means others to have it."""
        check(cid, block)

        def keep() -> bool:
            with self._database.transaction() as connection:
                self._insert(connection, [(cid, block)], self._clock(), put=False)
            return True

        return self._database.attempt("keeping a block", keep, False)

    async def get(self, cid: bytes) -> bytes | None:
        return self._database.attempt("getting a block", lambda: self.read(_digest(cid)), None)

    async def has(self, cid: bytes) -> bool:
        sql = "SELECT 1 FROM block WHERE digest = ?"
        found = self._database.attempt(
            "looking for a block", lambda: self._database.row(sql, (_digest(cid),)), None
        )
        return found is not None

    async def delete(self, cid: bytes) -> bool:
        digest = _digest(cid)
        self.tell("delete", cid)
        return self._database.attempt("deleting a block", lambda: self.drop([digest]) > 0, False)

    async def pin(self, cid: bytes, pinned: bool = True) -> bool:
        digest = _digest(cid)

        def pin() -> bool:
            with self._database.transaction() as connection:
                if not pinned:
                    pins.erase(connection, digest)
                found = connection.execute("SELECT 1 FROM block WHERE digest = ?", (digest,))
                if found.fetchone() is None:
                    return False
                if pinned:
                    leaves = connection.execute("SELECT leaf FROM link WHERE root = ?", (digest,))
                    below = [leaf for (leaf,) in leaves]
                    pins.write(connection, cid, recursive=True, below=below)
                return True

        self.tell("pin" if pinned else "unpin", cid)
        return self._database.attempt("pinning a block", pin, False)

    async def size(self) -> StoreSize:
        sql = "SELECT blocks, bytes, (SELECT count(*) FROM block WHERE pinned = 1) FROM total"
        found = self._database.attempt(
            "counting blocks", lambda: self._database.row(sql), (0, 0, 0)
        )
        return StoreSize(*found)

    async def digests(self) -> AsyncGenerator[list[bytes], None]:
        """The digests of all blocks, some at a time."""
        sql = f"SELECT digest FROM block WHERE digest > ? ORDER BY digest LIMIT {LISTED}"
        last = b""
        while True:
            some: list[tuple[bytes]] = self._database.attempt(
                "listing blocks", partial(self._database.rows, sql, (last,)), []
            )
            if not some:
                return
            (last,) = some[-1]
            yield [digest for (digest,) in some]

    # --- inside: these raise sqlite3.Error ------------------------------------------------------

    def read(self, digest: bytes, *, used: bool = True) -> bytes | None:
        """The block with that digest. A damaged one is deleted, and with it its answers."""
        found = self._database.row("SELECT data FROM block WHERE digest = ?", (digest,))
        if found is None:
            return None
        block: bytes = found[0]
        if not isinstance(block, bytes) or not verify(cid_of(digest, "raw"), block):
            logger.warning("a stored block was damaged: %s is gone", cid_text(cid_of(digest)))
            self.drop([digest])
            return None
        if used:
            self.uses.block(digest)
        return block

    def write(
        self,
        connection: sqlite3.Connection,
        blocks: Sequence[tuple[bytes, bytes]],
        now: float,
        *,
        put: bool = False,
    ) -> None:
        """Keep blocks that are known to be what their CIDs name; `put`: for a program."""
        self._insert(connection, blocks, now, put=put)
        for cid, _ in blocks:
            self.tell("put", cid)

    def _insert(
        self,
        connection: sqlite3.Connection,
        blocks: Iterable[tuple[bytes, bytes]],
        now: float,
        *,
        put: bool,
    ) -> None:
        connection.executemany(
            "INSERT INTO block (digest, size, used_at, put, data) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET used_at = max(used_at, excluded.used_at),"
            " put = max(put, excluded.put)"
            f" WHERE used_at < excluded.used_at - {SAME_USE} OR put < excluded.put",
            [(_digest(cid), len(block), int(now), put, block) for cid, block in blocks],
        )

    def tell(self, change: Change, cid: bytes) -> None:
        """Say what changed here."""
        if self.on_change is not None:
            self.on_change(change, cid)

    def drop(self, digests: Sequence[bytes]) -> int:
        """Delete blocks, pinned or not, with what needs them; how many of these there were."""
        with self._database.transaction() as connection:
            # Before the blocks: what is kept for the sake of one must not outlast it.
            connection.executemany("DELETE FROM pin WHERE digest = ?", [(d,) for d in digests])
            return connection.executemany(
                "DELETE FROM block WHERE digest = ?", [(digest,) for digest in digests]
            ).rowcount


def check(cid: bytes, block: bytes) -> None:
    """Raises `ValueError` if the CID is not of this block, or the block too large."""
    if len(block) > MAX_BLOCK:
        raise ValueError(f"a block of {len(block)} bytes; {MAX_BLOCK} is the most")
    if not verify(cid, block):
        raise ValueError(f"the block is not what {cid.hex()} names")


def _digest(cid: bytes) -> bytes:
    """What the block is kept under; nothing is kept under an empty one."""
    try:
        return split(cid)[1]
    except ValueError:
        return b""
