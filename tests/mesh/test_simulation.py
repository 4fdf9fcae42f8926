"""`scripts/simulate/routing`, run small: the directions that hold by far, never a speed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "simulate" / "routing"


def run(only: str, policies: str) -> Any:
    command = [
        sys.executable,
        str(SCRIPT),
        "--quick",
        "--json",
        "--only",
        only,
        "--policies",
        policies,
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    (scenario,) = json.loads(ran.stdout)
    return scenario["policies"]


@pytest.fixture(scope="module")
def with_one_that_fails() -> Any:
    return run("a peer fails", "best_performance,round_robin")


def test_best_performance_ends_sooner_than_round_robin_among_unequal_peers(
    with_one_that_fails: Any,
) -> None:
    best, robin = (with_one_that_fails[p] for p in ("best_performance", "round_robin"))
    assert best["p99"] <= robin["p99"] / 2
    assert best["p50"] < robin["p50"]


def test_one_that_fails_at_once_gets_less_than_half_of_its_share(with_one_that_fails: Any) -> None:
    assert with_one_that_fails["best_performance"]["attempts at the last"] < 0.5


def test_no_request_fails_because_a_peer_does(with_one_that_fails: Any) -> None:
    assert with_one_that_fails["best_performance"]["errors"] == 0


def test_nobody_is_sooner_than_who_knows_all(with_one_that_fails: Any) -> None:
    """The measure itself: a policy far below the all-knowing one would show a broken simulation."""
    assert with_one_that_fails["best_performance"]["p99 to all-knowing"] > 0.8
