"""Why a request went where it went: through the router, over HTTP, and on the command line."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import trio
from fakes_cli import FakeNode, Problem, made, run
from fakes_mesh import FakeProvider, asking
from fakes_router import HERE, THERE, Setup, nowhere, setup
from serving import serving

from promptmesh.cache.keys import key_text
from promptmesh.mesh.backends import BackendManager
from promptmesh.mesh.peers import PeerTable
from promptmesh.node.api_openai import OpenAIApi
from promptmesh.node.api_requests import RequestsApi
from promptmesh.node.names import Names
from promptmesh.node.router import Reuse
from promptmesh.node.routes import Routes
from promptmesh.node.trace import Trace
from promptmesh.providers.base import ModelOffer, ProviderUnavailable, Sampling, StreamInterrupted

ID = "x-promptmesh-request-id"
URL = "/v1/chat/completions"


@dataclass
class World:
    """A node that answers over HTTP, with its own providers behind the real backend manager."""

    client: httpx.AsyncClient
    setup: Setup

    async def ask(self, **fields: Any) -> httpx.Response:
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": "hi"}],
            "temperature": 0,
            **fields,
        }
        return await self.client.post(URL, json=body)

    async def why(self, response: httpx.Response) -> Any:
        """The explanation of an answer, failed or not."""
        explained = await self.client.get(f"/mesh/v1/requests/{response.headers[ID]}")
        assert explained.status_code == 200
        return explained.json()


@asynccontextmanager
async def world(*providers: FakeProvider, reuse: Reuse = "deterministic") -> AsyncIterator[World]:
    trace = Trace()
    manager = BackendManager(
        local=lambda: [p.backend() for p in providers],
        peers=PeerTable(HERE),
        policy="round_robin",
        peer_id=HERE,
        node="here",
        rng=Random(1),
        on_route=trace.route,
    )
    async with setup(manager, reuse=reuse, trace=trace) as s:
        written = functools.partial(key_text, form="sha256", base="base32")
        s.router.names = Names(manager.sources)
        openai = OpenAIApi(s.router, s.router.names, s.notes, written)
        names = {HERE: "here", THERE: "there"}
        requests = RequestsApi(
            trace,
            written,
            reuse=reuse,
            node_of=lambda p: names.get(p, ""),
            waiting=nowhere,
        )
        routes = Routes()
        routes.add("POST", URL, openai.chat_completions)
        routes.add("GET", "/mesh/v1/requests", requests.last)
        routes.add_below("GET", "/mesh/v1/requests/", requests.one)
        async with serving(routes) as client:
            yield World(client, s)


async def test_a_computed_answer_and_its_second_time() -> None:
    async with world(FakeProvider("a")) as w:
        first, again = await w.ask(), await w.ask()
        why, why_again = await w.why(first), await w.why(again)
    assert why["state"] == "answered"
    assert why["asked"]["model"] == why["model"] == "m"
    assert why["cache"] == {
        "status": "miss",
        "key": why["cache"]["key"],
        "cid": first.headers["x-promptmesh-cid"],
        "why": "no answer is stored here, and no peer claims to have one",
        "with": None,
    }
    assert f'key="{why["cache"]["key"]}"' in first.headers["cache-status"]
    assert why["policy"] == first.headers["x-promptmesh-policy"] == "round_robin"
    assert why["answered_by"]["provider"] == "a"
    assert why["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    assert why["finish_reason"] == "stop"
    assert 0 <= why["first_token_s"] <= why["total_s"]
    assert [(t["provider"], t["error"]) for t in why["attempts"]] == [("a", None)]
    assert why["explained_on"] is None
    assert why_again["cache"]["status"] == again.headers["x-promptmesh-cache"] == "hit-local"
    assert why_again["cache"]["cid"] == why["cache"]["cid"]
    assert why_again["cache"]["why"] == "the answer was stored here"
    assert (why_again["policy"], why_again["attempts"]) == (None, [])
    assert why_again["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded", "best_performance"])
async def test_the_policy_that_is_named_is_the_one_that_ran(policy: str) -> None:
    async with world(FakeProvider("a"), FakeProvider("b")) as w:
        for number in range(3):
            answer = await w.ask(seed=number, promptmesh={"policy": policy})
        why = await w.why(answer)
    assert why["policy"] == answer.headers["x-promptmesh-policy"] == policy
    assert {c["provider"] for c in why["candidates"]} == {"a", "b"}
    (choice,) = why["choices"]
    assert choice["chosen"]["provider"] == answer.headers["x-promptmesh-provider"]
    for weighed in choice["weighed"]:
        assert weighed["load"] == 0.0
        assert ("expected" in weighed) == (policy == "best_performance")
        assert (weighed["turns"] is not None) == (policy == "round_robin")
    if policy == "round_robin":
        assert sum(weighed["turns"] for weighed in choice["weighed"]) == 2
    if policy == "best_performance":
        expected = [weighed["expected"] for weighed in choice["weighed"]]
        for e in expected:
            parts = [e[name] or 0 for name in ("wait_s", "first_token_s", "tokens_s", "trouble_s")]
            assert e["first_token_s"] is None or e["total_s"] == pytest.approx(sum(parts), abs=1e-3)


async def test_a_failed_request_says_who_failed_and_who_was_ruled_out() -> None:
    small = FakeProvider("small", offers=(ModelOffer(id="m", context_length=1),))
    broken = FakeProvider("broken", fail=ProviderUnavailable("it is on fire", retry_after=3))
    async with world(small, broken) as w:
        answer = await w.ask(messages=[{"role": "user", "content": "a rather long prompt"}])
        assert answer.status_code == 503
        why = await w.why(answer)
    assert why["state"] == "failed"
    assert why["error"]["code"] == "provider_unavailable"
    assert why["error"]["message"] == answer.json()["error"]["message"]
    (ruled_out,) = why["ruled_out"]
    assert ruled_out["provider"] == "small"
    assert "does not fit" in ruled_out["reason"]
    (attempt,) = why["attempts"]
    assert (attempt["provider"], attempt["error"]["message"]) == ("broken", "it is on fire")
    assert (why["answered_by"], why["usage"], why["first_token_s"]) == (None, None, None)


async def test_why_auto_is_that_model() -> None:
    async with world(FakeProvider("a")) as w:
        why = await w.why(await w.ask(model="auto"))
    assert (why["asked"]["model"], why["model"]) == ("auto", "m")
    assert why["model_why"] == "free, on this node; the only model"


async def test_who_went_on_for_whom_is_told() -> None:
    offers = (ModelOffer(id="m", can_continue=True),)
    broken = StreamInterrupted("it fell over")
    providers = [FakeProvider(n, offers=offers, fail_after=(1, broken)) for n in ("a", "b")]
    async with world(*providers) as w:
        why = await w.why(await w.ask(stream=True))
    first, second = why["attempts"]
    assert (first["as"], first["outcome"], first["after"]) == ("turn", "broke", None)
    assert (second["as"], second["outcome"]) == ("continue", "broke")
    assert second["after"]["provider"] == first["provider"]
    assert second["at_character"] == len("one ")


async def test_what_could_not_be_read_or_is_not_there() -> None:
    async with world() as w:
        unread = await w.ask(temperature="warm")
        assert unread.status_code == 400
        why = await w.why(unread)
        assert (why["state"], why["error"]["code"]) == ("failed", "request_rejected")
        nobody = await w.ask(model="nope")
        assert (await w.why(nobody))["error"]["message"] == "nobody offers the model `nope`; " + (
            "there is no model at all"
        )
        missing = await w.client.get("/mesh/v1/requests/req-nope")
        assert missing.status_code == 404
        assert "no request req-nope is remembered" in missing.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "reuse", "reason"),
    [
        ({"promptmesh": {"cache": {"mode": "bypass"}}}, "deterministic", "says `bypass`"),
        ({"promptmesh": {"cache": {"mode": "refresh"}}}, "deterministic", "says `refresh`"),
        ({}, "never", "reuses no answers (cache.reuse is `never`)"),
        ({"temperature": 1.0}, "deterministic", "temperature is not 0, and there is no seed"),
        ({"promptmesh": {"cache": {"scope": "local"}}}, "always", "as the scope is `local`"),
        ({"promptmesh": {"privacy": "local"}}, "always", "as privacy is `local`"),
        ({"promptmesh": {"cache": {"max_age": 9}}}, "always", "stored here is at most 9 s old"),
    ],
)
async def test_why_nothing_was_reused(fields: dict[str, Any], reuse: Reuse, reason: str) -> None:
    async with world(FakeProvider("a"), reuse=reuse) as w:
        why = await w.why(await w.ask(**fields))
    assert reason in why["cache"]["why"]
    assert why["usage"]["completion_tokens"] == 3


async def test_an_answer_here_that_does_not_count_is_named() -> None:
    async with world(FakeProvider("a")) as w:
        w.setup.router._peer = THERE  # as if a peer had computed what lies here
        await w.ask()
        w.setup.router._peer = HERE
        w.setup.shared.distrusted = {HERE}
        w.setup.router._peer = "somebody else"
        why = await w.why(await w.ask())
    doubt = "the answer of here that is stored here does not count (it is distrusted)"
    assert why["cache"]["why"] == f"{doubt}, and no peer claims to have one"


async def test_who_shares_a_computation_is_led_to_the_one_that_made_it() -> None:
    async with world(FakeProvider("a", delay=0.2)) as w:
        answers: list[httpx.Response] = []

        async def ask() -> None:
            answers.append(await w.ask())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
        told = [await w.why(answer) for answer in answers]
    (leader,) = [why for why in told if why["cache"]["status"] == "miss"]
    (follower,) = [why for why in told if why["cache"]["status"] == "coalesced"]
    assert follower["cache"]["with"] == leader["id"]
    assert follower["cache"]["cid"] == leader["cache"]["cid"] is not None
    assert (follower["attempts"], len(leader["attempts"])) == ([], 1)


async def test_a_peers_request_is_told_with_who_asked() -> None:
    async with world(FakeProvider("a")) as w:
        async with w.setup.router.open(
            asking(id="req-theirs", sampling=Sampling(temperature=0), asker=THERE), local_only=True
        ) as answering:
            await answering.whole()
        why = (await w.client.get("/mesh/v1/requests/req-theirs")).json()
        listed = (await w.client.get("/mesh/v1/requests")).json()
    assert why["asker"] == {"peer": THERE, "node": "there"}
    assert why["cache"]["why"] == "no answer is stored here"
    assert listed == []


async def test_the_last_requests_and_their_number() -> None:
    async with world(FakeProvider("a")) as w:
        ids = [(await w.ask(seed=n)).headers[ID] for n in range(3)]
        listed = (await w.client.get("/mesh/v1/requests?limit=2")).json()
        assert [why["id"] for why in listed] == ids[:0:-1]
        for wrong in ("0", "513", "x", "-1", "%C2%B2", "9" * 5000):
            answer = await w.client.get(f"/mesh/v1/requests?limit={wrong}")
            assert answer.status_code == 400, wrong


# --- the command line


async def explained(home: Path, *command: str, policy: str = "best_performance") -> Any:
    """A failed and an answered request as the real node tells them, through the command."""
    bad = FakeProvider("bad", fail=ProviderUnavailable("on \x1b[31mfire"))
    offers = (ModelOffer(id="m", context_length=1),)
    small = FakeProvider("small", offers=offers)
    async with world(bad, FakeProvider("good", delay=0.02), small) as w:
        fields = {"promptmesh": {"policy": policy, "cache": {"mode": "bypass"}}}
        question = [{"role": "user", "content": "a rather long prompt"}]
        for _ in range(3):
            answer = await w.ask(messages=question, **fields)
            if answer.headers["x-promptmesh-attempts"] == "2":
                break
        last = (await w.client.get("/mesh/v1/requests?limit=1")).json()
        answers = {
            "GET /mesh/v1/requests?limit=1": last,
            "GET /mesh/v1/requests?limit=9": last * 2,
            f"GET /mesh/v1/requests/{last[0]['id']}": last[0],
        }
    with FakeNode(answers).running(made(home)):
        return last[0], run(home, *command)


async def test_explain_the_last_request(tmp_path: Path) -> None:
    why, ran = await explained(tmp_path, "explain")
    assert ran.code == 0
    lines = [" ".join(line.split()) for line in ran.out.splitlines()]
    assert lines[0].startswith(f"{why['id']} ")
    assert "cache bypass: the request says `bypass`" in lines
    assert "policy best_performance" in lines
    assert "answered by here:good" in lines
    assert "tokens 1 + 3, ended by stop" in lines
    assert "Choice 1 (best_performance: the fewest seconds until the whole answer)" in lines
    assert "CANDIDATE LOAD EXPECTED WAIT FIRST TOKEN TOKENS TROUBLE" in lines
    assert any(line.startswith("* here:bad 0 ") for line in lines)
    assert "here:small the prompt does not fit into its 1 tokens" in lines
    assert any(line.startswith("here:bad ") and line.endswith("fire") for line in lines)
    assert any(line.startswith("here:good ") and line.endswith("answered") for line in lines)
    assert "\x1b" not in ran.out


async def test_explain_lists_the_last(tmp_path: Path) -> None:
    why, ran = await explained(tmp_path, "explain", "--last", "9", policy="round_robin")
    title, *rows = ran.out.splitlines()
    assert title.split()[:2] == ["ID", "TIME"]
    assert [row.split()[0] for row in rows] == [why["id"]] * 2


def test_explain_says_what_it_cannot(tmp_path: Path) -> None:
    nothing = {
        "GET /mesh/v1/requests?limit=1": [],
        "GET /mesh/v1/requests/req%2Fx": Problem(404, "no request req/x is remembered"),
    }
    with FakeNode(nothing).running(made(tmp_path)):
        none = run(tmp_path, "explain")
        unknown = run(tmp_path, "explain", "req/x")
        both = run(tmp_path, "explain", "req", "--last", "3")
    assert (none.code, "has had no request" in none.err) == (1, True)
    assert (unknown.code, "no request req/x is remembered" in unknown.err) == (1, True)
    assert both.code == 2


def test_where_a_peer_answered_the_way_to_its_part_is_said(tmp_path: Path) -> None:
    there = {"peer": "12D3KooWThere", "node": "there"}
    candidate = {**there, "provider": "x", "own": False}

    def tried(role: str, outcome: str, *, after: Any = None, error: str = "") -> dict[str, Any]:
        return {
            **candidate,
            "as": role,
            "outcome": outcome,
            "after": after,
            "at_character": 120 if after else None,
            "seconds": 2.0,
            "error": {"message": error, "code": "c"} if error else None,
        }

    attempts = [
        tried("turn", "broke", error="there:x broke off its answer: gone"),
        tried("hedge", "outrun", error="there:x was faster, and it was cancelled"),
        tried("again", "failed", error="no"),
        tried("restart", "failed", after=candidate, error="its text differs"),
        tried("continue", "answered", after=candidate),
    ]
    why = {
        "id": "req-1", "at": 0, "state": "failed", "error": {"message": "cut", "code": "c"},
        "asker": {"peer": "12D3KooWAsker", "node": ""}, "task": "generate",
        "asked": {"model": "auto", "provider": "x", "peer": None, "policy": None,
                  "privacy": "mesh", "cache": "use"},
        "model": "m", "model_why": "free, at a peer; of 2 models",
        "cache": {"status": None, "key": None, "cid": None, "why": "", "with": None},
        "policy": "least_loaded", "candidates": [candidate], "ruled_out": [],
        "choices": [{"chosen": candidate, "weighed": [{**candidate, "load": 1.5, "turns": None}]}],
        "attempts": attempts, "answered_by": None,
        "first_token_s": None, "total_s": 61.5, "usage": None, "finish_reason": None,
        "waiting": {"place": 2, "of": 3, "wait_s": 12.34}, "explained_on": there,
    }  # fmt: skip
    with FakeNode({"GET /mesh/v1/requests/req-1": why}).running(made(tmp_path)):
        ran = run(tmp_path, "explain", "req-1")
    lines = [" ".join(line.split()) for line in ran.out.splitlines()]
    assert "asked by …ooWAsker" in lines
    meant = "auto, which means m (free, at a peer; of 2 models)"
    assert f"asked for {meant}, provider x, privacy mesh" in lines
    assert "Choice (least_loaded: the fewest requests for each slot)" in lines
    assert "waiting number 2 of 3 for a slot, about 12.34 s more" in lines
    assert "* there:x 1.5" in lines
    for line in (
        "there:x broke off its answer: gone",
        "as well, the first token being late: there:x was faster, and it was cancelled",
        "once more: no",
        "began anew, for there:x from character 120: its text differs",
        "continued there:x from character 120: answered",
    ):
        assert f"there:x 2.00 s {line}" in lines
    assert "error cut" in lines
    assert "explain req-1` on there." in ran.err
