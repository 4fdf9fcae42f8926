"""What the tests of sharing have in common: members of a mesh, and the mesh as each sees it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Literal

import trio

from promptmesh.cache.answers import AnswerCache
from promptmesh.cache.blocks import SqliteBlocks
from promptmesh.cache.cid import cid_bytes
from promptmesh.cache.claim_index import ClaimIndex
from promptmesh.cache.claim_rows import Claim
from promptmesh.cache.claims import ClaimLog, Entry, unseal
from promptmesh.cache.conduct import Conduct
from promptmesh.cache.database import Database
from promptmesh.cache.keys import mesh_key, namespace_secret, request_key
from promptmesh.cache.namespaces import Namespaces
from promptmesh.cache.trust import Trust
from promptmesh.mesh.frames import Known
from promptmesh.mesh.identity import Identity, verify
from promptmesh.mesh.transport import TransportError
from promptmesh.node.permissions import Permissions
from promptmesh.node.sharing import Sharing
from promptmesh.providers.base import (
    CacheControl,
    Completion,
    GenerateRequest,
    Message,
    Text,
)

SWARM = b"s" * 32
START = time.time()


def now() -> float:
    """The wall clock, which goes with that of the test."""
    return START + trio.current_time()


def asking(prompt: str = "hi", **cache: object) -> GenerateRequest:
    """A request with these fields of its cache control."""
    return GenerateRequest(
        model="m",
        messages=(Message(role="user", content=(Text(text=prompt),)),),
        cache=CacheControl(**cache),  # type: ignore[arg-type]
    )


class Member:
    """A node's cache and sharing, and what its peers may ask of it."""

    def __init__(
        self,
        name: str,
        trusted: Sequence[str] = ("all",),
        *,
        seed: int = 1,
    ) -> None:
        #: Seconds by which its clock is ahead.
        self.ahead = 0.0
        # As the transport of that name in a `MemoryNetwork`.
        self.identity = Identity(hashlib.sha256(name.encode()).digest())
        self.peer = self.identity.peer_id
        self.database = Database(None)
        self.blocks = SqliteBlocks(self.database)
        self.answers = AnswerCache(self.database, self.blocks, peer=self.peer)
        self.checked = 0
        self._sealed = 0
        self._trusted = trusted
        self._seed = seed
        self.start()

    def start(self) -> None:
        """Begin with what is in its file, as its process does."""
        namespaces = Namespaces()
        self.conduct = Conduct(self.database)
        self.log = ClaimLog(self.database, peer=self.peer, sign=self.identity.sign)
        self.index = ClaimIndex(
            self.database, peer=self.peer, verify=self._verify, conduct=self.conduct
        )
        self.sharing = Sharing(
            answers=self.answers,
            blocks=self.blocks,
            log=self.log,
            index=self.index,
            conduct=self.conduct,
            trust=Trust(self.conduct, own=self.peer, trusted=self._trusted),
            namespaces=namespaces,
            permissions=Permissions(answers=self.answers, namespaces=namespaces),
            peer=self.peer,
            rng=Random(self._seed),
            clock=lambda: now() + self.ahead,
        )

    async def make(self, request: GenerateRequest, text: str, **how: bool) -> str:
        """Store an answer of this node's own, and announce it. Gives its CID."""
        stored = await self.answers.store(
            request_key(request),
            Completion(text=text, finish_reason="stop"),
            model="m",
            now=now() + self.ahead,
            namespace=request.cache.namespace,
            **how,  # type: ignore[arg-type]
        )
        assert stored is not None
        self.sharing.announce(request_key(request), request, stored)
        return stored.cid_text

    # --- what it says, without its telling it

    def seal(self, claims: int) -> bytes:
        """A signed batch of that many claims of what nobody asked."""
        self._sealed += 1
        entries = [
            Entry(
                (self._sealed * 1000 + number).to_bytes(32, "big"),
                cid_bytes(b"x"),
                1,
                int(now()),
                int(now()) + 86400,
                False,
            )
            for number in range(claims)
        ]
        envelope = self.log.seal(entries, namespace=bytes(8), now=now())
        assert envelope is not None
        return envelope

    def own_batches(self) -> list[bytes]:
        """What it signed so far."""
        return [e for e in self.sharing.since({}) if unseal(e).peer == self.peer]

    def claims(self, request: GenerateRequest) -> list[Claim]:
        """What its index says of a request."""
        return self.index.lookup(mesh_key(namespace_secret(SWARM), request_key(request)), now())

    def _verify(self, peer: str, data: bytes, signature: bytes) -> bool:
        self.checked += 1
        return verify(peer, data, signature)


#: What a source does instead: bytes that it gives, an error, or that it never answers.
Fault = bytes | None | Exception | Literal["never"]


class Network:
    """The mesh as one member sees it."""

    def __init__(self, own: Member, members: Mapping[str, Member]) -> None:
        """`members` are all of the mesh, by peer; they may come and go."""
        self._own = own
        self._members = members
        self.lossy = False
        self.faults: dict[str, Fault] = {}
        #: Members that it cannot reach.
        self.gone: set[str] = set()
        #: Whom it asked for a block, and for claims as a home; what it put at homes; its gossip.
        self.asked: list[str] = []
        self.asked_homes: list[str] = []
        self.put: list[tuple[str, bytes]] = []
        self.gossiped: list[bytes] = []

    @property
    def _others(self) -> dict[str, Member]:
        return {peer: member for peer, member in self._members.items() if member is not self._own}

    def _at(self, peer: str) -> Member:
        if peer in self.gone or peer not in self._members:
            raise TransportError("it cannot be reached")
        return self._members[peer]

    def members(self) -> int:
        return len(self._members)

    def member_ids(self) -> Sequence[str]:
        return list(self._members)

    def connected(self) -> Sequence[str]:
        return [peer for peer in self._others if peer not in self.gone]

    async def find_claims(self, peer: str, keys: Sequence[bytes]) -> Sequence[bytes]:
        self.asked_homes.append(peer)
        await trio.sleep(0.02)
        if self.faults.get(peer) == "never":
            await trio.sleep_forever()
        return self._at(peer).sharing.find_claims(keys)

    async def put_claims(self, peer: str, envelopes: Sequence[bytes]) -> None:
        await trio.sleep(0.02)
        self._at(peer).sharing.put_claims(envelopes, self._own.peer)
        self.put += [(peer, envelope) for envelope in envelopes]

    async def fetch_block(self, peer: str, cid: bytes, proof: bytes) -> bytes | None:
        self.asked.append(peer)
        await trio.lowlevel.checkpoint()
        if peer in self.faults:
            fault = self.faults[peer]
            if fault == "never":
                await trio.sleep_forever()
            if isinstance(fault, Exception):
                raise fault
            assert not isinstance(fault, str)
            return fault
        return await self._at(peer).sharing.block(cid, self._own.peer, proof)

    async def ask_claims(self, peer: str, known: Mapping[str, Known]) -> Sequence[bytes]:
        await trio.lowlevel.checkpoint()
        return self._at(peer).sharing.since(known)

    async def announce_claims(self, message: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.gossiped.append(message)
        if not self.lossy:
            for member in self._others.values():
                heard = member.sharing.hear(self._own.peer, message)
                assert heard is (member.conduct.silence(self._own.peer, now()) is None)


@asynccontextmanager
async def mesh(
    *names: str, trusted: Sequence[str] = ("all",)
) -> AsyncIterator[list[tuple[Member, Network]]]:
    """Members that hear each other, while they run."""
    members = [Member(name, trusted) for name in names]
    by_peer = {member.peer: member for member in members}
    networks = [Network(member, by_peer) for member in members]
    async with trio.open_nursery() as nursery:
        for member, network in zip(members, networks, strict=True):
            member.sharing.attach(network, SWARM)
            nursery.start_soon(member.sharing.run)
        yield list(zip(members, networks, strict=True))
        nursery.cancel_scope.cancel()
    for member in members:
        member.database.close()


async def find(member: Member, request: GenerateRequest) -> tuple[str, str] | None:
    """The text and the peer that delivered it."""
    found = await member.sharing.find(request_key(request), request)
    return None if found is None else (found[0].completion.text, found[1])
