"""`/metrics` of two nodes: an answer, errors, a hit, a hop; docs/metrics.md names all of them."""

import re
from pathlib import Path

import pytest
from daemons import ECHO, ROOT, Daemon, mesh
from doc_blocks import tables
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families as parse

PAGE = (ROOT / "docs" / "metrics.md").read_text()


async def metrics(daemon: Daemon) -> dict[str, Metric]:
    response = await daemon.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {family.name: family for family in parse(response.text)}


def value(found: dict[str, Metric], name: str, **labels: str) -> float:
    """The sum of what has these labels."""
    family = found[name.removesuffix("_total").removesuffix("_count")]
    return sum(
        s.value for s in family.samples if s.name == name and labels.items() <= s.labels.items()
    )


@pytest.mark.e2e
async def test_what_two_nodes_tell(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": "", "b": ECHO}) as (a, b):
        await a.wait_for_model("echo", "b")
        before = await metrics(a)
        assert value(before, "promptmesh_requests_total") == 0
        assert value(before, "promptmesh_peers", state="connected") == 1
        assert value(before, "promptmesh_peer_providers", state="ready") == 1
        whole = (await a.chat("a secret question", "echo", temperature=0)).json()
        again = await a.chat("a secret question", "echo", temperature=0)
        assert again.headers["x-promptmesh-cache"] == "hit-local"
        assert (await a.chat("no [[echo fail=rejected]]", "echo")).status_code == 400
        assert (await a.chat("who?", "nobody-has-it")).status_code == 404
        assert (await a.get("/v1/chat/completions")).status_code == 405
        async with a.client(timeout=60) as client:
            unread = await client.post("/v1/chat/completions", content=b"{")
            assert unread.status_code == 400
        at_a, at_b = await metrics(a), await metrics(b)

        requests = "promptmesh_requests_total"
        answered = {"outcome": "answered", "task": "generate", "model": "echo"}
        assert value(at_a, requests, provider="(peers)", cache="miss", **answered) == 1
        assert value(at_a, requests, provider="(cache)", cache="hit-local", **answered) == 1
        assert value(at_a, requests, outcome="request_rejected", task="generate") == 1
        assert value(at_a, requests, outcome="request_rejected", task="") == 1
        assert value(at_a, requests, outcome="model_not_found", model="(others)") == 1
        assert value(at_a, requests) == value(at_a, requests, asker="own") == 5
        assert value(at_b, requests, asker="member", provider="echo", **answered) == 1
        assert value(at_b, requests, asker="own") == 0

        attempts = "promptmesh_attempts_total"
        assert value(at_a, attempts, provider="(peers)", outcome="answered") == 1
        assert value(at_b, attempts, provider="echo", outcome="request_rejected") == 1
        tokens = "promptmesh_tokens_total"
        for cache in ("miss", "hit-local"):
            for direction in ("prompt", "completion"):
                used = value(at_a, tokens, direction=direction, cache=cache)
                assert used == whole["usage"][f"{direction}_tokens"]
        assert value(at_a, "promptmesh_first_token_seconds_count", provider="(peers)") == 1
        assert value(at_a, "promptmesh_answer_seconds_count") == 2
        assert value(at_a, "promptmesh_requests_running") == 0
        assert value(at_b, "promptmesh_provider_state", provider="echo", state="ready") == 1
        assert value(at_b, "promptmesh_provider_state") == 1
        assert value(at_b, "promptmesh_provider_slots", provider="echo") > 0
        assert value(at_a, "promptmesh_cache_answers") == 1
        assert value(at_a, "process_resident_memory_bytes") > 1e6
        text = (await a.get("/metrics")).text
        assert "secret" not in text
        assert "nobody-has-it" not in text
        check_the_page(at_a, at_b)


def check_the_page(*nodes: dict[str, Metric]) -> None:
    """Its table has what they tell: names, types and labels."""
    told: dict[str, tuple[str, str]] = {}
    labels: dict[str, set[str]] = {}
    for family in (family for node in nodes for family in node.values()):
        name = family.name + "_total" * (family.type == "counter")
        told[name] = (family.type, family.documentation)
        labels.setdefault(name, set()).update(*(s.labels for s in family.samples))
    rows = tables(PAGE)["metric"]
    assert {name: (type_, said) for name, type_, _, said in rows} == told
    for name, _, said, _ in rows:
        assert set(re.findall("[a-z]+", said)) == labels[name] - {"le"}, name
