"""`scripts/install` says what is missing before it begins, and does nothing when all is there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in which nothing is installed, and a folder `bin` with next to no commands."""
    for name in ("pyproject.toml", "scripts/install"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, path)
    (tmp_path / "bin").mkdir()
    for name in ("sh", "cat", "dirname"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    return tmp_path


def command(checkout: Path, name: str, text: str) -> None:
    path = checkout / "bin" / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def install(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [checkout / "scripts" / "install", *arguments],
        env={"PATH": str(checkout / "bin"), **variables},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_another_word() -> None:
    ran = subprocess.run([ROOT / "scripts" / "install", "all"], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr == "promptmesh: usage: scripts/install [run | dev]\n"


@pytest.mark.parametrize(("sudo", "as_root"), [(True, "sudo sh -c"), (False, "su - -c")])
def test_without_root_it_gives_the_line_to_type(checkout: Path, sudo: bool, as_root: str) -> None:
    command(checkout, "id", "echo 1000")
    command(checkout, "apt-get", "echo apt-get was run >&2")
    if sudo:
        command(checkout, "sudo", "echo sudo was run >&2")
    ran = install(checkout)
    assert ran.returncode == 1
    said, line = ran.stderr.splitlines()
    assert "Type this once" in said
    assert line.startswith(f"{as_root} 'apt-get update && apt-get install -y ")
    assert line.endswith(" gcc libc6-dev libgmp-dev'")
    assert not (checkout / ".venv").exists()


def test_a_machine_without_python(checkout: Path) -> None:
    (checkout / "bin" / "python3").unlink()
    command(checkout, "id", "echo 1000")
    command(checkout, "apt-get", "echo apt-get was run >&2")
    line = install(checkout).stderr.splitlines()[-1]
    assert line.endswith(" python3 python3-venv python3-dev gcc libc6-dev libgmp-dev'")


def test_root_installs_them_and_hears_of_a_failure(checkout: Path) -> None:
    command(checkout, "id", "echo 0")
    command(checkout, "apt-get", 'echo "apt-get $1" >&2\n[ "$1" = update ]')
    ran = install(checkout)
    assert ran.returncode == 1
    first, *said, last = ran.stderr.splitlines()
    assert first.startswith("promptmesh: installing ")
    assert said == ["apt-get update", "apt-get install"]
    assert "apt-get could not install them" in last


def test_another_system(checkout: Path) -> None:
    said = install(checkout).stderr
    assert "what your system calls them" in said
    assert "libgmp-dev" in said


def test_an_old_python(checkout: Path) -> None:
    command(checkout, "old", '[ "$1" = --version ] && echo Python 3.9.2 || exit 1')
    ran = install(checkout, PYTHON="old")
    assert ran.returncode == 1
    assert "Python 3.11 or newer is needed" in ran.stderr
    assert "is Python 3.9.2." in ran.stderr


def test_a_python_that_is_not_there(checkout: Path) -> None:
    assert install(checkout, PYTHON="python9").stderr == (
        "promptmesh: PYTHON is python9, which is not there\n"
    )


def installed(checkout: Path) -> Path:
    """Make all look as if it were in place; the stamp."""
    venv = checkout / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    stamp = venv / ".promptmesh-dev"
    stamp.write_text(f"{checkout} {sys.version_info[0]} {sys.version_info[1]}\n")
    return stamp


@pytest.mark.parametrize("want", ["run", "dev"])
def test_nothing_to_do(checkout: Path, want: str) -> None:
    installed(checkout)
    ran = install(checkout, want)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.parametrize("change", ["a newer pyproject.toml", "a moved checkout", "no Python"])
def test_something_to_do(checkout: Path, change: str) -> None:
    stamp = installed(checkout)
    if change == "a moved checkout":
        stamp.write_text(stamp.read_text().replace(str(checkout), "/elsewhere"))
    elif change == "no Python":
        stamp.unlink()
        (checkout / ".venv" / "bin" / "python").unlink()
        command(checkout, "../.venv/bin/python", "exit 1")
    else:
        os.utime(stamp, (0, 0))
    # Here it ends at the packages that are missing.
    assert install(checkout).returncode == 1
