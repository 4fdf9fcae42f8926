"""Embeddings of Gemini: the body of `:batchEmbedContents`, and its reply.

Google counts no tokens of them, so their number is an estimate.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec

from .base import Embedding, EmbedRequest, Input, ProviderUnavailable, Usage, vector_fault
from .openai_errors import ErrorReader

#: Inputs of one call: the most that Google takes.
MAX_BATCH = 100


class _Vector(msgspec.Struct):
    values: list[float]


class _Reply(msgspec.Struct):
    embeddings: list[_Vector]


_decode = msgspec.json.Decoder(_Reply).decode


def encode_embed(request: EmbedRequest, inputs: Sequence[Input]) -> bytes:
    """The body for some of the request's inputs. Raises `ProviderUnavailable`."""
    if not all(isinstance(given, str) for given in inputs):
        raise ProviderUnavailable("Gemini makes embeddings of texts, and not of tokens")
    asked = {"model": f"models/{request.model}"}
    more = {} if request.dimensions is None else {"outputDimensionality": request.dimensions}
    return msgspec.json.encode(
        {"requests": [asked | {"content": {"parts": [{"text": t}]}} | more for t in inputs]}
    )


def read_embeddings(body: bytes, inputs: Sequence[Input], errors: ErrorReader) -> list[Embedding]:
    """The embeddings in the order of the inputs. Raises `ProviderUnavailable`."""
    try:
        vectors = [_packed(vector.values) for vector in _decode(body).embeddings]
        if len(vectors) != len(inputs):
            raise ValueError(f"{len(vectors)} embeddings, not one for each of {len(inputs)} inputs")
    except (ValueError, RecursionError) as error:
        raise ProviderUnavailable(f"{errors.name} sent no embeddings: {error}") from None
    return [
        Embedding(vector=vector, usage=Usage(prompt_tokens=len(given) // 4, exact=False))
        for vector, given in zip(vectors, inputs, strict=True)
    ]


def _packed(numbers: Sequence[float]) -> bytes:
    try:
        vector = struct.pack(f"<{len(numbers)}f", *numbers)
    except (OverflowError, struct.error) as error:
        raise ValueError(f"a vector cannot be read: {error}") from None
    if fault := vector_fault(vector):
        raise ValueError(fault)
    return vector
