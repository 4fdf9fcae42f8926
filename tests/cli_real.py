"""Which vendors' programs a test runs, and when."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from cli_matrix import CORE, MATRIX
from cli_programs import PROGRAMS


class Run(NamedTuple):
    """A program, and what it is asked."""

    name: str
    real: bool
    cases: tuple[str, ...]


def real_programs() -> Iterator[Any]:
    """The names of the real ones, as parameters of a test."""
    for name, program in PROGRAMS.items():
        yield pytest.param(name, id=f"{name}-real", marks=_marks(program.tier == "always"))


def recorded_programs() -> list[str]:
    """The names of those that have recordings."""
    return [name for name, program in PROGRAMS.items() if program.tier == "recorded"]


def runs() -> Iterator[Any]:
    """Each program in all cases: by its recordings, and for real; of those that always run for
    real, some cases in every run."""
    cases = tuple(MATRIX)
    for name, program in PROGRAMS.items():
        if program.tier == "recorded":
            yield pytest.param(Run(name, False, cases), id=f"{name}-recorded")
        if program.tier == "always":
            yield pytest.param(Run(name, True, CORE), id=f"{name}-real")
            cases_left = tuple(case for case in cases if case not in CORE)
            more = Run(name, True, cases_left)
            yield pytest.param(more, id=f"{name}-real-more", marks=_marks(False))
        else:
            yield pytest.param(Run(name, True, cases), id=f"{name}-real", marks=_marks(False))


def cells() -> Iterator[Any]:
    """Each run with each of its cases."""
    for run in runs():
        for case in run.values[0].cases:
            yield pytest.param(run.values[0], case, id=f"{run.id}-{case}", marks=run.marks)


def _marks(always: bool) -> tuple[pytest.MarkDecorator, ...]:
    return () if always else (pytest.mark.interop,)
