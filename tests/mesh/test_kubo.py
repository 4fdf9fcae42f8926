"""Real libp2p hosts and the real Kubo, in one private network."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from kubo import Kubo, kubo, needs_kubo

from promptmesh.cache.blocks import MemoryBlocks
from promptmesh.cache.cid import cid_bytes, cid_text, parse_cid
from promptmesh.cache.records import AnswerRecord, encode
from promptmesh.mesh.bitswap import Bitswap
from promptmesh.mesh.host import HostSettings, open_host
from promptmesh.mesh.swarm_key import format_swarm_key
from promptmesh.mesh.transport import PeerId, Transport, TransportError
from promptmesh.providers.base import Completion, Usage

pytestmark = [needs_kubo, pytest.mark.e2e]

SECRET = bytes(range(32))
SWARM_KEY = format_swarm_key(SECRET)


class Node:
    """A host that exchanges the blocks of a store in memory."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.peer_id = transport.peer_id
        self.blocks = MemoryBlocks()
        self.gives = True
        self.bitswap = Bitswap(transport, get=self._get)

    async def _get(self, peer: PeerId, cid: bytes) -> bytes | None:
        return await self.blocks.get(cid) if self.gives else None

    async def put(self, block: bytes) -> str:
        """Keep a raw block; returns its CID."""
        cid = cid_bytes(block, "raw")
        await self.blocks.put(cid, block)
        return cid_text(cid)

    async def fetch(self, cid: str) -> bytes:
        return await self.bitswap.fetch(parse_cid(cid), timeout=60)


@asynccontextmanager
async def node(name: str = "a", psk: bytes | None = SECRET) -> AsyncIterator[Node]:
    settings = HostSettings(
        seed=name.encode().ljust(32, b"."), listen=("/ip4/127.0.0.1/tcp/0",), psk=psk
    )
    async with open_host(settings) as transport, trio.open_nursery() as nursery:
        made = Node(transport)
        await nursery.start(made.bitswap.run)
        yield made
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def connected(folder: Path) -> AsyncIterator[tuple[Node, Kubo]]:
    """A node, and a Kubo that dialled it."""
    async with kubo(folder, swarm_key=SWARM_KEY) as peer, node() as made:
        assert await peer.connect(made.transport.addresses[0])
        yield made, peer


def answer(words: int) -> AnswerRecord:
    text = " ".join(f"word{i}" for i in range(words))
    usage = Usage(prompt_tokens=1, completion_tokens=words)
    return AnswerRecord(
        model="m", completion=Completion(text=text, finish_reason="stop", usage=usage)
    )


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process is about to do."""
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - another process has no events
            await trio.sleep(0.01)


@pytest.mark.parametrize("size", [0, 500, 2_000, 100_000, 500_000, 2 * 1024 * 1024], ids=str)
async def test_kubo_reads_a_block(tmp_path: Path, size: int) -> None:
    async with connected(tmp_path) as (here, peer):
        block = os.urandom(size)
        assert await peer.read(await here.put(block)) == block


@pytest.mark.parametrize("words", [10, 100_000], ids=["one block", "with leaves"])
async def test_kubo_pins_an_answer_and_passes_it_on(tmp_path: Path, words: int) -> None:
    blocks = encode(answer(words))
    assert (len(blocks.blocks) > 1) == (words > 10)
    async with kubo(tmp_path, swarm_key=SWARM_KEY) as peer:
        async with node() as here:
            for cid, block in blocks.blocks:
                await here.blocks.put(cid, block)
            assert await peer.connect(here.transport.addresses[0])
            assert await peer.pin(cid_text(blocks.cid))
        # That node is gone: root and leaves are at the Kubo, raw and dag-cbor.
        async with node("b") as other:
            assert await other.transport.connect(peer.peer_id, [peer.address])
            for cid, block in blocks.blocks:
                assert await other.fetch(cid_text(cid)) == block


@pytest.mark.parametrize("size", [0, 500, 3_000, 200_000], ids=str)
async def test_a_file_that_only_kubo_has_is_read(tmp_path: Path, size: int) -> None:
    """One block of dag-pb, by the CIDv0 that Kubo names it with."""
    async with connected(tmp_path) as (here, peer):
        content = os.urandom(size)
        assert content in await here.fetch(await peer.add(content))


async def test_many_blocks_at_once(tmp_path: Path) -> None:
    async with connected(tmp_path) as (here, peer):
        contents = [os.urandom(3000) for _ in range(50)]
        cids = [await peer.add(content) for content in contents]
        found: dict[str, bytes] = {}

        async def fetch(cid: str) -> None:
            found[cid] = await here.fetch(cid)

        async with trio.open_nursery() as nursery:
            for cid in cids:
                nursery.start_soon(fetch, cid)
        assert all(c in found[cid] for c, cid in zip(contents, cids, strict=True))


async def test_what_kubo_lacks_is_known_at_once(tmp_path: Path) -> None:
    async with connected(tmp_path) as (here, _):
        with pytest.raises(TransportError, match="no connected peer has the block"):
            await here.fetch(cid_text(cid_bytes(b"nobody has this")))


async def test_what_kubo_may_not_have_it_gets_when_it_may(tmp_path: Path) -> None:
    async with connected(tmp_path) as (here, peer), trio.open_nursery() as nursery:
        here.gives = False
        block = os.urandom(5000)
        cid = await here.put(block)
        pinned: list[bool] = []

        async def pin() -> None:
            pinned.append(await peer.pin(cid))

        nursery.start_soon(pin)
        correspondents = here.bitswap._correspondents
        await until(
            lambda: peer.peer_id in correspondents and bool(correspondents[peer.peer_id]._missing)
        )
        assert not pinned
        here.gives = True
        here.bitswap.stored(parse_cid(cid))
        await until(lambda: bool(pinned))
        assert pinned == [True]


async def test_kubo_says_what_it_is(tmp_path: Path) -> None:
    async with connected(tmp_path) as (here, peer):
        assert (await here.transport.agent(peer.peer_id)).startswith("kubo/")
        assert await here.transport.ping(peer.peer_id) < 5
        assert await peer.peers() == [here.peer_id]


@pytest.mark.parametrize(
    "other", [None, format_swarm_key(bytes(32))], ids=["no key", "another key"]
)
async def test_without_the_secret_nobody_comes_in(tmp_path: Path, other: str | None) -> None:
    async with kubo(tmp_path, swarm_key=other) as peer, node() as here:
        assert not await peer.connect(here.transport.addresses[0])
        with pytest.raises(TransportError):
            await here.transport.connect(peer.peer_id, [peer.address])
        assert not here.transport.connected()
