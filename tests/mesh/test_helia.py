"""Real libp2p hosts and the real Helia, in one private network (`scripts/test --interop`)."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import cbrrr
import pytest
import trio
from helia import Helia, HeliaError, helia, needs_helia

from promptmesh.cache.blocks import MemoryBlocks
from promptmesh.cache.cid import cid_bytes, cid_text, parse_cid
from promptmesh.mesh.bitswap import Bitswap
from promptmesh.mesh.host import HostSettings, open_host
from promptmesh.mesh.swarm_key import format_swarm_key
from promptmesh.mesh.transport import PeerId, Transport

pytestmark = [needs_helia, pytest.mark.e2e, pytest.mark.interop]

SECRET = bytes(range(32))


class Node:
    """A host that exchanges the blocks of a store in memory."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.blocks = MemoryBlocks()
        self.bitswap = Bitswap(transport, get=self._get)

    async def _get(self, peer: PeerId, cid: bytes) -> bytes | None:
        return await self.blocks.get(cid)

    async def put(self, block: bytes) -> str:
        cid = cid_bytes(block, "raw")
        await self.blocks.put(cid, block)
        return cid_text(cid)


@asynccontextmanager
async def connected(folder: Path) -> AsyncIterator[tuple[Node, Helia]]:
    """A node, and a Helia that dialled it."""
    settings = HostSettings(seed=b"a" * 32, listen=("/ip4/127.0.0.1/tcp/0",), psk=SECRET)
    async with (
        helia(folder, swarm_key=format_swarm_key(SECRET)) as peer,
        open_host(settings) as transport,
        trio.open_nursery() as nursery,
    ):
        node = Node(transport)
        await nursery.start(node.bitswap.run)
        await peer.connect(transport.addresses[0])
        yield node, peer
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("size", [0, 500, 2_000, 500_000, 2_000_000], ids=str)
async def test_helia_reads_a_block(tmp_path: Path, size: int) -> None:
    async with connected(tmp_path) as (node, peer):
        for _ in range(3):  # it ends its side of each stream
            block = os.urandom(size)
            assert await peer.get(await node.put(block)) == block


# Not an empty one: Helia says nothing where it has that.
@pytest.mark.parametrize("size", [500, 2_000, 500_000, 2_000_000], ids=str)
async def test_a_block_that_only_helia_has_is_read(tmp_path: Path, size: int) -> None:
    async with connected(tmp_path) as (node, peer):
        for _ in range(3):
            block = os.urandom(size)
            cid = await peer.put(block)
            assert cid == cid_text(cid_bytes(block, "raw"))
            assert await node.bitswap.fetch(parse_cid(cid), timeout=20) == block


async def test_helia_pins_a_block_with_leaves(tmp_path: Path) -> None:
    async with connected(tmp_path) as (node, peer):
        leaves = [os.urandom(60_000) for _ in range(8)]
        links: list[cbrrr.DagCborTypes] = [
            cbrrr.CID.decode(await node.put(leaf)) for leaf in leaves
        ]
        root = cbrrr.encode_dag_cbor({"leaves": links})
        await node.blocks.put(cid_bytes(root), root)
        await peer.pin(cid_text(cid_bytes(root)))
        for leaf in leaves:
            await node.blocks.delete(cid_bytes(leaf, "raw"))
            assert await node.bitswap.fetch(cid_bytes(leaf, "raw"), timeout=20) == leaf


async def test_helia_says_what_it_is(tmp_path: Path) -> None:
    async with connected(tmp_path) as (node, peer):
        assert "helia" in (await node.transport.agent(peer.peer_id)).lower()
        assert await node.transport.ping(peer.peer_id) < 5


async def test_with_another_key_it_stays_outside(tmp_path: Path) -> None:
    settings = HostSettings(seed=b"a" * 32, listen=("/ip4/127.0.0.1/tcp/0",), psk=SECRET)
    other_key = format_swarm_key(bytes(32))
    async with helia(tmp_path, swarm_key=other_key) as peer, open_host(settings) as transport:
        with pytest.raises(HeliaError):
            await peer.connect(transport.addresses[0])
        assert not transport.connected()
