"""docs/failures.md says what is: its table is that of the cases that a node is driven through."""

import re

from daemons import ROOT
from doc_blocks import tables
from fault_cases import CASES

from promptmesh.mesh.breakers import (
    ERRORS_IN_A_ROW,
    FIRST_PAUSE,
    FIRST_REST,
    LONGEST_PAUSE,
    LONGEST_REST,
)
from promptmesh.node.config_sections import DeadlinesConfig
from promptmesh.providers.event_stream import MAX_EVENT
from promptmesh.providers.stream_decoder import MAX_ANSWER, MAX_WHOLE

TEXT = (ROOT / "docs" / "failures.md").read_text()


def test_each_fault_has_its_row_and_each_row_its_case() -> None:
    rows = tables(TEXT)["Fault"]
    cases = [tuple(_plain(cell) for cell in case.row) for case in CASES]
    assert rows == cases


def _plain(cell: str) -> str:
    """As `tables` gives a cell that is one code span."""
    return cell[1:-1] if re.fullmatch(r"`[^`]*`", cell) else cell


def test_numbers() -> None:
    defaults = DeadlinesConfig()
    for name in ("connect", "first_token", "gap", "whole"):
        assert f"| `deadlines.{name}` | {getattr(defaults, name):g} s |" in TEXT
    mib = 1024 * 1024
    for what, most in (("answer", MAX_ANSWER), ("event", MAX_EVENT), ("reply", MAX_WHOLE)):
        assert f"{what} of more than {most // mib} Mi" in TEXT
    assert ERRORS_IN_A_ROW == 2
    assert "second failure in a row" in TEXT
    assert f"from {FIRST_PAUSE:g} s up to {LONGEST_PAUSE:g} s" in TEXT
    assert f"from {FIRST_REST:g} s up to {LONGEST_REST:g} s" in TEXT
