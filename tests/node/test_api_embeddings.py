"""`/v1/embeddings`: what a body means, and the vectors in the reply."""

import base64
import json
import struct
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.node.api_embeddings import decode_embed, encode_embeddings
from promptmesh.node.request_headers import with_headers
from promptmesh.providers.base import (
    CacheControl,
    Chunk,
    Embedding,
    EmbedRequest,
    Origin,
    RequestRejected,
    Usage,
)


def decode(given: Any, **fields: Any) -> EmbedRequest:
    body = msgspec.json.encode({"model": "m", "input": given} | fields)
    return decode_embed(body, "req-1")[0]


@pytest.mark.parametrize(
    ("given_input", "inputs"),
    [
        ("hi", ("hi",)),
        ("", ("",)),
        (["hi", "there"], ("hi", "there")),
        ([1, 2, 3], ((1, 2, 3),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
        (["hi", [1]], ("hi", (1,))),
    ],
)
def test_the_forms_of_input(given_input: Any, inputs: Any) -> None:
    assert decode(given_input) == EmbedRequest(
        model="m", inputs=inputs, dialect="openai", id="req-1"
    )


def test_all_fields() -> None:
    request = decode(
        "hi",
        dimensions=8,
        user="me",
        input_type="query",
        promptmesh={"peer": "alpha", "cache": {"namespace": "team"}, "deadline_s": 3},
    )
    assert (request.dimensions, request.extra) == (8, {"input_type": "query"})
    assert (request.peer, request.deadline) == ("alpha", 3)
    assert request.cache.namespace == "team"


def test_headers_count_as_for_chats() -> None:
    headers = {"x-promptmesh-peer": "beta", "cache-control": "no-store"}
    http = SimpleNamespace(headers=headers)
    request = with_headers(decode(["a", [1, 2]], dimensions=8), http)
    assert (request.peer, request.cache) == ("beta", CacheControl(mode="bypass"))
    assert (request.inputs, request.dimensions) == (("a", (1, 2)), 8)


@pytest.mark.parametrize(
    ("given_input", "fields", "field"),
    [
        ([], {}, "input"),
        ([[]], {}, "input"),
        ([[1], 2], {}, "input"),
        (["a", 2], {}, "input"),
        (["a"] * 2049, {}, "input"),
        ([1] * 16_385, {}, "input"),
        ([-1], {}, "input[0]"),
        ([2**31], {}, "input[0]"),
        ([1.5], {}, "input[0]"),
        (None, {}, "input"),
        ({"text": "a"}, {}, "input"),
        ("a", {"dimensions": 0}, "dimensions"),
        ("a", {"dimensions": 4097}, "dimensions"),
        ("a", {"encoding_format": "int8"}, "encoding_format"),
        ("a", {"model": None}, "model"),
        ("a", {"promptmesh": {"peers": "x"}}, "promptmesh"),
    ],
)
def test_the_field_that_is_wrong_is_named(given_input: Any, fields: Any, field: str) -> None:
    with pytest.raises(RequestRejected) as raised:
        decode(given_input, **fields)
    assert raised.value.field == field


@given(st.binary(max_size=100) | st.text(max_size=100).map(str.encode))
def test_no_body_raises_anything_else(body: bytes) -> None:
    with suppress(RequestRejected):
        decode_embed(body, "req-1")


INPUT = st.text(max_size=9) | st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)


@given(INPUT | st.lists(INPUT, min_size=1, max_size=5))
def test_what_is_decoded_may_be_sent_to_a_peer(given_input: Any) -> None:
    request = decode(given_input)
    raw = msgspec.msgpack.decode(msgspec.msgpack.encode(request))
    assert msgspec.convert(raw, EmbedRequest) == request


# --- the reply ------------------------------------------------------------------------------------

ORIGIN = Origin(peer="12D3", node="alpha", provider="tei", model="m", attempts=1)


def encode(chunk: Chunk, encoding: Any = "float") -> Any:
    return json.loads(trio.run(encode_embeddings, chunk, ORIGIN, "req-1", encoding))


def test_the_reply_as_clients_read_it() -> None:
    stored = Usage(prompt_tokens=3, cached=True)
    chunk = Chunk(
        embeddings=(
            Embedding(vector=struct.pack("<2f", 1, 0.1), usage=stored, cid="bafy1"),
            Embedding(vector=struct.pack("<2f", 2, 0.2), usage=Usage(prompt_tokens=4)),
        ),
        usage=Usage(prompt_tokens=7),
        finish_reason="stop",
    )
    assert encode(chunk) == {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": 0,
                "embedding": [1, 0.10000000149011612],
                "promptmesh": {"cid": "bafy1", "cached": True},
            },
            {"object": "embedding", "index": 1, "embedding": [2, 0.20000000298023224]},
        ],
        "model": "m",
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
        "promptmesh": {
            "request_id": "req-1",
            "peer": "12D3",
            "node": "alpha",
            "provider": "tei",
            "model": "m",
            "cache": "miss",
            "attempts": 1,
            "policy": "",
            "cached": 1,
        },
    }


VECTOR = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20
).map(lambda numbers: struct.pack(f"<{len(numbers)}f", *numbers))


@given(st.lists(VECTOR, min_size=1, max_size=3))
def test_any_vector_is_read_back_byte_for_byte_from_both_encodings(vectors: list[bytes]) -> None:
    chunk = Chunk(embeddings=tuple(Embedding(vector=v) for v in vectors), finish_reason="stop")
    numbers = [item["embedding"] for item in encode(chunk)["data"]]
    assert [struct.pack(f"<{len(n)}f", *n) for n in numbers] == vectors
    texts = [item["embedding"] for item in encode(chunk, "base64")["data"]]
    assert [base64.b64decode(text) for text in texts] == vectors
