"""The OpenAI dialect of embeddings: the body of `POST /embeddings`, and what a server replies.

Vectors are asked for in base64, which is a fifth of the bytes and exact; a server that does not
take that is asked for numbers, and one that sends them unasked is understood too.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from .base import (
    MAX_DIMENSIONS,
    Embedding,
    EmbedRequest,
    GenerateError,
    Input,
    ProviderUnavailable,
    RequestRejected,
    Usage,
    vector_fault,
)
from .openai_errors import ErrorReader

#: Bytes of a number in a reply: `-1.1754943508222875e-38` in JSON, and the comma.
MAX_NUMBER = 28
#: Bytes of a reply beside its vectors: its head, and the head of each vector.
MAX_REST = 64 * 1024
#: Characters that a token is taken for, where the server counts nothing.
CHARACTERS_A_TOKEN = 4


def encode_embed(request: EmbedRequest, *, base64_vectors: bool) -> bytes:
    """The body of `POST /embeddings`. Raises `RequestRejected`."""
    body: dict[str, Any] = dict(request.extra) if request.dialect == "openai" else {}
    # One text goes without a list, as most callers send it.
    one = request.inputs[0] if len(request.inputs) == 1 else None
    body |= {"model": request.model, "input": one if isinstance(one, str) else request.inputs}
    if base64_vectors:
        body["encoding_format"] = "base64"
    if request.dimensions is not None:
        body["dimensions"] = request.dimensions
    try:
        return msgspec.json.encode(body)
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestRejected(f"the request cannot be written as JSON: {error}") from None


def longest_reply(request: EmbedRequest) -> int:
    """Bytes of the longest reply that can be one to this request."""
    numbers = request.dimensions or MAX_DIMENSIONS
    return MAX_REST + len(request.inputs) * (256 + numbers * MAX_NUMBER)


class _Item(msgspec.Struct):
    embedding: str | list[float]
    index: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    total_tokens: int | None = None


class _Reply(msgspec.Struct):
    data: list[_Item]
    usage: _Usage | None = None


_decode = msgspec.json.Decoder(_Reply).decode


def read_embeddings(body: bytes, request: EmbedRequest, errors: ErrorReader) -> Sequence[Embedding]:
    """The embeddings in the order of the inputs. Raises `GenerateError` for anything else."""
    try:
        return _embeddings(_decode(body), request)
    except (ValueError, RecursionError) as error:
        said = errors.read(body)
        if said.message:  # an error with status 200
            raise errors.event(said) from None
        raise ProviderUnavailable(f"{errors.name} sent no embeddings: {error}") from None


def refuses_base64(failure: GenerateError) -> bool:
    """Did a server refuse the request for its `encoding_format`?"""
    said = failure.message
    return type(failure) is RequestRejected and ("encoding_format" in said or "base64" in said)


def _embeddings(reply: _Reply, request: EmbedRequest) -> Sequence[Embedding]:
    count = len(request.inputs)
    by_index = {
        place if item.index is None else item.index: item for place, item in enumerate(reply.data)
    }
    if len(reply.data) != count or by_index.keys() != set(range(count)):
        raise ValueError(f"{len(reply.data)} embeddings, not one for each of {count} inputs")
    vectors = [_vector(by_index[index].embedding) for index in range(count)]
    if len({len(vector) for vector in vectors}) > 1:
        raise ValueError("vectors of different lengths")
    usages = _usages(request.inputs, reply.usage)
    return [Embedding(vector=v, usage=u) for v, u in zip(vectors, usages, strict=True)]


def _vector(given: str | list[float]) -> bytes:
    try:
        if isinstance(given, str):
            vector = base64.b64decode(given, validate=True)
        else:
            vector = struct.pack(f"<{len(given)}f", *given)
    except (binascii.Error, ValueError, OverflowError, struct.error) as error:
        raise ValueError(f"a vector cannot be read: {error}") from None
    if fault := vector_fault(vector):
        raise ValueError(fault)
    return vector


def _usages(inputs: Sequence[Input], told: _Usage | None) -> list[Usage]:
    """The tokens of each input.

    Tokens that were sent are counted. Servers tell the sum of all inputs: it is shared out by their
    lengths, so that what is stored of them adds up to what was paid.
    """
    if all(not isinstance(given, str) for given in inputs):
        return [Usage(prompt_tokens=len(given)) for given in inputs]
    total = (told.prompt_tokens or told.total_tokens) if told else None
    if total is None or not 0 <= total < 2**53:
        return [Usage(prompt_tokens=_guess(given), exact=False) for given in inputs]
    if len(inputs) == 1:
        return [Usage(prompt_tokens=total)]
    return [Usage(prompt_tokens=n, exact=False) for n in _shares(total, list(map(_size, inputs)))]


def _guess(given: Input) -> int:
    return _size(given) // CHARACTERS_A_TOKEN


def _size(given: Input) -> int:
    return len(given) if isinstance(given, str) else len(given) * CHARACTERS_A_TOKEN


def _shares(total: int, sizes: Sequence[int]) -> list[int]:
    """The total in shares as large as the sizes, in whole numbers that add up to it."""
    weights = [size + 1 for size in sizes]  # the empty text has tokens too, that mark its ends
    whole = sum(weights)
    shares, before, given = [], 0, 0
    for weight in weights:
        before += weight
        upto = total * before // whole
        shares.append(upto - given)
        given = upto
    return shares
