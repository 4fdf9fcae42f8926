"""The routes of the OpenAI dialect: chat completions, streamed or whole, and the models."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from ..providers.base import Answering, GenerateError, ModelRequest, Origin
from .api_errors import error_body, error_event, error_headers, status_of
from .cache_headers import cache_headers
from .http_server import Request, Responder
from .names import Names
from .openai_answers import StreamEncoder, encode_whole, origin_headers
from .openai_requests import ChatCall, decode_chat
from .request_headers import forbid_storing, with_headers
from .router import Router
from .waiting_notes import EVENTS, WaitingNotes

logger = logging.getLogger(__name__)

JSON = "application/json"


def new_request_id() -> str:
    """An id that names a request in logs, headers and on every node it visits."""
    return "req-" + secrets.token_hex(10)


class OpenAIApi:
    """The handlers of `/v1/*`."""

    def __init__(
        self,
        router: Router,
        names: Names,
        notes: WaitingNotes,
        key_text: Callable[[bytes], str] = bytes.hex,
    ) -> None:
        """`key_text` writes the key of a question as the configuration says."""
        self._router = router
        self._names = names
        self._notes = notes
        self._key_text = key_text

    async def chat_completions(self, request: Request, responder: Responder) -> None:
        """`POST /v1/chat/completions`."""
        request_id = new_request_id()
        try:
            remember = not forbid_storing(request)
            call = decode_chat(request.body, request_id, remember=remember)
            call = msgspec.structs.replace(call, request=with_headers(call.request, request))
            if call.stream:
                await self._stream(responder, call)
            else:
                async with self._router.open(call.request) as answering:
                    await self._send_whole(responder, call, answering)
        except GenerateError as error:
            logger.info("%s failed: %s", request_id, error)
            self._router.trace.refused(request_id, error)
            await send_error(responder, error, request_id, self._router.trace.attempts(request_id))

    async def _stream(self, responder: Responder, call: ChatCall) -> None:
        async with (
            self._notes.told(responder, call.request.id) as answered,
            self._router.open(call.request) as answering,
        ):
            await answered()
            await self._send_stream(responder, call, answering)

    async def _send_whole(self, responder: Responder, call: ChatCall, answering: Answering) -> None:
        completion, closing = await answering.whole()
        origin = closing.origin or answering.origin
        request_id = call.request.id
        await responder.send(
            200,
            encode_whole(completion, origin, request_id, int(time.time()), closing.cid),
            content_type=JSON,
            headers=self._headers(call, answering, origin, closing.cid),
        )

    async def _send_stream(
        self, responder: Responder, call: ChatCall, answering: Answering
    ) -> None:
        request_id = call.request.id
        encoder = StreamEncoder(
            answering.origin, request_id, int(time.time()), include_usage=call.include_usage
        )
        headers = self._headers(call, answering, answering.origin)
        if not responder.started:
            await responder.start(
                200, content_type=EVENTS, headers=[("cache-control", "no-cache"), *headers]
            )
        await responder.write(encoder.first())
        async for chunk in answering.chunks:
            events = encoder.chunk(chunk)
            if events:
                await responder.write(events)
        await responder.end()

    def _headers(
        self, call: ChatCall, answering: Answering, origin: Origin, cid: str | None = None
    ) -> list[tuple[str, str]]:
        return answer_headers(call.request, origin, self._key_text(answering.key), cid)

    async def models(self, request: Request, responder: Responder) -> None:
        """`GET /v1/models`: everything that can be asked, over all peers."""
        body = msgspec.json.encode({"object": "list", "data": list(self._model_objects())})
        await responder.send(200, body, content_type=JSON)

    def _model_objects(self) -> Iterable[dict[str, Any]]:
        for model, sources in self._names.models().items():
            yield {
                "id": model,
                "object": "model",
                "created": 0,
                "owned_by": sources[0].provider,
                "promptmesh": {
                    "tasks": sorted({task for s in sources for task in s.offer.tasks}),
                    "context_length": max(s.offer.context_length or 0 for s in sources) or None,
                    "sources": [
                        {"peer": s.peer, "node": s.node, "provider": s.provider} for s in sources
                    ],
                },
            }


def answer_headers(
    request: ModelRequest, origin: Origin, key: str, cid: str | None
) -> list[tuple[str, str]]:
    """The headers of an answer: who gave it, and how the cache dealt with the request."""
    refresh = request.cache.mode == "refresh"
    return [
        *origin_headers(origin, request.id, cid),
        *cache_headers(origin, key, cid=cid, refresh=refresh),
    ]


async def send_error(
    responder: Responder, error: GenerateError, request_id: str, attempts: int
) -> None:
    """The failure as a status and a body, or as the last event of a stream that has begun."""
    if responder.ended:  # its time was over just as the client had it all
        return
    if responder.started:
        await responder.write(error_event(error))
        await responder.end()
        return
    headers = [
        ("x-promptmesh-request-id", request_id),
        ("x-promptmesh-attempts", str(attempts)),
        *error_headers(error),
    ]
    await responder.send(status_of(error), error_body(error), content_type=JSON, headers=headers)
