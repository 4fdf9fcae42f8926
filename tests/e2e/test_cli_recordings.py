"""The recordings are what the real programs say now."""

from pathlib import Path

import pytest
from cli_matrix import ENDLESS
from cli_real import recorded_programs
from record_clis import record
from record_turns import CASES, TURNS, turn_now
from recordings import load, recordings
from vendors import vendors

pytestmark = [pytest.mark.e2e, pytest.mark.interop]


@pytest.mark.parametrize("name", recorded_programs())
async def test_recordings_are_what_is_said_now(name: str, tmp_path: Path) -> None:
    async with vendors() as server:
        await record(name, server, tmp_path)
    kept = recordings(name)
    for path in sorted((tmp_path / "recorded").iterdir()):
        now, then = load(path.read_text()), kept[path.stem]
        if path.stem in ENDLESS:
            continue  # how far it came when it was ended is chance
        assert _output(now.lines) == _output(then.lines), path.stem
        assert (now.argv, now.files) == (then.argv, then.files), path.stem
        if None not in (now.exit, then.exit):  # else it was ended, which may come before its end
            assert now.exit == then.exit, path.stem


@pytest.mark.parametrize("case", CASES)
async def test_turns_are_what_codex_tells_now(case: str, tmp_path: Path) -> None:
    async with vendors() as server:
        assert await turn_now(case, server, tmp_path) == (TURNS / f"{case}.jsonl").read_text()


def _output(lines: tuple[tuple[str, str], ...]) -> list[str]:
    """What it wrote for programs: its complaints have places in its code."""
    return [line for stream, line in lines if stream == "out"]
