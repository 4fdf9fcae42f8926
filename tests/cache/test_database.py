import logging
import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from promptmesh.cache.database import CHECKED_SIZE, Database


def put(database: Database, name: bytes, data: bytes = b"x") -> None:
    with database.transaction() as connection:
        connection.execute("INSERT INTO block VALUES (?, ?, 0, 0, 0, ?)", (name, len(data), data))


def names(database: Database) -> list[bytes]:
    return [name for (name,) in database.rows("SELECT digest FROM block ORDER BY digest")]


def test_settings(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    database = Database(path)
    pragmas = ("journal_mode", "synchronous", "page_size", "auto_vacuum", "foreign_keys")
    assert [database.row(f"PRAGMA {name}")[0] for name in pragmas] == ["wal", 1, 4096, 2, 1]
    put(database, b"a")
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    database.close()


def test_what_was_written_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    database = Database(path)
    put(database, b"a")
    database.close()
    assert sorted(os.listdir(tmp_path)) == ["cache.sqlite"]
    database = Database(path)
    assert names(database) == [b"a"]
    database.close()


def test_it_is_opened_twice_and_both_are_seen_by_others(tmp_path: Path) -> None:
    """A descriptor that is closed takes all locks of its process along, and who closes the file
    elsewhere then takes itself for the last and removes what was not copied yet."""
    path = tmp_path / "cache.sqlite"
    first = Database(path)
    second = Database(path)
    other = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('PRAGMA user_version')"
    )
    subprocess.run([sys.executable, "-c", f"{other}.fetchone(); c.close()", str(path)], check=True)
    put(first, b"a")
    assert names(second) == [b"a"]
    assert (tmp_path / "cache.sqlite-wal").exists()
    second.close()
    first.close()


def test_a_transaction_is_all_or_nothing(tmp_path: Path) -> None:
    database = Database(tmp_path / "cache.sqlite")

    def fail_halfway() -> None:
        with database.transaction() as connection:
            connection.execute("INSERT INTO block VALUES (x'aa', 1, 0, 0, 0, x'00')")
            raise KeyError("halfway")

    with pytest.raises(KeyError):
        fail_halfway()
    assert names(database) == []
    assert database.row("SELECT blocks, bytes FROM total") == (0, 0)
    put(database, b"a")
    assert database.row("SELECT blocks, bytes FROM total") == (1, 1)
    database.close()


@pytest.mark.parametrize(
    "content", [b"no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_a_damaged_file_is_set_aside(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cache.sqlite"
    path.write_bytes(content)
    database = Database(path)
    put(database, b"a")
    assert names(database) == [b"a"]
    assert (tmp_path / "cache.sqlite.damaged").read_bytes() == content
    assert "cache.sqlite.damaged" in caplog.text
    database.close()


def filled(path: Path) -> int:
    database = Database(path)
    for number in range(300):
        put(database, number.to_bytes(32, "big"), os.urandom(2000))
    database.close()
    return path.stat().st_size


def scribble(path: Path, size: int) -> None:
    """Every page but the first becomes nonsense."""
    with path.open("r+b") as file:
        for offset in range(8192, size, 8192):
            file.seek(offset)
            file.write(b"\xff" * 64)


def test_damage_inside_is_found_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    scribble(path, filled(path))
    database = Database(path)
    assert names(database) == []
    put(database, b"a")
    assert (tmp_path / "cache.sqlite.damaged").exists()
    database.close()


def test_damage_is_found_when_it_is_met(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promptmesh.cache.database.CHECKED_SIZE", 0)
    assert CHECKED_SIZE > 0
    path = tmp_path / "cache.sqlite"
    size = filled(path)
    database = Database(path)
    scribble(path, size)
    assert database.generation == 0
    key = (150).to_bytes(32, "big")
    sql = "SELECT data FROM block WHERE digest = ?"
    assert database.attempt("looking", lambda: database.row(sql, (key,)), None) is None
    assert database.generation == 1
    assert "set aside" in caplog.text
    put(database, b"a")
    assert names(database) == [b"a"]
    database.close()
    database = Database(path)
    assert names(database) == [b"a"]
    database.close()


@pytest.mark.parametrize("sql", ["PRAGMA user_version = 99", "PRAGMA application_id = 1"])
def test_another_version_is_set_aside(tmp_path: Path, sql: str) -> None:
    path = tmp_path / "cache.sqlite"
    database = Database(path)
    put(database, b"a")
    database.rows(sql)
    database.close()
    database = Database(path)
    assert names(database) == []
    assert (tmp_path / "cache.sqlite.damaged").exists()
    database.close()


def test_a_foreign_database_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    foreign = sqlite3.connect(path)
    foreign.execute("CREATE TABLE precious (x)")
    foreign.close()
    database = Database(path)
    assert names(database) == []
    database.close()
    foreign = sqlite3.connect(tmp_path / "cache.sqlite.damaged")
    assert foreign.execute("SELECT count(*) FROM precious").fetchone() == (0,)
    foreign.close()


def test_without_a_place_it_lives_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(tmp_path / "nowhere" / "cache.sqlite")
    put(database, b"a")
    assert names(database) == [b"a"]
    assert "in memory" in caplog.text
    database.close()


def test_a_row_of_faults_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    database = Database(tmp_path / "cache.sqlite")
    other = sqlite3.connect(tmp_path / "cache.sqlite", isolation_level=None)
    database.rows("PRAGMA busy_timeout = 0")

    def write() -> str:
        put(database, b"a")
        return "written"

    for _ in range(2):
        caplog.clear()
        other.execute("BEGIN IMMEDIATE")
        assert database.attempt("writing", write, "missed") == "missed"
        assert database.attempt("writing", write, "missed") == "missed"
        assert [record.message for record in caplog.records] == [
            "the cache failed (writing: database is locked) and does without until it works"
        ]
        other.execute("ROLLBACK")
        assert database.attempt("writing", write, "missed") == "written"
        database.rows("DELETE FROM block")
    other.close()
    database.close()


def test_a_closed_one_is_a_fault_like_any_other(tmp_path: Path) -> None:
    database = Database(tmp_path / "cache.sqlite")
    database.close()
    database.close()
    assert database.attempt("reading", lambda: len(names(database)), -1) == -1
    assert (tmp_path / "cache.sqlite").exists()


async def test_checkpoint_empties_the_log(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    database = Database(path)
    await database.checkpoint()
    before = path.stat().st_size
    for number in range(100):
        put(database, number.to_bytes(32, "big"), os.urandom(2000))
    assert path.stat().st_size == before
    await database.checkpoint()
    assert path.stat().st_size > before + 200_000
    assert len(names(database)) == 100
    database.close()


async def test_checkpoint_in_memory_is_nothing() -> None:
    database = Database(None)
    put(database, b"a")
    await database.checkpoint()
    assert names(database) == [b"a"]
    database.close()


def test_room_goes_back_to_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    size = filled(path)
    database = Database(path)
    database.rows("DELETE FROM block")
    for _ in range(10):
        database.shrink()
    database.close()
    assert path.stat().st_size < size / 2
