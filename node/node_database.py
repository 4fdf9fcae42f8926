"""`node.sqlite`: what nobody can compute again: what peers may, and who spent what.

Unlike `cache.sqlite` it may not be thrown away. So a file of an older version is migrated, one step
after the other in one transaction each; and one that is damaged, or was written by a newer
promptmesh, is an error that says what to do. Nothing is ever begun anew in its place.

WAL with synchronous=NORMAL, as for the cache: what was committed survives the end of the process,
however that comes.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .home import HomeError

logger = logging.getLogger(__name__)

#: Marks the file as ours ("PMnd"), and says what `file` shows of it.
APPLICATION_ID = 0x504D6E64
#: Step N takes a file of version N to version N + 1. A step that was released is never changed.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE peer (
        id TEXT PRIMARY KEY,
        node TEXT NOT NULL,
        serve INTEGER NOT NULL,
        ask INTEGER NOT NULL,
        cache INTEGER NOT NULL,
        blocked INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    """,
    """
    CREATE TABLE usage (
        day INTEGER NOT NULL,
        asker TEXT NOT NULL,
        peer TEXT NOT NULL,
        provider TEXT NOT NULL,
        model TEXT NOT NULL,
        cache TEXT NOT NULL,
        requests INTEGER NOT NULL,
        unfinished INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        money REAL NOT NULL,
        tokens_saved INTEGER NOT NULL,
        seconds_saved REAL NOT NULL,
        money_saved REAL NOT NULL,
        PRIMARY KEY (day, asker, peer, provider, model, cache)
    ) STRICT, WITHOUT ROWID;
    """,
)
#: Seconds that a write waits for another process (a `promptmesh` command) to finish its own.
BUSY_TIMEOUT = 2.0
#: What the methods raise when the file fails them.
DatabaseError = sqlite3.Error


class NodeDatabase:
    """The one owner of the connection. All calls come from the thread that opened it."""

    def __init__(self, path: Path | None) -> None:
        """Open the file, making it if there is none; None: in memory.

        Raises `HomeError`, which says what to do.
        """
        self._path = path
        try:
            self._connection = _opened(path)
        except (sqlite3.Error, OSError) as error:
            raise HomeError(_advice(path, error)) from error

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """All rows. Raises `DatabaseError`."""
        return self._connection.execute(sql, parameters).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing. Raises `DatabaseError`; nothing may be awaited inside."""
        with _transaction(self._connection) as connection:
            yield connection

    @contextmanager
    def apart(self) -> Iterator[None]:
        """While inside no file is open, as SQLite wants it of a process that forks: the child would
        believe it had the locks of its parent. Nothing may be asked meanwhile. Never raises: what
        cannot be opened again fails who asks it."""
        if self._path is None:
            yield
            return
        self.close()
        try:
            yield
        finally:
            try:
                self._connection = _opened(self._path)
            except (sqlite3.Error, OSError) as error:
                logger.error("%s", _advice(self._path, error))

    def close(self) -> None:
        """Close it. Never raises."""
        with suppress(sqlite3.Error):
            self._connection.close()


class _Unusable(sqlite3.DatabaseError):
    """It is damaged, or is something else."""


def _opened(path: Path | None) -> sqlite3.Connection:
    """Raises `sqlite3.Error` or `OSError`."""
    if path is None:
        connection = sqlite3.connect(":memory:", isolation_level=None)
    else:
        # Who asked what is private: the file is its owner's, and so are those beside it. One that
        # is there is not opened here: to close it would take from this process the locks that it
        # may have on it already, and with them what was not copied yet (sqlite.org/howtocorrupt).
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None)
    try:
        _prepare(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection) -> None:
    (result,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if result != "ok":
        raise _Unusable(result)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    with _transaction(connection):
        # Read inside: another process may be doing the same.
        version = _version(connection)
        for step in MIGRATIONS[version:]:
            for statement in filter(str.strip, step.split(";")):
                connection.execute(statement)
        if version < len(MIGRATIONS):
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


def _version(connection: sqlite3.Connection) -> int:
    """The version of what is there; 0: nothing."""
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    (kind,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if not tables and not kind:
        return 0
    if kind != APPLICATION_ID or version < 1:
        raise _Unusable("it is no file of promptmesh's")
    if version > len(MIGRATIONS):
        raise _TooNew
    return int(version)


class _TooNew(sqlite3.DatabaseError):
    """A newer promptmesh wrote it."""


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        raise


def _advice(path: Path | None, error: Exception) -> str:
    """What is wrong with the file, and what to do about it."""
    if isinstance(error, _TooNew):
        return f"{path} was written by a newer promptmesh: run that one, or one newer still"
    code = getattr(error, "sqlite_errorcode", None)
    damage = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    if isinstance(error, _Unusable) or (code is not None and code & 0xFF in damage):
        return (
            f"{path} is damaged ({error}). It holds what peers are denied, and what was spent: "
            "bring it back from a copy together with its -wal file. Or move these files away: then "
            "all members are allowed everything again (`promptmesh peers deny`, `block`), and the "
            "counts begin at nothing"
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return f"{path} cannot be opened: {reason}"
