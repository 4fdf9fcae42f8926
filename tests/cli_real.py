"""Which vendors' programs a test runs, and when."""

from collections.abc import Iterator
from typing import Any

import pytest
from cli_programs import PROGRAMS


def real_programs() -> Iterator[Any]:
    """The names of the real ones, as parameters of a test."""
    for name, program in PROGRAMS.items():
        marks = () if program.tier == "always" else (pytest.mark.interop,)
        yield pytest.param(name, id=f"{name}-real", marks=marks)


def benches() -> Iterator[Any]:
    """Their names and whether they are real, with those that recordings stand for."""
    for name in recorded_programs():
        yield pytest.param((name, False), id=f"{name}-recorded")
    for real in real_programs():
        yield pytest.param((real.values[0], True), id=real.id, marks=real.marks)


def recorded_programs() -> list[str]:
    """The names of those that have recordings."""
    return [name for name, program in PROGRAMS.items() if program.tier == "recorded"]
