"""The ledgers of two nodes: what one asks of the other is in both, and a stop loses nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
from daemons import ECHO, Daemon, mesh, until

pytestmark = pytest.mark.e2e


async def usage(daemon: Daemon) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(await daemon.cli("usage", "--json"))
    return report


async def test_the_figures_add_up_over_a_hop_and_a_restart(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": "", "b": ECHO}) as (a, b):
        await a.wait_for_model("echo")
        tokens = 0
        for number in range(3):
            answer = await a.chat(f"question number {number}", "echo", temperature=0)
            tokens += answer.json()["usage"]["total_tokens"]
        again = await a.chat("question number 1", "echo", temperature=0)
        assert again.headers["x-promptmesh-cache"] == "hit-local"
        saved = again.json()["usage"]["total_tokens"]
        failed = await a.chat("no [[echo fail=rejected]]", "echo", temperature=0)
        assert failed.status_code == 400
        async with a.stream("one two three [[echo gap_s=30]]", "echo") as events:
            await anext(events)
        await b.chat("asked at home", "echo", temperature=0)

        async def over() -> bool:
            at_a, at_b = await usage(a), await usage(b)
            return (at_a["own"]["unfinished"], at_b["served"]["unfinished"]) == (2, 2)

        await until(over, "both have seen the end of the two that were not finished")
        at_a, at_b = await usage(a), await usage(b)
        assert (at_a["own"]["requests"], at_a["served"]["requests"]) == (4, 0)
        assert at_a["own"]["tokens_saved"] == saved
        assert at_a["own"]["prompt_tokens"] + at_a["own"]["completion_tokens"] == tokens + saved
        served = at_b["served"]
        assert served["requests"] == 3
        assert served["prompt_tokens"] + served["completion_tokens"] == tokens
        assert at_b["own"]["requests"] == 1
        pairs = {(r["asker_node"], r["node"]): r["requests"] for r in at_b["by_peer"]}
        assert pairs["a", "b"] == 3
        by_b = [r for r in at_a["by_model"] if r["node"] == "b" and r["provider"] == "echo"]
        assert [(r["model"], r["requests"]) for r in by_b] == [("echo", 3)]
        table = await a.cli("usage")
        assert "this machine" in table

        # Nobody had asked for a report in between: what was counted is written when it stops.
        await a.chat("the last question", "echo", temperature=0)
        await a.stop()
        at_a = await usage(a)
        assert at_a["own"]["requests"] == 5
        await a.start()
        assert (await usage(a))["own"] == at_a["own"]
        # And what was written, a kill does not lose.
        await a.kill()
        await a.start()
        assert (await usage(a))["own"] == at_a["own"]
