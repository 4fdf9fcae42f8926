"""Blocks by CID from anywhere: the local store first, then whoever is connected."""

from __future__ import annotations

import pytest

from promptmesh.cache.blocks import MemoryBlocks
from promptmesh.cache.cid import cid_bytes
from promptmesh.mesh.transport import TransportError
from promptmesh.node.reading import Reading

BLOCK = b"a block"
CID = cid_bytes(BLOCK, "raw")


class Guard:
    """Gives everything, or nothing."""

    def __init__(self) -> None:
        self.allows = True
        self.asked: list[str | None] = []

    async def may_serve(self, peer: str | None, cid: bytes, proof: bytes = b"") -> bool:
        self.asked.append(peer)
        return self.allows


class Source:
    """A mesh that has some blocks."""

    def __init__(self, *blocks: bytes) -> None:
        self.blocks = {cid_bytes(block, "raw"): block for block in blocks}
        self.asked: list[tuple[bytes, float]] = []
        self.told: list[bytes] = []

    async def fetch(self, cid: bytes, *, timeout: float) -> bytes:
        self.asked.append((cid, timeout))
        if cid not in self.blocks:
            raise TransportError("nobody has it")
        return self.blocks[cid]

    def stored(self, cid: bytes) -> None:
        self.told.append(cid)


@pytest.fixture
def guard() -> Guard:
    return Guard()


@pytest.fixture
def reading(guard: Guard) -> Reading:
    return Reading(blocks=MemoryBlocks(), permissions=guard)


async def test_what_is_here_is_asked_of_nobody(reading: Reading) -> None:
    source = Source(BLOCK)
    reading.attach(source)
    await reading.put(CID, BLOCK)
    assert await reading.read(CID) == BLOCK
    assert not source.asked


async def test_what_was_fetched_is_here_the_next_time(reading: Reading) -> None:
    source = Source(BLOCK)
    reading.attach(source)
    assert await reading.read(CID, timeout=3) == BLOCK
    reading.detach()
    assert await reading.read(CID) == BLOCK
    assert source.asked == [(CID, 3)]


async def test_what_nobody_has_is_none(reading: Reading) -> None:
    assert await reading.read(CID) is None
    reading.attach(Source())
    assert await reading.read(CID) is None


async def test_what_is_withheld_is_neither_given_nor_asked_for(
    reading: Reading, guard: Guard
) -> None:
    source = Source(BLOCK)
    reading.attach(source)
    await reading.put(CID, BLOCK)
    guard.allows = False
    assert await reading.read(CID) is None
    assert await reading.give("bob", CID) is None
    assert guard.asked == [None, "bob"]
    assert not source.asked


async def test_whoever_waits_is_told_of_what_is_put(reading: Reading) -> None:
    source = Source()
    reading.attach(source)
    await reading.put(CID, BLOCK)
    assert source.told == [CID]


async def test_wrong_bytes_are_not_kept(reading: Reading) -> None:
    with pytest.raises(ValueError, match="not what"):
        await reading.put(CID, b"other")
    assert await reading.read(CID) is None
