import math
from collections.abc import Callable
from typing import Any

import cbrrr
import dag_cbor
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.cache.cid import cid_bytes, cid_text, verify
from promptmesh.cache.record_bounds import BLOCK_SIZE, MAX_OUTPUT, RecordError
from promptmesh.cache.records import AnswerRecord, Blocks, decode, links
from promptmesh.cache.records import encode as encode_record
from promptmesh.providers.base import Completion, CompletionBuilder, ToolCall, Usage

FULL = Completion(
    text="Grüße 🎈",
    reasoning="hm",
    tool_calls=(ToolCall(id="c1", name="look", arguments='{"x": 1}'),),
    logprobs=(
        {"token": "Gr", "logprob": -0.25, "bytes": [71, 114], "top_logprobs": []},
        {"token": "ü", "logprob": 0, "bytes": None, "top_logprobs": [{"token": "a"}]},
    ),
    finish_reason="tool_calls",
    usage=Usage(prompt_tokens=7, completion_tokens=3, exact=False),
)
SHORT = Completion(text="Paris", finish_reason="stop", usage=Usage(prompt_tokens=7))
MADE_BY = {"weights": "sha256:ab", "engine": "transformers 5", "numerics": "float32/invariant"}


def encode(completion: Completion, *, model: str, **names: Any) -> Blocks:
    return encode_record(AnswerRecord(model=model, completion=completion, **names))


def answer_in(
    block: bytes, fetch: Callable[[bytes], bytes | None] = lambda cid: None
) -> Completion:
    record = decode(block, fetch)
    assert isinstance(record, AnswerRecord)
    return record.completion


def root(completion: Completion, **names: Any) -> bytes:
    return encode(completion, model="m", **names).blocks[0][1]


# --- what it is ---------------------------------------------------------------------------------


def test_the_record_as_anyone_reads_it() -> None:
    blocks = encode(FULL, model="smollm2", **MADE_BY)
    assert dag_cbor.decode(blocks.blocks[0][1]) == {
        "v": 1,
        "kind": "llm-response",
        "model": "smollm2",
        "weights": "sha256:ab",
        "engine": "transformers 5",
        "numerics": "float32/invariant",
        "finish_reason": "tool_calls",
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "exact": False},
        "output": [
            {
                "role": "assistant",
                "text": "Grüße 🎈",
                "reasoning": "hm",
                "tool_calls": [{"id": "c1", "name": "look", "arguments": '{"x": 1}'}],
                "logprobs": list(FULL.logprobs),
            }
        ],
    }
    assert blocks.size == len(blocks.blocks[0][1])


def test_known_cids() -> None:
    """The same on every machine and version: a change here splits a mesh into two."""
    known = [encode(SHORT, model="m"), encode(FULL, model="smollm2", **MADE_BY)]
    known.append(encode(long_answer(200_000), model="m"))
    assert [cid_text(blocks.cid) for blocks in known] == [
        "bafyreidsu6o2wxct5x7x6uhatkd4xhrzj3imzxdjxf7eijj4jtpfh2zhd4",
        "bafyreibz5uid7nu7ggvr2aonywbwb5yn2vlm63h3or2d2i7d42jyjnuoiu",
        "bafyreigvx4xopvxq5g7doiophpohomq3nxcjyswqyqwwhjg42b7oqcjo5i",
    ]


def test_defaults_are_left_out() -> None:
    empty = Completion(finish_reason="length")
    assert cbrrr.decode_dag_cbor(root(empty)) == {
        "v": 1,
        "kind": "llm-response",
        "model": "m",
        "finish_reason": "length",
        "output": [{"role": "assistant"}],
    }


def test_what_a_cache_did_with_it_does_not_count() -> None:
    cached = Completion(
        text="Paris", finish_reason="stop", usage=Usage(prompt_tokens=7, cached=True)
    )
    assert root(cached) == root(SHORT)


def test_what_made_it_counts() -> None:
    cids = {encode(SHORT, model=model, **names).cid for model in "mn" for names in ({}, MADE_BY)}
    assert len(cids) == 4


@pytest.mark.parametrize("completion", [FULL, SHORT, Completion(finish_reason="stop")])
def test_comes_back_whole(completion: Completion) -> None:
    blocks = encode(completion, model="m", **MADE_BY)
    assert verify(blocks.cid, blocks.blocks[0][1])
    assert decode(blocks.blocks[0][1]) == AnswerRecord(model="m", completion=completion, **MADE_BY)


def test_the_chunks_of_a_stored_answer_make_the_same_record() -> None:
    builder = CompletionBuilder()
    for chunk in answer_in(root(FULL)).chunks():
        builder.add(chunk)
    assert root(builder.completion()) == root(FULL)


# --- large answers ------------------------------------------------------------------------------


def long_answer(size: int) -> Completion:
    return Completion(text="0123456789abcdef\n" * (size // 17), finish_reason="stop")


@pytest.mark.parametrize("size", [65_000, 66_000, 131_000, 200_000, 1_000_000])
def test_large_answers_have_leaves(size: int) -> None:
    completion = long_answer(size)
    blocks = encode(completion, model="m")
    first, *leaves = blocks.blocks
    assert len(first[1]) <= BLOCK_SIZE
    assert all(len(leaf) <= BLOCK_SIZE and verify(cid, leaf) for cid, leaf in blocks.blocks)
    assert bool(leaves) == (size > 65_500)
    assert links(first[1]) == tuple(cid for cid, _ in leaves)
    assert answer_in(first[1], dict(blocks.blocks).get) == completion


def test_equal_leaves_are_one_block() -> None:
    completion = Completion(text="x" * 400_000, finish_reason="stop")
    blocks = encode(completion, model="m")
    assert len(links(blocks.blocks[0][1])) == 7
    assert len(blocks.blocks) == 4
    assert answer_in(blocks.blocks[0][1], dict(blocks.blocks).get) == completion


def test_a_leaf_that_is_missing_or_wrong_is_said() -> None:
    blocks = encode(long_answer(200_000), model="m")
    found = dict(blocks.blocks)
    last = links(blocks.blocks[0][1])[-1]
    with pytest.raises(RecordError, match="missing"):
        decode(blocks.blocks[0][1])
    for wrong in (b"", found[last][:-1], found[last] + b"x", b"x" * (BLOCK_SIZE + 1)):
        with pytest.raises(RecordError, match="other bytes"):
            decode(blocks.blocks[0][1], {**found, last: wrong}.get)


# --- what no record is made of ------------------------------------------------------------------


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "completion",
    [
        Completion(text="cut", finish_reason="content_filter"),
        Completion(text="\ud800", finish_reason="stop"),
        Completion(logprobs=({"logprob": -math.inf},), finish_reason="stop"),
        Completion(logprobs=({"logprob": math.nan},), finish_reason="stop"),
        Completion(logprobs=({"bytes": b"x"},), finish_reason="stop"),
        Completion(logprobs=({"x": 2**53 + 1},), finish_reason="stop"),
        Completion(logprobs=({"x": nested(9)},), finish_reason="stop"),
        Completion(logprobs=({"x": nested(50_000)},), finish_reason="stop"),
        Completion(finish_reason="stop", usage=Usage(prompt_tokens=-1)),
        Completion(finish_reason="stop", usage=Usage(completion_tokens=2**60)),
        Completion(text="x" * MAX_OUTPUT, finish_reason="stop"),
    ],
)
def test_answers_that_have_no_record(completion: Completion) -> None:
    with pytest.raises(RecordError):
        encode(completion, model="m")


def test_names_are_bounded() -> None:
    with pytest.raises(RecordError, match="name"):
        encode(SHORT, model="m" * 1025)
    with pytest.raises(RecordError, match="name"):
        encode(SHORT, model="m", engine="m" * 1025)


# --- blocks of strangers ------------------------------------------------------------------------

PLAIN: dict[str, Any] = {
    "v": 1,
    "kind": "llm-response",
    "model": "m",
    "finish_reason": "stop",
    "output": [{"role": "assistant", "text": "hi"}],
}
LEAF = cbrrr.CID(cid_bytes(b"leaf", "raw"))


def changed(**fields: Any) -> bytes:
    plain = {**PLAIN, **fields}
    return cbrrr.encode_dag_cbor({name: value for name, value in plain.items() if value != "-"})


def output(**fields: Any) -> bytes:
    return changed(output=[{"role": "assistant", **fields}])


def test_the_unchanged_one_is_a_record() -> None:
    assert answer_in(changed()).text == "hi"


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"\xa0",
        b"\x01",
        cbrrr.encode_dag_cbor([PLAIN]),
        changed() + b"\0",
        changed()[:-1],
        *(changed(**{name: "-"}) for name in PLAIN),
        changed(v=2),
        changed(v=True),
        changed(kind="llm-request"),
        changed(model=1),
        changed(model=None),
        changed(model="m" * 2000),
        changed(finish_reason="content_filter"),
        changed(finish_reason="error"),
        changed(more=1),
        changed(weights=None),
        changed(weights=b"x"),
        changed(usage={}),
        changed(usage={"prompt_tokens": 0}),
        changed(usage={"prompt_tokens": -1}),
        changed(usage={"prompt_tokens": 2**60}),
        changed(usage={"prompt_tokens": 1.0}),
        changed(usage={"prompt_tokens": 1, "cached": True}),
        changed(usage={"prompt_tokens": 1, "exact": True}),
        changed(output=[]),
        changed(output=PLAIN["output"] * 2),
        changed(output="hi"),
        changed(output=[{"role": "user", "text": "hi"}]),
        output(text=""),
        output(text=1),
        output(text=None),
        output(more=1),
        output(tool_calls=[]),
        output(tool_calls=[{"id": "c"}]),
        output(tool_calls=[{"id": "c", "name": "n", "arguments": "{}", "more": 1}]),
        output(logprobs=[]),
        output(logprobs=[1]),
        output(logprobs=[{"a": b"x"}]),
        output(logprobs=[{"a": LEAF}]),
        output(logprobs=[{"a": 2**60}]),
        output(logprobs=[{"a": nested(9)}]),
        output(logprobs=[{"a": nested(30_000)}]),
        changed(output=nested(60_000)),
        output(text="x" * BLOCK_SIZE),
        changed(parts=[LEAF], bytes=4),
        changed(output="-", parts=[LEAF]),
        changed(output="-", parts=[LEAF], bytes=0),
        changed(output="-", parts=[LEAF], bytes=-1),
        changed(output="-", parts=[LEAF], bytes=BLOCK_SIZE + 1),
        changed(output="-", parts=[LEAF] * 100, bytes=BLOCK_SIZE * 100),
        changed(output="-", parts=[], bytes=2**62),
        changed(output="-", parts=["x"], bytes=4),
        changed(output="-", parts=[cbrrr.CID(b"")], bytes=4),
        changed(output="-", parts=[cbrrr.CID(cid_bytes(b"leaf"))], bytes=4),
        changed(output="-", parts=[LEAF], bytes=4),
        changed(parts=[], bytes=0),
    ],
)
def test_anything_else_is_refused(block: bytes) -> None:
    with pytest.raises(RecordError):
        decode(block, {LEAF.cid_bytes: b"leaf"}.get)


def test_a_small_answer_in_leaves_is_refused() -> None:
    body = cbrrr.encode_dag_cbor(PLAIN["output"])
    leaf = cbrrr.CID(cid_bytes(body, "raw"))
    block = changed(output="-", parts=[leaf], bytes=len(body))
    with pytest.raises(RecordError, match="canonical"):
        decode(block, {leaf.cid_bytes: body}.get)


@given(st.binary(max_size=200))
def test_random_bytes(block: bytes) -> None:
    for entry in (decode, links):
        with pytest.raises(RecordError):
            entry(block)


@given(
    block=st.sampled_from([root(FULL), root(SHORT), root(long_answer(70_000))]),
    at=st.integers(0, 1000),
    byte=st.integers(0, 255),
)
def test_a_changed_byte_is_another_record_or_none(block: bytes, at: int, byte: int) -> None:
    at %= len(block)
    other = block[:at] + bytes([byte]) + block[at + 1 :]
    leaves = dict(encode(long_answer(70_000), model="m").blocks)
    try:
        record = decode(other, leaves.get)
    except RecordError:
        assert other != block
    else:
        assert encode_record(record).blocks[0][1] == other
