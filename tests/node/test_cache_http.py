"""What the cache does for programs, through the router and over real HTTP."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import trio
from fakes_router import HERE, THERE, AsIs, Shared, nowhere
from serving import serving

from promptmesh.cache.answer_rows import StoredAnswer
from promptmesh.cache.answers import AnswerCache
from promptmesh.cache.blocks import SqliteBlocks
from promptmesh.cache.cid import parse_cid
from promptmesh.cache.database import Database
from promptmesh.cache.keys import key_text, request_key
from promptmesh.cache.namespaces import Namespaces
from promptmesh.cache.uses import Kind
from promptmesh.node import openai_requests
from promptmesh.node.api_openai import OpenAIApi
from promptmesh.node.ledger import Ledger
from promptmesh.node.node_database import NodeDatabase
from promptmesh.node.permissions import Permissions
from promptmesh.node.router import Reuse, Router
from promptmesh.node.routes import Routes
from promptmesh.node.waiting_notes import WaitingNotes
from promptmesh.providers.base import (
    Answering,
    Chunk,
    Completion,
    GenerateRequest,
    Message,
    Origin,
    Sampling,
    Text,
    ToolCallDelta,
    Usage,
)

URL = "/v1/chat/completions"
USAGE = Usage(prompt_tokens=5, completion_tokens=2)
LOGPROB = {"token": "é", "logprob": -0.12345678901234567, "bytes": [195, 169], "top_logprobs": []}
#: What `World.ask` asks.
QUESTION = GenerateRequest(
    model="m",
    messages=(Message(role="user", content=(Text(text="hi"),)),),
    sampling=Sampling(temperature=0),
)
#: An answer with everything in it, in pieces as a model makes them.
RICH = [
    Chunk(reasoning="let me "),
    Chunk(reasoning="see"),
    Chunk(text="é", logprobs=(LOGPROB,)),
    Chunk(text="\n\u2028 🎈"),
    Chunk(tool_calls=(ToolCallDelta(index=0, id="c1", name="look", arguments='{"a"'),)),
    Chunk(tool_calls=(ToolCallDelta(index=0, arguments=": 1.0}"),)),
    Chunk(tool_calls=(ToolCallDelta(index=1, id="c2", name="go", arguments=""),)),
    Chunk(finish_reason="tool_calls", usage=USAGE),
]


@dataclass
class Backends:
    """Answers with the chunks given, or with a number that rises, once the door is open."""

    chunks: list[Chunk] = field(default_factory=list)
    finish: Any = "stop"
    asked: list[GenerateRequest] = field(default_factory=list)
    door: trio.Event = field(default_factory=trio.Event)

    @asynccontextmanager
    async def open(
        self, request: Any, *, local_only: bool = False, key: bytes = b""
    ) -> AsyncIterator[Answering]:
        self.asked.append(request)
        origin = Origin(peer=HERE, node="n", provider="p", model="m", attempts=1)
        yield Answering(origin, self._given(len(self.asked)))

    async def _given(self, number: int) -> AsyncIterator[Chunk]:
        await self.door.wait()
        last = Chunk(finish_reason=self.finish, usage=USAGE)
        for chunk in self.chunks or [Chunk(text=str(number)), last]:
            yield chunk


class Untouchable(AnswerCache):
    """Fails the test that reads or writes it."""

    async def lookup(self, *_: Any, **__: Any) -> StoredAnswer | None:
        raise AssertionError("the cache was read")

    async def store(self, *_: Any, **__: Any) -> StoredAnswer | None:
        raise AssertionError("the cache was written")


@dataclass
class Silent(Shared):
    """Fails the test that asks or tells a peer, for as long as nobody may."""

    silent: bool = True

    async def find(self, *question: Any) -> tuple[StoredAnswer, str] | None:
        assert not self.silent, "a peer was asked"
        return await super().find(*question)

    def announce(self, *answer: Any) -> None:
        assert not self.silent, "a peer was told"
        super().announce(*answer)


@dataclass
class World:
    client: httpx.AsyncClient
    router: Router
    backends: Backends
    shared: Shared
    answers: AnswerCache

    async def ask(
        self, prompt: str = "hi", headers: dict[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        body = {"model": "m", "messages": [{"role": "user", "content": prompt}]}
        body |= {"temperature": 0} | fields
        body = {name: value for name, value in body.items() if value is not None}
        return await self.client.post(URL, json=body, headers=headers)

    async def text(self, **how: Any) -> str:
        answer = await self.ask(**how)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    async def stored(self) -> int:
        return (await self.answers.stat(now=time.time())).answers


@asynccontextmanager
async def world(
    *,
    reuse: Reuse = "deterministic",
    backends: Backends | None = None,
    shared: Shared | None = None,
    answers: type[AnswerCache] = AnswerCache,
    written: Callable[[bytes], str] = key_text,
) -> AsyncIterator[World]:
    database, node_database = Database(None), NodeDatabase(None)
    backends, shared = backends or Backends(), shared or Shared()
    backends.door.set()
    cache = answers(database, SqliteBlocks(database), peer=HERE)
    async with trio.open_nursery() as nursery:
        router = Router(
            backends=backends,
            names=AsIs(),
            answers=cache,
            shared=shared,
            ledger=Ledger(node_database, peer=HERE),
            nursery=nursery,
            peer=HERE,
            node_of={HERE: "here", THERE: "there"}.__getitem__,
            reuse=reuse,
            deadline=60,
        )
        routes = Routes()
        names: Any = None  # only `GET /v1/models` needs them
        notes = WaitingNotes(nursery, waiting=nowhere, busy=lambda: False)
        openai = OpenAIApi(router, names, notes, written)
        routes.add("POST", URL, openai.chat_completions)
        async with serving(routes) as client:
            yield World(client, router, backends, shared, cache)
        nursery.cancel_scope.cancel()
    database.close()
    node_database.close()


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The objects of a streamed answer, which must be whole."""
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


#: The three ways to say a thing: body, header of ours, header of HTTP.
def ways(field: dict[str, Any], header: str, control: str | None = None) -> list[dict[str, Any]]:
    ((name, value),) = field.items()
    found: list[dict[str, Any]] = [
        {"promptmesh": {"cache": field}},
        {"headers": {f"x-promptmesh-cache-{name.replace('_', '-')}": header or str(value)}},
    ]
    return found + ([{"headers": {"cache-control": control}}] if control else [])


# --- what a request can say -----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("way", ways({"mode": "bypass"}, "bypass", "No-Store"))
async def test_no_store_touches_nothing(way: dict[str, Any], stream: bool) -> None:
    openai_requests._remembered.clear()
    async with world(shared=Silent(), answers=Untouchable) as w:
        for number in (1, 2):
            answer = await w.ask(stream=stream, **way)
            assert answer.status_code == 200
            assert str(number) in answer.text
            assert answer.headers["x-promptmesh-cache"] == "bypass"
            assert answer.headers["cache-status"] == "promptmesh; fwd=bypass"
            assert not {"x-promptmesh-cid", "etag", "age"} & answer.headers.keys()
        stat = await w.answers.stat(now=time.time())
        assert (stat.bypassed, stat.misses, stat.hits, stat.answers) == (2, 0, 0, 0)
        # Whoever computes it is told the same.
        assert [request.cache.mode for request in w.backends.asked] == ["bypass", "bypass"]
        assert not openai_requests._remembered


async def test_no_store_does_not_see_what_is_stored_and_leaves_it() -> None:
    async with world() as w:
        assert await w.text() == "1"
        assert await w.text(headers={"cache-control": "no-store"}) == "2"
        assert await w.text() == "1"


@pytest.mark.parametrize("way", ways({"mode": "only"}, "only", "only-if-cached"))
async def test_only_if_cached(way: dict[str, Any]) -> None:
    async with world() as w:
        answer = await w.ask(**way)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "cache_only_miss"
        assert w.backends.asked == []
        assert w.shared.asked == 1  # a peer's is a stored one too
        assert await w.text() == "1"
        assert await w.text(**way) == "1"


@pytest.mark.parametrize("way", ways({"mode": "refresh"}, "refresh", "no-cache"))
async def test_refresh(way: dict[str, Any]) -> None:
    async with world() as w:
        await w.ask()
        asked = w.shared.asked
        answer = await w.ask(**way)
        assert answer.json()["choices"][0]["message"]["content"] == "2"
        assert answer.headers["cache-status"].startswith("promptmesh; fwd=request; stored")
        assert w.shared.asked == asked
        # The newest of this node's own is the one that is reused.
        assert await w.text() == "2"
        assert await w.stored() == 2


@pytest.mark.parametrize("way", ways({"ttl": 60}, "60"))
async def test_ttl(way: dict[str, Any]) -> None:
    async with world() as w:
        await w.ask(**way)
        (row,) = await w.answers.listing(now=time.time())
        assert row.expires_at - row.stored_at == pytest.approx(60)
        hit = await w.ask()
        assert hit.headers["cache-status"].startswith("promptmesh; hit; ttl=")
        assert 0 < int(hit.headers["cache-status"].split("ttl=")[1].split(";")[0]) <= 60


@pytest.mark.parametrize("way", ways({"max_age": 50}, "50", "max-age=50"))
async def test_max_age(way: dict[str, Any]) -> None:
    async with world() as w:
        old = Completion(text="old", finish_reason="stop")
        await w.answers.store(request_key(QUESTION), old, model="m", now=time.time(), age=100)
        hit = await w.ask()
        assert 100 <= int(hit.headers["age"]) < 150
        assert hit.headers["x-promptmesh-cache"] == "hit-local"
        assert (await w.ask(**way)).headers["x-promptmesh-cache"] == "miss"
        assert (await w.ask(**way)).headers["x-promptmesh-cache"] == "hit-local"


@pytest.mark.parametrize("way", ways({"scope": "local"}, "local"))
async def test_scope_local_stays_here(way: dict[str, Any]) -> None:
    shared = Silent()
    async with world(shared=shared) as w:
        first = await w.ask(**way)
        cid = parse_cid(first.headers["x-promptmesh-cid"])
        assert (await w.ask(**way)).headers["x-promptmesh-cache"] == "hit-local"
        permissions = Permissions(answers=w.answers, namespaces=Namespaces())
        assert not await permissions.may_serve(THERE, cid)
        assert not await permissions.may_serve(None, cid)
        # Nor is it given to a peer that asks the same question: it gets an answer of its own.
        shared.silent = False  # what is computed for a peer may be told
        async with w.router.open(QUESTION, local_only=True) as answering:
            assert answering.origin.cache == "miss"
            assert (await answering.completion()).text == "2"
        assert request_key(QUESTION) == request_key(w.backends.asked[0])


@pytest.mark.parametrize("way", ways({"namespace": "team"}, "team"))
async def test_namespaces_do_not_mix(way: dict[str, Any]) -> None:
    async with world() as w:
        assert await w.text(**way) == "1"
        assert await w.text() == "2"
        assert await w.text(promptmesh={"cache": {"namespace": "other"}}) == "3"
        assert await w.text(**way) == "1"
        assert await w.text() == "2"
        rows = await w.answers.listing(now=time.time())
        assert sorted(row.namespace for row in rows) == ["", "other", "team"]
        # Who knows the CID alone gets only what is in no namespace.
        permissions = Permissions(answers=w.answers, namespaces=Namespaces())
        served = [row for row in rows if await permissions.may_serve(THERE, row.cid.raw)]
        assert [row.namespace for row in served] == [""]


# --- which answers are reused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reuse", "fields", "reused"),
    [
        ("deterministic", {"temperature": 0}, True),
        ("deterministic", {"temperature": 0.0}, True),
        ("deterministic", {"temperature": None, "seed": 7}, True),
        ("deterministic", {"temperature": 1, "seed": 0}, True),
        ("deterministic", {"temperature": None}, False),
        ("deterministic", {"temperature": 0.5}, False),
        ("deterministic", {"temperature": 1, "promptmesh": {"cache": {"any_sample": True}}}, True),
        ("always", {"temperature": 1}, True),
        ("never", {"temperature": 0}, False),
        ("never", {"temperature": 0, "promptmesh": {"cache": {"any_sample": True}}}, False),
    ],
)
async def test_the_policy(reuse: Reuse, fields: dict[str, Any], reused: bool) -> None:
    async with world(reuse=reuse) as w:
        assert await w.text(**fields) == "1"
        assert await w.text(**fields) == ("1" if reused else "2")
        assert await w.stored() == (1 if reused else 2)  # stored they all are


@pytest.mark.parametrize(
    ("finish", "fields", "stored"),
    [
        ("stop", {}, True),
        ("length", {"max_tokens": 2}, True),
        ("length", {"max_completion_tokens": 2}, True),
        ("length", {"max_tokens": 3}, False),  # the model's context was full
        ("length", {}, False),
        ("content_filter", {}, False),
    ],
)
async def test_what_is_whole(finish: str, fields: dict[str, Any], stored: bool) -> None:
    async with world(backends=Backends(finish=finish)) as w:
        first = await w.ask(**fields)
        assert ("x-promptmesh-cid" in first.headers) is stored
        assert ("etag" in first.headers) is stored
        assert ("; stored" in first.headers["cache-status"]) is stored
        assert await w.text(**fields) == ("1" if stored else "2")


# --- what is given back ---------------------------------------------------------------------------


def content(answer: httpx.Response) -> Any:
    """The body without what is of the one request."""
    body = answer.json()
    for name in ("id", "created", "promptmesh"):
        del body[name]
    body["usage"].pop("cached", None)
    return body


def joined(answer: httpx.Response) -> dict[str, Any]:
    """A streamed answer, put together."""
    found: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": {}, "logprobs": []}
    for event in events(answer):
        for choice in event["choices"]:
            delta = choice["delta"]
            for name in ("content", "reasoning_content"):
                found[name] += delta.get(name) or ""
            found["logprobs"] += (choice["logprobs"] or {}).get("content", [])
            found["finish_reason"] = choice["finish_reason"]
            for call in delta.get("tool_calls", []):
                there = found["calls"].setdefault(call["index"], ["", "", ""])
                there[0] += call.get("id") or ""
                there[1] += call["function"].get("name") or ""
                there[2] += call["function"]["arguments"]
    return found


async def test_everything_is_replayed_exactly() -> None:
    async with world(backends=Backends(chunks=RICH)) as w:
        computed = await w.ask()
        hit = await w.ask()
        assert hit.headers["x-promptmesh-cache"] == "hit-local"
        assert content(hit) == content(computed)
        message = content(hit)["choices"][0]
        assert message["logprobs"]["content"] == [LOGPROB]
        assert message["message"]["reasoning_content"] == "let me see"
        assert message["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": 1.0}'
        usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
        assert computed.json()["usage"] == usage
        assert hit.json()["usage"] == usage | {"cached": True}
        assert len(w.backends.asked) == 1


async def test_a_stream_is_replayed_exactly_and_at_once() -> None:
    async with world(backends=Backends(chunks=RICH)) as w:
        options = {"include_usage": True}
        computed = await w.ask(stream=True, stream_options=options)
        hit = await w.ask(stream=True, stream_options=options)
        assert joined(hit) == joined(computed)
        assert joined(hit)["calls"] == {0: ["c1", "look", '{"a": 1.0}'], 1: ["c2", "go", ""]}
        # Its CID is known before the body; of the computed one at its end.
        cid = hit.headers["x-promptmesh-cid"]
        assert hit.headers["etag"] == f'"{cid}"'
        assert 0 <= int(hit.headers["age"]) < 60
        assert not {"x-promptmesh-cid", "etag", "age"} & computed.headers.keys()
        assert events(computed)[-2]["promptmesh"]["cid"] == cid
        assert events(hit)[-1]["usage"]["cached"] is True
        assert "cached" not in events(computed)[-1]["usage"]


@pytest.mark.parametrize("first", [True, False], ids=["streamed first", "whole first"])
async def test_streamed_and_whole_requests_share_an_entry(first: bool) -> None:
    async with world(backends=Backends(chunks=RICH)) as w:
        one = await w.ask(stream=first)
        other = await w.ask(stream=not first)
        assert other.headers["x-promptmesh-cache"] == "hit-local"
        whole, streamed = (other, one) if first else (one, other)
        assert joined(streamed)["content"] == content(whole)["choices"][0]["message"]["content"]
        assert len(w.backends.asked) == 1
        assert await w.stored() == 1


async def test_equal_requests_at_once_share_a_computation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world() as w:
        w.backends.door, joined = trio.Event(), trio.Event()
        counted: list[str] = []
        count = w.answers.uses.count

        def counting(kind: Kind, **saved: Any) -> None:
            count(kind, **saved)
            counted.append(kind)
            if counted.count("coalesced") == 2:
                joined.set()

        monkeypatch.setattr(w.answers.uses, "count", counting)
        answers: list[httpx.Response] = []

        async def ask(stream: bool) -> None:
            answers.append(await w.ask(stream=stream))

        async with trio.open_nursery() as nursery:
            for stream in (False, True, False):
                nursery.start_soon(ask, stream)
            with trio.fail_after(60):
                await joined.wait()
            w.backends.door.set()
        assert len(w.backends.asked) == 1
        statuses = sorted(answer.headers["cache-status"] for answer in answers)
        assert sum("fwd=miss; collapsed" in status for status in statuses) == 2
        caches = sorted(answer.headers["x-promptmesh-cache"] for answer in answers)
        assert caches == ["coalesced", "coalesced", "miss"]


async def test_a_peers_answer_is_a_hit() -> None:
    async with world() as there, world() as w:
        await there.ask()
        key = request_key(there.backends.asked[0])
        stored = await there.answers.lookup(key, now=time.time())
        assert stored is not None
        w.shared.knows = (stored, THERE)
        hit = await w.ask()
        assert hit.headers["x-promptmesh-cache"] == "hit-mesh"
        assert hit.headers["x-promptmesh-node"] == "there"
        assert hit.headers["cache-status"].endswith("; detail=mesh")
        assert hit.headers["etag"] == f'"{stored.cid_text}"'
        assert w.backends.asked == []


@pytest.mark.parametrize(
    "written",
    [
        key_text,
        functools.partial(key_text, form="cid"),
        functools.partial(key_text, form="cid", base="base58btc"),
    ],
    ids=["sha256", "cid", "base58btc"],
)
async def test_the_key_is_shown_as_the_configuration_says(
    written: Callable[[bytes], str],
) -> None:
    async with world(written=written) as w:
        answers = [await w.ask(), await w.ask(), await w.ask(stream=True)]
        key = written(request_key(w.backends.asked[0]))
        assert all(f'key="{key}"' in answer.headers["cache-status"] for answer in answers)
