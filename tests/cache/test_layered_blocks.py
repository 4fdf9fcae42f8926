import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import cbrrr
import pytest
import trio
from fakes_kubo import FakeKubo
from trio.testing import MockClock, wait_all_tasks_blocked

from promptmesh.cache.answers import AnswerCache
from promptmesh.cache.blocks import SqliteBlocks
from promptmesh.cache.cid import cid_bytes
from promptmesh.cache.database import Database
from promptmesh.cache.kubo import KuboError
from promptmesh.cache.layers import (
    LOOK_PERIOD,
    MAX_WAITING,
    PAUSE,
    TRIES,
    LayeredBlocks,
    PublicStore,
)
from promptmesh.providers.base import Completion

BLOCK = cbrrr.encode_dag_cbor({"some": "block"})
CID = cid_bytes(BLOCK)
LEAF = b"a leaf"
LEAF_CID = cid_bytes(LEAF, "raw")
KEY = bytes(32)


class Node:
    """A store of two, its parts, and what may leave."""

    def __init__(self, path: Path, **options: bool) -> None:
        self.database = Database(path / "cache.sqlite")
        self.first = SqliteBlocks(self.database)
        self.kubo = FakeKubo()
        self.withheld: set[bytes] = set()
        self.layers = LayeredBlocks(self.first, self.kubo, may_leave=self._may_leave, **options)

    async def _may_leave(self, cid: bytes) -> bool:
        return cid not in self.withheld

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        await self.layers.start()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.layers.run)
            yield
            nursery.cancel_scope.cancel()
        self.database.close()


Make = Callable[..., Node]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda **options: Node(tmp_path, **options)


# --- reading --------------------------------------------------------------------------------------


async def test_what_is_here_is_not_asked_for(make: Make) -> None:
    node = make()
    async with node.running():
        await node.first.keep(CID, BLOCK)
        assert await node.layers.get(CID) == BLOCK
        assert await node.layers.has(CID)
    assert ("get", CID) not in node.kubo.calls


async def test_what_is_there_is_kept_here_for_this_node_only(make: Make) -> None:
    node = make()
    async with node.running():
        await node.kubo.put(CID, BLOCK)
        assert await node.layers.has(CID)
        assert await node.layers.get(CID) == BLOCK
        assert await node.first.get(CID) == BLOCK
        # It is not told back, and nobody outside may have it.
        await wait_all_tasks_blocked()
        assert node.kubo.calls.count(("put", CID)) == 1
        answers = AnswerCache(node.database, node.first)
        assert not (await answers.reach(CID)).put


async def test_pinning_brings_it_here(make: Make) -> None:
    node = make()
    async with node.running():
        await node.kubo.put(CID, BLOCK)
        assert await node.layers.pin(CID)
        assert (await node.first.size()).pinned == 1


# --- writing --------------------------------------------------------------------------------------


async def test_changes_go_there_in_order(make: Make) -> None:
    node = make()
    async with node.running():
        await node.layers.put(CID, BLOCK)
        await node.layers.pin(CID)
        await node.layers.pin(CID, False)
        await wait_all_tasks_blocked()
        assert await node.kubo.get(CID) == BLOCK
        await node.layers.delete(CID)
        await wait_all_tasks_blocked()
        assert not await node.kubo.has(CID)
    told = [what for what, cid in node.kubo.calls if cid == CID]
    assert told == ["put", "pin", "unpin", "get", "delete", "has"]


async def test_answers_go_there_with_their_leaves(make: Make) -> None:
    node = make(pin=True)
    answers = AnswerCache(node.database, node.first)
    long = Completion(text="0123456789abcdef\n" * 20_000, finish_reason="stop")
    async with node.running():
        stored = await answers.store(KEY, long, model="m", now=0)
        assert stored is not None
        await wait_all_tasks_blocked()
        here, there = await node.first.size(), await node.kubo.size()
    assert (there.blocks, there.bytes) == (here.blocks, here.bytes)
    assert there.blocks > 1
    # The root is pinned, after all that it links to is there.
    assert node.kubo.calls[-1] == ("pin", stored.cid.raw)
    assert there.pinned == 1


async def test_what_may_not_leave_stays(make: Make) -> None:
    node = make()
    node.withheld.add(CID)
    async with node.running():
        await node.layers.put(CID, BLOCK)
        await node.layers.pin(CID)
        await wait_all_tasks_blocked()
    assert not {"put", "pin"} & {what for what, _ in node.kubo.calls}


async def test_what_was_not_written_does_not_go_there(make: Make) -> None:
    node = make()
    async with node.running():
        with suppress(ZeroDivisionError), node.database.transaction() as connection:
            node.first.write(connection, [(CID, BLOCK)], 0)
            raise ZeroDivisionError
        await wait_all_tasks_blocked()
    assert ("put", CID) not in node.kubo.calls


# --- faults ---------------------------------------------------------------------------------------


async def test_a_store_that_fails_is_left_alone(make: Make) -> None:
    node = make()
    async with node.running():
        node.kubo.fault = "gone"
        assert await node.layers.get(CID) is None
        assert node.layers.state().state == "away"
        for _ in range(5):
            assert await node.layers.get(CID) is None
            assert not await node.layers.has(CID)
        assert node.kubo.calls.count(("get", CID)) == 1


async def test_what_waits_goes_there_when_it_is_back(make: Make, autojump_clock: MockClock) -> None:
    node = make()
    async with node.running():
        node.kubo.fault = "gone"
        for block in (BLOCK, LEAF):
            await node.layers.put(cid_bytes(block, "raw"), block)
        await wait_all_tasks_blocked()
        assert node.layers.state().waiting == 2
        node.kubo.fault = ""
        await trio.sleep(PAUSE + 1)
        assert node.layers.state().state == "ready"
        assert node.layers.state().waiting == 0
        assert (await node.kubo.size()).blocks == 2


async def test_a_change_that_always_fails_holds_up_the_rest_only_so_long(
    make: Make, autojump_clock: MockClock
) -> None:
    node = make()
    real = node.kubo.put

    async def put(cid: bytes, block: bytes) -> bool:
        node.kubo.fault = "too strange" if cid == CID else ""
        done = await real(cid, block)
        node.kubo.fault = ""
        return done

    node.kubo.put = put  # type: ignore[method-assign]
    async with node.running():
        await node.layers.put(CID, BLOCK)
        await node.layers.put(LEAF_CID, LEAF)
        await trio.sleep((PAUSE + 1) * TRIES)
        assert await node.kubo.has(LEAF_CID)
    assert node.kubo.calls.count(("put", CID)) == TRIES


async def test_a_full_queue_says_so_once(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    node = make()
    for number in range(MAX_WAITING + 5):
        block = b"%d" % number
        await node.layers.put(cid_bytes(block, "raw"), block)
    assert node.layers.state().waiting == MAX_WAITING
    assert caplog.text.count("lags behind") == 1
    node.database.close()


async def test_a_store_that_is_not_there_is_no_obstacle(
    make: Make, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    node = make()
    node.kubo.fault = "nothing listens there"
    async with node.running():
        assert node.layers.state().state == "away"
        await trio.sleep(PAUSE * 3)
        assert await node.layers.get(CID) is None
        node.kubo.fault = ""
        await trio.sleep(PAUSE + 1)
        assert node.layers.state().state == "ready"
    assert caplog.text.count("nothing listens there") == 1


# --- whom it tells --------------------------------------------------------------------------------


async def test_a_public_store_is_refused(make: Make) -> None:
    node = make()
    node.kubo.public = "its Bootstrap list is not empty"
    with pytest.raises(PublicStore, match=r"Bootstrap.*kubo\.publish = true"):
        await node.layers.start()
    node.database.close()


async def test_a_public_store_is_used_on_request(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    node = make(publish=True)
    node.kubo.public = "its Bootstrap list is not empty"
    async with node.running():
        await node.layers.put(CID, BLOCK)
        await wait_all_tasks_blocked()
        assert await node.kubo.has(CID)
        assert node.layers.state().problem == "its Bootstrap list is not empty"
    assert "public: all can read what goes there" in caplog.text


async def test_a_store_that_becomes_public_is_used_no_more(
    make: Make, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    node = make()
    async with node.running():
        node.kubo.public = "it listens on /ip4/8.8.8.8"
        await trio.sleep(LOOK_PERIOD + 1)
        assert node.layers.state().state == "public"
        await node.layers.put(CID, BLOCK)
        await trio.sleep(LOOK_PERIOD / 2)
        assert await node.layers.get(LEAF_CID) is None
        assert not {"put", "get"} & {what for what, _ in node.kubo.calls}
        node.kubo.public = ""
        await trio.sleep(LOOK_PERIOD + 1)
        assert await node.kubo.has(CID)
    assert caplog.text.count("is not used") == 1


async def test_a_store_that_was_away_is_not_used_before_it_showed_that_it_is_private(
    make: Make,
    autojump_clock: MockClock,
) -> None:
    node = make()
    node.kubo.fault = "gone"
    async with node.running():
        node.kubo.fault, node.kubo.public = "", "its Bootstrap list is not empty"
        await node.layers.put(CID, BLOCK)
        await trio.sleep(PAUSE * 3)
        assert not {"put", "get"} & {what for what, _ in node.kubo.calls}


# --- at once --------------------------------------------------------------------------------------


async def test_pinning_there_at_once(make: Make) -> None:
    node = make()
    await node.layers.pin_there([(CID, BLOCK), (LEAF_CID, LEAF)])
    assert await node.kubo.get(LEAF_CID) == LEAF
    assert node.kubo.calls[-2] == ("pin", CID)
    node.database.close()


@pytest.mark.parametrize(("fault", "public"), [("gone", ""), ("", "it is public")])
async def test_pinning_there_says_why_not(make: Make, fault: str, public: str) -> None:
    node = make()
    node.kubo.fault, node.kubo.public = fault, public
    with pytest.raises(KuboError, match=fault or public):
        await node.layers.pin_there([(CID, BLOCK)])
    node.database.close()
