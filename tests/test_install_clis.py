"""`scripts/install-clis` installs what it is asked for, once, at a version that it names."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Stands for `python -m pip install ... --target FOLDER PACKAGE`: makes the program of that wheel.
PIP = """#!/bin/sh
echo "$@" >>pip.log
while [ "$1" != --target ]; do shift; done
mkdir -p "$2/codex_cli_bin/bin" && cp /bin/true "$2/codex_cli_bin/bin/codex"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the script and something that acts as pip."""
    (tmp_path / "scripts").mkdir()
    for name in ("install-clis", "get-node"):
        shutil.copy2(ROOT / "scripts" / name, tmp_path / "scripts" / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PIP)
    python.chmod(0o755)
    return tmp_path


def install(checkout: Path, *parts: str) -> subprocess.CompletedProcess[str]:
    script = checkout / "scripts" / "install-clis"
    return subprocess.run([script, *parts], cwd="/", capture_output=True, text=True, timeout=60)


def pips(checkout: Path) -> list[str]:
    """What pip was asked to install."""
    return [line.split()[-1] for line in (checkout / "pip.log").read_text().splitlines()]


def test_another_word(checkout: Path) -> None:
    ran = install(checkout, "codes")
    assert ran.returncode == 1
    assert ran.stderr.startswith("promptmesh: usage: scripts/install-clis [codex | ")


def test_it_installs_once_and_then_does_nothing(checkout: Path) -> None:
    ran = install(checkout, "codex")
    assert (ran.returncode, ran.stdout) == (0, "")
    assert "installing openai-codex-cli-bin==" in ran.stderr
    program = checkout / "build" / "clis" / "bin" / "codex"
    subprocess.run([program], check=True)
    again = install(checkout, "codex")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert len(pips(checkout)) == 1


def test_another_version_is_installed_anew(checkout: Path) -> None:
    install(checkout, "codex")
    stamp = checkout / "build" / "clis" / "codex" / ".installed"
    wanted = stamp.read_text()
    stamp.write_text("openai-codex-cli-bin==0.1\n")
    leftover = stamp.with_name("of the old version")
    leftover.touch()
    install(checkout, "codex")
    assert stamp.read_text() == wanted
    assert not leftover.exists()
    assert len(set(pips(checkout))) == 1


def test_a_failure_of_pip_is_said_and_leaves_no_stamp(checkout: Path) -> None:
    (checkout / ".venv" / "bin" / "python").write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    ran = install(checkout, "codex")
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-2:] == [
        "no network",
        "promptmesh: pip could not install them; its reason is above",
    ]
    assert not (checkout / "build" / "clis" / "codex" / ".installed").exists()
    assert not (checkout / "build" / "clis" / "bin").exists()


def test_a_package_without_its_program_is_said(checkout: Path) -> None:
    (checkout / ".venv" / "bin" / "python").write_text('#!/bin/sh\nmkdir -p "build/clis/codex"\n')
    ran = install(checkout, "codex")
    assert ran.returncode == 1
    assert "build/clis/codex/codex_cli_bin/bin/codex is missing" in ran.stderr
