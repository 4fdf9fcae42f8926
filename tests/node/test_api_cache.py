"""The routes of the stored answers, over real HTTP."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import cbrrr
import dag_json
import httpx
import pytest
from serving import serving

from promptmesh.cache.answers import AnswerCache, Limits
from promptmesh.cache.blocks import SqliteBlocks
from promptmesh.cache.cid import cid_bytes, cid_text, parse_cid
from promptmesh.cache.claim_rows import Claim
from promptmesh.cache.database import Database
from promptmesh.node.api_cache import MAX_LISTED, PATH, CacheApi
from promptmesh.node.finding import Claimed
from promptmesh.node.routes import Routes
from promptmesh.providers.base import Completion, ToolCall, Usage

LONG = "0123456789abcdef\n" * 12_000


@dataclass
class World:
    client: httpx.AsyncClient
    answers: AnswerCache
    blocks: SqliteBlocks

    async def store(self, text: str, key: bytes = b"k" * 32, **more: Any) -> str:
        """An answer, and its CID."""
        usage = Usage(prompt_tokens=3, completion_tokens=4)
        completion = Completion(text=text, finish_reason="stop", usage=usage)
        settings = {"model": "m", "now": time.time(), **more}
        stored = await self.answers.store(key, completion, **settings)
        assert stored is not None
        return stored.cid_text

    async def get(self, rest: str, status: int = 200) -> Any:
        answer = await self.client.get(f"{PATH}{rest}")
        assert answer.status_code == status, answer.text
        return answer.json()

    async def say(self, method: str, rest: str, status: int = 200, **headers: str) -> Any:
        answer = await self.client.request(method, f"{PATH}{rest}", headers=headers)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def texts(self, query: str = "") -> set[str]:
        return {row["text"] for row in await self.get(query)}


@asynccontextmanager
async def world(
    *, claimed: Callable[[bytes, str], Sequence[Claimed]] = lambda key, namespace: (), **limits: Any
) -> AsyncIterator[World]:
    database = Database(None)
    blocks = SqliteBlocks(database)
    answers = AnswerCache(database, blocks, peer="me", limits=Limits(**limits))
    routes = Routes()
    CacheApi(answers, blocks, claimed=claimed, node_of=lambda peer: f"name of {peer}").add_to(
        routes
    )
    async with serving(routes) as client:
        yield World(client, answers, blocks)
    database.close()


async def test_the_listing_and_its_filters() -> None:
    async with world() as w:
        assert await w.get("") == []
        one = await w.store("one", seconds=1.5, money=0.25)
        await w.store("two", b"2" * 32, model="n", namespace="team")
        await w.store("three", b"3" * 32, shared=False, source="other")
        again = {"seconds": 1.5, "money": 0.25}
        await w.store("one", b"4" * 32, **again)  # the same answer to another question
        rows = {row["text"]: row for row in await w.get("")}
        assert sorted(rows) == ["one", "three", "two"]
        assert rows["one"] | {"stored_at": 0, "expires_at": 0} == {
            "cid": one, "model": "m", "bytes": rows["one"]["bytes"], "stored_at": 0,
            "expires_at": 0, "text": "one", "pinned": False, "hits": 0, "tokens": 7,
            "seconds": 1.5, "money": 0.25, "source": "me", "own": True, "claimed": 0,
            "namespace": "", "scope": "mesh",
        }  # fmt: skip
        assert (rows["two"]["namespace"], rows["three"]["scope"]) == ("team", "local")
        assert (rows["three"]["own"], rows["three"]["source"]) == (False, "other")
        assert await w.texts("?model=n") == {"two"}
        assert await w.texts("?namespace=team") == {"two"}
        assert await w.texts("?namespace=") == {"one", "three"}
        assert await w.texts("?model=m&namespace=team") == set()
        assert len(await w.get("?limit=2")) == 2


@pytest.mark.parametrize("limit", ["0", "-1", "x", "", str(MAX_LISTED + 1), "99999999999"])
async def test_a_limit_that_is_none(limit: str) -> None:
    async with world() as w:
        assert "limit" in (await w.get(f"?limit={limit}", 400))["error"]["message"]


async def test_stat() -> None:
    async with world() as w:
        await w.store("one")
        w.answers.uses.count("hits_local", tokens=7, seconds=2.5, money=0.5)
        stat = await w.get("/stat")
        assert stat == {
            "answers": 1, "blocks": 1, "bytes": stat["bytes"], "max_bytes": 1_000_000_000,
            "pinned": 0, "hits": 1, "hits_local": 1, "hits_mesh": 0, "coalesced": 0, "misses": 0,
            "bypassed": 0, "tokens_saved": 7, "seconds_saved": 2.5, "money_saved": 0.5,
        }  # fmt: skip


@pytest.mark.parametrize("text", ["Paris é 🎈", LONG], ids=["short", "long"])
async def test_a_record_is_the_dag_json_of_its_root_block(text: str) -> None:
    async with world() as w:
        cid = await w.store(text)
        answer = await w.client.get(f"{PATH}/{cid}")
        # Another implementation of dag-json makes the same of the block, byte for byte.
        block = await w.blocks.get(b"\x01" + _digest_of(cid))
        assert block is not None
        decoded: Any = cbrrr.decode_dag_cbor(block)
        assert dag_json.encode(_with_links(decoded)) == answer.content
        whole = await w.get(f"/{cid}/answer")
        assert (whole["text"], whole["cid"], whole["model"]) == (text, cid, "m")
        assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def _digest_of(cid: str) -> bytes:
    from promptmesh.cache.cid import parse_cid

    return parse_cid(cid)[1:]


def _with_links(value: Any) -> Any:
    """`cbrrr`'s links as those of `multiformats`, which `dag_json` knows."""
    from multiformats import CID

    if isinstance(value, cbrrr.CID):
        return CID.decode(value.cid_bytes)
    if isinstance(value, dict):
        return {key: _with_links(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_links(item) for item in value]
    return value


async def test_the_whole_answer_has_all_its_parts() -> None:
    async with world() as w:
        full = Completion(
            text="t", reasoning="r", finish_reason="tool_calls",
            tool_calls=(ToolCall(id="c", name="n", arguments="{}"),),
            logprobs=({"token": "t", "logprob": -0.5},),
        )  # fmt: skip
        stored = await w.answers.store(b"k" * 32, full, model="m", now=time.time(), source="p")
        assert stored is not None
        whole = await w.get(f"/{stored.cid_text}/answer")
        assert (whole["reasoning"], whole["finish_reason"]) == ("r", "tool_calls")
        assert whole["tool_calls"] == [{"id": "c", "name": "n", "arguments": "{}"}]
        assert whole["logprobs"] == [{"token": "t", "logprob": -0.5}]
        assert (whole["source"], whole["expires_at"] - whole["stored_at"]) == ("p", 86400)


async def test_the_beginning_of_a_cid_is_enough_while_it_is_one_answers() -> None:
    async with world() as w:
        cid = await w.store("one")
        assert (await w.get("/bafyrei/answer"))["cid"] == cid
        other = await w.store("two", b"2" * 32)
        message = (await w.get("/bafyrei", 400))["error"]["message"]
        assert "ambiguous" in message
        assert cid in message
        common = next(n for n in range(59) if cid[n] != other[n])
        assert (await w.get(f"/{other[: common + 1]}/answer"))["cid"] == other
        missing = cid_text(cid_bytes(b"missing"))
        assert missing[:20] in (await w.get(f"/{missing[:20]}", 404))["error"]["message"]
        assert "is no CID" in (await w.get("/nonsense", 400))["error"]["message"]
        for what in (missing, f"{missing}/answer", f"{missing}/alternatives"):
            assert missing in (await w.get(f"/{what}", 404))["error"]["message"]


async def test_alternatives_are_the_answers_to_the_question() -> None:
    async with world() as w:
        mine = await w.store("mine", now=time.time() - 100)
        theirs = await w.store("theirs", source="other")
        await w.store("something else", b"2" * 32)
        for asked in (mine, theirs):
            own, others = await w.get(f"/{asked}/alternatives")
            assert (own["cid"], own["own"], own["asked"]) == (mine, True, asked == mine)
            assert 100 <= own["age"] < 160
            assert (others["cid"], others["own"], others["source"]) == (theirs, False, "other")
            assert (others["asked"], others["here"]) == (asked == theirs, True)
            assert others["claims"] == []


async def test_alternatives_say_who_claims_what() -> None:
    made = int(time.time())
    claims: list[Claimed] = []
    async with world(claimed=lambda key, namespace: claims) as w:
        cid = parse_cid(await w.store("mine"))
        elsewhere = cid_bytes(b"another answer")
        claims += [
            Claimed(Claim("peer-1", cid, 9, made, made + 60, False), ""),
            Claimed(Claim("peer-2", cid, 9, made, made + 60, True), ""),
            Claimed(Claim("peer-3", elsewhere, 77, made, made + 60, False), "it flooded"),
        ]
        mine, claimed = await w.get(f"/{cid_text(cid)}/alternatives")
        assert mine["claims"] == [
            {
                "peer": f"peer-{number}",
                "node": f"name of peer-{number}",
                "kind": kind,
                "trusted": True,
                "reason": "",
                "made_at": made,
                "expires_at": made + 60,
            }
            for number, kind in ((1, "computed"), (2, "held"))
        ]
        assert (claimed["cid"], claimed["here"]) == (cid_text(elsewhere), False)
        assert (claimed["bytes"], claimed["asked"]) == (77, False)
        (claim,) = claimed["claims"]
        assert (claim["trusted"], claim["reason"]) == (False, "it flooded")


async def test_pins() -> None:
    async with world(max_bytes=1) as w:
        cid = await w.store(LONG)
        assert await w.say("PUT", f"/{cid}/pin") == {"cid": cid, "pinned": True}
        assert (await w.get("/stat"))["pinned"] == 1  # one answer, of five blocks
        await w.say("POST", "/gc")
        assert (await w.get(""))[0]["pinned"] is True
        assert await w.say("DELETE", f"/{cid}/pin") == {"cid": cid, "pinned": False}
        gone = await w.say("POST", "/gc")
        assert (gone["evicted"] > 0, gone["bytes"], gone["freed"] > 200_000) == (True, 0, True)
        assert await w.get("") == []
        for method in ("PUT", "DELETE"):
            await w.say(method, f"/{cid}/pin", 404)


async def test_gc_removes_what_expired() -> None:
    async with world() as w:
        await w.store("over", ttl=1, now=time.time() - 10)
        await w.store("kept", b"2" * 32)
        gone = await w.say("POST", "/gc")
        assert (gone["expired"], gone["evicted"]) == (1, 0)
        assert await w.texts() == {"kept"}


async def test_remove_one() -> None:
    async with world() as w:
        cid = await w.store("one")
        await w.say("PUT", f"/{cid}/pin")
        assert await w.say("DELETE", f"/{cid}") == {"cid": cid, "removed": True}
        assert await w.get("") == []
        await w.say("DELETE", f"/{cid}", 404)


async def test_purge_of_a_model_and_of_a_namespace() -> None:
    async with world() as w:
        for number in range(300):  # more than are looked at in one go
            key = number.to_bytes(32, "big")
            name = "team" if number % 3 == 0 else ""
            await w.store(f"{number}", key, model=f"m{number % 2}", namespace=name)
        pinned = await w.store("pinned", model="m0")
        await w.say("PUT", f"/{pinned}/pin")
        assert await w.say("DELETE", "?model=m0&namespace=team") == {"removed": 50, "pinned": 0}
        assert await w.say("DELETE", "?model=m0") == {"removed": 100, "pinned": 1}
        assert await w.say("DELETE", "?namespace=team") == {"removed": 50, "pinned": 0}
        left = await w.get("?limit=1000")
        assert {(row["model"], row["namespace"]) for row in left} == {("m0", ""), ("m1", "")}
        assert len(left) == 101
        assert await w.say("DELETE", "?model=unknown") == {"removed": 0, "pinned": 0}


@pytest.mark.parametrize("query", ["", "?limit=3", "?model=", "?model=" + "x" * 2000])
async def test_a_purge_of_everything_is_refused(query: str) -> None:
    async with world() as w:
        await w.store("one")
        await w.say("DELETE", query, 400)
        assert await w.texts() == {"one"}


@pytest.mark.parametrize(
    ("method", "rest"),
    [("DELETE", "/{cid}"), ("PUT", "/{cid}/pin"), ("DELETE", "?model=m"), ("POST", "/gc")],
)
async def test_a_web_page_changes_nothing(method: str, rest: str) -> None:
    async with world(max_bytes=1) as w:
        cid = await w.store("one")
        path = rest.format(cid=cid)
        await w.say(method, path, 403, origin="https://evil.example")
        await w.say(method, path, 403, host="evil.example")
        (row,) = await w.get("")
        assert (row["cid"], row["pinned"]) == (cid, False)


@pytest.mark.parametrize(
    ("method", "rest", "status"),
    [
        ("PUT", "/{cid}/nothing", 404),
        ("GET", "/{cid}/nothing", 404),
        ("GET", "/{cid}/answer/more", 404),
        ("OPTIONS", "//pin", 404),
        ("GET", "/" + "x" * 3000, 400),
        ("GET", "/%00", 400),
    ],
)
async def test_what_there_is_not(method: str, rest: str, status: int) -> None:
    async with world() as w:
        cid = await w.store("one")
        await w.say(method, rest.format(cid=cid), status)
        assert await w.texts() == {"one"}


@pytest.mark.parametrize(
    ("method", "rest", "allowed"),
    [
        ("POST", "", "DELETE, GET, HEAD, OPTIONS"),
        ("PUT", "/{cid}", "DELETE, GET, HEAD, OPTIONS"),
        ("DELETE", "/{cid}/answer", "GET, HEAD, OPTIONS"),
        ("HEAD", "/{cid}/pin", "DELETE, OPTIONS, PUT"),
        ("DELETE", "/stat", "GET, HEAD, OPTIONS"),
        ("GET", "/gc", "OPTIONS, POST"),
    ],
)
async def test_another_method_is_told_which_are_taken(method: str, rest: str, allowed: str) -> None:
    async with world() as w:
        path = PATH + rest.format(cid=await w.store("one"))
        for asked, status in ((method, 405), ("OPTIONS", 204)):
            answer = await w.client.request(asked, path)
            assert (answer.status_code, answer.headers["allow"]) == (status, allowed)
        assert await w.texts() == {"one"}
