"""What is counted of requests, how it is bounded, and how it is written."""

from __future__ import annotations

import pytest
from fakes_mesh import asking
from prometheus_client.parser import text_string_to_metric_families as parse

from promptmesh.mesh.attempts import Attempt, Step
from promptmesh.mesh.policies import Candidate
from promptmesh.mesh.route import Route
from promptmesh.node.api_metrics import FAMILIES, exposition
from promptmesh.node.metrics import (
    BUCKETS,
    CACHE,
    MAX_MODELS,
    MAX_SERIES,
    OTHERS,
    PEERS,
    Asked,
    Histogram,
    Metrics,
    Tried,
)
from promptmesh.node.trace import Trace
from promptmesh.providers.base import (
    CacheStatus,
    GenerateError,
    ModelOffer,
    Origin,
    ProviderBusy,
    ProviderUnavailable,
    RequestRejected,
    Usage,
)

USAGE = Usage(prompt_tokens=7, completion_tokens=5)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("me")


def answer(
    metrics: Metrics,
    *,
    peer: str = "me",
    provider: str = "echo",
    model: str = "m",
    cache: CacheStatus = "miss",
    asker: str = "",
) -> None:
    trace = Trace(metrics)
    with trace.begin(asking(id="1", asker=asker), for_peer=bool(asker)) as record:
        record.model = model
        record.answered(Origin(peer=peer, provider=provider, cache=cache))
        record.told_usage = USAGE


def candidate(peer: str, provider: str) -> Candidate:
    return Candidate(peer=peer, node="n", provider=provider, offer=ModelOffer(id="m"))


async def test_an_answer_is_counted_with_its_tokens_and_its_time(metrics: Metrics) -> None:
    answer(metrics)
    ((labels, counts),) = metrics.requests.items()
    assert labels == Asked("own", "generate", "echo", "m", "miss", "answered")
    assert (counts.number, counts.prompt_tokens, counts.completion_tokens) == (1, 7, 5)
    assert sum(counts.whole.counts) == 1
    assert sum(counts.first_token.counts) == 0  # it was not routed


async def test_who_answers_is_a_provider_of_this_node_or_no_name(metrics: Metrics) -> None:
    answer(metrics, peer="another", provider="theirs", asker="")
    answer(metrics, provider="cache", cache="hit-local")
    answer(metrics, peer="another", provider="cache", cache="hit-mesh")
    answer(metrics, asker="another")
    assert {(r.asker, r.provider, r.cache) for r in metrics.requests} == {
        ("own", PEERS, "miss"),
        ("own", CACHE, "hit-local"),
        ("own", CACHE, "hit-mesh"),
        ("member", "echo", "miss"),
    }


async def test_what_fails_is_counted_by_its_code_and_runs_no_longer(metrics: Metrics) -> None:
    trace = Trace(metrics)
    with trace.begin(asking(id="1")):
        assert metrics.running == {"own": 1, "member": 0}
    with pytest.raises(ProviderUnavailable), trace.begin(asking(id="2")):
        raise ProviderUnavailable("no")
    trace.refused("3", RequestRejected("no JSON"))
    trace.refused("2", ProviderUnavailable("no"))  # as the edge says of every failure
    assert metrics.running == {"own": 0, "member": 0}
    assert {(r.task, r.model, r.outcome) for r in metrics.requests} == {
        ("generate", OTHERS, "provider_unavailable"),
        ("generate", OTHERS, "answered"),
        ("", OTHERS, "request_rejected"),
    }
    assert {counts.number for counts in metrics.requests.values()} == {1}


async def test_each_candidate_that_was_asked_is_counted_once(metrics: Metrics) -> None:
    attempts = [
        Attempt(Step(candidate("me", "gpu"), 1), ProviderBusy("full"), 0.1, "failed"),
        Attempt(Step(candidate("another", "x"), 2), ProviderUnavailable("gone"), 0.1, "failed"),
        Attempt(Step(candidate("me", "slow"), 3), GenerateError("slower"), 0.1, "outrun"),
        Attempt(Step(candidate("me", "echo"), 4), None, 0.2, "answered"),
    ]
    route = Route("round_robin", [], [], [], attempts)
    trace = Trace(metrics)
    with trace.begin(asking(id="1")) as record:
        record.model = "m"
        trace.route(asking(id="1"), False, route)
        route.first_at = record.started + 3.0
        route.settle()
        record.answered(Origin(peer="me", provider="echo"))
    assert metrics.tried == {
        Tried("gpu", "provider_busy"): 1,
        Tried(PEERS, "provider_unavailable"): 1,
        Tried("slow", "outrun"): 1,
        Tried("echo", "answered"): 1,
    }
    (counts,) = metrics.requests.values()
    assert counts.first_token.sum == pytest.approx(3.0)


async def test_names_from_outside_are_bounded(metrics: Metrics) -> None:
    for number in range(MAX_MODELS + 5):
        answer(metrics, model=f"model-{number}")
    models = {r.model for r in metrics.requests}
    assert len(models) == MAX_MODELS + 1
    assert OTHERS in models
    for number in range(MAX_SERIES + 5):  # an owner's own, and yet not without end
        answer(metrics, model="model-1", provider=f"p{number}")
    assert len(metrics.requests) == MAX_SERIES + 1
    last = Asked("own", "generate", OTHERS, OTHERS, "miss", "answered")
    assert metrics.requests[last].number > 5


def test_times_fall_into_their_buckets() -> None:
    histogram = Histogram()
    for seconds in (0.0, BUCKETS[0], BUCKETS[0] * 1.01, 10 * BUCKETS[-1]):
        histogram.add(seconds)
    assert histogram.counts[:2] == [2, 1]
    assert histogram.counts[-1] == 1


def test_the_text_is_read_as_it_was_meant() -> None:
    strange = 'a"b\\c\nd{}'
    histogram = Histogram()
    histogram.add(0.3)
    histogram.add(1e9)
    labels = ("generate", strange, "m")
    text = exposition(
        [("promptmesh_peers", (strange,), 3), ("promptmesh_cache_bytes", (), 2**40)],
        {"promptmesh_first_token_seconds": {labels: histogram}},
    )
    found = {family.name: family for family in parse(text)}
    assert {family.name.removesuffix("_total") for family in FAMILIES.values()} == set(found)
    (peers,) = found["promptmesh_peers"].samples
    assert (peers.labels, peers.value) == ({"state": strange}, 3)
    assert found["promptmesh_cache_bytes"].samples[0].value == 2**40
    samples = found["promptmesh_first_token_seconds"].samples
    by_bound = {s.labels["le"]: s.value for s in samples if "le" in s.labels}
    assert (by_bound["0.25"], by_bound["0.5"], by_bound["600.0"], by_bound["+Inf"]) == (0, 1, 1, 2)
    assert {s.labels["provider"] for s in samples} == {strange}
    assert [s.value for s in samples if s.name.endswith("_count")] == [2]
