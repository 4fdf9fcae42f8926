"""`node.sqlite`: made, migrated, and never begun anew."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from promptmesh.node import node_database
from promptmesh.node.home import HomeError
from promptmesh.node.node_database import MIGRATIONS, NodeDatabase


def write(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def user_version(path: Path) -> int:
    connection = sqlite3.connect(path)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    connection.close()
    return int(version)


def test_it_is_opened_twice_and_both_are_seen_by_others(tmp_path: Path) -> None:
    """A descriptor that is closed takes all locks of its process along, and who closes the file
    elsewhere then takes itself for the last and removes what was not copied yet."""
    path = tmp_path / "node.sqlite"
    first = NodeDatabase(path)
    second = NodeDatabase(path)
    other = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('PRAGMA user_version')"
    )
    subprocess.run([sys.executable, "-c", f"{other}.fetchone(); c.close()", str(path)], check=True)
    with first.transaction() as connection:
        connection.execute("INSERT INTO peer VALUES ('p', 'n', 0, 1, 1, 0)")
    assert second.rows("SELECT id FROM peer") == [("p",)]
    assert (tmp_path / "node.sqlite-wal").exists()
    second.close()
    first.close()


@pytest.mark.parametrize("there_before", [False, True])
def test_only_its_owner_reads_it(tmp_path: Path, there_before: bool) -> None:
    path = tmp_path / "node.sqlite"
    if there_before:
        path.touch(mode=0o644)
    database = NodeDatabase(path)
    with database.transaction() as connection:
        connection.execute("INSERT INTO peer VALUES ('p', 'n', 0, 1, 1, 0)")
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["node.sqlite", "node.sqlite-shm", "node.sqlite-wal"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    database.close()


def test_what_was_written_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "node.sqlite"
    for _ in range(2):
        database = NodeDatabase(path)
        with database.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO peer VALUES ('p', 'n', 0, 1, 1, 0)")
        database.close()
    database = NodeDatabase(path)
    assert database.rows("SELECT id, node FROM peer") == [("p", "n")]
    database.close()
    assert user_version(path) == len(MIGRATIONS)


def test_a_transaction_is_all_or_nothing() -> None:
    database = NodeDatabase(None)

    def write_and_fail() -> None:
        with database.transaction() as connection:
            connection.execute("INSERT INTO peer VALUES ('p', 'n', 0, 1, 1, 0)")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    assert database.rows("SELECT * FROM peer") == []
    database.close()


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS) + 1))
def test_every_older_version_is_migrated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    path = tmp_path / "node.sqlite"
    monkeypatch.setattr(node_database, "MIGRATIONS", MIGRATIONS[:version])
    database = NodeDatabase(path)
    with database.transaction() as connection:
        connection.execute("INSERT INTO peer VALUES ('p', 'n', 0, 1, 1, 0)")
    database.close()
    assert user_version(path) == version
    later = "CREATE TABLE later (x INTEGER) STRICT; INSERT INTO later VALUES (7);"
    monkeypatch.setattr(node_database, "MIGRATIONS", (*MIGRATIONS, later))
    database = NodeDatabase(path)
    assert database.rows("SELECT x, id FROM later, peer") == [(7, "p")]
    database.close()


def test_a_step_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "node.sqlite"
    NodeDatabase(path).close()
    broken = "CREATE TABLE later (x INTEGER); CREATE TABLE peer (x INTEGER);"
    monkeypatch.setattr(node_database, "MIGRATIONS", (*MIGRATIONS, broken))
    with pytest.raises(HomeError, match="already exists"):
        NodeDatabase(path)
    assert user_version(path) == len(MIGRATIONS)
    monkeypatch.undo()
    database = NodeDatabase(path)
    assert database.rows("SELECT name FROM sqlite_schema WHERE name = 'later'") == []
    database.close()


def test_a_newer_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "node.sqlite"
    NodeDatabase(path).close()
    write(path, f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    before = path.read_bytes()
    with pytest.raises(HomeError, match="newer promptmesh: run that one"):
        NodeDatabase(path)
    assert path.read_bytes() == before


def test_a_damaged_file_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "node.sqlite"
    damaged = os.urandom(8192)
    path.write_bytes(damaged)
    with pytest.raises(HomeError, match=r"is damaged .* bring it back from a copy .* move"):
        NodeDatabase(path)
    assert path.read_bytes() == damaged


def test_a_damaged_page_is_found(tmp_path: Path) -> None:
    path = tmp_path / "node.sqlite"
    database = NodeDatabase(path)
    with database.transaction() as connection:
        connection.executemany(
            "INSERT INTO peer VALUES (?, 'n', 0, 1, 1, 0)", [(f"{n:0200}",) for n in range(200)]
        )
    database.close()
    data = bytearray(path.read_bytes())
    data[8192:12288] = bytes(4096)
    path.write_bytes(data)
    with pytest.raises(HomeError, match="is damaged"):
        NodeDatabase(path)


def test_another_programs_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "node.sqlite"
    write(path, "CREATE TABLE theirs (x)")
    with pytest.raises(HomeError, match="no file of promptmesh's"):
        NodeDatabase(path)
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT name FROM sqlite_schema").fetchall() == [("theirs",)]
    connection.close()


def test_a_folder_in_its_place_is_said(tmp_path: Path) -> None:
    path = tmp_path / "node.sqlite"
    path.mkdir()
    with pytest.raises(HomeError, match="cannot be opened"):
        NodeDatabase(path)
