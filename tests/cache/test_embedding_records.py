"""The record of an embedding, the keys of its inputs, and both in the cache."""

import math
import struct
from collections.abc import Iterator
from typing import Any

import cbrrr
import dag_cbor
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.cache.answers import AnswerCache
from promptmesh.cache.blocks import SqliteBlocks
from promptmesh.cache.cid import cid_text
from promptmesh.cache.database import Database
from promptmesh.cache.keys import embed_keys, request_key
from promptmesh.cache.record_bounds import BLOCK_SIZE, RecordError
from promptmesh.cache.records import (
    EmbeddingRecord,
    decode,
    encode,
    kind_for,
    links,
)
from promptmesh.providers.base import (
    CacheControl,
    Completion,
    Embedding,
    EmbedRequest,
    GenerateRequest,
    RequestRejected,
    TimeLimits,
    Usage,
)

NOW = 1_800_000_000.0
MADE_BY: Any = {"weights": "sha256:ab", "engine": "tei 1", "numerics": "float32/invariant"}


def vector(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


SMALL = Embedding(vector=vector(0.5, -2), usage=Usage(prompt_tokens=7))
RECORD = EmbeddingRecord(model="m", embedding=SMALL, **MADE_BY)


def block_of(record: EmbeddingRecord) -> bytes:
    ((_, block),) = encode(record).blocks
    return block


# --- the record -----------------------------------------------------------------------------------


def test_the_record_as_anyone_reads_it() -> None:
    assert dag_cbor.decode(block_of(RECORD)) == {
        "v": 1,
        "kind": "llm-embedding",
        "model": "m",
        "vector": bytes.fromhex("0000003f000000c0"),
        "usage": {"prompt_tokens": 7},
        **MADE_BY,
    }


def test_known_cids() -> None:
    """The same on every machine and version: a change here splits a mesh into two."""
    bare = EmbeddingRecord(model="m", embedding=Embedding(vector=vector(1)))
    assert [cid_text(encode(record).cid) for record in (RECORD, bare)] == [
        "bafyreicgroa3iawaelgg2okigbg2memqtdtoslij4gq5ai6obgggqmyj3m",
        "bafyreiccohwol4hgwvqj72ghq4427mmps67r2tht35zwx5dwyvsfwo4oi4",
    ]


def test_neither_the_cid_nor_where_it_was_found_is_in_it() -> None:
    found = Embedding(
        vector=SMALL.vector, usage=Usage(prompt_tokens=7, cached=True), cid="bafy-other"
    )
    assert block_of(EmbeddingRecord(model="m", embedding=found, **MADE_BY)) == block_of(RECORD)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=64),
    st.integers(0, 2**53),
    st.booleans(),
)
def test_any_vector_comes_back_byte_for_byte(
    numbers: list[float], tokens: int, exact: bool
) -> None:
    usage = Usage(prompt_tokens=tokens, exact=exact)
    record = EmbeddingRecord(
        model="m", embedding=Embedding(vector=vector(*numbers), usage=usage), engine="e"
    )
    block = block_of(record)
    assert decode(block) == record
    assert links(block) == ()


def test_the_largest_fits_into_one_block() -> None:
    block = block_of(EmbeddingRecord(model="m", embedding=Embedding(vector=bytes(4 * 4096))))
    assert len(block) < BLOCK_SIZE


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"abc",
        bytes(4 * 4097),
        vector(1, math.nan),
        vector(math.inf),
        vector(math.inf, -math.inf),
    ],
)
def test_what_is_no_vector_has_no_record(bad: bytes) -> None:
    with pytest.raises(RecordError):
        encode(EmbeddingRecord(model="m", embedding=Embedding(vector=bad)))
    with pytest.raises(RecordError):
        decode(changed(vector=bad))


PLAIN = {"v": 1, "kind": "llm-embedding", "model": "m", "vector": vector(1)}


def changed(**fields: Any) -> bytes:
    plain = {**PLAIN, **fields}
    return cbrrr.encode_dag_cbor({name: value for name, value in plain.items() if value != "-"})


def test_the_unchanged_one_is_a_record() -> None:
    record = decode(changed())
    assert isinstance(record, EmbeddingRecord)
    assert record.embedding.vector == vector(1)


@pytest.mark.parametrize(
    "block",
    [
        changed(v=2),
        changed(kind="llm-embedding-2"),
        changed(kind="llm-response"),
        changed(kind="-"),
        changed(model="-"),
        changed(model="m" * 2000),
        changed(vector="-"),
        changed(vector="AACAPw=="),
        changed(vector=[1.0]),
        changed(vector=[0, 0, 128, 63]),
        changed(usage={}),
        changed(usage={"prompt_tokens": 0}),
        changed(usage={"prompt_tokens": -1}),
        changed(usage={"cached": True}),
        changed(cid="bafy"),
        changed(weights=None),
        changed(output=[]),
        changed(parts=[]),
        block_of(RECORD) + b"\0",
        block_of(RECORD)[:-1],
    ],
)
def test_nothing_else_is_one(block: bytes) -> None:
    with pytest.raises(RecordError):
        decode(block)


@given(at=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_changed_byte_is_another_record_or_none(at: int, byte: int) -> None:
    block = block_of(RECORD)
    at %= len(block)
    other = block[:at] + bytes([byte]) + block[at + 1 :]
    try:
        record = decode(other)
    except RecordError:
        assert other != block
    else:
        assert encode(record).blocks[0][1] == other


# --- keys -----------------------------------------------------------------------------------------


def asking(*inputs: Any, **fields: Any) -> EmbedRequest:
    return EmbedRequest(**{"model": "m", "inputs": inputs or ("hi",), **fields})


def key(*inputs: Any, **fields: Any) -> bytes:
    (found,) = embed_keys(asking(*inputs, **fields))
    return found


def test_known_keys() -> None:
    """The same on every machine and version: a change here makes all that is stored unfindable."""
    found = [*embed_keys(asking("hi", (1, 2))), key("hi", dimensions=8)]
    assert [k.hex() for k in found] == [
        "bae1f5e864f53645fd3da8a64405d8b19ee780d11b61419fb3b2db352a85b626",
        "6dbd907796d69667cd86e2c1b8270ebd35cc30e2516e49d5ccd59638eb4cdec7",
        "820390d7afa6af787c00e6536e8be798e32ac3c931f1709504ce791c5a3ac596",
    ]


def test_a_key_does_not_depend_on_the_batch() -> None:
    assert embed_keys(asking("a", "b", "a")) == [key("a"), key("b"), key("a")]


def test_what_decides_the_vector_is_in_the_key() -> None:
    keys = [
        key("hi"),
        key("hi "),
        key(""),
        key((1, 2)),
        key((2, 1)),
        key("[1, 2]"),
        key("hi", model="n"),
        key("hi", dimensions=8),
        key("hi", dimensions=9),
        key("hi", extra={"input_type": "query"}, dialect="openai"),
        key("hi", extra={"input_type": "query"}, dialect="other"),
        key("hi", cache=CacheControl(namespace="team")),
    ]
    assert len(set(keys)) == len(keys)
    assert request_key(GenerateRequest(model="m", messages=())) not in keys


def test_what_does_not_decide_it_is_not() -> None:
    same = asking(
        "hi",
        dialect="openai",
        extra={"user": "u", "timeout": 3},
        provider="p",
        peer="q",
        policy="least_loaded",
        privacy="local",
        priority="background",
        limits=TimeLimits(gap=1.0),
        hedge=True,
        asker="p",
        max_cost=0.5,
        prefer="any",
        cache=CacheControl(mode="refresh", ttl=3, max_age=4, scope="local"),
        deadline=5.0,
        id="r",
    )
    assert embed_keys(same) == [key("hi")]


def test_what_json_does_not_have_is_the_requests_fault() -> None:
    with pytest.raises(RequestRejected):
        key("hi", extra={"a": b"bytes"})
    with pytest.raises(RequestRejected):
        key("\ud800")


# --- in the cache ---------------------------------------------------------------------------------


@pytest.fixture
def answers() -> Iterator[AnswerCache]:
    database = Database(None)
    yield AnswerCache(database, SqliteBlocks(database, clock=lambda: NOW), peer="me")
    database.close()


KEY = key("hi")


async def test_stored_found_listed_and_counted(answers: AnswerCache) -> None:
    stored = await answers.store(KEY, SMALL, model="m", now=NOW, **MADE_BY)
    assert stored is not None
    found = await answers.lookup(KEY, now=NOW, kind=EmbeddingRecord)
    assert found is not None
    assert found.record == RECORD
    assert found.embedding == Embedding(
        vector=SMALL.vector, usage=Usage(prompt_tokens=7, cached=True), cid=stored.cid_text
    )
    (row,) = await answers.listing(now=NOW)
    assert (row.model, row.weights, row.tokens, row.hits) == ("m", "sha256:ab", 7, 1)
    assert await answers.get(stored.cid.raw, now=NOW) is not None


async def test_each_question_gets_its_own_kind_of_record(answers: AnswerCache) -> None:
    """A lying peer may claim that the answer to a chat is an embedding."""
    completion = Completion(text="yes", finish_reason="stop")
    assert await answers.store(KEY, SMALL, model="m", now=NOW)
    assert await answers.lookup(KEY, now=NOW) is None
    assert await answers.store(KEY, completion, model="m", now=NOW)
    for _ in range(2):
        answer = await answers.lookup(KEY, now=NOW)
        vectors = await answers.lookup(KEY, now=NOW, kind=EmbeddingRecord)
        assert answer is not None
        assert answer.completion == completion
        assert vectors is not None
        assert vectors.embedding.vector == SMALL.vector


async def test_another_kind_is_not_adopted(answers: AnswerCache) -> None:
    blocks = encode(RECORD)
    taken = {"now": NOW, "made_at": NOW, "expires_at": NOW + 60, "source": "them"}
    with pytest.raises(RecordError, match="kind"):
        await answers.adopt(KEY, blocks.cid, dict(blocks.blocks), **taken)  # type: ignore[arg-type]
    adopted = await answers.adopt(
        KEY,
        blocks.cid,
        dict(blocks.blocks),
        kind=kind_for(asking()),
        **taken,  # type: ignore[arg-type]
    )
    assert adopted.record == RECORD


async def test_what_has_no_record_is_not_stored(answers: AnswerCache) -> None:
    bad = Embedding(vector=vector(math.nan))
    assert await answers.store(KEY, bad, model="m", now=NOW) is None
