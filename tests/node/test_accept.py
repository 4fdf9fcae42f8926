"""What a client would rather have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.node.accept import preferred

OFFERED = ["application/raw", "application/car", "text/json"]


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("application/car", "application/car"),
        ("APPLICATION/CAR ; version=1", "application/car"),
        ("application/car;q=0.5, application/raw", "application/raw"),
        ("application/car;version=1;q=0.5, application/raw;q=0.4", "application/car"),
        ("*/*", "application/raw"),
        ("application/*, text/json;q=0.9", "application/raw"),
        ("application/*;q=0.8, text/json;q=0.9", "text/json"),
        ("*/*, application/raw;q=0", "application/car"),
        ("*/*;q=0.1, application/*;q=0", "text/json"),
        ("text/html", None),
        ("application/raw;q=0", None),
        ("application/raw;q=2", None),
        ("application/raw;q=nan", None),
        ("application/raw;q=", None),
        ("", None),
        (",,;;", None),
    ],
)
def test_the_best_liked_is_chosen(accept: str, chosen: str | None) -> None:
    assert preferred(accept, OFFERED) == chosen


@given(st.text(max_size=100))
def test_any_text_is_read(accept: str) -> None:
    assert preferred(accept, OFFERED) in (*OFFERED, None)
