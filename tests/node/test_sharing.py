"""Claims go out, others' claims are found, their blocks fetched and verified."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from random import Random

import pytest
import trio
import trio.testing

from promptmesh.cache.answers import AnswerCache
from promptmesh.cache.blocks import SqliteBlocks
from promptmesh.cache.cid import cid_bytes, parse_cid
from promptmesh.cache.claim_index import ClaimIndex
from promptmesh.cache.claims import ClaimLog
from promptmesh.cache.database import Database
from promptmesh.cache.keys import request_key
from promptmesh.cache.namespaces import Namespaces
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


def asking(prompt: str = "hi", **cache: object) -> GenerateRequest:
    return GenerateRequest(
        model="m",
        messages=(Message(role="user", content=(Text(text=prompt),)),),
        cache=CacheControl(**cache),  # type: ignore[arg-type]
    )


class Member:
    """A node's cache and sharing, and what its peers may ask of it."""

    def __init__(self, name: str) -> None:
        self.identity = Identity(name.encode().ljust(32, b"."))
        self.peer = self.identity.peer_id
        self.database = Database(None)
        self.blocks = SqliteBlocks(self.database)
        self.answers = AnswerCache(self.database, self.blocks, peer=self.peer)
        namespaces = Namespaces()
        self.sharing = Sharing(
            answers=self.answers,
            blocks=self.blocks,
            log=ClaimLog(self.database, peer=self.peer, sign=self.identity.sign),
            index=ClaimIndex(self.database, peer=self.peer, verify=verify),
            namespaces=namespaces,
            permissions=Permissions(answers=self.answers, namespaces=namespaces),
            peer=self.peer,
            rng=Random(1),
        )

    async def make(self, request: GenerateRequest, text: str, **how: bool) -> str:
        """Store an answer of this node's own, and announce it. Gives its CID."""
        stored = await self.answers.store(
            request_key(request),
            Completion(text=text, finish_reason="stop"),
            model="m",
            now=time.time(),
            namespace=request.cache.namespace,
            **how,  # type: ignore[arg-type]
        )
        assert stored is not None
        self.sharing.announce(request_key(request), request, stored)
        return stored.cid_text


class Network:
    """The mesh as one member sees it."""

    def __init__(self, own: Member, others: Sequence[Member]) -> None:
        self._own = own
        self._others = {member.peer: member for member in others}
        self.lossy = False
        self.lies: dict[bytes, bytes] = {}
        self.asked: list[str] = []

    def members(self) -> int:
        return len(self._others) + 1

    def connected(self) -> Sequence[str]:
        return list(self._others)

    async def fetch_block(self, peer: str, cid: bytes, proof: bytes) -> bytes | None:
        self.asked.append(peer)
        await trio.lowlevel.checkpoint()
        if cid in self.lies:
            return self.lies[cid]
        return await self._others[peer].sharing.block(cid, self._own.peer, proof)

    async def ask_claims(self, peer: str, known: Mapping[str, Known]) -> Sequence[bytes]:
        await trio.lowlevel.checkpoint()
        if peer not in self._others:
            raise TransportError("not connected")
        return self._others[peer].sharing.since(known)

    async def announce_claims(self, message: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if not self.lossy:
            for member in self._others.values():
                assert member.sharing.hear(self._own.peer, message)


@asynccontextmanager
async def mesh(*names: str) -> AsyncIterator[list[tuple[Member, Network]]]:
    members = [Member(name) for name in names]
    networks = [Network(m, [o for o in members if o is not m]) for m in members]
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


async def test_an_answer_is_found_by_the_others(autojump_clock: trio.testing.MockClock) -> None:
    async with mesh("a", "b", "c") as ((a, _), (b, _), (c, _)):
        assert await find(b, asking()) is None
        cid = await a.make(asking(), "hello")
        await trio.sleep(2)
        assert await find(b, asking()) == ("hello", a.peer)
        assert await find(c, asking()) == ("hello", a.peer)
        # It is b's own now: no claim is needed to find it again.
        stored = await b.answers.lookup(request_key(asking()), now=time.time())
        assert stored is not None
        assert stored.cid_text == cid
        assert await find(c, asking("other")) is None


async def test_two_questions_with_one_answer(autojump_clock: trio.testing.MockClock) -> None:
    async with mesh("a", "b") as ((a, _), (b, _)):
        assert await a.make(asking("1 + 1"), "2") == await a.make(asking("one and one"), "2")
        await trio.sleep(2)
        assert await find(b, asking("1 + 1")) == ("2", a.peer)
        assert await find(b, asking("one and one")) == ("2", a.peer)


async def test_a_long_answer_comes_with_its_leaves(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mesh("a", "b") as ((a, _), (b, network)):
        await a.make(asking(), "x" * 200_000)
        await trio.sleep(2)
        found = await find(b, asking())
        assert found == ("x" * 200_000, a.peer)
        assert len(network.asked) > 2


async def test_namespaces_do_not_mix(autojump_clock: trio.testing.MockClock) -> None:
    async with mesh("a", "b") as ((a, _), (b, _)):
        cid = parse_cid(await a.make(asking(namespace="x"), "hello" * 20_000))
        await trio.sleep(2)
        assert await find(b, asking()) is None
        # Who knows only the CID gets nothing, also from who got it later.
        assert await a.sharing.block(cid, b.peer) is None
        assert await find(b, asking(namespace="x")) == ("hello" * 20_000, a.peer)
        assert await b.sharing.block(cid, a.peer) is None


async def test_other_bytes_than_the_cid_names_are_a_miss(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mesh("a", "b") as ((a, _), (b, network)):
        await a.make(asking(), "true")
        stored = await a.answers.lookup(request_key(asking()), now=time.time())
        assert stored is not None
        await trio.sleep(2)
        network.lies[stored.cid.raw] = b"other bytes"
        assert await find(b, asking()) is None
        assert await b.answers.lookup(request_key(asking()), now=time.time()) is None


async def test_what_may_not_leave_is_not_given_to_who_knows_its_cid(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mesh("a", "b") as ((a, _), (b, _)):
        stored = await a.answers.store(
            request_key(asking()),
            Completion(text="secret", finish_reason="stop"),
            model="m",
            now=time.time(),
            shared=False,
        )
        assert stored is not None
        assert await a.sharing.block(stored.cid.raw, b.peer) is None
        assert await a.sharing.block(cid_bytes(b"nothing", "raw"), b.peer) is None


async def test_what_gossip_loses_is_learnt_by_asking(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mesh("a", "b") as ((a, lossy), (b, _)):
        lossy.lossy = True
        for number in range(150):  # more than a page, as each is a batch of its own
            cid = await a.make(asking(str(number)), f"answer {number}")
            assert a.sharing.claim_for(cid)
        assert await find(b, asking("7")) is None
        await b.sharing.meet(a.peer)
        for number in range(150):
            assert await find(b, asking(str(number))) == (f"answer {number}", a.peer)


async def test_what_gossip_loses_is_repaired_within_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mesh("a", "b") as ((a, lossy), (b, _)):
        lossy.lossy = True
        await a.make(asking(), "hello")
        await trio.sleep(5)
        assert await find(b, asking()) is None
        await trio.sleep(75)
        assert await find(b, asking()) == ("hello", a.peer)


async def test_the_claim_that_comes_with_an_answer_counts_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mesh("a", "b") as ((a, lossy), (b, _)):
        lossy.lossy = True
        await a.make(asking(), "hello")
        stored = await a.answers.lookup(request_key(asking()), now=time.time())
        assert stored is not None
        claim = a.sharing.claim_for(stored.cid_text)
        assert claim is not None
        b.sharing.take_claim(a.peer, claim, stored.cid_text)
        assert await find(b, asking()) == ("hello", a.peer)
        # It was taken out of what is still to be told.
        assert a.sharing.claim_for(stored.cid_text) is None


@pytest.mark.parametrize("message", [b"", b"\xc1", b"\x91\xa1x", b"\x91\xc4\x01x"])
async def test_nonsense_is_not_passed_on(message: bytes) -> None:
    member = Member("a")
    assert member.sharing.hear("12D3-x", message) is False
    member.database.close()


async def test_alone_it_finds_and_tells_nothing() -> None:
    member = Member("a")
    await member.make(asking(), "hello")
    assert await find(member, asking("x")) is None
    await member.sharing.meet("12D3-x")
    member.database.close()
