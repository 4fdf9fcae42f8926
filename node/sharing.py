"""Answers shared with the mesh: claims go out, others' claims are found and their blocks fetched.

A claim is a signed statement of who computed an answer that it has it. Claims are gossiped inside
the mesh's budget of messages, so several travel in one; what gossip loses is repaired by asking a
neighbour. A lookup reads this node's own index: a miss costs nothing and asks nobody.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from random import Random
from typing import Protocol

import msgspec
import trio

from ..cache.answer_rows import StoredAnswer
from ..cache.answers import AnswerCache
from ..cache.blocks import BlockStore
from ..cache.cid import verify
from ..cache.claim_index import ClaimIndex
from ..cache.claim_rows import Claim, Ingested
from ..cache.claims import MAX_ENTRIES, ClaimLog, Entry
from ..cache.keys import block_proof, mesh_key
from ..cache.namespaces import Namespaces
from ..cache.record_bounds import RecordError
from ..cache.records import links
from ..mesh.frames import Known, RemoteProtocolError
from ..mesh.transport import PeerId, TransportError
from ..providers.base import GenerateRequest
from .permissions import Permissions

logger = logging.getLogger(__name__)

#: Nodes whose claims make one gossip message a second (adverts have the same share of the budget).
NODES_A_SECOND = 2.5
#: Seconds between two messages of this node at least, and the bytes of one.
SHORTEST_PAUSE = 0.5
MAX_MESSAGE = 48 * 1024
#: Seconds between two questions to a neighbour for what gossip lost.
REPAIR_PERIOD = 60.0
#: Pages asked of one neighbour in a row.
MAX_PAGES = 100
#: Seconds that a lookup may take before the answer is computed instead.
FETCH_TIME = 3.0
#: Different answers, and claimants of each, that are tried.
MAX_ALTERNATIVES, MAX_CLAIMANTS = 3, 3

#: Which batches are known: peer -> (epoch, ranges of numbers).
Versions = Mapping[PeerId, Known]


class ClaimNetwork(Protocol):
    """What sharing needs of the mesh (`mesh.network.Network`)."""

    def members(self) -> int: ...

    def connected(self) -> Sequence[PeerId]: ...

    async def fetch_block(self, peer: PeerId, cid: bytes, proof: bytes) -> bytes | None: ...

    async def ask_claims(self, peer: PeerId, known: Versions) -> Sequence[bytes]: ...

    async def announce_claims(self, message: bytes) -> None: ...


class Sharing:
    """The node's side of the shared cache. Without a network it finds and tells nothing."""

    def __init__(
        self,
        *,
        answers: AnswerCache,
        blocks: BlockStore,
        log: ClaimLog,
        index: ClaimIndex,
        namespaces: Namespaces,
        permissions: Permissions,
        peer: PeerId,
        rng: Random,
    ) -> None:
        """`peer` is this node."""
        self._answers = answers
        self._blocks = blocks
        self._log = log
        self._index = index
        self._namespaces = namespaces
        self._permissions = permissions
        self._peer = peer
        self._rng = rng
        self._network: ClaimNetwork | None = None
        #: Claims to be signed, by namespace tag and CID: several questions may have one answer.
        self._unsigned: dict[bytes, dict[str, list[Entry]]] = {}
        #: Envelopes that are signed and not yet gossiped.
        self._unsent: list[bytes] = []
        self._ready = trio.Event()

    # --- the network, which may come and go

    def attach(self, network: ClaimNetwork, swarm_key: bytes) -> None:
        """Share with the mesh of that key from now on."""
        self._network = network
        self._namespaces.enter(swarm_key)

    def detach(self) -> None:
        """Share with nobody."""
        self._network = None

    # --- telling

    def announce(self, key: bytes, request: GenerateRequest, stored: StoredAnswer) -> None:
        """Tell the others that this node has the answer to that key."""
        namespace = self._namespaces.of(request.cache.namespace)
        if namespace is None or stored.stored_at is None or stored.expires_at is None:
            return
        made, ends = int(stored.stored_at), int(stored.expires_at)
        entry = Entry(mesh_key(namespace.secret, key), stored.cid.raw, stored.size, made, ends)
        self._unsigned.setdefault(namespace.tag, {}).setdefault(stored.cid_text, []).append(entry)
        self._ready.set()

    def claim_for(self, cid: str) -> bytes | None:
        """The signed claim of an answer that was just announced, for the peer that asked for it."""
        for tag, entries in self._unsigned.items():
            if cid in entries:
                return self._sign(tag, entries.pop(cid)[:MAX_ENTRIES])
        return None

    def _sign(self, tag: bytes, entries: Sequence[Entry]) -> bytes | None:
        envelope = self._log.seal(entries, namespace=tag, now=time.time())
        if envelope is not None:
            self._unsent.append(envelope)
            self._ready.set()
        return envelope

    async def run(self) -> None:
        """Gossip what is announced, and repair what gossip lost, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._repair_again_and_again)
            while True:
                await self._ready.wait()
                self._ready = trio.Event()
                await self._publish()
                members = self._network.members() if self._network else 0
                await trio.sleep(max(SHORTEST_PAUSE, members / NODES_A_SECOND))

    async def _publish(self) -> None:
        """Sign what waits, and gossip one message of it."""
        unsigned, self._unsigned = self._unsigned, {}
        for tag, waiting in unsigned.items():
            entries = [entry for same in waiting.values() for entry in same]
            for first in range(0, len(entries), MAX_ENTRIES):
                self._sign(tag, entries[first : first + MAX_ENTRIES])
        message: list[bytes] = []
        size = 0
        while self._unsent and size + len(self._unsent[0]) <= MAX_MESSAGE:
            size += len(self._unsent[0])
            message.append(self._unsent.pop(0))
        if self._unsent:
            self._ready.set()
        else:
            self._ready = trio.Event()
        if message and self._network is not None:
            try:
                await self._network.announce_claims(msgspec.msgpack.encode(message))
            except TransportError as error:
                # The batches are kept: whoever lacks them asks for them.
                logger.debug("claims were not gossiped: %s", error)

    # --- hearing

    def hear(self, peer: PeerId, message: bytes) -> bool:
        """Take a gossiped message. May it be passed on?"""
        try:
            envelopes = msgspec.msgpack.decode(message, type=list[bytes])
        except (msgspec.DecodeError, RecursionError) as error:
            logger.warning("peer %s gossiped claims that are none: %s", peer, error)
            return False
        sound = [self.take(peer, envelope) for envelope in envelopes]
        return all(sound)

    def take(self, peer: PeerId, envelope: bytes) -> bool:
        """Take one envelope that a peer brought. Is it sound?"""
        taken: Ingested = self._index.ingest(envelope, time.time())
        if taken.status == "full":
            logger.info("claims of %s are not kept: %s", taken.peer, taken.reason)
        if taken.status in ("refused", "equivocation"):
            logger.warning("claims of %s by way of %s: %s", taken.peer, peer, taken.reason)
            return False
        return True

    def take_claim(self, peer: PeerId, envelope: bytes, cid: str) -> None:
        """Take the claim that came with an answer."""
        self.take(peer, envelope)

    async def meet(self, peer: PeerId) -> None:
        """Learn from a peer the claims that this node lacks. Raises `TransportError`."""
        if self._network is None:
            return
        for _ in range(MAX_PAGES):
            before = self._index.versions()
            page = await self._network.ask_claims(peer, before)
            sound = True
            for envelope in page:
                sound = self.take(peer, envelope) and sound
                await trio.lowlevel.checkpoint()  # a full batch takes 3 ms
            if not sound or not page or self._index.versions() == before:
                return

    async def _repair_again_and_again(self) -> None:
        while True:
            await trio.sleep(REPAIR_PERIOD * self._rng.uniform(0.8, 1.2))
            await self._index.expire(time.time())
            peers = self._network.connected() if self._network else ()
            if peers:
                try:
                    await self.meet(self._rng.choice(list(peers)))
                except (TransportError, RemoteProtocolError) as error:
                    logger.debug("claims were not repaired: %s", error)

    # --- what peers ask

    def since(self, known: Versions) -> Sequence[bytes]:
        """A page of the envelopes that who knows only those lacks."""
        return self._index.since(known, now=time.time())

    async def block(self, cid: bytes, peer: PeerId, proof: bytes = b"") -> bytes | None:
        """A block for a peer, if it is here and the peer may have it."""
        if not await self._permissions.may_serve(peer, cid, proof):
            return None
        return await self._blocks.get(cid)

    # --- finding

    async def find(self, key: bytes, request: GenerateRequest) -> tuple[StoredAnswer, str] | None:
        """A stored answer of a peer, fetched and verified, and that peer; None if there is none."""
        namespace = self._namespaces.of(request.cache.namespace)
        if self._network is None or namespace is None:
            return None
        now = time.time()
        claims = self._index.lookup(mesh_key(namespace.secret, key), now)
        if not claims:
            return None
        oldest = now - request.cache.max_age if request.cache.max_age is not None else 0.0
        with trio.move_on_after(FETCH_TIME):
            return await self._fetch_any(key, request, [c for c in claims if c.made_at >= oldest])
        return None

    async def _fetch_any(
        self, key: bytes, request: GenerateRequest, claims: Sequence[Claim]
    ) -> tuple[StoredAnswer, str] | None:
        assert self._network is not None
        reachable = set(self._network.connected())
        by_cid: dict[bytes, list[Claim]] = {}
        for claim in claims:
            if claim.peer in reachable:
                by_cid.setdefault(claim.cid, []).append(claim)
        for same in list(by_cid.values())[:MAX_ALTERNATIVES]:
            for claim in same[:MAX_CLAIMANTS]:
                try:
                    stored = await self._fetch(key, request, claim, claimed=len(same))
                except (TransportError, RemoteProtocolError, RecordError) as error:
                    logger.warning(
                        "peer %s did not deliver a claimed answer: %s", claim.peer, error
                    )
                else:
                    return stored, claim.peer
        return None

    async def _fetch(
        self, key: bytes, request: GenerateRequest, claim: Claim, *, claimed: int
    ) -> StoredAnswer:
        """Raises `TransportError`, `RemoteProtocolError`, or `RecordError` for wrong bytes."""
        name = request.cache.namespace
        root = await self._fetch_block(claim.peer, claim.cid, name)
        blocks = {claim.cid: root}
        for leaf in links(root):
            blocks[leaf] = await self._fetch_block(claim.peer, leaf, name)
        return await self._answers.adopt(
            key,
            claim.cid,
            blocks,
            now=time.time(),
            made_at=claim.made_at,
            expires_at=claim.expires_at,
            source=claim.peer,
            claimed=claimed,
            namespace=name,
        )

    async def _fetch_block(self, peer: PeerId, cid: bytes, namespace: str) -> bytes:
        assert self._network is not None
        # What is in the default namespace, every member may have.
        known = self._namespaces.of(namespace) if namespace else None
        proof = block_proof(known.secret, cid, self._peer) if known else b""
        block = await self._network.fetch_block(peer, cid, proof)
        if block is None:
            raise RecordError("it does not hold the block any more, or does not give it")
        if not verify(cid, block):
            raise RecordError("it sent other bytes than the CID names")
        return block
