"""Answers shared with the mesh: its parts joined, and what peers may ask of them.

A claim is a signed statement of a peer that it computed an answer, or holds a copy. `claiming` has
what this node says, which `telling` gossips or, in a mesh of more than 64 members, `placing` puts
at the homes of its keys. `hearing` takes what others say, `finding` looks it up, and `fetching`
gets the bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from random import Random

import trio

from ..cache.answer_rows import StoredAnswer
from ..cache.answers import AnswerCache
from ..cache.blocks import BlockStore
from ..cache.claim_index import ClaimIndex
from ..cache.claims import ClaimLog
from ..cache.conduct import Conduct
from ..cache.namespaces import Namespaces
from ..cache.trust import Trust
from ..mesh.transport import PeerId
from ..providers.base import ModelRequest
from .claim_network import ClaimNetwork, Link, Versions
from .claiming import Claiming
from .fetching import Fetching
from .finding import MAX_ENVELOPES, Finding
from .hearing import Hearing
from .permissions import Permissions
from .placing import Placing
from .telling import Telling


class Sharing:
    """The node's side of the shared cache. Without a network it finds and tells nothing."""

    def __init__(
        self,
        *,
        answers: AnswerCache,
        blocks: BlockStore,
        log: ClaimLog,
        index: ClaimIndex,
        conduct: Conduct,
        trust: Trust,
        namespaces: Namespaces,
        permissions: Permissions,
        peer: PeerId,
        rng: Random,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`peer` is this node; `conduct` is that of `index` and `trust`."""
        self._blocks = blocks
        self._index = index
        self._namespaces = namespaces
        self._permissions = permissions
        self._link = link = Link(peer, clock=clock)
        self._claiming = Claiming(link, log=log, index=index, namespaces=namespaces)
        self._telling = Telling(link, self._claiming)
        self._placing = Placing(link, self._claiming)
        self._hearing = Hearing(link, index=index, conduct=conduct, rng=rng)
        self._finding = Finding(
            link,
            answers=answers,
            index=index,
            namespaces=namespaces,
            trust=trust,
            conduct=conduct,
            hearing=self._hearing,
            fetching=Fetching(link, namespaces=namespaces, conduct=conduct, rng=rng),
        )
        # What the network and those who serve it call.
        self.hear = self._hearing.hear
        self.meet = self._hearing.meet
        self.claim_for = self._claiming.claim_for
        # What answers requests, and shows what is known.
        self.announce = self._claiming.announce
        self.objection = self._finding.objection
        self.claimed = self._finding.claimed

    # --- the network, which may come and go

    def attach(self, network: ClaimNetwork, swarm_key: bytes) -> None:
        """Share with the mesh of that key from now on."""
        self._link.network = network
        self._namespaces.enter(swarm_key)

    def detach(self) -> None:
        """Share with nobody."""
        self._link.network = None

    async def run(self) -> None:
        """Tell what is announced, and repair what gossip lost, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hearing.repair)
            while True:
                await self._tell_everybody()
                await self._tell_homes()

    async def _tell_everybody(self) -> None:
        while not self._link.by_homes():
            await self._claiming.wait()
            await self._telling.tell()

    async def _tell_homes(self) -> None:
        self._placing.begin()
        while self._link.by_homes():
            await self._placing.place()
        self._claiming.say_again()

    # --- what requests ask

    async def find(
        self,
        key: bytes,
        request: ModelRequest,
        tell: Callable[[str], None] = lambda why: None,
    ) -> tuple[StoredAnswer, PeerId] | None:
        """A stored answer of a peer, fetched and verified, and who gave it; None if there is none.

        This node holds it then, and says so while few do. `tell` is told why there is none.
        """
        found = await self._finding.find(key, request, tell)
        if found is not None:
            self._claiming.announce(key, request, found[0])
        return found

    def take_claim(self, peer: PeerId, envelope: bytes, cid: str) -> None:
        """Take the claim that came with an answer."""
        self._hearing.take(peer, envelope)

    # --- what peers ask

    def since(self, known: Versions) -> Sequence[bytes]:
        """A page of the envelopes that who knows only those lacks."""
        return self._index.since(known, now=self._link.clock())

    def put_claims(self, envelopes: Sequence[bytes], peer: PeerId) -> None:
        """Take the claims of a peer of which this node is a home."""
        self._hearing.take_told(peer, envelopes)

    def find_claims(self, keys: Sequence[bytes]) -> list[bytes]:
        """The envelopes that claim these keys."""
        now = self._link.clock()
        found = [
            envelope for key in keys for envelope in self._index.envelopes(key, MAX_ENVELOPES, now)
        ]
        return list(dict.fromkeys(found))

    async def block(self, cid: bytes, peer: PeerId, proof: bytes = b"") -> bytes | None:
        """A block for a peer, if it is here and the peer may have it."""
        if not await self._permissions.may_serve(peer, cid, proof):
            return None
        return await self._blocks.get(cid)
