"""Private folders: what a killed process left is removed by the next, and nothing else is."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from promptmesh.providers import private_folder as module
from promptmesh.providers.private_folder import Folder, private_folder

#: Has a folder with a login in it, and a program that waits there, until it is killed.
HOLDER = """
import sys, tempfile, trio
from promptmesh.providers.child import open_child
from promptmesh.providers.private_folder import private_folder

async def main():
    waits = [sys.executable, "-I", "-S", "-c", "import time; print(1, flush=True); time.sleep(60)"]
    async with private_folder() as folder, open_child(waits, {}, folder) as child:
        folder.write("home/login.json", "secret")
        await child.line()
        print(folder.path, child.pid, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where all of them are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def names(place: Path) -> set[str]:
    """What there is."""
    return set(os.listdir(place))


def runs(pid: int) -> bool:
    """Does it run? One that has ended may wait to be asked how."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def holder(place: Path) -> Iterator[tuple[subprocess.Popen[str], Path, int]]:
    """Another process, its folder, and the number of its program."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        env={**os.environ, "TMPDIR": str(place)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        try:
            path, _, program = process.stdout.readline().rpartition(" ")
            yield process, Path(path), int(program)
        finally:
            process.kill()


async def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(
    place: Path,
) -> None:
    with holder(place) as (killed, left, orphan), holder(place) as (_, used, program):
        async with private_folder() as folder:
            assert names(place) == {left.name, used.name, folder.path.name}
        killed.kill()
        killed.wait()
        async with private_folder() as folder:
            assert names(place) == {used.name, folder.path.name}
        assert (used / "home" / "login.json").read_text() == "secret"
        assert module._programs(Folder(used)) == [program]
        assert not runs(orphan)
    async with private_folder():
        assert not runs(program)
    assert names(place) == set()


async def test_a_folder_is_removed_that_its_remover_did_not_finish(place: Path) -> None:
    (place / "promptmesh-run-half" / "home").mkdir(parents=True)
    async with private_folder() as folder:
        assert names(place) == {folder.path.name}


async def test_nothing_else_is_touched(
    place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "file").touch()
    (place / "promptmesh-run-link").symlink_to(elsewhere)
    (place / "promptmesh-run-file").touch()
    (place / "promptmesh-other" / "work").mkdir(parents=True)
    (place / "promptmesh-run-made").mkdir()  # somebody is about to lock it
    before = names(place)
    async with private_folder():
        pass
    assert names(place) == before
    assert (elsewhere / "file").exists()


async def test_what_another_user_has_is_not_touched(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = place / "promptmesh-run-foreign"
    (foreign / "work").mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    async with private_folder():
        pass
    assert foreign.exists()


async def test_one_that_cannot_be_removed_is_told_of_and_stops_nobody(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (place / "promptmesh-run-stuck" / "work").mkdir(parents=True)
    rmtree = shutil.rmtree

    def stuck(path: Path) -> None:
        if path.name.endswith("stuck"):
            raise PermissionError(1, "Operation not permitted", str(path))
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", stuck)
    with caplog.at_level(logging.WARNING):
        async with private_folder() as folder:
            assert folder.work.is_dir()
    assert "promptmesh-run-stuck" in caplog.text


async def test_where_there_are_no_locks_nothing_is_taken_for_abandoned(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(9, "Bad file descriptor")

    (place / "promptmesh-run-whose" / "work").mkdir(parents=True)
    monkeypatch.setattr(fcntl, "flock", none)
    async with private_folder() as folder:
        assert folder.work.is_dir()
    assert names(place) == {"promptmesh-run-whose"}


def test_none_is_taken_away_from_those_who_make_and_remove_theirs_at_once(place: Path) -> None:
    def use(number: int) -> None:
        with module._held() as folder:
            folder.write("file", str(number))
            assert folder.work.is_dir()
            assert folder.temporary.is_dir()
            assert (folder.path / "file").read_text() == str(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(400)))
    assert names(place) == set()
