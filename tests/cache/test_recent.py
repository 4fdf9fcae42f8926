"""What is kept ready never differs from what a lookup in the file would give."""

import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from promptmesh.cache import database as databases
from promptmesh.cache import recent
from promptmesh.cache.answers import AnswerCache
from promptmesh.cache.blocks import SqliteBlocks
from promptmesh.cache.cid import Cid
from promptmesh.cache.database import Database
from promptmesh.providers.base import Completion

NOW = 1_000_000.0
KEY = b"k" * 32


def cache(database: Database) -> AnswerCache:
    return AnswerCache(database, SqliteBlocks(database, clock=lambda: NOW), peer="me")


async def store(answers: AnswerCache, text: str, key: bytes = KEY, **more: Any) -> Cid:
    settings = {"model": "m", "now": NOW, **more}
    completion = Completion(text=text, finish_reason="stop")
    stored = await answers.store(key, completion, **settings)
    assert stored is not None
    return stored.cid


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.sqlite"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    database = Database(path)
    yield database
    database.close()


@pytest.fixture
def looked(database: Database, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The queries that looked for rows."""
    queries: list[str] = []
    rows = database.rows

    def counted(sql: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        queries.append(sql)
        return rows(sql, parameters)

    monkeypatch.setattr(database, "rows", counted)
    return queries


async def test_the_second_lookup_does_not_read_the_file(
    database: Database, looked: list[str]
) -> None:
    answers = cache(database)
    cid = await store(answers, "one")
    first = await answers.lookup(KEY, now=NOW + 1)
    second = await answers.lookup(KEY, now=NOW + 9)
    assert first is not None
    assert second is not None
    assert len(looked) == 1
    assert second.completion is first.completion
    assert (first.age, second.age) == (1, 9)
    row = await answers.row(KEY, cid.raw)
    assert row is not None
    await answers.stat(now=NOW)  # writes the hits down
    row = await answers.row(KEY, cid.raw)
    assert row is not None
    assert row.hits == 2


Change = Callable[[AnswerCache, Database, Path, Cid], Awaitable[Any]]


async def own_alternative(answers: AnswerCache, database: Database, path: Path, cid: Cid) -> None:
    await store(answers, "better", now=NOW + 1)


async def removal(answers: AnswerCache, database: Database, path: Path, cid: Cid) -> None:
    assert await answers.remove(cid.raw)


async def other_process(answers: AnswerCache, database: Database, path: Path, cid: Cid) -> None:
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA foreign_keys = ON")
        other.execute("DELETE FROM block")


async def another_node(answers: AnswerCache, database: Database, path: Path, cid: Cid) -> None:
    other = Database(path)
    await store(cache(other), "better", now=NOW + 1)
    other.close()


async def damage(answers: AnswerCache, database: Database, path: Path, cid: Cid) -> None:
    with database.transaction() as connection:
        connection.execute("UPDATE block SET data = x'00'")


@pytest.mark.parametrize("change", [own_alternative, removal, other_process, another_node, damage])
async def test_after_any_change_the_file_counts(
    change: Change, database: Database, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "OTHERS", 0)
    answers = cache(database)
    cid = await store(answers, "one")
    assert await answers.lookup(KEY, now=NOW)
    await change(answers, database, path, cid)
    found = await answers.lookup(KEY, now=NOW + 2)
    fresh = Database(path)
    assert found == await cache(fresh).lookup(KEY, now=NOW + 2)
    fresh.close()
    assert found is None or found.completion.text == "better"


async def test_an_answer_that_is_over_is_not_given_but_a_pinned_one_is(database: Database) -> None:
    answers = cache(database)
    cid = await store(answers, "one", ttl=10)
    assert await answers.lookup(KEY, now=NOW + 9)
    assert await answers.lookup(KEY, now=NOW + 10) is None
    await answers.pin(cid.raw)
    assert await answers.lookup(KEY, now=NOW + 9)
    assert await answers.lookup(KEY, now=NOW + 10)


async def test_what_a_lookup_asks_for_separates(database: Database) -> None:
    answers = cache(database)
    await store(answers, "private", shared=False, weights="w")
    assert await answers.lookup(KEY, now=NOW + 5)
    assert await answers.lookup(KEY, now=NOW + 5, shared_only=True) is None
    assert await answers.lookup(KEY, now=NOW + 5, weights="v") is None
    assert await answers.lookup(KEY, now=NOW + 5, max_age=4) is None
    assert await answers.lookup(KEY, now=NOW + 5, max_age=5)
    assert await answers.lookup(b"x" * 32, now=NOW + 5) is None


async def test_its_memory_is_bounded(
    database: Database, looked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent, "MAX_BYTES", 1000)
    answers = cache(database)
    keys = [bytes([number]) * 32 for number in range(20)]
    for key in keys:
        await store(answers, f"{key[0]:0100}", key)
    for _ in range(2):
        for key in keys:
            assert await answers.lookup(key, now=NOW)
    # Twenty of 150 bytes do not fit: the first ones had to go before they were asked again.
    assert len(looked) == 40


async def test_a_large_answer_is_read_each_time(database: Database, looked: list[str]) -> None:
    answers = cache(database)
    await store(answers, "x" * 70_000)
    for _ in range(2):
        assert await answers.lookup(KEY, now=NOW)
    assert len(looked) == 2
