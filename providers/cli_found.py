"""Finds a vendor's program on this machine, and remembers what it says of itself.

Each question to such a program costs a process: 20 ms of one, 4 s of another.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Generic, TypeVar

import trio

T = TypeVar("T")

#: Seconds after which it is asked again although nothing has changed.
LIFETIME = 600.0


def find(command: str, environment: Mapping[str, str]) -> str | None:
    """Where the program is: a path as it is, a name by the environment's PATH."""
    return shutil.which(os.path.expanduser(command), path=environment.get("PATH", os.defpath))


def version_in(text: str) -> tuple[int, ...]:
    """The first version that a text names, as numbers; without one: none."""
    found = re.search(r"\d+(?:\.\d+)+", text[:4096])
    return tuple(int(part[:9]) for part in found[0].split(".")) if found else ()


def version_text(version: Iterable[int]) -> str:
    """Such a version for people."""
    return ".".join(map(str, version))


class Remembered(Generic[T]):
    """What was found out, until one of some files changes or time has passed."""

    def __init__(self, lifetime: float = LIFETIME) -> None:
        """`lifetime` in seconds."""
        self._lifetime = lifetime
        self._lock = trio.Lock()
        self._state: object = None
        self._until = 0.0
        self._known: list[T] = []

    async def get(self, files: Iterable[str], ask: Callable[[], Awaitable[T]]) -> T:
        """What `ask` found out while the files were as they are. Who comes meanwhile waits."""
        async with self._lock:
            state = tuple((name, *state_of(name)) for name in files)
            if not self._known or state != self._state or trio.current_time() >= self._until:
                self._known = [await ask()]
                self._state, self._until = state, trio.current_time() + self._lifetime
            return self._known[0]


def state_of(name: str) -> tuple[int, ...]:
    """What changes of a file when it is written; empty: there is none."""
    try:
        found = os.stat(name)
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino
