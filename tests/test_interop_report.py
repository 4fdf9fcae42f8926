"""The report of `scripts/test --interop`."""

import re
from collections import Counter
from pathlib import Path

import pytest
from interop_report import HEAD, ROOT, InteropReport, Tried, page, result, versions


def report(
    name: str,
    outcome: str,
    *,
    when: str = "call",
    why: str = "",
    note: str = "",
    cell: object = None,
) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=name,
        location=("", 0, ""),
        keywords={} if "ours" in name else {"interop": 1},
        outcome=outcome,  # type: ignore[arg-type] # one of three literals
        longrepr=("file", 1, f"Skipped: {why}") if why else None,
        when=when,  # type: ignore[arg-type] # the same
        user_properties=[("interop", note)] * bool(note) + [("cell", cell)] * bool(cell),
    )


def test_what_ran_is_counted_by_test(tmp_path: Path) -> None:
    plugin = InteropReport(tmp_path / "interop.md")
    for said in (
        report("tests/b.py::two", "skipped", when="setup", why=f"{ROOT}/build is not there"),
        report("tests/a.py::one[y]", "passed", when="setup"),
        report("tests/a.py::one[y]", "passed", note="codex: 401 costs 1 request"),
        report("tests/a.py::one[x]", "failed"),
        report("tests/c.py::ours", "passed"),
    ):
        plugin.pytest_runtest_logreport(said)
    plugin.pytest_sessionfinish()
    text = (tmp_path / "interop.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows == [
        "| `a.py::one` | 1 passed, 1 failed |",
        "| `b.py::two` | 1 skipped (./build is not there) |",
    ]
    assert text.endswith("\n- codex: 401 costs 1 request\n")


def test_what_programs_gave_is_a_table(tmp_path: Path) -> None:
    plugin = InteropReport(tmp_path / "interop.md")
    for name, cell in (
        ("x", ("e401", "codex", "refused")),
        ("y", ("e401", "codex", "refused")),
        ("z", ("e401", "claude", "stop")),
        ("w", ("e401", "claude", "length")),
        ("v", ("ok", "codex", "stop")),
    ):
        plugin.pytest_runtest_logreport(report(name, "passed", cell=cell))
    plugin.pytest_sessionfinish()
    assert (tmp_path / "interop.md").read_text().splitlines()[-4:] == [
        "| case | claude | codex |",
        "| --- | --- | --- |",
        "| `e401` | length / stop | refused |",
        "| `ok` |  | stop |",
    ]


def test_the_page_is_the_same_for_the_same_results() -> None:
    tried = {name: Tried(Counter(passed=2), {"b", "a"}) for name in ("tests/y", "tests/x")}
    turned = dict(reversed(tried.items()))
    assert page(versions(), tried, {}) == page(versions(), turned, {})
    assert result(tried["tests/x"]) == "2 passed (a; b)"


def test_versions_name_each_package_once() -> None:
    found = versions()
    assert found == sorted(set(found), key=lambda row: (row[0].lower(), row))
    assert "openai" in {name for name, _, _ in found}


def test_the_committed_page_holds_nothing_of_a_machine() -> None:
    text = (ROOT / "docs" / "interop.md").read_text()
    assert text.startswith(HEAD)
    assert str(ROOT) not in text
    assert not re.search(r"(?<![\w./:])/(?:root|work|tmp|var|home)/", text)
    assert not re.search(r"\d failed", text)
