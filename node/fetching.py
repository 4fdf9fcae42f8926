"""Gets the blocks of an answer from whoever has them: checked, bounded, from the next if one fails.

Who computed the answer and who holds a copy serve alike, as the CID decides what is right. What a
source does wrong is held against it: other bytes more than an answer that it has no more.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from random import Random

import trio

from ..cache.cid import cid_text, verify
from ..cache.conduct import LATE, Conduct
from ..cache.keys import block_proof
from ..cache.namespaces import Namespaces
from ..cache.record_bounds import BLOCK_SIZE
from ..cache.records import links
from ..mesh.frames import RemoteProtocolError
from ..mesh.transport import PeerId, TransportError
from .claim_network import Link

logger = logging.getLogger(__name__)

#: Seconds that one source may take, and sources that are tried.
SOURCE_TIME, MAX_SOURCES = 1.0, 4
#: Blocks of an answer that is fetched, a megabyte; one with more is computed instead.
MAX_BLOCKS = 16
#: Seconds for which a source that did not deliver an answer is not asked for it again.
REMEMBERED = 60.0
#: Such failures that are remembered.
MAX_FAILURES = 1024

#: Blocks by CID.
Blocks = dict[bytes, bytes]


class _Undelivered(Exception):
    """A source did not do as it claimed. The message says what."""


class Fetching:
    """Fetches answers by their CIDs."""

    def __init__(
        self, link: Link, *, namespaces: Namespaces, conduct: Conduct, rng: Random
    ) -> None:
        self._link = link
        self._namespaces = namespaces
        self._conduct = conduct
        self._rng = rng
        #: (peer, CID) -> until when it is not asked.
        self._failed: dict[tuple[PeerId, bytes], float] = {}

    async def fetch(
        self, cid: bytes, sources: Sequence[PeerId], namespace: str
    ) -> tuple[Blocks, PeerId] | None:
        """The blocks of an answer, and who gave the last; None if nobody gave all.

        Raises `RecordError` if the CID names something that is no answer.
        """
        blocks: Blocks = {}
        for peer in self._in_turn(cid, sources):
            try:
                with trio.move_on_after(SOURCE_TIME):
                    if not await self._take(peer, cid, blocks, namespace):
                        return None
                    return blocks, peer
                self._late(peer, "it did not deliver in time")
            except _Undelivered as error:
                logger.info("peer %s did not deliver %s: %s", peer, cid_text(cid), error)
            self._remember(peer, cid)
        return None

    def _in_turn(self, cid: bytes, sources: Sequence[PeerId]) -> list[PeerId]:
        """Whom to ask: who is connected, in any order, so that all share the work."""
        assert self._link.network is not None
        now = self._link.clock()
        connected = set(self._link.network.connected())
        # In a large mesh others are within reach, too: it is connected on demand.
        reachable = set(sources) if self._link.by_homes() else connected
        asked = [
            peer
            for peer in dict.fromkeys(sources)
            if peer in reachable
            and self._failed.get((peer, cid), 0.0) <= now
            and self._conduct.silence(peer, now) is None
        ]
        self._rng.shuffle(asked)
        return sorted(asked, key=lambda peer: peer not in connected)[:MAX_SOURCES]

    async def _take(self, peer: PeerId, cid: bytes, blocks: Blocks, namespace: str) -> bool:
        """Take from a peer what is lacking. False if the answer is too large to be fetched."""
        if cid not in blocks:
            blocks[cid] = await self._block(peer, cid, namespace)
        leaves = links(blocks[cid])
        if len(leaves) >= MAX_BLOCKS:
            logger.info("%s has more than %d blocks, and is not fetched", cid_text(cid), MAX_BLOCKS)
            return False
        for leaf in leaves:
            if leaf not in blocks:
                blocks[leaf] = await self._block(peer, leaf, namespace)
        return True

    async def _block(self, peer: PeerId, cid: bytes, namespace: str) -> bytes:
        """One block, checked. Raises `_Undelivered`, and holds it against the peer."""
        network = self._link.network
        if network is None:
            raise _Undelivered("this node is alone")
        # What is in the default namespace, every member may have.
        known = self._namespaces.of(namespace) if namespace else None
        proof = block_proof(known.secret, cid, self._link.peer) if known else b""
        try:
            block = await network.fetch_block(peer, cid, proof)
        except TransportError as error:
            if peer in network.connected():
                self._late(peer, str(error))
            raise _Undelivered(str(error)) from error
        except RemoteProtocolError as error:
            self._conduct.offended(peer, "nonsense", self._link.clock())
            raise _Undelivered(str(error)) from error
        if block is None:
            self._conduct.offended(peer, "undelivered", self._link.clock())
            raise _Undelivered("it has the block no more, or does not give it")
        if len(block) > BLOCK_SIZE or not verify(cid, block):
            self._conduct.offended(peer, "wrong bytes", self._link.clock())
            raise _Undelivered("it sent other bytes than the CID names")
        return block

    def _late(self, peer: PeerId, why: str) -> None:
        logger.info("peer %s: %s", peer, why)
        self._conduct.offended(peer, "undelivered", self._link.clock(), weight=LATE)

    def _remember(self, peer: PeerId, cid: bytes) -> None:
        if len(self._failed) >= MAX_FAILURES:
            del self._failed[next(iter(self._failed))]
        self._failed[peer, cid] = self._link.clock() + REMEMBERED
