"""Pins: what is kept for ever, and the blocks below it that are kept for its sake.

The tables (`schema`) hold who pinned what, and set `block.pinned` from it, so that a block below
two pins stays when one of them goes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .cid import DIGEST_SIZE, cid_of, split
from .database import Database
from .links import stored

Kind = Literal["recursive", "direct", "indirect"]

#: The CID as it was pinned, or of a raw block for one that is kept for the sake of another.
_LISTING = """
    SELECT pin.cid, iif(pin.recursive, 'recursive', 'direct') FROM pin
        WHERE (?1 IS NULL OR digest = ?1)
    UNION ALL SELECT DISTINCT leaf, 'indirect' FROM pinned_below
        WHERE (?1 IS NULL OR leaf = ?1) AND leaf NOT IN (SELECT digest FROM pin)"""


class PinsFull(Exception):
    """What is pinned would take more room than the cache has. Nothing was pinned."""


@dataclass(frozen=True, slots=True)
class Pin:
    """One block that is kept, and why."""

    #: Of version 0 or 1, as it was pinned.
    cid: bytes
    kind: Kind


class Pins:
    """The pins of `cache.sqlite`, as programs see them."""

    def __init__(
        self,
        database: Database,
        *,
        max_bytes: int,
        tell: Callable[[Literal["pin", "unpin"], bytes], None] = lambda change, cid: None,
    ) -> None:
        """At most `max_bytes` are pinned. `tell` is told of what was pinned and unpinned."""
        self._database = database
        self._max_bytes = max_bytes
        self._tell = tell

    async def add(self, named: bytes, *, recursive: bool, below: Sequence[bytes] = ()) -> bool:
        """Keep a block, and those `below` it, by their CIDs. Are they all here?

        `named` is its CID as the program wrote it. Raises `PinsFull`.
        """

        def add() -> bool:
            try:
                with self._database.transaction() as connection:
                    digests = [cid[-DIGEST_SIZE:] for cid in below]
                    write(connection, named, recursive=recursive, below=digests)
                    (held,) = connection.execute("SELECT pinned_bytes FROM total").fetchone()
                    if held > self._max_bytes:
                        raise PinsFull(f"more than {self._max_bytes} bytes would be pinned")
            except sqlite3.IntegrityError:  # one of them was evicted in the meantime
                return False
            return True

        pinned = self._database.attempt("pinning", add, False)
        if pinned:
            self._tell("pin", stored(named))
        return pinned

    async def remove(self, cid: bytes) -> bool:
        """Take back the pin of a block. Was it pinned by itself?"""

        def remove() -> bool:
            with self._database.transaction() as connection:
                return erase(connection, cid[-DIGEST_SIZE:])

        unpinned = self._database.attempt("unpinning", remove, False)
        if unpinned:
            self._tell("unpin", cid)
        return unpinned

    async def listing(self, cid: bytes | None = None) -> list[Pin]:
        """What is pinned: all of it, or how this block is, if it is."""
        digest = None if cid is None else split(cid)[1]
        rows: list[tuple[bytes, Kind]] = self._database.attempt(
            "listing pins", lambda: self._database.rows(_LISTING, (digest,)), []
        )
        return [
            Pin(cid_of(name, "raw") if kind == "indirect" else name, kind) for name, kind in rows
        ]


# --- inside a transaction: these raise sqlite3.Error --------------------------------------------


def write(
    connection: sqlite3.Connection, named: bytes, *, recursive: bool, below: Iterable[bytes]
) -> None:
    """Pin a block, and those below it, by their digests; all must be here."""
    digest = named[-DIGEST_SIZE:]
    connection.execute(
        "INSERT INTO pin VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET cid = ?2,"
        " recursive = max(recursive, ?3)",
        (digest, named, recursive),
    )
    connection.executemany(
        "INSERT INTO pinned_below VALUES (?, ?) ON CONFLICT DO NOTHING",
        [(digest, leaf) for leaf in below if leaf != digest],
    )


def erase(connection: sqlite3.Connection, digest: bytes) -> bool:
    """Unpin a block. Was it pinned by itself?"""
    return connection.execute("DELETE FROM pin WHERE digest = ?", (digest,)).rowcount > 0
