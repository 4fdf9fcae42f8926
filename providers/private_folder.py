"""A private folder for one run of a program, which is removed with all that is in it.

It may hold a copy of a login. So what a process left that was killed is removed by the next that
makes such a folder: while its maker lives it holds a lock on the folder, which no other process can
mistake (a number may be another's by now, or of another container), and which keeps those away that
tidy up old temporary files.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import trio

logger = logging.getLogger(__name__)

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
    _remove_abandoned()
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


def _remove_abandoned() -> None:
    """Remove those whose makers are gone."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # it is used, is another's, or has just gone
            _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    """Raises `OSError`."""
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(lock).st_uid == os.geteuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.listdir(lock):  # an empty one is about to be locked
                _remove(path)
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:  # the owner of the disk sees it
        logger.warning("a private folder is left behind: %s", error)
