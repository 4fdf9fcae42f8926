import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from promptmesh.cache.answer_rows import MAX_ALTERNATIVES, AnswerStat, Reach
from promptmesh.cache.answers import AnswerCache, Limits
from promptmesh.cache.blocks import SqliteBlocks
from promptmesh.cache.cid import Cid, cid_bytes, cid_of, split
from promptmesh.cache.database import Database
from promptmesh.cache.record_bounds import RecordError
from promptmesh.cache.records import AnswerRecord, encode, links
from promptmesh.cache.upkeep import Swept
from promptmesh.providers.base import Completion, ToolCall, Usage

NOW = 1_000_000.0
KEY = b"k" * 32
ANSWER = Completion(
    text="Paris", finish_reason="stop", usage=Usage(prompt_tokens=7, completion_tokens=2)
)
LONG = Completion(text="0123456789abcdef\n" * 12_000, finish_reason="length")


def answer(text: str) -> Completion:
    return Completion(text=text, finish_reason="stop")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "cache.sqlite")
    yield database
    database.close()


def cache(database: Database, **limits: Any) -> AnswerCache:
    blocks = SqliteBlocks(database, clock=lambda: NOW)
    return AnswerCache(database, blocks, peer="me", limits=Limits(**limits))


@pytest.fixture
def answers(database: Database) -> AnswerCache:
    return cache(database)


async def store(answers: AnswerCache, completion: Completion = ANSWER, **more: Any) -> Cid:
    settings = {"key": KEY, "model": "m", "now": NOW, **more}
    stored = await answers.store(content=completion, **settings)
    assert stored is not None
    return stored.cid


async def text(answers: AnswerCache, key: bytes = KEY, now: float = NOW, **more: Any) -> str | None:
    found = await answers.lookup(key, now=now, **more)
    return None if found is None else found.completion.text


# --- store and look up --------------------------------------------------------------------------


async def test_a_stored_answer_is_found(answers: AnswerCache) -> None:
    assert await answers.lookup(KEY, now=NOW) is None
    cid = await store(answers, weights="w", engine="e", numerics="n", source="other")
    found = await answers.lookup(KEY, now=NOW + 10)
    assert found is not None
    assert found.completion == ANSWER
    assert found.record == AnswerRecord(
        model="m", weights="w", engine="e", numerics="n", completion=ANSWER
    )
    assert (found.cid, found.cid_text) == (cid, cid.text)
    assert (found.age, found.stored_at, found.expires_at) == (10, NOW, NOW + 86400)
    assert found.source == "other"
    assert found.size > 50
    assert await answers.lookup(b"x" * 32, now=NOW) is None


async def test_the_cid_is_of_the_record_alone(answers: AnswerCache) -> None:
    cids = {
        await store(answers, key=bytes([i]) * 32, now=NOW + i, source=f"p{i}", namespace=f"n{i}")
        for i in range(3)
    }
    assert cids == {Cid(encode(AnswerRecord(model="m", completion=ANSWER)).cid)}


async def test_tool_calls_reasoning_and_logprobs_come_back(answers: AnswerCache) -> None:
    full = Completion(
        text="t",
        reasoning="r",
        tool_calls=(ToolCall(id="c", name="n", arguments="{}"),),
        logprobs=({"token": "t", "logprob": -0.5},),
        finish_reason="tool_calls",
    )
    await store(answers, full)
    found = await answers.lookup(KEY, now=NOW)
    assert found is not None
    assert found.completion == full


async def test_long_answers_have_leaves(answers: AnswerCache, database: Database) -> None:
    await store(answers, LONG)
    assert database.row("SELECT count(*) FROM link") == (4,)
    found = await answers.lookup(KEY, now=NOW)
    assert found is not None
    assert found.completion == LONG
    assert found.size == database.row("SELECT bytes FROM total")[0]


@pytest.mark.parametrize(
    "completion",
    [
        Completion(text="x", finish_reason="content_filter"),
        Completion(text="\ud800", finish_reason="stop"),
        Completion(logprobs=({"logprob": float("-inf")},), finish_reason="stop"),
    ],
    ids=["filtered", "no text", "no number"],
)
async def test_what_has_no_record_is_not_stored(
    answers: AnswerCache, completion: Completion
) -> None:
    assert await answers.store(KEY, completion, model="m", now=NOW) is None
    assert await answers.lookup(KEY, now=NOW) is None


# --- how old, of what, for whom -----------------------------------------------------------------


@pytest.mark.parametrize(("ttl", "until"), [(None, 86400), (5, 5), (0.5, 0.5), (10**9, 7 * 86400)])
async def test_ttl(answers: AnswerCache, ttl: float | None, until: float) -> None:
    await store(answers, ttl=ttl)
    assert await text(answers, now=NOW + until - 0.1) == "Paris"
    assert await text(answers, now=NOW + until) is None


@pytest.mark.parametrize("ttl", [0, -1])
async def test_a_ttl_of_nothing_stores_nothing(
    answers: AnswerCache, database: Database, ttl: float
) -> None:
    assert await answers.store(KEY, ANSWER, model="m", now=NOW, ttl=ttl) is None
    assert database.row("SELECT blocks FROM total") == (0,)


async def test_max_age(answers: AnswerCache) -> None:
    await store(answers)
    assert await text(answers, now=NOW + 10, max_age=10) == "Paris"
    assert await text(answers, now=NOW + 10, max_age=9) is None
    assert await text(answers, now=NOW + 1, max_age=0) is None
    await store(answers, now=NOW + 100)
    assert await text(answers, now=NOW + 105, max_age=9) == "Paris"


async def test_a_clock_that_went_back_makes_no_negative_age(answers: AnswerCache) -> None:
    await store(answers)
    found = await answers.lookup(KEY, now=NOW - 50)
    assert found is not None
    assert found.age == 0


async def test_weights(answers: AnswerCache) -> None:
    await store(answers, answer("unknown"))
    await store(answers, answer("one"), weights="one", now=NOW + 1)
    assert await text(answers, weights="one") == "one"
    assert await text(answers, weights="two") is None
    assert await text(answers) == "one"


async def test_what_may_not_leave_this_node(answers: AnswerCache) -> None:
    private = await store(answers, LONG, shared=False)
    assert await text(answers) == LONG.text
    assert await text(answers, shared_only=True) is None
    stored = await answers.get(private.raw, now=NOW)
    assert stored is not None
    leaf = links(encode(stored.record).blocks[0][1])[0]
    for cid in (private.raw, leaf, cid_bytes(b"not here"), b"no cid", b""):
        assert await answers.reach(cid) == Reach()
    # The same answer to a question that is no secret.
    await store(answers, LONG, key=b"o" * 32)
    for cid in (private.raw, leaf, cid_of(split(private.raw)[1], "raw")):
        assert await answers.reach(cid) == Reach(frozenset({""}))
    assert await text(answers, shared_only=True) is None
    assert await text(answers, key=b"o" * 32, shared_only=True) == LONG.text


async def test_a_block_goes_as_far_as_the_answers_it_belongs_to(answers: AnswerCache) -> None:
    cid = await store(answers, LONG, namespace="team")
    blocks = encode(AnswerRecord(model="m", completion=LONG)).blocks
    assert {await answers.reach(block) for block, _ in blocks} == {Reach(frozenset({"team"}))}
    await store(answers, LONG, key=b"2" * 32, namespace="secret", shared=False)
    await store(answers, LONG, key=b"3" * 32, namespace="club")
    assert await answers.reach(cid.raw) == Reach(frozenset({"team", "club"}))


@pytest.mark.parametrize("pinned", [False, True])
async def test_without_its_row_a_block_goes_nowhere(
    answers: AnswerCache, database: Database, pinned: bool
) -> None:
    """Whatever is left of an answer that may not leave, and of one that might."""
    private = await store(answers, LONG, shared=False, ttl=10)
    shared = await store(answers, answer("shared"), key=b"2" * 32, ttl=10)
    leaf = links(encode(AnswerRecord(model="m", completion=LONG)).blocks[0][1])[0]
    if pinned:
        await answers.pin(private.raw)
        await answers.pin(shared.raw)
    await answers.maintain(NOW + 20)
    assert await answers.reach(private.raw) == await answers.reach(leaf) == Reach()
    # No way of the cache deletes the row of a pinned answer; if one did, nothing would leak.
    database.rows("DELETE FROM answer")
    assert (await answers.get(private.raw, now=NOW) is not None) is pinned
    for cid in (private.raw, leaf, shared.raw):
        assert await answers.reach(cid) == Reach()


async def test_what_a_program_put_may_leave_and_outlives_the_answer(
    answers: AnswerCache, database: Database
) -> None:
    blocks = SqliteBlocks(database, clock=lambda: NOW - 1000)
    private = await store(answers, LONG, shared=False, ttl=10)
    _, (leaf, data), *_ = encode(AnswerRecord(model="m", completion=LONG)).blocks
    assert await blocks.put(leaf, data)
    assert await answers.reach(leaf) == Reach(put=True)
    assert await answers.reach(private.raw) == Reach()
    await answers.maintain(NOW + 20)
    assert await blocks.get(leaf) == data
    assert await answers.reach(leaf) == Reach(put=True)
    # An answer stored over it does not take that away; forgetting it does.
    await store(answers, LONG, shared=False)
    assert await answers.reach(leaf) == Reach(put=True)
    await blocks.delete(leaf)
    await store(answers, LONG, shared=False)
    assert await answers.reach(leaf) == Reach()


# --- alternatives -------------------------------------------------------------------------------


async def test_my_own_comes_first_then_the_newest(answers: AnswerCache) -> None:
    await store(answers, answer("theirs"), source="other", now=NOW + 5)
    assert await text(answers) == "theirs"
    await store(answers, answer("mine"), source="me", now=NOW)
    assert await text(answers) == "mine"
    await store(answers, answer("newer"), source="", now=NOW + 1)
    assert await text(answers) == "newer"
    await store(answers, answer("newest of theirs"), source="other", now=NOW + 9)
    assert await text(answers) == "newer"


async def adopt(answers: AnswerCache, completion: Completion, **more: Any) -> str:
    blocks = encode(AnswerRecord(model="m", completion=completion))
    settings = {
        "now": NOW,
        "made_at": NOW - 50,
        "expires_at": NOW + 100,
        "source": "other",
        **more,
    }
    stored = await answers.adopt(KEY, blocks.cid, dict(blocks.blocks), **settings)
    return stored.completion.text


async def test_the_most_claimed_comes_before_the_newest(answers: AnswerCache) -> None:
    await adopt(answers, answer("two"), claimed=2)
    await adopt(answers, answer("three"), claimed=3)
    await adopt(answers, answer("one"), claimed=1, made_at=NOW)
    assert await text(answers) == "three"
    await adopt(answers, answer("two"), claimed=5)
    assert await text(answers) == "two"
    await store(answers, answer("mine"))
    assert await text(answers) == "mine"


async def test_computing_it_here_makes_it_mine(answers: AnswerCache) -> None:
    await adopt(answers, ANSWER)
    cid = await store(answers)
    row = await answers.row(KEY, cid.raw)
    assert row is not None
    assert (row.own, row.source, row.claimed) == (True, "me", 1)
    await adopt(answers, ANSWER)
    row = await answers.row(KEY, cid.raw)
    assert row is not None
    assert (row.own, row.source) == (True, "me")


async def test_alternatives_are_bounded(answers: AnswerCache, database: Database) -> None:
    first = await store(answers, answer("kept"))
    await answers.pin(first.raw)
    for number in range(MAX_ALTERNATIVES + 10):
        await store(answers, answer(str(number)), now=NOW + 1 + number)
    assert database.row("SELECT answers, blocks FROM total") == (
        MAX_ALTERNATIVES + 1,
        MAX_ALTERNATIVES + 1,
    )
    assert await text(answers) == str(MAX_ALTERNATIVES + 9)
    assert await answers.get(first.raw, now=NOW) is not None


# --- adopting -----------------------------------------------------------------------------------


async def test_an_adopted_answer_keeps_its_times(answers: AnswerCache) -> None:
    assert await adopt(answers, LONG) == LONG.text
    found = await answers.lookup(KEY, now=NOW + 10)
    assert found is not None
    assert (found.age, found.expires_at, found.source) == (60, NOW + 100, "other")
    assert await text(answers, now=NOW + 10, max_age=59) is None
    assert await text(answers, now=NOW + 100) is None


async def test_an_adopted_answer_is_given_back_also_if_it_is_not_kept(
    answers: AnswerCache, database: Database
) -> None:
    assert await adopt(answers, ANSWER, expires_at=NOW) == "Paris"
    assert await text(answers) is None
    database.close()
    assert await adopt(answers, ANSWER) == "Paris"


async def test_other_bytes_are_refused(answers: AnswerCache) -> None:
    blocks = encode(AnswerRecord(model="m", completion=ANSWER))
    other = encode(AnswerRecord(model="m", completion=answer("other")))
    long = encode(AnswerRecord(model="m", completion=LONG))
    junk = b"\xa0"
    wrong: list[tuple[bytes, dict[bytes, bytes]]] = [
        (blocks.cid, {}),
        (blocks.cid, {blocks.cid: other.blocks[0][1]}),
        (cid_bytes(junk), {cid_bytes(junk): junk}),
        (long.cid, dict(long.blocks[:-1])),
    ]
    for cid, found in wrong:
        with pytest.raises(RecordError):
            await answers.adopt(
                KEY, cid, found, now=NOW, made_at=NOW, expires_at=NOW + 9, source="liar"
            )
    assert await text(answers) is None


# --- looking at it ------------------------------------------------------------------------------


async def test_get_by_cid(answers: AnswerCache) -> None:
    cid = await store(answers, ttl=5)
    found = await answers.get(cid.raw, now=NOW + 100)
    assert found is not None
    assert (found.completion, found.age, found.cid) == (ANSWER, 100, cid)
    assert await answers.get(cid_bytes(b"x"), now=NOW) is None


async def test_looking_at_an_answer_is_no_use_of_it(
    answers: AnswerCache, database: Database
) -> None:
    cid = await store(answers, LONG, now=NOW - 500)
    later = NOW + 100
    await answers.get(cid.raw, now=later)
    await answers.listing(now=later)
    assert database.rows("SELECT DISTINCT used_at FROM block") == [(NOW - 500,)]
    await answers.lookup(KEY, now=later)
    await answers.listing(now=later)
    assert database.rows("SELECT DISTINCT used_at FROM block") == [(later,)]


async def test_a_block_that_is_no_answer(answers: AnswerCache, database: Database) -> None:
    blocks = SqliteBlocks(database)
    await blocks.put(cid_bytes(b"\xa0"), b"\xa0")
    assert await answers.get(cid_bytes(b"\xa0"), now=NOW) is None
    assert await blocks.has(cid_bytes(b"\xa0"))
    record = encode(AnswerRecord(model="m", completion=ANSWER))
    await blocks.put(*record.blocks[0])
    found = await answers.get(record.cid, now=NOW)
    assert found is not None
    assert (found.completion, found.age) == (ANSWER, None)


async def test_listing_and_stat(answers: AnswerCache) -> None:
    first = await store(answers, weights="w", namespace="team", shared=False)
    second = await store(answers, answer("two"), key=b"2" * 32, now=NOW + 100, source="p")
    await store(answers, answer("over"), key=b"3" * 32, ttl=1)
    await answers.pin(first.raw)
    for _ in range(3):
        await answers.lookup(KEY, now=NOW)
    rows = await answers.listing(10, now=NOW + 100)
    assert [(row.cid, row.pinned) for row in rows] == [(first, True), (second, False)]
    row = rows[0]
    assert (row.key, row.model, row.weights, row.source) == (KEY, "m", "w", "me")
    assert (row.own, row.shared, row.namespace) == (True, False, "team")
    assert (row.tokens, row.hits, row.claimed) == (9, 3, 0)
    assert (row.stored_at, row.expires_at, row.used_at) == (NOW, NOW + 86400, NOW + 100)
    assert len(await answers.listing(1, now=NOW)) == 1
    assert await answers.row(KEY, first.raw) == row
    assert await answers.row(KEY, second.raw) is None
    stat = await answers.stat(now=NOW)
    size = sum(row.size for row in await answers.listing(10, now=NOW))
    assert (stat.answers, stat.blocks, stat.bytes, stat.pinned) == (3, 3, size, 1)
    assert stat.max_bytes == 1_000_000_000


async def test_what_was_counted_and_saved(answers: AnswerCache, database: Database) -> None:
    answers.uses.count("hits_local", tokens=9, seconds=1.5, money=0.25)
    answers.uses.count("hits_local", tokens=9, seconds=None, money=None)
    answers.uses.count("coalesced")
    answers.uses.saved(tokens=1, money=0.5)
    for kind in ("hits_mesh", "misses", "misses", "bypassed"):
        answers.uses.count(kind)
    # A count costs the request no write.
    assert database.row("SELECT hits_local, tokens_saved FROM total") == (0, 0)
    for _ in range(2):
        stat = await answers.stat(now=NOW)
        assert stat == AnswerStat(0, 0, 0, 1_000_000_000, 0, 2, 1, 1, 2, 1, 19, 1.5, 0.75)
        assert stat.hits == 3


async def test_what_an_answer_took_comes_with_it(answers: AnswerCache) -> None:
    cid = await store(answers, seconds=2.5, money=0.001)
    for _ in range(2):
        found = await answers.lookup(KEY, now=NOW)
        assert found is not None
        assert (found.seconds, found.money) == (2.5, 0.001)
        await store(answers)  # another time, not knowing
    await store(answers, seconds=3.5)
    row = await answers.row(KEY, cid.raw)
    assert row is not None
    assert (row.seconds, row.money) == (3.5, 0.001)


async def test_an_answer_that_is_old_already(answers: AnswerCache) -> None:
    stored = await answers.store(KEY, ANSWER, model="m", now=NOW, age=60, ttl=10)
    assert stored is not None
    assert (stored.stored_at, stored.age, stored.expires_at) == (NOW - 60, 60, NOW + 10)
    assert await text(answers, now=NOW + 5, max_age=65) == "Paris"
    assert await text(answers, now=NOW + 5, max_age=64) is None
    assert await text(answers, now=NOW + 10) is None


# --- forgetting ---------------------------------------------------------------------------------


def counts(database: Database) -> tuple[int, ...]:
    """answers, blocks, links: each counted, and as the totals say."""
    real = database.row(
        "SELECT (SELECT count(*) FROM answer), (SELECT count(*) FROM block),"
        " (SELECT count(*) FROM link), (SELECT coalesce(sum(size), 0) FROM block)"
    )
    assert database.row("SELECT answers, blocks, bytes FROM total") == (*real[:2], real[3])
    return tuple(real[:3])


async def test_remove_leaves_nothing(answers: AnswerCache, database: Database) -> None:
    cid = await store(answers, LONG)
    await store(answers, LONG, key=b"2" * 32)
    await answers.pin(cid.raw)
    assert counts(database) == (2, 5, 4)
    assert await answers.remove(cid.raw)
    assert counts(database) == (0, 0, 0)
    assert not await answers.remove(cid.raw)


async def test_shared_leaves_stay_while_a_root_needs_them(
    answers: AnswerCache, database: Database
) -> None:
    one = await store(answers, LONG)
    two = await store(answers, LONG, key=b"2" * 32, model="another")
    assert counts(database) == (2, 6, 8)
    await answers.pin(one.raw)
    await answers.pin(two.raw)
    await answers.remove(one.raw)
    assert counts(database) == (1, 5, 4)
    assert await text(answers, key=b"2" * 32) == LONG.text
    assert database.row("SELECT count(*) FROM block WHERE pinned = 1") == (5,)
    await answers.unpin(two.raw)
    assert database.row("SELECT count(*) FROM block WHERE pinned = 1") == (0,)


async def test_leaves_go_with_their_last_root(answers: AnswerCache, database: Database) -> None:
    one = await store(answers, LONG)
    two = await store(answers, LONG, key=b"2" * 32, model="another")
    await answers.remove(one.raw)
    assert counts(database) == (1, 5, 4)
    assert await text(answers, key=b"2" * 32) == LONG.text
    await answers.remove(two.raw)
    assert counts(database) == (0, 0, 0)


async def test_unpinning_leaves_what_another_pinned_root_needs(
    answers: AnswerCache, database: Database
) -> None:
    one = await store(answers, LONG)
    two = await store(answers, LONG, key=b"2" * 32, model="another")
    await answers.pin(one.raw)
    await answers.pin(two.raw)
    await answers.unpin(one.raw)
    assert database.row("SELECT count(*) FROM block WHERE pinned = 1") == (5,)


async def test_expired_answers_go_with_their_blocks(
    answers: AnswerCache, database: Database
) -> None:
    await store(answers, LONG, ttl=10)
    await store(answers, LONG, key=b"2" * 32, ttl=20)
    kept = await store(answers, ttl=10, key=b"3" * 32)
    await answers.pin(kept.raw)
    for number in range(40):
        await store(answers, answer(str(number)), key=bytes([number]) * 32, ttl=10)
    assert await answers.maintain(NOW + 9) == Swept(0, 0)
    assert await answers.maintain(NOW + 10) == Swept(41, 0)
    assert counts(database) == (2, 6, 4)
    assert await text(answers, key=b"2" * 32, now=NOW + 10) == LONG.text
    assert await answers.maintain(NOW + 20) == Swept(1, 0)
    assert counts(database) == (1, 1, 0)
    # Pinned: kept for ever.
    assert await text(answers, key=b"3" * 32, now=NOW + 10**8) == "Paris"
    await answers.unpin(kept.raw)
    assert await text(answers, key=b"3" * 32, now=NOW + 10**8) is None


async def test_eviction_by_use(database: Database) -> None:
    answers = cache(database, max_bytes=100_000)
    cids = {}
    for number in range(100):
        completion = answer(f"{number:04}" + "x" * 2000)
        cids[number] = await store(
            answers, completion, key=bytes([number]) * 32, now=NOW + number * 100
        )
    await answers.pin(cids[3].raw)
    assert await text(answers, key=bytes([5]) * 32) is not None
    await answers.stat(now=NOW + 20_000)  # writes down that it was used
    swept = await answers.maintain(NOW + 20_000)
    stat = await answers.stat(now=NOW)
    assert swept.evicted > 50
    assert 92_000 < stat.bytes <= 95_000
    assert stat.answers == 100 - swept.evicted
    there = {n for n in cids if await text(answers, key=bytes([n]) * 32) is not None}
    assert {3, 5} < there
    assert there - {3, 5} == set(range(100 - len(there) + 2, 100))
    assert counts(database)[0] == len(there)


async def test_eviction_takes_a_long_answer_whole(database: Database) -> None:
    answers = cache(database, max_bytes=150_000)
    await store(answers, LONG)
    await answers.maintain(NOW)
    assert counts(database) == (0, 0, 0)


async def test_eviction_stops_at_what_is_pinned(database: Database) -> None:
    answers = cache(database, max_bytes=1000)
    cid = await store(answers, LONG)
    await answers.pin(cid.raw)
    await store(answers, key=b"2" * 32)
    assert await answers.maintain(NOW) == Swept(0, 1)
    assert await text(answers) == LONG.text


async def test_upkeep_runs_until_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    database = Database(None)  # no threads, which the clock would not wait for
    answers = cache(database)
    await store(answers, ttl=10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: answers.run(clock=lambda: NOW + trio.current_time() - start))
        start = trio.current_time()
        await trio.sleep(9)
        assert counts(database) == (1, 1, 0)
        await trio.sleep(5)
        assert counts(database) == (0, 0, 0)
        await store(answers)
        assert await text(answers) == "Paris"
        nursery.cancel_scope.cancel()
    assert database.row("SELECT hits FROM answer") == (1,)
    database.close()


# --- when it fails ------------------------------------------------------------------------------


async def test_a_damaged_block_is_a_miss_and_another_alternative_serves(
    answers: AnswerCache, database: Database
) -> None:
    await store(answers, answer("older"), now=NOW - 5)
    cid = await store(answers)
    database.rows("UPDATE block SET data = x'00' WHERE digest = ?", (split(cid.raw)[1],))
    assert await text(answers) == "older"
    assert counts(database) == (1, 1, 0)
    await store(answers)
    assert await text(answers) == "Paris"


async def test_a_damaged_leaf_takes_its_answer_along(
    answers: AnswerCache, database: Database
) -> None:
    await store(answers, LONG)
    database.rows(
        "UPDATE block SET data = x'00' WHERE digest = (SELECT leaf FROM link ORDER BY leaf)"
    )
    assert await text(answers) is None
    assert counts(database) == (0, 0, 0)
    await store(answers, LONG)
    assert await text(answers) == LONG.text


async def test_a_failing_database_is_a_miss(answers: AnswerCache, database: Database) -> None:
    cid = await store(answers)
    database.close()
    assert await answers.lookup(KEY, now=NOW) is None
    assert await answers.store(KEY, ANSWER, model="m", now=NOW) is None
    assert await answers.get(cid.raw, now=NOW) is None
    assert await answers.row(KEY, cid.raw) is None
    assert await answers.listing(now=NOW) == []
    assert (await answers.stat(now=NOW)).answers == 0
    assert await answers.reach(cid.raw) == Reach()
    assert not await answers.pin(cid.raw)
    assert not await answers.unpin(cid.raw)
    assert not await answers.remove(cid.raw)
    assert await answers.maintain(NOW) == Swept(0, 0)


async def test_a_file_damaged_while_in_use_is_begun_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promptmesh.cache.database.CHECKED_SIZE", 0)
    path = tmp_path / "cache.sqlite"
    database = Database(path)
    answers = cache(database)
    for number in range(200):
        await store(answers, answer(str(number) * 500), key=bytes([number]) * 32)
    database.close()
    database = Database(path)
    answers = cache(database)
    with path.open("r+b") as file:
        for offset in range(8192, path.stat().st_size, 8192):
            file.seek(offset)
            file.write(os.urandom(100))
    for number in range(200):
        await answers.lookup(bytes([number]) * 32, now=NOW)
    assert "set aside" in caplog.text
    await store(answers)
    assert await text(answers) == "Paris"
    database.close()
