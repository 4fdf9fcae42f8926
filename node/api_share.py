"""`/mesh/v1/share/CID`: an answer as it leaves the mesh (`cache.share`), or is looked at.

POST makes a share: a CAR file, or with `pin` a DAG in the Kubo that is configured. GET gives what
`promptmesh open CID` looks at: the answer with its claims, or a share that is found by its CID.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from ..cache import car, share
from ..cache.answer_rows import Row
from ..cache.cid import cid_text
from ..cache.keys import canonical, mesh_key, request_key
from ..cache.kubo import KuboError
from ..cache.record_bounds import RecordError
from ..cache.records import links
from ..cache.share import Share, ShareError
from ..providers.base import GenerateRequest, ModelNotFound, RequestRejected
from .api_cache import Refusal, named
from .http_server import Request, Responder
from .openai_requests import decode_chat
from .parts import Parts
from .routes import Routes, problem

JSON = "application/json"
CAR = "application/vnd.ipld.car; version=1"
PATH = "/mesh/v1/share/"


class ShareBody(msgspec.Struct, forbid_unknown_fields=True):
    """What `POST` takes."""

    #: A body of `/v1/chat/completions`: the question, which goes into the share.
    request: msgspec.Raw = msgspec.Raw()
    #: Put in the signed claims, whose batches name other answers too.
    claims: bool = True
    #: Share it although its scope is `local`, or it is in a namespace.
    private: bool = False
    #: Put it into the configured Kubo, instead of a CAR file.
    pin: bool = False


class ShareApi:
    """Makes shares of the answers that this node holds."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def add_to(self, routes: Routes) -> None:
        """Answer these routes."""
        routes.add_below("POST", PATH, self._handler(self._post))
        routes.add_below("GET", PATH, self._handler(self._get))

    def _handler(
        self, answer: Callable[[bytes, bytes], Awaitable[bytes | Mapping[str, Any]]]
    ) -> Callable[[Request, Responder, str], Awaitable[None]]:
        async def handle(request: Request, responder: Responder, name: str) -> None:
            try:
                cid = await named(self._parts.answers, name)
                value = await answer(cid, request.body)
            except Refusal as refusal:
                await responder.send(refusal.status, problem(str(refusal)), content_type=JSON)
                return
            if isinstance(value, bytes):
                await responder.send(200, value, content_type=CAR)
            else:
                await responder.send(200, msgspec.json.encode(value), content_type=JSON)

        return handle

    # --- making one

    async def _post(self, cid: bytes, body: bytes) -> bytes | Mapping[str, Any]:
        try:
            asked = msgspec.json.decode(body or b"{}", type=ShareBody)
        except msgspec.DecodeError as error:
            raise Refusal(400, f"the body: {error}") from None
        rows = await self._parts.answers.rows(cid)
        if not rows:
            raise Refusal(404, f"this node holds no answer {cid_text(cid)}")
        request = None
        if question := bytes(asked.request):
            request, row = self._question(question, rows)
            rows = [row]
        if not asked.private and not any(row.shared and not row.namespace for row in rows):
            raise Refusal(403, _private(rows))
        made = await self._made(cid, rows, request, claims=asked.claims)
        return await self._pinned(made) if asked.pin else made.car()

    async def _made(
        self, cid: bytes, rows: Sequence[Row], request: bytes | None, *, claims: bool
    ) -> Share:
        now = time.time()
        envelopes: dict[bytes, None] = {}
        for row in rows if claims else ():
            namespace = self._parts.namespaces.of(row.namespace)
            if namespace is not None:
                key = mesh_key(namespace.secret, row.key)
                envelopes |= dict.fromkeys(self._parts.claims.statements(key, cid, now))
        try:
            return share.make(
                await self._answer(cid),
                list(envelopes)[: share.MAX_CLAIMS],
                request,
                peer=self._parts.peer,
                sign=self._parts.sign,
                now=now,
            )
        except ShareError as error:
            raise Refusal(400, str(error)) from None

    async def _answer(self, cid: bytes) -> list[tuple[bytes, bytes]]:
        """The blocks of an answer, its root first."""
        root = await self._parts.blocks.get(cid)
        if root is None:
            raise Refusal(404, f"this node holds no answer {cid_text(cid)}")
        found = [(cid, root)]
        for leaf in dict.fromkeys(links(root)):
            block = await self._parts.blocks.get(leaf)
            if block is None:
                raise Refusal(404, f"a part of the answer is gone: {cid_text(leaf)}")
            found.append((leaf, block))
        return found

    def _question(self, body: bytes, rows: Sequence[Row]) -> tuple[bytes, Row]:
        """The canonical request, and the row of its key. The node does not store requests."""
        try:
            request = decode_chat(body, "share", remember=False).request
            for resolved in self._meanings(request, rows):
                key = request_key(resolved)
                row = next((row for row in rows if row.key == key), None)
                if row is not None:
                    return canonical(resolved), row
        except RequestRejected as error:
            raise Refusal(400, f"the request: {error}") from None
        raise Refusal(
            409,
            "the answer is not one to that request: its key is another. All that decides the "
            "answer must be as it was asked: messages, sampling, tools, namespace",
        )

    def _meanings(self, request: GenerateRequest, rows: Sequence[Row]) -> list[GenerateRequest]:
        """What its model's name may have meant: what it means now, or what answered."""
        models = [row.model for row in rows]
        with suppress(ModelNotFound):  # nobody offers one now
            models.insert(0, self._parts.names.resolve(request).model)
        return [
            msgspec.structs.replace(request, model=model)
            for model in dict.fromkeys([*models, request.model])
        ]

    async def _pinned(self, made: Share) -> Mapping[str, Any]:
        layers = self._parts.layers
        if layers is None:
            raise Refusal(409, "no Kubo is configured (kubo.api): there is nowhere to pin it")
        try:
            await layers.pin_there(made.blocks)
        except KuboError as error:
            raise Refusal(502, f"the Kubo did not take it: {error}") from None
        state = layers.state()
        public = state.problem if state.state == "ready" else ""
        return {"cid": cid_text(made.cid), "kubo": state.url, "public": public}

    # --- looking at one

    async def _get(self, cid: bytes, body: bytes) -> bytes:
        """What is here is its owner's to look at; what is not is read as any program may."""
        rows = await self._parts.answers.rows(cid)
        if rows:
            return (await self._made(cid, rows, None, claims=True)).car()
        blocks = {cid: await self._read(cid)}
        try:
            parts = share.linked(blocks[cid])
        except ShareError:
            parts = ()
        for part in parts:
            blocks[part] = await self._read(part)
        for root in (cid, *parts):
            for leaf in _leaves(blocks[root]):
                blocks[leaf] = await self._read(leaf)
        return car.write([cid], blocks.items())

    async def _read(self, cid: bytes) -> bytes:
        block = await self._parts.reading.read(cid)
        if block is None:
            raise Refusal(404, f"the block {cid_text(cid)} was not found")
        return block


def _leaves(block: bytes) -> tuple[bytes, ...]:
    try:
        return links(block)
    except RecordError:  # it is no answer
        return ()


def _private(rows: Sequence[Row]) -> str:
    namespace = next((row.namespace for row in rows if row.namespace), "")
    why = f"it is in the namespace {namespace!r}" if namespace else "its scope is `local`"
    return (
        f"this answer was not meant for others: {why}. Whoever gets the share can read it, and "
        "pass it on (`--private` shares it all the same)"
    )
