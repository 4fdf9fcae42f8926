from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from promptmesh.cache.blocks import MAX_BLOCK, BlockStore, MemoryBlocks, SqliteBlocks, StoreSize
from promptmesh.cache.cid import cid_bytes, cid_of, split
from promptmesh.cache.database import Database

BLOCK = b"some block"
RAW = cid_bytes(BLOCK, "raw")
CBOR = cid_bytes(BLOCK)
OTHER = cid_bytes(b"other")
#: CIDs that no block of ours has.
FOREIGN = [b"", b"x", b"\x12\x20" + bytes(32), b"\x01\x71\x12\x40" + bytes(64), RAW[:-1]]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "cache.sqlite")
    yield database
    database.close()


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, database: Database) -> BlockStore:
    makers: dict[str, Callable[[], BlockStore]] = {
        "memory": MemoryBlocks,
        "sqlite": lambda: SqliteBlocks(database),
    }
    return makers[request.param]()


# --- the contract -------------------------------------------------------------------------------


async def test_a_block_is_found_by_any_codec(store: BlockStore) -> None:
    assert await store.get(RAW) is None
    assert not await store.has(RAW)
    assert await store.put(RAW, BLOCK)
    assert await store.put(RAW, BLOCK)
    assert await store.get(RAW) == await store.get(CBOR) == BLOCK
    assert await store.has(CBOR)
    assert await store.get(OTHER) is None
    assert await store.size() == StoreSize(1, len(BLOCK), 0)


async def test_delete(store: BlockStore) -> None:
    await store.put(RAW, BLOCK)
    assert not await store.delete(OTHER)
    assert await store.delete(CBOR)
    assert not await store.delete(RAW)
    assert await store.get(RAW) is None
    assert await store.size() == StoreSize(0, 0, 0)


async def test_pin(store: BlockStore) -> None:
    assert not await store.pin(RAW)
    await store.put(RAW, BLOCK)
    assert await store.pin(CBOR)
    assert await store.pin(RAW)
    assert (await store.size()).pinned == 1
    assert await store.pin(RAW, False)
    assert (await store.size()).pinned == 0
    await store.pin(RAW)
    assert await store.delete(RAW)
    assert await store.size() == StoreSize(0, 0, 0)


async def test_empty_and_largest_blocks(store: BlockStore) -> None:
    for block in (b"", bytes(MAX_BLOCK)):
        assert await store.put(cid_bytes(block, "raw"), block)
        assert await store.get(cid_bytes(block, "raw")) == block


async def test_other_bytes_and_larger_blocks_are_refused(store: BlockStore) -> None:
    with pytest.raises(ValueError, match="is not what"):
        await store.put(OTHER, BLOCK)
    large = bytes(MAX_BLOCK + 1)
    with pytest.raises(ValueError, match="is the most"):
        await store.put(cid_bytes(large), large)
    assert await store.size() == StoreSize(0, 0, 0)


@pytest.mark.parametrize("cid", FOREIGN)
async def test_foreign_cids_have_no_block(store: BlockStore, cid: bytes) -> None:
    with pytest.raises(ValueError, match="is not what"):
        await store.put(cid, BLOCK)
    assert await store.get(cid) is None
    assert not await store.has(cid)
    assert not await store.delete(cid)
    assert not await store.pin(cid)


# --- over SQLite --------------------------------------------------------------------------------


async def test_blocks_outlive_the_process(tmp_path: Path) -> None:
    path = tmp_path / "again.sqlite"
    for _ in range(2):
        database = Database(path)
        store = SqliteBlocks(database)
        assert await store.put(RAW, BLOCK)
        assert await store.get(RAW) == BLOCK
        database.close()


@pytest.mark.parametrize("damaged", [b"x" + BLOCK[1:], BLOCK[:-1], b"", "text", 7, None])
async def test_a_damaged_block_is_not_there(
    database: Database, damaged: object, caplog: pytest.LogCaptureFixture
) -> None:
    store = SqliteBlocks(database)
    await store.put(RAW, BLOCK)
    if damaged is None:
        database.rows("UPDATE block SET digest = ?", (split(OTHER)[1],))
        wanted = OTHER
    else:
        database.rows("UPDATE block SET data = ?", (damaged,))
        wanted = RAW
    assert await store.get(wanted) is None
    assert "damaged" in caplog.text
    assert not await store.has(wanted)
    assert await store.size() == StoreSize(0, 0, 0)
    assert await store.put(RAW, BLOCK)
    assert await store.get(RAW) == BLOCK


async def test_a_failing_database_is_an_empty_store(database: Database) -> None:
    store = SqliteBlocks(database)
    await store.put(RAW, BLOCK)
    database.close()
    assert not await store.put(RAW, BLOCK)
    assert await store.get(RAW) is None
    assert not await store.has(RAW)
    assert not await store.delete(RAW)
    assert not await store.pin(RAW)
    assert await store.size() == StoreSize(0, 0, 0)


async def test_uses_are_written_down_once_a_minute(database: Database) -> None:
    clock = Clock()
    store = SqliteBlocks(database, clock=clock)
    await store.put(RAW, BLOCK)

    async def used(at: float) -> int:
        await store.get(RAW)
        await store.uses.write(at)
        return int(database.row("SELECT used_at FROM block")[0])

    assert await used(1030) == 1000
    assert await used(1100) == 1100
    clock.now = 1150.0
    await store.put(RAW, BLOCK)
    assert await used(1150) == 1100
    clock.now = 1200.0
    await store.put(RAW, BLOCK)
    assert database.row("SELECT used_at FROM block") == (1200,)


async def test_many_uses_are_written_in_parts(database: Database) -> None:
    store = SqliteBlocks(database, clock=Clock())
    cids = [cid_bytes(bytes([i]), "raw") for i in range(200)]
    for i, cid in enumerate(cids):
        await store.put(cid, bytes([i]))
        assert await store.get(cid_of(split(cid)[1])) == bytes([i])
    await store.uses.write(5000)
    assert database.rows("SELECT DISTINCT used_at FROM block") == [(5000,)]
