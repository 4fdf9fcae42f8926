"""Recordings of the vendors' CLIs: a program that is recorded and played says the same again."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from recordings import (
    RECORDED,
    Normal,
    Recording,
    case_of,
    load,
    playing_program,
    recording_program,
    recordings,
)

#: What it says ends without an end of line and is no UTF-8.
PROGRAM = r"""#!/bin/sh
echo "$1 in $(pwd) with $(cat)"
echo "it took 01a2063e-9e57-7b12-bdb2-7a6cb1146908 long" >&2
[ "$1" = --usage-output-file ] && echo '{"tokens": 5}' >"$2"
printf 'and \377'
case $BASE_URL in */hang) sleep 60 ;; esac
exit 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the programs `tool` (recorded) and `played` (what was recorded)."""
    monkeypatch.setattr("recordings.RECORDED", tmp_path)
    (tmp_path / "vendor").mkdir()
    (tmp_path / "real").mkdir()
    real = tmp_path / "real" / "tool"
    real.write_text(PROGRAM)
    real.chmod(0o755)
    recording_program(tmp_path, real, tmp_path / "vendor")
    playing_program(tmp_path, "vendor", "played")
    (tmp_path / "private" / "work").mkdir(parents=True)
    return tmp_path


def start(folder: Path, name: str, mode: str, *argv: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [folder / name, *argv],
        env={"PATH": "/usr/bin:/bin", "BASE_URL": f"http://127.0.0.1:8080/m/{mode}"},
        cwd=folder / "private" / "work",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def test_what_was_said_is_said_again(folder: Path) -> None:
    usage = folder / "private" / "usage.json"
    argv = ("--usage-output-file", str(usage))
    recorded = start(folder, "tool", "ok", *argv)
    out, err = recorded.communicate(b"a prompt")
    assert (recorded.returncode, out.endswith(b"and \xff")) == (7, True)
    usage.unlink()
    played = start(folder, "played", "ok", *argv)
    again = played.communicate(b"another prompt")
    assert played.returncode == 7
    assert again[0] == out.replace(str(usage.parent).encode(), b"/private")
    assert again[1] == re.sub(rb"[0-9a-f-]{36}", b"00000000-0000-4000-8000-000000000001", err)
    assert usage.read_text() == '{"tokens": 5}\n'


def test_one_that_runs_on_until_it_is_ended(folder: Path) -> None:
    for name in ("tool", "played"):
        program = start(folder, name, "hang", "x")
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.close()
        assert program.stdout.readline().startswith(b"x in ")
        subprocess.run(["kill", "-TERM", "--", f"-{program.pid}"], check=True)
        assert program.wait(60) == 143
        program.stdout.close()
        assert program.stderr is not None
        program.stderr.close()
    recording = recordings("vendor")["hang"]
    assert (recording.exit, recording.stopped) == (None, 143)


def test_a_case_that_is_missing_is_said(folder: Path) -> None:
    program = start(folder, "played", "e401")
    _, err = program.communicate()
    assert program.returncode == 1
    assert b"no recording of the case 'e401'" in err


def test_which_case() -> None:
    url = {"BASE_URL": "http://127.0.0.1:8080/m/e429-7/v1"}
    assert case_of(["-p"], url) == "e429-7"
    assert case_of(["-c", f'base="{url["BASE_URL"]}"'], {}) == "e429-7"
    assert case_of(["--version"], {"HOME": "/m/x"}) == "version"
    assert case_of(["auth", "status"], {}) == "auth-status"


def test_what_changes_from_run_to_run_is_taken_out() -> None:
    normal = Normal([("/tmp/x", "/private"), ("/tmp/x/home", "/home/user"), ("/", "/root")])
    one, two = "01a2063e-9e57-7b12-bdb2-7a6cb1146908", "9fddf312-acf4-4846-a0d4-c43df0ce3885"
    said = normal(f'{one} {two} {one} /tmp/x/home/a /tmp/x/b "duration_ms":90.5 {"2026-11-25"}')
    first, second, third, *rest = said.split()
    assert first == third != second
    assert rest == ["/home/user/a", "/private/b", '"duration_ms":1', "2026-11-25"]
    assert normal("2026-11-25T14:28:36.968Z") == "2026-01-01T00:00:00.000Z"
    assert normal("http://127.0.0.1:34567/m/ok") == "http://127.0.0.1:1/m/ok"


def test_a_recording_is_read_as_it_was_written() -> None:
    recording = Recording(("-p",), (("out", "a\udcff\n"), ("err", "b")), None, {"-o": "{}"}, 143)
    assert load(recording.dump()) == recording


def files() -> list[Path]:
    return sorted(RECORDED.rglob("*.jsonl"))


@pytest.mark.parametrize("path", files(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_nothing_of_a_machine_is_in_the_recordings(path: Path) -> None:
    text = path.read_text()
    assert load(text).dump() == text
    places = re.findall(r"(?<![\w./:])/(?:root|work|tmp|var|usr|home/(?!user\b))\w*", text)
    assert not places
    hosts = set(re.findall(r"https?://([\w.-]+)", text))
    assert not {host for host in hosts if re.search("registry|pypi|npmjs", host)}
    assert not re.search(r"\bsk-", text)
    assert not re.search(r"127\.0\.0\.1:(?!1\b)\d", text)
