"""The routes about the stored answers: `/mesh/v1/cache/*`. The owner's own door: it shows them all.

The command line uses the same code without HTTP where no node runs (`reply_offline`): several
processes may use `cache.sqlite` at once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cbrrr
import msgspec
import trio

from ..cache.answer_rows import Row, StoredAnswer
from ..cache.answers import AnswerCache, Limits
from ..cache.blocks import SqliteBlocks
from ..cache.cid import cid_text, parse_cid
from ..cache.dag_json import encode
from ..cache.database import Database
from ..cache.records import EmbeddingRecord, Record
from ..providers.base import floats
from .finding import Claimed
from .http_server import Request, Responder
from .openai_answers import usage_fields
from .routes import ANY, Routes, problem, send_other_method

JSON = "application/json"
PATH = "/mesh/v1/cache"
#: Characters of an answer that a listing shows.
PREVIEW = 80
#: Answers of one listing.
MAX_LISTED = 1000
#: Characters of a model's or a namespace's name.
MAX_NAME = 1024

Query = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Reply:
    """What is answered: a status, and a JSON document."""

    status: int
    body: bytes


class Refusal(Exception):
    """What was asked cannot be done."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class CacheApi:
    """Answers `METHOD /mesh/v1/cache/...`, by HTTP or without."""

    def __init__(
        self,
        answers: AnswerCache,
        blocks: SqliteBlocks,
        bring: Callable[[bytes], Awaitable[bool]] | None = None,
        *,
        claimed: Callable[[bytes, str], Sequence[Claimed]] = lambda key, namespace: (),
        node_of: Callable[[str], str] = lambda peer: "",
    ) -> None:
        """`bring` gets an answer that is not here from a further store.

        `claimed` says what others claim of a key in a namespace, `node_of` how a peer is called.
        """
        self._answers = answers
        self._blocks = blocks
        self._bring = bring
        self._claimed = claimed
        self._node_of = node_of
        self._whole: dict[str, dict[str, Callable[[Query], Awaitable[Any]]]] = {
            "": {"GET": self._list, "DELETE": self._purge},
            "stat": {"GET": self._stat},
            "gc": {"POST": self._collect},
        }
        self._each: dict[str, dict[str, Callable[[bytes], Awaitable[Any]]]] = {
            "": {"GET": self._record, "DELETE": self._remove},
            "answer": {"GET": self._answer},
            "alternatives": {"GET": self._alternatives},
            "pin": {"PUT": self._pin, "DELETE": self._unpin},
        }

    def add_to(self, routes: Routes) -> None:
        """Answer these routes."""

        async def answer(request: Request, responder: Responder, rest: str = "") -> None:
            method = "GET" if request.method == "HEAD" else request.method
            methods = self._methods(rest)
            if methods and method not in methods:
                await send_other_method(request, responder, methods)
                return
            reply = await self.reply(method, rest, request.query)
            await responder.send(reply.status, reply.body, content_type=JSON)

        routes.add(ANY, PATH, answer)
        routes.add_below(ANY, f"{PATH}/", answer)

    async def reply(self, method: str, rest: str, query: Query) -> Reply:
        """What is answered to `METHOD /mesh/v1/cache/REST?QUERY`. Never raises."""
        try:
            value = await self._value(method, rest, query)
        except Refusal as refusal:
            return Reply(refusal.status, problem(str(refusal)))
        return Reply(200, value if isinstance(value, bytes) else msgspec.json.encode(value))

    async def _value(self, method: str, rest: str, query: Query) -> Any:
        if method not in self._methods(rest):
            raise Refusal(404, f"there is no {method} {PATH}/{rest} here")
        if rest in self._whole:
            return await self._whole[rest][method](query)
        name, _, action = rest.partition("/")
        return await self._each[action][method](await named(self._answers, name))

    def _methods(self, rest: str) -> Collection[str]:
        """What `/mesh/v1/cache/REST` takes; nothing: there is no such path."""
        if rest in self._whole:
            return self._whole[rest]
        name, _, action = rest.partition("/")
        return self._each.get(action, {}) if name else {}

    # --- all of them

    async def _list(self, query: Query) -> Any:
        """`GET /mesh/v1/cache?model=&namespace=&limit=`."""
        rows = await self._answers.listing(_limit(query), now=time.time(), **_filters(query))
        return await self._shown(rows)

    async def _stat(self, query: Query) -> Any:
        """`GET /mesh/v1/cache/stat`."""
        stat = await self._answers.stat(now=time.time())
        return {**asdict(stat), "hits": stat.hits}

    async def _purge(self, query: Query) -> Any:
        """`DELETE /mesh/v1/cache?model=&namespace=`."""
        filters = _filters(query)
        if not filters:
            raise Refusal(400, "say of which model or which namespace: ?model=M or ?namespace=N")
        return asdict(await self._answers.purge(**filters))

    async def _collect(self, query: Query) -> Any:
        """`POST /mesh/v1/cache/gc`."""
        before = (await self._answers.stat(now=time.time())).bytes
        swept = await self._answers.maintain(time.time())
        after = (await self._answers.stat(now=time.time())).bytes
        return {**asdict(swept), "freed": max(0, before - after), "bytes": after}

    # --- one of them

    async def _record(self, cid: bytes) -> bytes:
        """`GET /mesh/v1/cache/CID`: the root block as dag-json, as `ipfs dag get CID` prints it."""
        await self._stored(cid)
        block = await self._blocks.get(cid)
        if block is None:
            raise _missing(cid)
        return encode(cbrrr.decode_dag_cbor(block))

    async def _answer(self, cid: bytes) -> Any:
        """`GET /mesh/v1/cache/CID/answer`: all of it, also where it lies in leaves."""
        stored = await self._stored(cid)
        return {
            "cid": stored.cid_text,
            "model": stored.record.model,
            **_content(stored.record),
            "usage": usage_fields(stored.record.usage),
            "weights": stored.record.weights,
            "engine": stored.record.engine,
            "numerics": stored.record.numerics,
            "source": stored.source,
            "stored_at": _whole(stored.stored_at),
            "expires_at": _whole(stored.expires_at),
        }

    async def _alternatives(self, cid: bytes) -> Any:
        """`GET /mesh/v1/cache/CID/alternatives`: the answers to the same question, best first.

        The one asked for is among them, and those that are only claimed come last.
        """
        await self._stored(cid)
        now = time.time()
        rows = await self._answers.alternatives(cid, now=now)
        claims = self._claims_of(rows)
        known = [
            {
                **shown,
                "age": max(0, int(now - shown["stored_at"])),
                "asked": parse_cid(shown["cid"]) == cid,
                "here": True,
                "claims": [_claim(each, self._node_of) for each in claims.pop(shown["cid"], ())],
            }
            for shown in await self._shown(rows)
        ]
        return known + [_only_claimed(text, each, self._node_of) for text, each in claims.items()]

    def _claims_of(self, rows: Iterable[Row]) -> dict[str, list[Claimed]]:
        """Who claims which answer to the questions of these rows, by CID."""
        found: dict[str, dict[str, Claimed]] = {}
        for key, namespace in dict.fromkeys((row.key, row.namespace) for row in rows):
            for each in self._claimed(key, namespace):
                found.setdefault(cid_text(each.claim.cid), {})[each.claim.peer] = each
        return {text: list(by_peer.values()) for text, by_peer in found.items()}

    async def _pin(self, cid: bytes) -> Any:
        """`PUT /mesh/v1/cache/CID/pin`: keep it for ever."""
        if not await self._answers.pin(cid):
            raise _missing(cid)
        return {"cid": cid_text(cid), "pinned": True}

    async def _unpin(self, cid: bytes) -> Any:
        """`DELETE /mesh/v1/cache/CID/pin`: let it expire and be evicted again."""
        if not await self._answers.unpin(cid):
            raise _missing(cid)
        return {"cid": cid_text(cid), "pinned": False}

    async def _remove(self, cid: bytes) -> Any:
        """`DELETE /mesh/v1/cache/CID`: forget it, pinned or not."""
        if not await self._answers.remove(cid):
            raise _missing(cid)
        return {"cid": cid_text(cid), "removed": True}

    async def _stored(self, cid: bytes) -> StoredAnswer:
        stored = await self._answers.get(cid, now=time.time())
        if stored is None and self._bring is not None and await self._bring(cid):
            stored = await self._answers.get(cid, now=time.time())
        if stored is None:
            raise _missing(cid)
        return stored

    async def _shown(self, rows: Iterable[Row]) -> list[dict[str, Any]]:
        """The rows as JSON; several questions with one answer are one entry."""
        found: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row.cid.text in found:
                found[row.cid.text]["hits"] += row.hits
                continue
            stored = await self._answers.get(row.cid.raw, now=row.used_at)
            found[row.cid.text] = _entry(row, _preview(stored.record) if stored else "")
            await trio.lowlevel.checkpoint()
        return list(found.values())


def _content(record: Record) -> dict[str, Any]:
    if isinstance(record, EmbeddingRecord):
        return {"embedding": floats(record.embedding.vector)}
    completion = record.completion
    return {
        "text": completion.text,
        "reasoning": completion.reasoning,
        "tool_calls": completion.tool_calls,
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason,
    }


def _preview(record: Record) -> str:
    """What a listing shows of it."""
    if isinstance(record, EmbeddingRecord):
        return f"(embedding of {len(floats(record.embedding.vector))} numbers)"
    return record.completion.text[:PREVIEW]


def _entry(row: Row, text: str) -> dict[str, Any]:
    return {
        "cid": row.cid.text,
        "model": row.model,
        "bytes": row.size,
        "stored_at": int(row.stored_at),
        "expires_at": int(row.expires_at),
        "text": text,
        "pinned": row.pinned,
        "hits": row.hits,
        "tokens": row.tokens,
        "seconds": row.seconds,
        "money": row.money,
        "source": row.source,
        "own": row.own,
        "claimed": row.claimed,
        "namespace": row.namespace,
        "scope": "mesh" if row.shared else "local",
    }


def _claim(claimed: Claimed, node_of: Callable[[str], str]) -> dict[str, Any]:
    claim = claimed.claim
    return {
        "peer": claim.peer,
        "node": node_of(claim.peer),
        "kind": "held" if claim.held else "computed",
        "trusted": not claimed.doubt,
        "reason": claimed.doubt,
        "made_at": claim.made_at,
        "expires_at": claim.expires_at,
    }


def _only_claimed(
    text: str, claims: Sequence[Claimed], node_of: Callable[[str], str]
) -> dict[str, Any]:
    """An answer that peers claim and that is not here."""
    return {
        "cid": text,
        "bytes": claims[0].claim.size,
        "here": False,
        "asked": False,
        "claims": [_claim(each, node_of) for each in claims],
    }


async def named(answers: AnswerCache, text: str) -> bytes:
    """The CID of that text, or of the one answer whose CID begins with it. Raises `Refusal`."""
    with suppress(ValueError):
        return parse_cid(text)
    try:
        found = await answers.beginning(text)
    except ValueError:
        raise Refusal(400, f"{text[:100]!r} is no CID, and no answer's begins so") from None
    if len(found) > 1:
        some = " and ".join(cid.text for cid in found)
        raise Refusal(400, f"{text} is ambiguous: it begins {some}, among others")
    if not found:
        raise Refusal(404, f"this node holds no answer whose CID begins with {text}")
    return found[0].raw


def _missing(cid: bytes) -> Refusal:
    return Refusal(404, f"this node holds no answer {cid_text(cid)}")


def _filters(query: Query) -> dict[str, str]:
    """`model` and `namespace`, where they are given; the default namespace is the empty name."""
    found = {name: query[name][0] for name in ("model", "namespace") if name in query}
    for name, value in found.items():
        if len(value) > MAX_NAME:
            raise Refusal(400, f"{name}: a name of {len(value)} characters")
    if found.get("model") == "":
        raise Refusal(400, "model: the name of a model is missing")
    return found


def _limit(query: Query) -> int:
    text = query.get("limit", [str(MAX_LISTED)])[0]
    if not re.fullmatch("[0-9]{1,4}", text) or not 0 < int(text) <= MAX_LISTED:
        raise Refusal(400, f"limit: expected a number from 1 to {MAX_LISTED}, not {text[:20]!r}")
    return int(text)


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


def reply_offline(path: Path, max_bytes: int, method: str, rest: str, query: Query) -> Reply:
    """What `CacheApi` answers over that `cache.sqlite`, in this process and without a node."""
    database = Database(path if path.exists() else None)
    try:
        blocks = SqliteBlocks(database)
        answers = AnswerCache(database, blocks, limits=Limits(max_bytes=max_bytes))
        return trio.run(CacheApi(answers, blocks).reply, method, rest, query)
    finally:
        database.close()
