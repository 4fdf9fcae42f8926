"""Finds a stored answer among the members: who claims it, whom of them to believe, who has it.

A lookup reads this node's own index: a miss costs nothing and asks nobody. Only in a large mesh,
where claims are at the homes of their keys, two homes are asked, for a short time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import trio

from ..cache.answer_rows import StoredAnswer
from ..cache.answers import AnswerCache
from ..cache.claim_index import ClaimIndex
from ..cache.claim_rows import Claim
from ..cache.conduct import Conduct
from ..cache.homes import homes
from ..cache.keys import mesh_key
from ..cache.namespaces import Namespaces
from ..cache.record_bounds import RecordError
from ..cache.records import kind_for
from ..cache.trust import Alternative, Trust
from ..mesh.frames import RemoteProtocolError
from ..mesh.transport import PeerId, TransportError
from ..providers.base import ModelRequest
from .claim_network import Link
from .fetching import Fetching
from .hearing import Hearing

logger = logging.getLogger(__name__)

#: Seconds that a lookup may take before the answer is computed instead.
FETCH_TIME = 3.0
#: Different answers that are tried.
MAX_ALTERNATIVES = 3
#: Seconds for the homes of a key, and homes that are asked at once.
HOME_TIME, HOMES_AT_ONCE = 0.3, 2
#: Lookups that may ask homes at once; of more, each is a miss.
MAX_LOOKUPS = 16
#: Seconds for which a key that no home knows is not asked for again, and such keys.
MISS_TIME, MAX_MISSES = 5.0, 4096
#: Envelopes that a home gives for a key; it may give fewer.
MAX_ENVELOPES = 32


class Claimed(NamedTuple):
    """A claim as this node sees it."""

    claim: Claim
    #: Why it does not count; "": it does.
    doubt: str


class Finding:
    """Stored answers of the other members."""

    def __init__(
        self,
        link: Link,
        *,
        answers: AnswerCache,
        index: ClaimIndex,
        namespaces: Namespaces,
        trust: Trust,
        conduct: Conduct,
        hearing: Hearing,
        fetching: Fetching,
    ) -> None:
        self._link = link
        self._answers = answers
        self._index = index
        self._namespaces = namespaces
        self._trust = trust
        self._conduct = conduct
        self._hearing = hearing
        self._fetching = fetching
        self._lookups = 0
        #: Mesh key -> until when it is known that no home has a claim.
        self._missed: dict[bytes, float] = {}

    # --- what lies here

    def objection(self, key: bytes, request: ModelRequest, stored: StoredAnswer) -> str:
        """Why an answer may not be given that lies here, whoever computed it; "": it may."""

        def claims() -> list[Claim]:
            found = self._claims(key, request.cache.namespace)
            return [claim for claim in found if claim.cid == stored.cid.raw]

        wanted = request.cache.min_agreement
        return self._trust.objection(stored.source, claims, self._link.clock(), wanted=wanted)

    def claimed(self, key: bytes, namespace: str) -> list[Claimed]:
        """What others claim of a key, and whether that counts."""
        now = self._link.clock()
        return [
            Claimed(claim, self._trust.doubt(claim.peer, now))
            for claim in self._claims(key, namespace)
        ]

    def _claims(self, key: bytes, name: str) -> list[Claim]:
        namespace = self._namespaces.of(name)
        if namespace is None:
            return []
        return self._index.lookup(mesh_key(namespace.secret, key), self._link.clock())

    # --- what others have

    async def find(
        self, key: bytes, request: ModelRequest, tell: Callable[[str], None]
    ) -> tuple[StoredAnswer, PeerId] | None:
        """An answer that enough trusted peers claim, fetched and verified, and who gave it.

        `tell` is told why, if there is none.
        """
        namespace = self._namespaces.of(request.cache.namespace)
        if self._link.network is None or namespace is None:
            tell("this node is in no mesh")
            return None
        wanted = mesh_key(namespace.secret, key)
        found = self._alternatives(wanted, request)
        if not found and self._link.by_homes() and await self._ask_homes(wanted, request):
            found = self._alternatives(wanted, request)
        if not found:
            tell(self._why_none(wanted, request))
            return None
        stored = None
        with trio.move_on_after(FETCH_TIME):
            stored = await self._fetch_any(key, request, found)
        if stored is None:
            tell("what peers claim to have could not be fetched")
        return stored

    def _why_none(self, wanted: bytes, request: ModelRequest) -> str:
        """Why no claim that there is counts."""
        now = self._link.clock()
        claims = self._index.lookup(wanted, now)
        if not claims:
            return "no peer claims to have one"
        doubts = {self._trust.doubt(claim.peer, now) for claim in claims if not claim.held}
        if doubts and "" not in doubts:
            return f"what peers claim does not count: {', '.join(sorted(doubts))}"
        if self._trust.alternatives(claims, now, wanted=request.cache.min_agreement):
            return f"what peers have is older than {request.cache.max_age:g} s"
        return "too few peers computed the same (min_agreement)"

    def _alternatives(self, wanted: bytes, request: ModelRequest) -> list[Alternative]:
        now = self._link.clock()
        claims = self._index.lookup(wanted, now)
        if not claims:
            return []
        found = self._trust.alternatives(claims, now, wanted=request.cache.min_agreement)
        if request.cache.max_age is not None:
            found = [a for a in found if a.made_at >= now - request.cache.max_age]
        return found[:MAX_ALTERNATIVES]

    async def _fetch_any(
        self, key: bytes, request: ModelRequest, found: list[Alternative]
    ) -> tuple[StoredAnswer, PeerId] | None:
        for alternative in found:
            try:
                stored = await self._fetch(key, request, alternative)
            except RecordError as error:
                # The bytes are right, so it is who claimed them as an answer that is wrong.
                logger.info("an answer of %s is none: %s", ", ".join(alternative.producers), error)
                for peer in alternative.producers:
                    self._conduct.offended(peer, "wrong bytes", self._link.clock())
            else:
                if stored is not None:
                    return stored
        return None

    async def _fetch(
        self, key: bytes, request: ModelRequest, alternative: Alternative
    ) -> tuple[StoredAnswer, PeerId] | None:
        """Raises `RecordError` if what is claimed is no answer."""
        namespace = request.cache.namespace
        fetched = await self._fetching.fetch(alternative.cid, alternative.sources, namespace)
        if fetched is None:
            return None
        blocks, peer = fetched
        stored = await self._answers.adopt(
            key,
            alternative.cid,
            blocks,
            now=self._link.clock(),
            made_at=alternative.made_at,
            expires_at=alternative.expires_at,
            source=peer if peer in alternative.producers else alternative.producers[0],
            kind=kind_for(request),
            claimed=len(alternative.producers),
            namespace=namespace,
        )
        return stored, peer

    # --- the homes of a key

    async def _ask_homes(self, wanted: bytes, request: ModelRequest) -> bool:
        """Ask the homes of a key for claims. Did that bring an answer that may be used?"""
        now = self._link.clock()
        network = self._link.network
        if network is None or self._lookups >= MAX_LOOKUPS or self._missed.get(wanted, 0.0) > now:
            return False
        members = [peer for peer in network.member_ids() if peer != self._link.peer]
        to_ask = list(homes(wanted, members))
        found = False

        async def ask(scope: trio.CancelScope) -> None:
            nonlocal found
            while to_ask:
                if await self._ask_home(to_ask.pop(0), wanted, request):
                    found = True
                    scope.cancel()

        self._lookups += 1
        try:
            with trio.move_on_after(HOME_TIME) as limit:
                async with trio.open_nursery() as nursery:
                    for _ in range(HOMES_AT_ONCE):
                        nursery.start_soon(ask, limit)
        finally:
            self._lookups -= 1
        if not found:
            self._remember_miss(wanted)
        return found

    async def _ask_home(self, home: PeerId, wanted: bytes, request: ModelRequest) -> bool:
        network = self._link.network
        if network is None or self._conduct.silence(home, self._link.clock()) is not None:
            return False
        try:
            envelopes = await network.find_claims(home, [wanted])
        except TransportError as error:
            logger.debug("home %s did not say what it knows: %s", home, error)
            return False
        except RemoteProtocolError as error:
            logger.debug("home %s broke the protocol: %s", home, error)
            self._conduct.offended(home, "nonsense", self._link.clock())
            return False
        sound = all(self._hearing.take(home, envelope) for envelope in envelopes[:MAX_ENVELOPES])
        return sound and bool(envelopes) and bool(self._alternatives(wanted, request))

    def _remember_miss(self, wanted: bytes) -> None:
        if len(self._missed) >= MAX_MISSES:
            del self._missed[next(iter(self._missed))]
        self._missed[wanted] = self._link.clock() + MISS_TIME
