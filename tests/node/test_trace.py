"""What is remembered of requests: how each ended, and never too much."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from fakes_mesh import asking

from promptmesh.mesh.attempts import Attempt, Step
from promptmesh.mesh.policies import Candidate
from promptmesh.mesh.route import MAX_ERROR, Route
from promptmesh.mesh.ruling_out import RuledOut
from promptmesh.node.trace import MAX_NAME, MAX_NAMED, MAX_REQUESTS, Trace
from promptmesh.providers.base import CacheControl, GenerateRequest, ModelOffer, ProviderUnavailable


def request(request_id: str, **fields: Any) -> GenerateRequest:
    return asking(id=request_id, **fields)


def route_of(candidates: int, ruled_out: int = 0) -> Route:
    one = Candidate(peer="p", node="n", provider="x", offer=ModelOffer(id="m"))
    return Route("round_robin", [one] * candidates, [RuledOut(one, "no")] * ruled_out, [], [])


async def test_how_a_request_ends() -> None:
    trace = Trace()
    with trace.begin(request("whole")) as record:
        assert record.state == "running"
    with pytest.raises(ProviderUnavailable), trace.begin(request("failed")):
        raise ProviderUnavailable("no" * MAX_ERROR)
    with trio.CancelScope() as scope, trace.begin(request("left")):
        scope.cancel()
        await trio.lowlevel.checkpoint()
    with pytest.raises(ZeroDivisionError), trace.begin(request("broken")):
        raise ZeroDivisionError
    states = {r.id: (r.state, r.code) for r in trace.last(9)}
    assert states == {
        "broken": ("failed", "internal_error"),
        "left": ("left", ""),
        "failed": ("failed", "provider_unavailable"),
        "whole": ("answered", ""),
    }
    failed = trace.find("failed")
    assert failed is not None
    assert len(failed.error) == MAX_ERROR


async def test_a_request_that_could_not_be_read_is_known_by_its_error() -> None:
    trace = Trace()
    trace.refused("req-1", ProviderUnavailable("no JSON"))
    record = trace.find("req-1")
    assert record is not None
    assert (record.state, record.error, record.asked) == ("failed", "no JSON", "")
    with pytest.raises(ProviderUnavailable), trace.begin(request("req-2")):
        raise ProviderUnavailable("first")
    trace.refused("req-2", ProviderUnavailable("first"))  # as the edge says of every failure
    again = trace.find("req-2")
    assert again is not None
    assert again.asked == "m"


async def test_the_last_requests_are_remembered() -> None:
    trace = Trace()
    for number in range(MAX_REQUESTS + 3):
        with trace.begin(request(f"r{number}")):
            pass
    assert trace.find("r2") is None
    assert trace.find("r3") is not None
    assert [r.id for r in trace.last(2)] == [f"r{MAX_REQUESTS + 2}", f"r{MAX_REQUESTS + 1}"]
    assert len(trace.last(10_000)) == MAX_REQUESTS


async def test_a_peer_neither_hides_nor_pushes_out_what_is_ours() -> None:
    trace = Trace()
    with trace.begin(request("ours")):
        pass
    with trace.begin(request("ours", model="theirs", asker="p"), for_peer=True):
        pass
    for number in range(MAX_REQUESTS + 3):
        with trace.begin(request(f"r{number}", asker="p"), for_peer=True):
            pass
    ours = trace.find("ours")
    assert ours is not None
    assert (ours.asked, ours.for_peer) == ("m", False)
    assert [r.id for r in trace.last(9)] == ["ours"]
    theirs = trace.find("r5")
    assert theirs is not None
    assert theirs.asker == "p"


async def test_the_candidates_that_are_named_are_bounded() -> None:
    trace = Trace()
    for number in range(20):
        with trace.begin(request(f"r{number}")):
            trace.route(request(f"r{number}"), False, route_of(1000, 1000))
    there = trace.last(99)
    assert sum(r.weight for r in there) <= MAX_NAMED < sum(r.weight for r in there) + 2000
    assert there[0].id == "r19"
    # One that names more than that by itself is still there, and makes room when it goes.
    with trace.begin(request("huge")):
        trace.route(request("huge"), False, route_of(2 * MAX_NAMED))
    assert [r.id for r in trace.last(9)] == ["huge"]
    with trace.begin(request("huge")):
        trace.route(request("huge"), False, route_of(1))
    for number in range(3):
        with trace.begin(request(f"s{number}")):
            trace.route(request(f"s{number}"), False, route_of(1))
    assert len(trace.last(9)) == 4


async def test_names_are_cut_and_what_has_no_id_is_not_remembered() -> None:
    long = "x" * 100_000
    trace = Trace()
    asked = request("r", model=long, provider=long, peer=long, cache=CacheControl(namespace=long))
    with trace.begin(asked) as record:
        record.model = asked.model
    for text in (record.asked, record.provider, record.peer):
        assert text == "x" * MAX_NAME
    assert record.cache.namespace == ""
    for unnamed in ("", long):
        with trace.begin(request(unnamed), for_peer=True):
            pass
        assert trace.find(unnamed) is None
    trace.route(request("unknown"), False, route_of(1))


async def test_attempts_are_counted_also_for_who_shared_the_computation() -> None:
    trace = Trace()
    candidate = Candidate(peer="p", node="n", provider="x", offer=ModelOffer(id="m"))
    tried = [
        Attempt(Step(candidate, 1), ProviderUnavailable("no"), 0.1, "failed"),
        Attempt(Step(candidate, 2), None, 0.2, "answered"),
    ]
    with trace.begin(request("leads")) as leads, trace.begin(request("follows")) as follows:
        leads.flight = follows.flight = b"same"
        follows.joined = True
        trace.route(request("leads"), False, Route("round_robin", [], [], [], tried))
        assert (trace.attempts("leads"), trace.attempts("follows")) == (2, 2)
    with trace.begin(request("stored")):
        pass
    assert (trace.attempts("stored"), trace.attempts("unknown")) == (0, 0)
