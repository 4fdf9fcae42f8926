"""`scripts/simulate/claims` runs, and what it simulates behaves as it should."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "scripts" / "simulate" / "claims"


def simulate(*arguments: str) -> Any:
    command = [sys.executable, str(SCRIPT), "--quick", "--json", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_gossip_reaches_everybody() -> None:
    figures = simulate("--nodes", "8", "--rate", "0.1")["8"]
    assert figures["answers"] > 20
    assert figures["spread"]["reached"] == 1
    assert figures["found"]["hits"] == 1
    assert figures["found"]["asked a home"] == figures["not there"]["hits"] == 0
    assert figures["late joiner"] < 10
    assert figures["cpu"] > 0


def test_without_gossip_repair_does_its_work() -> None:
    figures = simulate("--nodes", "6", "--loss", "1")["6"]
    assert figures["spread"]["reached"] > 0.5
    assert figures["spread"]["max"] > 10


def test_above_the_limit_claims_are_at_homes() -> None:
    figures = simulate("--nodes", "66")["66"]
    assert figures["spread"]["reached"] == 1
    assert figures["found"]["asked a home"] > 0.8
    assert figures["found"]["hits"] > 0.75
    assert figures["not there"]["hits"] == 0
    # Homes take at most 0.3 s, also if nobody has it.
    assert figures["not there"]["p95"] <= 0.301
