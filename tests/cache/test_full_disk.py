"""A full disk: nothing new is stored, what is there stays, and nobody but the log hears of it."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from promptmesh.cache.answers import AnswerCache, Limits
from promptmesh.cache.blocks import SqliteBlocks
from promptmesh.cache.cid import cid_bytes
from promptmesh.cache.database import Database
from promptmesh.providers.base import Completion

NOW = 1_000_000.0
LARGE = bytes(1_000_000)
SIZE = 4 * 1024 * 1024


@dataclass
class Disk:
    """A small disk, and how it gets more room."""

    path: Path
    fill: Callable[[Database], None]
    make_room: Callable[[Database], None]


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[Disk]:
    """A real one, in memory."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    filler = folder / "filler"
    try:
        filler.write_bytes(bytes(SIZE // 2))
        yield Disk(folder, lambda database: None, lambda database: filler.unlink())
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def limited(folder: Path) -> Iterator[Disk]:
    """SQLite's own limit, which fails with the same error."""
    folder.mkdir()

    def limit(pages: int) -> Callable[[Database], None]:
        def set_limit(database: Database) -> None:
            database.rows(f"PRAGMA max_page_count = {pages}")

        return set_limit

    yield Disk(folder, limit(200), limit(2**30))


@pytest.fixture(params=[mounted, limited], ids=["file system", "page limit"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    with request.param(tmp_path / "disk") as disk:
        yield disk


def cache(database: Database) -> AnswerCache:
    return AnswerCache(database, SqliteBlocks(database, clock=lambda: NOW), peer="me")


async def store(answers: AnswerCache, number: int) -> bool:
    """An answer of 20 kB; was it stored?"""
    completion = Completion(text=f"{number} " + os.urandom(10_000).hex(), finish_reason="stop")
    key = number.to_bytes(32, "big")
    return await answers.store(key, completion, model="m", now=NOW) is not None


async def text(answers: AnswerCache, number: int) -> str | None:
    found = await answers.lookup(number.to_bytes(32, "big"), now=NOW)
    return None if found is None else found.completion.text.split()[0]


async def test_a_full_disk_is_a_miss(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    database = Database(disk.path / "cache.sqlite")
    disk.fill(database)
    answers = cache(database)
    stored = 0
    with caplog.at_level(logging.WARNING):
        while await store(answers, stored):
            stored += 1
            assert stored < 1000
        assert stored > 10
        for _ in range(10):
            assert not await store(answers, stored)
        assert not await SqliteBlocks(database).put(cid_bytes(LARGE, "raw"), LARGE)
        await answers.maintain(NOW)
    # Said once, and not for every answer.
    faults = [r.getMessage() for r in caplog.records if "the cache failed" in r.getMessage()]
    assert len(faults) == 1
    assert "full" in faults[0]
    assert "set aside" not in caplog.text
    # All that was acknowledged is there.
    assert [await text(answers, n) for n in range(stored)] == [str(n) for n in range(stored)]
    disk.make_room(database)
    assert await store(answers, stored)
    assert await text(answers, stored) == str(stored)
    database.close()
    database = Database(disk.path / "cache.sqlite")
    answers = cache(database)
    assert [await text(answers, n) for n in (0, stored)] == ["0", str(stored)]
    assert database.rows("PRAGMA integrity_check") == [("ok",)]
    database.close()


async def test_a_node_starts_on_a_full_disk(disk: Disk) -> None:
    path = disk.path / "cache.sqlite"
    database = Database(path)
    disk.fill(database)
    answers = cache(database)
    stored = 0
    while await store(answers, stored):
        stored += 1
    database.close()
    database = Database(path)
    disk.fill(database)
    answers = cache(database)
    assert [await text(answers, n) for n in range(stored)] == [str(n) for n in range(stored)]
    await answers.maintain(NOW)
    disk.make_room(database)
    # Nothing of it is left in the way.
    small = AnswerCache(
        database, SqliteBlocks(database), peer="me", limits=Limits(max_bytes=200_000)
    )
    await small.maintain(NOW)
    assert (await small.stat(now=NOW)).bytes <= 200_000
    assert await store(small, stored + 1)
    database.close()
