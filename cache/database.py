"""`cache.sqlite`: blocks, the index of answers and claims, in one file that may be thrown away.

WAL with synchronous=NORMAL: a commit takes 0.1 ms and survives the end of the process, however that
comes; a power cut may lose the last ones and never damages the file. Reads and commits are made
where they are called for, as they are shorter than a change of threads; only the checkpoint, which
waits for the disk, has a thread of its own.

A fault never reaches who asks the cache: `attempt` logs it and gives what a miss would give. A
damaged file is set aside and begun again.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import trio

from .schema import APPLICATION_ID, TABLES, VERSION

logger = logging.getLogger(__name__)

T = TypeVar("T")
#: Equal as long as nothing has changed.
Stamp = tuple[int, int, int]
#: Seconds within which what other processes change is noticed: asking costs as much as all else.
OTHERS = 0.05

#: Bytes. A commit writes some eight pages whole, of which it changes little: with pages of twice
#: the size it takes a third longer.
PAGE_SIZE = 4096
#: Seconds that a commit waits for another process (a `promptmesh cache` command) to finish its own.
BUSY_TIMEOUT = 0.25
#: Pages in the log after which a commit copies them itself (64 MiB), if the thread lags behind.
WAL_PAGES = 64 * 1024 * 1024 // PAGE_SIZE
#: Largest file that is looked through when it is opened, which takes 0.1 s; in a larger one damage
#: shows when it is met.
CHECKED_SIZE = 32 * 1024 * 1024
#: Pages given back at a time, which takes 1 ms.
VACUUMED = 128
#: Set aside under this name; a former one is overwritten.
DAMAGED = ".damaged"

_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class _Unusable(sqlite3.DatabaseError):
    """The file is damaged or is something else."""


class Database:
    """The one owner of the connection. All calls come from the thread that opened it."""

    def __init__(self, path: Path | None) -> None:
        """Open the file, making it if there is none; None: in memory.

        Never raises for what is in the file or wrong with it: a damaged one is set aside, and
        where none can be had at all the cache lives in memory.
        """
        self._path = path
        #: Counts the files begun: what was remembered of the one before is void.
        self.generation = 0
        self._faulty = False
        self._checkpointed = 0
        #: How often other processes have changed the file, and when to look again.
        self._others, self._ask_again = 0, 0.0
        self._limiter = trio.CapacityLimiter(1)
        self._connection = self._open()

    # --- reading and writing --------------------------------------------------------------------

    def rows(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        """All rows. Raises `sqlite3.Error`."""
        return self._connection.execute(sql, parameters).fetchall()

    def row(self, sql: str, parameters: tuple[Any, ...] = ()) -> Any:
        """The first row, or None. Raises `sqlite3.Error`."""
        return self._connection.execute(sql, parameters).fetchone()

    def stamp(self) -> Stamp:
        """Another one after each change to the file. Raises `sqlite3.Error`.

        At once after one of this process, within `OTHERS` after one of another.
        """
        now = time.monotonic()
        if now >= self._ask_again:
            self._ask_again = now + OTHERS
            (self._others,) = self._connection.execute("PRAGMA data_version").fetchone()
        return self.generation, self._connection.total_changes, self._others

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing. Raises `sqlite3.Error`; nothing may be awaited inside."""
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
            raise
        self._faulty = False

    def attempt(self, what: str, action: Callable[[], T], otherwise: T) -> T:
        """Do it; after a fault of the database, which is logged, `otherwise`."""
        try:
            return action()
        except sqlite3.Error as error:
            self._fault(what, error)
            return otherwise

    # --- upkeep ---------------------------------------------------------------------------------

    async def checkpoint(self) -> None:
        """Copy what was committed from the log into the file, in a thread. Never raises."""
        if self._path is None:
            return
        try:
            changes = self._connection.total_changes
            if changes != self._checkpointed:
                await trio.to_thread.run_sync(_checkpoint, self._path, limiter=self._limiter)
                self._checkpointed = changes
        except sqlite3.Error as error:
            self._fault("checkpoint", error)

    def shrink(self) -> None:
        """Give some of the room back to the disk, if a quarter of the file is free."""
        free, pages = (self.row(f"PRAGMA {name}")[0] for name in ("freelist_count", "page_count"))
        if free * 4 > pages:
            # Not by execute(), which would stop after the first page.
            self._connection.executescript(f"PRAGMA incremental_vacuum({VACUUMED})")

    @contextmanager
    def apart(self) -> Iterator[None]:
        """While inside no file is open, as SQLite wants it of a process that forks: the child would
        believe it had the locks of its parent. Nothing may be asked meanwhile."""
        if self._path is None:
            yield
            return
        self.close()
        try:
            yield
        finally:
            self._begin_again()

    def close(self) -> None:
        """Close it; what is asked afterwards is a fault like any other. Never raises."""
        with suppress(sqlite3.Error):
            self._connection.close()

    # --- opening --------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        if self._path is None:
            return _prepared(sqlite3.connect(":memory:", isolation_level=None))
        try:
            try:
                return _opened(self._path)
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                _set_aside(self._path, error)
                return _opened(self._path)
        except (sqlite3.Error, OSError) as error:
            logger.error("cannot open %s (%s): answers are kept in memory", self._path, error)
            self._path = None
            return self._open()

    def _fault(self, what: str, error: sqlite3.Error) -> None:
        """Log the first of a row of faults, and begin again where the file is damaged."""
        if not self._faulty:
            self._faulty = True
            logger.warning("the cache failed (%s: %s) and does without until it works", what, error)
        if _is_damage(error) and self._path is not None:
            self.close()
            try:
                _set_aside(self._path, error)
                self._begin_again()
            except OSError as cause:
                logger.error("cannot set %s aside: %s", self._path, cause)

    def _begin_again(self) -> None:
        self.generation += 1
        self._checkpointed = 0
        self._connection = self._open()


def _opened(path: Path) -> sqlite3.Connection:
    """Raises `sqlite3.Error` or `OSError`."""
    # Answers are private: the file is its owner's, and so are those that SQLite puts beside it.
    # One that is there is left alone: to close it here would take from this process the locks that
    # it may have on it already, and with them what was not copied yet (sqlite.org/howtocorrupt).
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None)
    try:
        _prepared(connection)
        if path.stat().st_size <= CHECKED_SIZE:
            (result,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if result != "ok":
                raise _Unusable(result)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepared(connection: sqlite3.Connection) -> sqlite3.Connection:
    connection.executescript(
        f"""
        PRAGMA page_size = {PAGE_SIZE};
        PRAGMA auto_vacuum = INCREMENTAL;
        PRAGMA journal_mode = WAL;
        PRAGMA synchronous = NORMAL;
        PRAGMA wal_autocheckpoint = {WAL_PAGES};
        PRAGMA journal_size_limit = {WAL_PAGES * PAGE_SIZE};
        PRAGMA cache_size = -8000;
        PRAGMA foreign_keys = ON;
        PRAGMA recursive_triggers = ON;
        """
    )
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if not tables:
        connection.executescript(
            f"""
            BEGIN IMMEDIATE;
            {TABLES}
            PRAGMA application_id = {APPLICATION_ID};
            PRAGMA user_version = {VERSION};
            COMMIT;
            """
        )
    (kind,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if (kind, version) != (APPLICATION_ID, VERSION):
        raise _Unusable(f"it is of another kind or version ({kind:#x}, {version})")
    return connection


def _is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, _Unusable) or (code is not None and code & 0xFF in _DAMAGE)


def _set_aside(path: Path, error: sqlite3.Error) -> None:
    aside = f"{path}{DAMAGED}"
    logger.error("%s is damaged (%s): set aside as %s and begun again", path, error, aside)
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{aside}{suffix}")


def _checkpoint(path: Path) -> None:
    with _copying, closing(sqlite3.connect(path, timeout=0)) as connection:
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()


# A fork waits for it: what it holds of SQLite's locks at that moment, the child could never take.
_copying = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_copying.acquire,
        after_in_parent=_copying.release,
        after_in_child=_copying.release,
    )
