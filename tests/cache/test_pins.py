"""Pins: what is kept, under which name, and for whose sake."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.cache.blocks import SqliteBlocks
from promptmesh.cache.cid import cid_bytes
from promptmesh.cache.database import Database
from promptmesh.cache.links import version_0
from promptmesh.cache.pins import Pin, Pins, PinsFull
from promptmesh.cache.upkeep import sweep

NAMES = [b"one", b"two", b"three", b"four"]
A, B, C, D = (cid_bytes(name, "raw") for name in NAMES)


@pytest.fixture
def database() -> Iterator[Database]:
    database = Database(None)
    yield database
    database.close()


@pytest.fixture
def pins(database: Database) -> Pins:
    return Pins(database, max_bytes=1000)


@pytest.fixture
async def blocks(database: Database) -> SqliteBlocks:
    blocks = SqliteBlocks(database)
    for name in NAMES:
        await blocks.put(cid_bytes(name, "raw"), name)
    return blocks


async def kept(database: Database, blocks: SqliteBlocks) -> set[bytes]:
    """What an eviction of all that can go leaves."""
    await sweep(database, blocks, now=1.0, max_bytes=0)
    return {cid for cid in (A, B, C, D) if await blocks.has(cid)}


async def test_what_is_below_a_pin_is_kept(
    database: Database, blocks: SqliteBlocks, pins: Pins
) -> None:
    assert await pins.add(A, recursive=True, below=[B, C])
    first, *others = await pins.listing()
    assert first == Pin(A, "recursive")
    assert {pin.cid for pin in others if pin.kind == "indirect"} == {B, C}
    assert await pins.listing(B) == [Pin(B, "indirect")]
    assert await pins.listing(D) == []
    assert await kept(database, blocks) == {A, B, C}
    assert await pins.remove(A)
    assert await kept(database, blocks) == set()


async def test_a_block_with_two_reasons_stays_for_the_other(
    database: Database, blocks: SqliteBlocks, pins: Pins
) -> None:
    await pins.add(A, recursive=True, below=[B, C])
    await pins.add(D, recursive=True, below=[C])
    await pins.add(B, recursive=False)
    assert await pins.listing(B) == [Pin(B, "direct")]
    await pins.remove(A)
    assert await kept(database, blocks) == {B, C, D}


async def test_only_what_was_pinned_by_itself_is_unpinned(blocks: SqliteBlocks, pins: Pins) -> None:
    await pins.add(A, recursive=True, below=[B])
    assert not await pins.remove(B)
    assert not await pins.remove(C)
    assert await pins.listing(B) == [Pin(B, "indirect")]


async def test_a_missing_block_pins_nothing(blocks: SqliteBlocks, pins: Pins) -> None:
    assert not await pins.add(A, recursive=True, below=[B, cid_bytes(b"elsewhere", "raw")])
    assert not await pins.add(cid_bytes(b"elsewhere", "raw"), recursive=False)
    assert await pins.listing() == []
    assert (await blocks.size()).pinned == 0


async def test_a_pin_keeps_the_name_it_was_given(blocks: SqliteBlocks, pins: Pins) -> None:
    as_file = cid_bytes(b"one", "dag-pb")
    await pins.add(version_0(as_file), recursive=True)
    assert await pins.listing(A) == [Pin(version_0(as_file), "recursive")]
    await pins.add(A, recursive=True)
    assert await pins.listing() == [Pin(A, "recursive")]


async def test_what_was_pinned_is_told(database: Database, blocks: SqliteBlocks) -> None:
    told: list[tuple[str, bytes]] = []
    pins = Pins(database, max_bytes=3, tell=lambda change, cid: told.append((change, cid)))
    as_file = cid_bytes(b"one", "dag-pb")
    assert await pins.add(version_0(as_file), recursive=True)
    with pytest.raises(PinsFull):
        await pins.add(B, recursive=True)
    assert not await pins.remove(B)
    assert await pins.remove(as_file)
    assert told == [("pin", as_file), ("unpin", as_file)]


async def test_the_store_pins_the_same_way(blocks: SqliteBlocks, pins: Pins) -> None:
    await blocks.pin(A)
    assert await pins.listing() == [Pin(A, "recursive")]
    assert await pins.remove(A)
    await pins.add(A, recursive=True, below=[B])
    assert await blocks.pin(A, False)
    assert (await blocks.size()).pinned == 0


async def test_deleting_a_block_ends_its_pin(blocks: SqliteBlocks, pins: Pins) -> None:
    await pins.add(A, recursive=True, below=[B])
    await blocks.delete(A)
    assert await pins.listing() == []
    assert (await blocks.size()).pinned == 0


async def test_no_more_is_pinned_than_there_is_room_for(
    database: Database, blocks: SqliteBlocks
) -> None:
    pins = Pins(database, max_bytes=len(b"onetwo"))
    assert await pins.add(A, recursive=True, below=[B])
    assert await pins.add(B, recursive=False)
    with pytest.raises(PinsFull):
        await pins.add(C, recursive=False)
    assert await pins.listing(C) == []
    await pins.remove(A)
    assert await pins.add(A, recursive=False)
    await blocks.delete(B)
    with pytest.raises(PinsFull):
        await pins.add(C, recursive=False)
    await blocks.delete(A)
    assert await pins.add(C, recursive=False)


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 3), st.frozensets(st.integers(0, 3))), max_size=12
    )
)
async def test_a_block_is_pinned_while_there_is_a_reason(
    steps: list[tuple[bool, int, frozenset[int]]],
) -> None:
    all_cids = [A, B, C, D]
    database = Database(None)
    try:
        blocks, pins = SqliteBlocks(database), Pins(database, max_bytes=1000)
        for name in NAMES:
            await blocks.put(cid_bytes(name, "raw"), name)
        reasons: dict[int, set[int]] = {}
        for add, root, below in steps:
            if add:
                await pins.add(all_cids[root], recursive=True, below=[all_cids[i] for i in below])
                reasons.setdefault(root, {root}).update(below)
            else:
                assert await pins.remove(all_cids[root]) == (root in reasons)
                reasons.pop(root, None)
        expected = set().union(*reasons.values())
        assert (await blocks.size()).pinned == len(expected)
        assert await kept(database, blocks) == {all_cids[i] for i in expected}
    finally:
        database.close()
