from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import cbrrr
import pytest
from fakes_ipfs import ipfs_node
from fakes_kubo import FakeKubo
from js_ipfs import JsIpfs

from promptmesh.cache.blocks import MAX_BLOCK, BlockStore, MemoryBlocks, SqliteBlocks, StoreSize
from promptmesh.cache.cid import cid_bytes, cid_of, split
from promptmesh.cache.database import Database
from promptmesh.cache.kubo import KuboBlocks
from promptmesh.cache.layers import LayeredBlocks

#: dag-cbor, since a daemon looks into what it pins.
BLOCK = cbrrr.encode_dag_cbor("some block")
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


@pytest.fixture(scope="module")
def js_ipfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JsIpfs]:
    with JsIpfs(tmp_path_factory.mktemp("js-ipfs")) as daemon:
        yield daemon


async def always(cid: bytes) -> bool:
    return True


@pytest.fixture(
    params=[
        "memory",
        "sqlite",
        "layered",
        "rpc",
        pytest.param("js-ipfs", marks=pytest.mark.interop),
    ]
)
async def store(
    request: pytest.FixtureRequest, database: Database, tmp_path: Path
) -> AsyncIterator[BlockStore]:
    blocks = SqliteBlocks(database)
    if request.param == "memory":
        yield MemoryBlocks()
    elif request.param == "sqlite":
        yield blocks
    elif request.param == "layered":
        yield LayeredBlocks(blocks, FakeKubo(), may_leave=always)
    elif request.param == "rpc":
        async with ipfs_node(tmp_path / "node") as node:
            yield KuboBlocks(node.url, timeout=20)
    else:
        # It waits for half of this time for what it does not have.
        yield KuboBlocks(request.getfixturevalue("js_ipfs").api, timeout=2)


@pytest.fixture(autouse=True)
async def nothing_of_ours(store: BlockStore) -> None:
    """A daemon outlives a test."""
    for block in (BLOCK, b"other", b"", bytes(MAX_BLOCK)):
        await store.delete(cid_bytes(block, "raw"))


class Growth:
    """How a store grew, in blocks and pins: a daemon's own lie beside ours."""

    def __init__(self, store: BlockStore, before: StoreSize) -> None:
        self._store = store
        self._before = before

    async def now(self) -> tuple[int, int]:
        after = await self._store.size()
        return after.blocks - self._before.blocks, after.pinned - self._before.pinned


@pytest.fixture
async def growth(store: BlockStore, nothing_of_ours: None) -> Growth:
    return Growth(store, await store.size())


# --- the contract -------------------------------------------------------------------------------


async def test_a_block_is_found_by_any_codec(store: BlockStore, growth: Growth) -> None:
    assert await store.get(RAW) is None
    assert not await store.has(RAW)
    assert await store.put(RAW, BLOCK)
    assert await store.put(RAW, BLOCK)
    assert await store.get(RAW) == await store.get(CBOR) == BLOCK
    assert await store.has(CBOR)
    assert await store.get(OTHER) is None
    assert await growth.now() == (1, 0)


async def test_delete(store: BlockStore, growth: Growth) -> None:
    await store.put(RAW, BLOCK)
    assert not await store.delete(OTHER)
    assert await store.delete(CBOR)
    assert not await store.delete(RAW)
    assert await store.get(RAW) is None
    assert await growth.now() == (0, 0)


async def test_pin(store: BlockStore, growth: Growth) -> None:
    assert not await store.pin(RAW)
    await store.put(RAW, BLOCK)
    assert await store.pin(CBOR)
    assert await store.pin(CBOR)
    assert await growth.now() == (1, 1)
    assert await store.pin(RAW, False)
    assert await growth.now() == (1, 0)
    await store.pin(RAW)
    assert await store.delete(RAW)
    assert await growth.now() == (0, 0)


async def test_empty_and_largest_blocks(store: BlockStore) -> None:
    for block in (b"", bytes(MAX_BLOCK)):
        assert await store.put(cid_bytes(block, "raw"), block)
        assert await store.get(cid_bytes(block, "raw")) == block


async def test_other_bytes_and_larger_blocks_are_refused(store: BlockStore, growth: Growth) -> None:
    with pytest.raises(ValueError, match="is not what"):
        await store.put(OTHER, BLOCK)
    large = bytes(MAX_BLOCK + 1)
    with pytest.raises(ValueError, match="is the most"):
        await store.put(cid_bytes(large), large)
    assert await growth.now() == (0, 0)


@pytest.mark.parametrize("cid", FOREIGN)
async def test_foreign_cids_have_no_block(store: BlockStore, cid: bytes) -> None:
    with pytest.raises(ValueError, match="is not what"):
        await store.put(cid, BLOCK)
    assert await store.get(cid) is None
    assert not await store.has(cid)
    assert not await store.delete(cid)
    assert not await store.pin(cid)


# --- in this process ----------------------------------------------------------------------------


async def test_size_counts_bytes(database: Database) -> None:
    for store in (MemoryBlocks(), SqliteBlocks(database)):
        await store.put(RAW, BLOCK)
        await store.put(cid_bytes(b"other", "raw"), b"other")
        await store.pin(RAW)
        assert await store.size() == StoreSize(2, len(BLOCK) + 5, 1)


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
