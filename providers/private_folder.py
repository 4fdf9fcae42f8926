"""A private folder for one run of a program, which is removed with all that is in it.

It may hold a copy of a login. So what a process left that was killed is removed by the next that
makes such a folder, and the programs are ended that still run there: while its maker lives it holds
a lock on the folder, which no other process can mistake (a number may be another's by now, or of
another container), and which keeps those away that tidy up old temporary files.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import trio

logger = logging.getLogger(__name__)

#: Seconds after SIGTERM in which a program may put its things in order, and after SIGKILL in which
#: it must be gone; what is stuck in the kernel is left to it.
TERMINATE_GRACE = 2.0
KILL_GRACE = 0.8
#: Seconds between two looks whether one is gone, of which no event tells.
LOOK = 0.01
#: How the names of all of them begin.
_PREFIX = "promptmesh-run-"


class Folder(NamedTuple):
    """A private folder, which others cannot look into."""

    path: Path

    @property
    def work(self) -> Path:
        """An empty one to work in."""
        return self.path / "work"

    @property
    def temporary(self) -> Path:
        """For its temporary files."""
        return self.path / "tmp"

    def write(self, name: str, text: str) -> Path:
        """Put a small file into it, beside the folder to work in."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
        return path


@contextlib.asynccontextmanager
async def private_folder() -> AsyncIterator[Folder]:
    """A folder that is removed with all that is in it. Raises `OSError`."""
    held = _held()
    with trio.CancelScope(shield=True):  # it must not be made and be forgotten
        folder = await trio.to_thread.run_sync(held.__enter__)
    try:
        yield folder
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(held.__exit__, None, None, None)


@contextlib.contextmanager
def _held() -> Iterator[Folder]:
    """The same for a thread."""
    remove_abandoned()
    folder = Folder(Path(tempfile.mkdtemp(prefix=_PREFIX)))
    lock = None
    try:
        lock = os.open(folder.path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # without locks none is taken for abandoned
            fcntl.flock(lock, fcntl.LOCK_EX)
        folder.work.mkdir()
        folder.temporary.mkdir()
        yield folder
    finally:
        _remove(folder.path)
        if lock is not None:
            os.close(lock)


def remove_abandoned() -> None:
    """Remove those whose makers are gone. Takes seconds where their programs must be ended."""
    try:
        found = list(Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"))
    except OSError:  # there is no place where one could be
        return
    for path in found:
        with contextlib.suppress(OSError):  # it is used, is another's, or has just gone
            _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    """Raises `OSError`."""
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(lock).st_uid == os.geteuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.listdir(lock):  # an empty one is about to be locked
                _end_programs(Folder(path))
                _remove(path)
    finally:
        os.close(lock)


def _end_programs(folder: Folder) -> None:
    """End those that were started there, and what they started."""
    for number, patience in ((signal.SIGTERM, TERMINATE_GRACE), (signal.SIGKILL, KILL_GRACE)):
        until = time.monotonic() + patience
        for program in _programs(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(program, number)
        while _programs(folder) and time.monotonic() < until:
            time.sleep(LOOK)


def _programs(folder: Folder) -> list[int]:
    """The processes that have it for their temporary files. None where no `/proc` tells."""
    mark = b"\0TMPDIR=%s\0" % os.fsencode(folder.temporary)
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it is another user's, or has just ended
            if mark in b"\0" + environment.read_bytes():
                found.append(int(environment.parent.name))
    return found


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:  # the owner of the disk sees it
        logger.warning("a private folder is left behind: %s", error)
