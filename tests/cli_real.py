"""Which vendors' programs run for real, and when."""

from collections.abc import Iterator
from typing import Any

import pytest
from cli_programs import PROGRAMS

#: Those that run for real in every run; the others do with `scripts/test --interop`.
ALWAYS_REAL: tuple[str, ...] = ()


def real_programs() -> Iterator[Any]:
    """Their names, as parameters of a test."""
    for name in PROGRAMS:
        marks = () if name in ALWAYS_REAL else (pytest.mark.interop,)
        yield pytest.param(name, id=f"{name}-real", marks=marks)


def benches() -> Iterator[Any]:
    """The same with whether they are real: recordings stand for those that are not always."""
    for name in PROGRAMS:
        if name not in ALWAYS_REAL:
            yield pytest.param((name, False), id=f"{name}-recorded")
    for real in real_programs():
        yield pytest.param((real.values[0], True), id=real.id, marks=real.marks)
