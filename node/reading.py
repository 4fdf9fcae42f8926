"""Blocks by CID for programs of this machine, from wherever they are: what gateway and RPC read.

First this node's own store, then the one behind it (`cache.layers`) where there is one, then the
mesh, while this node is in one. A block that was fetched is kept like one that a program put, so
that the next read is local, and inside the budget of bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from ..cache.blocks import BlockStore
from ..mesh.transport import PeerId, TransportError

logger = logging.getLogger(__name__)

#: Seconds that a read waits for peers.
PATIENCE = 10.0


class Source(Protocol):
    """Gets blocks from others (`mesh.bitswap.Bitswap`)."""

    async def fetch(self, cid: bytes, *, timeout: float) -> bytes:
        """The block, checked against its CID. Raises `TransportError` if nobody gives it."""
        ...

    def stored(self, cid: bytes) -> None:
        """The block is here now: somebody may wait for it."""
        ...


class Guard(Protocol):
    """Decides who may have a block (`node.permissions.Permissions`)."""

    async def may_serve(self, peer: PeerId | None, cid: bytes, proof: bytes = b"") -> bool: ...


class Reading:
    """Reads and keeps blocks for programs. See the module."""

    def __init__(
        self,
        *,
        blocks: BlockStore,
        permissions: Guard,
        beyond: Callable[[bytes], Awaitable[bytes | None]] | None = None,
    ) -> None:
        """`beyond` looks into a further store, without a fault."""
        self._blocks = blocks
        self._beyond = beyond
        self._permissions = permissions
        self._source: Source | None = None

    # --- the mesh, which may come and go

    def attach(self, source: Source) -> None:
        """Look also there from now on."""
        self._source = source

    def detach(self) -> None:
        """Look at home only."""
        self._source = None

    # --- reading

    async def read(self, cid: bytes, *, timeout: float = PATIENCE) -> bytes | None:
        """The block, if a program may have it and it is found within `timeout` seconds.

        A block that is here and withheld is asked of nobody.
        """
        if await self._blocks.has(cid):
            return await self.read_local(cid)
        block = await self._beyond(cid) if self._beyond else None
        if block is None:
            block = await self._fetch(cid, timeout)
        if block is not None:
            await self.put(cid, block)
        return block

    async def read_local(self, cid: bytes) -> bytes | None:
        """The block, if it is here and a program may have it."""
        return await self.give(None, cid)

    async def give(self, peer: PeerId | None, cid: bytes) -> bytes | None:
        """The block, if it is here and that peer, or a program (None), may have it."""
        if not await self._permissions.may_serve(peer, cid):
            return None
        return await self._blocks.get(cid)

    async def put(self, cid: bytes, block: bytes) -> bool:
        """Keep a block for a program. False if it could not be written.

        Raises `ValueError` if the CID is not of this block, or the block too large.
        """
        kept = await self._blocks.put(cid, block)
        if kept and self._source is not None:
            self._source.stored(cid)
        return kept

    async def _fetch(self, cid: bytes, timeout: float) -> bytes | None:
        if self._source is None:
            return None
        try:
            return await self._source.fetch(cid, timeout=timeout)
        except TransportError as error:
            logger.debug("block %s was not fetched: %s", cid.hex(), error)
            return None
