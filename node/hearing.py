"""Takes what others claim: told by gossip or to a home, brought with an answer, or asked for.

Whoever lost its say is not even read. What is wrong counts against who brought it, and a lie
against who signed it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from random import Random
from typing import Annotated

import msgspec
import trio

from ..cache.claim_index import ClaimIndex
from ..cache.claim_rows import Ingested
from ..cache.conduct import Conduct
from ..mesh.frames import RemoteProtocolError
from ..mesh.transport import PeerId, TransportError
from .claim_network import Link

logger = logging.getLogger(__name__)

#: Envelopes of one gossiped message: with one claim each, more do not fit.
MAX_ENVELOPES = 256
#: Seconds between two questions to a neighbour for what gossip lost.
REPAIR_PERIOD = 60.0
#: Pages asked of one neighbour in a row.
MAX_PAGES = 100

_Envelopes = Annotated[list[bytes], msgspec.Meta(max_length=MAX_ENVELOPES)]


class Hearing:
    """What others say, on its way into the index."""

    def __init__(self, link: Link, *, index: ClaimIndex, conduct: Conduct, rng: Random) -> None:
        self._link = link
        self._index = index
        self._conduct = conduct
        self._rng = rng
        self._warned = False

    # --- told unasked

    def hear(self, peer: PeerId, message: bytes) -> bool:
        """Take a message that a peer gossiped. May it be passed on?"""
        now = self._link.clock()
        if self._conduct.silence(peer, now) is not None:
            return False
        try:
            envelopes = msgspec.msgpack.decode(message, type=_Envelopes)
        except (msgspec.DecodeError, RecursionError) as error:
            logger.debug("peer %s gossiped claims that are none: %s", peer, error)
            self._conduct.offended(peer, "nonsense", now)
            return False
        return self.take_told(peer, envelopes)

    def take_told(self, peer: PeerId, envelopes: Iterable[bytes]) -> bool:
        """Take envelopes that a peer told unasked. Are those sound that were looked at?"""
        for envelope in envelopes:
            if self._conduct.silence(peer, self._link.clock()) is not None:
                return False
            if not self._take(peer, envelope, told_by=peer):
                return False
        return True

    # --- asked for

    def take(self, peer: PeerId, envelope: bytes) -> bool:
        """Take an envelope that a peer was asked for, or that came with its answer. Is it sound?"""
        return self._take(peer, envelope)

    async def meet(self, peer: PeerId) -> None:
        """Learn from a peer the claims that this node lacks. Raises `TransportError`."""
        if self._link.by_homes():
            return  # nobody has all claims, and nobody needs them
        network = self._link.network
        for _ in range(MAX_PAGES):
            now = self._link.clock()
            if network is None or self._conduct.silence(peer, now) is not None:
                return
            before = self._index.versions(now)
            page = await network.ask_claims(peer, before)
            if not await self._take_page(peer, page) or self._index.versions(now) == before:
                return

    async def _take_page(self, peer: PeerId, page: Iterable[bytes]) -> bool:
        """Is there something in it, and all of it sound?"""
        some = False
        for envelope in page:
            some = True
            if not self._take(peer, envelope):
                return False
            await trio.lowlevel.checkpoint()  # a full batch takes 3 ms
        return some

    async def repair(self) -> None:
        """Ask a neighbour now and then for what gossip lost, until cancelled."""
        while True:
            await trio.sleep(REPAIR_PERIOD * self._rng.uniform(0.8, 1.2))
            await self._index.expire(self._link.clock())
            network = self._link.network
            peers = network.connected() if network is not None else ()
            if peers:
                try:
                    await self.meet(self._rng.choice(list(peers)))
                except (TransportError, RemoteProtocolError) as error:
                    logger.debug("claims were not repaired: %s", error)

    # --- both

    def _take(self, peer: PeerId, envelope: bytes, *, told_by: PeerId = "") -> bool:
        now = self._link.clock()
        taken: Ingested = self._index.ingest(envelope, now, told_by=told_by)
        if taken.status in ("full", "fast", "silenced"):
            logger.debug("claims of %s are not kept: %s", taken.peer, taken.reason)
        if taken.status == "early" and not self._warned:
            self._warned = True
            logger.warning(
                "claims of %s are of the future, and not used: its clock is wrong, or this one's",
                taken.peer,
            )
        if taken.status == "equivocation":
            self._conduct.offended(taken.peer, "equivocation", now, evidence=taken.evidence)
            self._index.forget(taken.peer)
            return not told_by  # who brought both is not to blame
        if taken.status == "refused":
            logger.debug("claims of %s by way of %s: %s", taken.peer, peer, taken.reason)
            self._conduct.offended(peer, "nonsense", now)
            return False
        return not (told_by and taken.status in ("silenced", "fast"))
