"""`POST /v1/embeddings`: the OpenAI dialect of embeddings."""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
import trio

from ..providers.base import (
    FLOAT_SIZE,
    MAX_DIMENSIONS,
    MAX_INPUT_TOKENS,
    MAX_INPUTS,
    Chunk,
    Embedding,
    EmbedRequest,
    GenerateError,
    Input,
    Origin,
    RequestRejected,
    Token,
    Usage,
    floats,
)
from .api_openai import JSON, answer_headers, new_request_id, send_error
from .embed_router import EmbedRouter
from .http_server import Request, Responder
from .openai_answers import origin_fields, usage_fields
from .openai_requests import ABOUT_THE_CALLER, MeshFields, Name, decode_body, routing
from .request_headers import with_headers

logger = logging.getLogger(__name__)

Encoding = Literal["float", "base64"]
#: Numbers that are written as text before others have their turn: that takes a few ms.
TURN = 16 * 1024

_encode = msgspec.json.Encoder().encode


class _Body(msgspec.Struct):
    model: Name
    input: str | list[str | Token | list[Token]]
    encoding_format: Encoding | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=MAX_DIMENSIONS)] | None = None
    promptmesh: MeshFields = msgspec.field(default_factory=MeshFields)


_KNOWN = frozenset(_Body.__struct_fields__) | ABOUT_THE_CALLER
_decode = msgspec.json.Decoder(_Body).decode


class EmbeddingsApi:
    """The handler of `/v1/embeddings`."""

    def __init__(self, router: EmbedRouter, key_text: Callable[[bytes], str] = bytes.hex) -> None:
        """`key_text` writes the key of a question as the configuration says."""
        self._router = router
        self._key_text = key_text

    async def embeddings(self, request: Request, responder: Responder) -> None:
        """`POST /v1/embeddings`."""
        request_id = new_request_id()
        try:
            asked, encoding = decode_embed(request.body, request_id)
            asked = with_headers(asked, request)
            async with self._router.open(asked) as answering:
                chunk = await anext(aiter(answering.chunks))
                origin = answering.origin
            body = await encode_embeddings(chunk, origin, request_id, encoding)
            headers = answer_headers(asked, origin, self._key_text(answering.key), chunk.cid)
            await responder.send(200, body, content_type=JSON, headers=headers)
        except GenerateError as error:
            logger.info("%s failed: %s", request_id, error)
            self._router.trace.refused(request_id, error)
            await send_error(responder, error, request_id, self._router.trace.attempts(request_id))


def decode_embed(body: bytes, request_id: str) -> tuple[EmbedRequest, Encoding]:
    """Decode a body: the request, and the form of its vectors.

    Raises `RequestRejected`, with the field that is wrong.
    """
    fields, extra = decode_body(body, _decode, _KNOWN)
    request = EmbedRequest(
        model=fields.model,
        inputs=_inputs(fields.input),
        dimensions=fields.dimensions,
        dialect="openai",
        extra=extra,
        id=request_id,
        **routing(fields.promptmesh),
    )
    return request, fields.encoding_format or "float"


def _inputs(given: str | list[str | int | list[int]]) -> tuple[Input, ...]:
    """One text, several, the tokens of one, or of several."""
    if isinstance(given, str):
        return (given,)
    if given and all(isinstance(token, int) for token in given):
        inputs: tuple[Any, ...] = (tuple(given),)
    else:
        inputs = tuple(tuple(one) if isinstance(one, list) else one for one in given)
    if not 0 < len(inputs) <= MAX_INPUTS:
        raise _wrong(f"1 to {MAX_INPUTS} inputs can be asked for at once, not {len(inputs)}")
    for number, one in enumerate(inputs):
        if isinstance(one, int):
            raise _wrong("a token stands beside texts or lists of tokens")
        if isinstance(one, tuple) and not 0 < len(one) <= MAX_INPUT_TOKENS:
            raise _wrong(f"input {number} has {len(one)} tokens; 1 to {MAX_INPUT_TOKENS} may be")
    return inputs


def _wrong(what: str) -> RequestRejected:
    return RequestRejected(f"input: {what}", field="input")


async def encode_embeddings(
    chunk: Chunk, origin: Origin, request_id: str, encoding: Encoding
) -> bytes:
    """The `list` object. A float is written so that it is the same float32 when it is read."""
    items = []
    written = 0
    for index, embedding in enumerate(chunk.embeddings):
        items.append(_item(index, embedding, encoding))
        written += len(embedding.vector) // FLOAT_SIZE
        if written > TURN:
            await trio.lowlevel.checkpoint()
            written = 0
    fields = origin_fields(origin, request_id, chunk.cid)
    fields["cached"] = sum(embedding.usage.cached for embedding in chunk.embeddings)
    rest = {
        "model": origin.model,
        "usage": _usage(chunk.usage or Usage(exact=False)),
        "promptmesh": fields,
    }
    return b'{"object":"list","data":[' + b",".join(items) + b"]," + _encode(rest)[1:]


def _item(index: int, embedding: Embedding, encoding: Encoding) -> bytes:
    vector: Any
    if encoding == "base64":
        vector = base64.b64encode(embedding.vector).decode()
    else:
        vector = floats(embedding.vector)
    item = {"object": "embedding", "index": index, "embedding": vector}
    if embedding.cid is not None:
        item["promptmesh"] = {"cid": embedding.cid, "cached": embedding.usage.cached}
    return _encode(item)


def _usage(usage: Usage) -> dict[str, Any]:
    fields = usage_fields(usage)
    del fields["completion_tokens"]
    return fields
