"""The vendors' own SDKs understand the stub of the vendors: what it says is what theirs say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_programs import CLIS
from faults import PARTIAL, WHOLE
from vendor_free import MODELS
from vendor_replies import COMPLETION_TOKENS, PROMPT_TOKENS
from vendors import vendors_in_a_thread

PROGRAM = Path(__file__).parent / "clients" / "vendor_sdks.py"
PIECES = [PARTIAL, WHOLE.removeprefix(PARTIAL)]
TOKENS = [PROMPT_TOKENS, COMPLETION_TOKENS]


@pytest.mark.interop
def test_the_sdks_of_anthropic_and_google() -> None:
    with vendors_in_a_thread() as server:
        done = subprocess.run(
            [sys.executable, PROGRAM, server.origin],
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(CLIS / "sdks")},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["anthropic"] == {
        "whole": WHOLE,
        "pieces": PIECES,
        "finish": "end_turn",
        "tokens": TOKENS,
        "models": list(MODELS),
        "counted": PROMPT_TOKENS,
        "e401": ["AuthenticationError", 401, None],
        "e429-7": ["RateLimitError", 429, "7"],
        "e529": ["OverloadedError", 529, None],
    }
    assert said["google"] == {
        "whole": WHOLE,
        "pieces": PIECES,
        "finish": "STOP",
        "tokens": TOKENS,
        "models": [f"models/{model}" for model in MODELS],
        "counted": PROMPT_TOKENS,
        "badkey": ["ClientError", 400, "INVALID_ARGUMENT"],
        "e429-7": ["ClientError", 429, "RESOURCE_EXHAUSTED"],
        "e503": ["ServerError", 503, "UNAVAILABLE"],
    }
