"""Money between real nodes: free before paid, what a request may cost, what members may spend."""

import json
from pathlib import Path
from typing import Any

import pytest
from daemons import ECHO, Daemon, mesh

pytestmark = pytest.mark.e2e

#: Of the echo: a dollar for each word of the prompt and of the answer.
VENDOR = """
[limits]
max_cost_per_day = 100.0
max_member_cost_per_day = 20.0
[[providers]]
kind = "echo"
name = "vendor"
share = true
price = {prompt = 1_000_000, completion = 1_000_000}
"""
#: A request for a new answer of a bounded length.
SHORT: Any = {"temperature": 1.0, "max_tokens": 3}


async def money(daemon: Daemon) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(await daemon.cli("usage", "--json"))
    return report


async def test_money(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": "", "b": VENDOR, "c": ECHO}) as (a, b, c):
        for daemon in (a, b, c):
            await daemon.wait_for_model("echo", "b", "c")
        # Free before paid, whatever the policy, unless the request says otherwise.
        for policy in ("round_robin", "least_loaded", "best_performance"):
            for _ in range(3):
                answer = await a.chat("one two", "echo", promptmesh={"policy": policy})
                assert answer.headers["x-promptmesh-node"] == "c"
        nodes = set()
        for number in range(4):
            mesh_fields = {"policy": "round_robin", "prefer": "any"}
            answer = await a.chat("x", "echo", promptmesh=mesh_fields, max_tokens=number + 1)
            nodes.add(answer.headers["x-promptmesh-node"])
        assert nodes == {"b", "c"}
        before = (await money(b))["spent_today_by_members"]
        assert 0 < before < 6

        # What a request may cost, said in its body or by a header.
        only_b = "b:vendor/echo"
        ways: tuple[Any, ...] = (
            {"promptmesh": {"max_cost": 0.5}},
            {"headers": {"x-promptmesh-max-cost": "0.5"}},
        )
        for way in ways:
            refused = await a.chat("one two", only_b, **way, **SHORT)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == "promptmesh.max_cost"
            assert "b:vendor: the request is expected to cost $" in refused.text
            assert "and may cost $0.5" in refused.text
        cheaper = await a.chat("one", "echo", promptmesh={"max_cost": 0.0})
        assert cheaper.headers["x-promptmesh-node"] == "c"
        wrong = await a.chat("one", "echo", promptmesh={"max_cost": -1})
        assert wrong.status_code == 400

        # A member pays with the owner's money, so both have it in their ledgers.
        answer = await a.chat("one two", only_b, **SHORT)
        assert answer.status_code == 200
        tokens = answer.json()["usage"]["total_tokens"]
        at_a, at_b = await money(a), await money(b)
        assert at_b["spent_today_by_members"] == at_b["spent_today"] == before + tokens
        assert at_a["own"]["money"] == at_b["served"]["money"] == before + tokens
        assert at_a["spent_today"] == 0

        # What members may spend in a day is less than what the owner may.
        refused = await a.chat("one two three", only_b, temperature=1.0, max_tokens=40)
        assert refused.status_code == 503
        assert "$20.00 for members (limits.max_member_cost_per_day)" in refused.text
        # It was too much money and no failure: what fits into the rest is answered at once.
        assert (await a.chat("x", only_b, temperature=1.0, max_tokens=1)).status_code == 200
        own = await b.chat("one two three", "vendor/echo", temperature=1.0, max_tokens=40)
        assert own.status_code == 200
        # The restarted node knows what was spent.
        spent = (await money(b))["spent_today"]
        await b.stop()
        await b.start()
        assert (await money(b))["spent_today"] == spent
