"""Limits of a minute between real nodes: another is asked, and the caller learns when to come."""

from pathlib import Path

import pytest
from daemons import mesh

pytestmark = pytest.mark.e2e

#: The echo twice: one may be asked once a minute, and of the other each member may have one.
LIMITED = """
[[providers]]
kind = "echo"
name = "strict"
models = ["strict"]
share = true
requests_per_minute = 1
when_limited = "refuse"
[[providers]]
kind = "echo"
name = "fair"
models = ["fair"]
member_requests_per_minute = 1
"""
LAX = '[[providers]]\nkind = "echo"\nname = "lax"\nmodels = ["strict"]\n'


async def test_limits(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": LAX, "b": LIMITED}) as (a, b):
        await a.wait_for_model("fair", "b:fair")
        await b.wait_for_model("strict", "a:lax", "b:strict")
        # A new answer each time: a stored one costs nothing and counts for nothing.
        to_strict = {"provider": "strict", "cache": {"mode": "bypass"}}
        assert (await b.chat("one", "strict", promptmesh=to_strict)).status_code == 200
        refused = await b.chat("two", "strict", promptmesh=to_strict)
        assert refused.status_code == 503
        assert "limit of 1 requests a minute" in refused.text
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        # Who does not insist on it is answered by the other.
        for policy in ("round_robin", "least_loaded", "best_performance"):
            for prompt in ("three", "four"):
                wishes = {"policy": policy, "cache": {"mode": "bypass"}}
                answer = await b.chat(prompt, "strict", promptmesh=wishes)
                assert answer.headers["x-promptmesh-provider"] == "lax", answer.text

        fresh = {"cache": {"mode": "bypass"}}
        assert (await a.chat("one", "fair", promptmesh=fresh)).status_code == 200
        refused = await a.chat("two", "fair", promptmesh=fresh)
        assert refused.status_code == 503
        assert "gives each member 1 requests a minute" in refused.text
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        for prompt in ("one", "two"):
            assert (await b.chat(prompt, "fair", promptmesh=fresh)).status_code == 200
