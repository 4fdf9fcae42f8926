"""The records: what is stored of an answer or an embedding, as IPFS blocks.

The record of an answer is one dag-cbor block of at most 64 KiB. A larger one keeps its head in the
root block and its output, encoded, in raw leaves of 64 KiB (the last one shorter) that the root
links to::

    {"v": 1, "kind": "llm-response", "model": "...", "finish_reason": "stop",
     "usage": {"prompt_tokens": 7, "completion_tokens": 2},
     "weights"?, "engine"?, "numerics"?: "...",
     "output": [{"role": "assistant", "text"?, "reasoning"?, "tool_calls"?, "logprobs"?}]}
    {... instead of output: "parts": [link, ...], "bytes": 70000}

The record of an embedding is always one block, and holds the float32 numbers as their bytes, little
end first::

    {"v": 1, "kind": "llm-embedding", "model": "...", "vector": bytes,
     "usage"?: {"prompt_tokens": 7}, "weights"?, "engine"?, "numerics"?: "..."}

A record holds no time, peer, signature, key or prompt, and leaves out every field that has its
default: two honest nodes that compute the same answer make the same CID. The only floats of CBOR in
it are log probabilities, 64-bit as dag-cbor wants them; an answer or a vector with a number that is
not finite has no record.

Blocks may come from strangers. `decode` takes only what `encode` makes, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import cbrrr
import msgspec

from ..providers.base import (
    Completion,
    Embedding,
    EmbedRequest,
    FinishReason,
    ModelRequest,
    ToolCall,
    Usage,
)
from .cid import DIGEST_SIZE, PREFIX, cid_bytes, cid_text, verify
from .record_bounds import BLOCK_SIZE, MAX_OUTPUT, RecordError, check, check_embedding


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a record with their CIDs, the root first."""

    cid: bytes
    blocks: tuple[tuple[bytes, bytes], ...]

    @property
    def size(self) -> int:
        """Bytes of all blocks."""
        return sum(len(block) for _, block in self.blocks)


class RecordHead(msgspec.Struct, frozen=True, kw_only=True):
    """What made it."""

    model: str
    #: Digest of the weights, engine with version, numerics class; None: not known.
    weights: str | None = None
    engine: str | None = None
    numerics: str | None = None


class AnswerRecord(RecordHead, frozen=True, kw_only=True):
    """An answer and what made it."""

    completion: Completion

    @property
    def usage(self) -> Usage:
        return self.completion.usage


class EmbeddingRecord(RecordHead, frozen=True, kw_only=True):
    """An embedding and what made it."""

    embedding: Embedding

    @property
    def usage(self) -> Usage:
        return self.embedding.usage


Record = AnswerRecord | EmbeddingRecord


def kind_for(request: ModelRequest) -> type[Record]:
    """The kind of record that holds what was asked for."""
    return EmbeddingRecord if isinstance(request, EmbedRequest) else AnswerRecord


def record_of(content: Completion | Embedding, head: RecordHead) -> Record:
    """The record of what was made, by what the head says."""
    made_by = msgspec.structs.asdict(head)
    if isinstance(content, Embedding):
        return EmbeddingRecord(embedding=content, **made_by)
    return AnswerRecord(completion=content, **made_by)


def encode(record: Record) -> Blocks:
    """The blocks of a record. Raises `RecordError` if it is not whole or not storable."""
    try:
        if isinstance(record, EmbeddingRecord):
            return _encode_embedding(record)
        return _encode_answer(record)
    except (TypeError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"the answer cannot be written as dag-cbor: {error}") from error


def _encode_answer(record: AnswerRecord) -> Blocks:
    check(record.completion, _names(record))
    completion = record.completion
    head = _plain_head(record, "llm-response", finish_reason=completion.finish_reason)
    output: Any = [_plain_output(completion)]
    root = cbrrr.encode_dag_cbor({**head, "output": output})
    if len(root) <= BLOCK_SIZE:
        return _blocks(root, [])
    body = cbrrr.encode_dag_cbor(output)
    if len(body) > MAX_OUTPUT:
        raise RecordError(f"an answer of {len(body)} bytes; {MAX_OUTPUT} is the most")
    leaves = [body[i : i + BLOCK_SIZE] for i in range(0, len(body), BLOCK_SIZE)]
    parts: Any = [cbrrr.CID(cid_bytes(leaf, "raw")) for leaf in leaves]
    return _blocks(cbrrr.encode_dag_cbor({**head, "parts": parts, "bytes": len(body)}), leaves)


def _encode_embedding(record: EmbeddingRecord) -> Blocks:
    check_embedding(record.embedding, _names(record))
    head = _plain_head(record, "llm-embedding", vector=record.embedding.vector)
    return _blocks(cbrrr.encode_dag_cbor(head), [])


def links(root: bytes) -> tuple[bytes, ...]:
    """The CIDs of the leaves that a root block needs, in order. Raises `RecordError`."""
    head = _head(root)
    return () if isinstance(head, _EmbeddingHead) else tuple(p.cid_bytes for p in head.parts)


def decode(root: bytes, fetch: Callable[[bytes], bytes | None] = lambda cid: None) -> Record:
    """The record of a root block, whose leaves `fetch` finds by CID.

    Raises `RecordError` for anything but what `encode` makes, and for a leaf that is missing or is
    not what its CID names.
    """
    head = _head(root)
    record: Record
    if isinstance(head, _EmbeddingHead):
        record = _embedding_record(head)
    else:
        record = _answer_record(head, fetch)
    # This takes 5 us, and no rule about the bytes can be forgotten.
    if encode(record).blocks[0][1] != root:
        raise RecordError("not the canonical form of a record")
    return record


# --- the form -----------------------------------------------------------------------------------


class _Output(msgspec.Struct, frozen=True):
    role: Literal["assistant"]
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[dict[str, Any], ...] = ()


class _Head(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    v: Literal[1]
    model: str
    usage: Usage = Usage()
    weights: str | None = None
    engine: str | None = None
    numerics: str | None = None


class _EmbeddingHead(_Head, frozen=True, kw_only=True, tag="llm-embedding"):
    vector: bytes


class _AnswerHead(_Head, frozen=True, kw_only=True, tag="llm-response"):
    finish_reason: FinishReason
    output: tuple[_Output, ...] | None = None
    parts: tuple[cbrrr.CID, ...] = ()
    bytes: int = 0


def _blocks(root: bytes, leaves: list[bytes]) -> Blocks:
    cid = cid_bytes(root)
    # Equal leaves are one block.
    named = {cid_bytes(leaf, "raw"): leaf for leaf in leaves}
    return Blocks(cid, ((cid, root), *named.items()))


def _names(record: RecordHead) -> tuple[str | None, ...]:
    return (record.model, record.weights, record.engine, record.numerics)


def _plain_head(record: Record, kind: str, **fields: Any) -> dict[str, Any]:
    usage = {
        "prompt_tokens": record.usage.prompt_tokens or None,
        "completion_tokens": record.usage.completion_tokens or None,
        "exact": None if record.usage.exact else False,
    }
    return {
        "v": 1,
        "kind": kind,
        "model": record.model,
        **fields,
        **_present(
            usage=_present(**usage) or None,
            weights=record.weights,
            engine=record.engine,
            numerics=record.numerics,
        ),
    }


def _plain_output(completion: Completion) -> dict[str, Any]:
    calls = [
        {"id": call.id, "name": call.name, "arguments": call.arguments}
        for call in completion.tool_calls
    ]
    return {
        "role": "assistant",
        **_present(
            text=completion.text or None,
            reasoning=completion.reasoning or None,
            tool_calls=calls or None,
            logprobs=list(completion.logprobs) or None,
        ),
    }


def _present(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _read(block: bytes, form: Any) -> Any:
    try:
        return msgspec.convert(cbrrr.decode_dag_cbor(block), form)
    except (ValueError, RecursionError) as error:  # msgspec.ValidationError is a ValueError
        raise RecordError(f"not an answer record: {error}") from error


def _head(root: bytes) -> _AnswerHead | _EmbeddingHead:
    if len(root) > BLOCK_SIZE:
        raise RecordError(f"a root block of {len(root)} bytes; {BLOCK_SIZE} is the most")
    head: _AnswerHead | _EmbeddingHead = _read(root, _AnswerHead | _EmbeddingHead)
    if isinstance(head, _EmbeddingHead):
        return head
    if not 0 <= head.bytes <= MAX_OUTPUT or len(head.parts) != -(-head.bytes // BLOCK_SIZE):
        raise RecordError("not an answer record: its parts do not fit its length")
    if (head.output is None) != bool(head.parts):
        raise RecordError("not an answer record: it needs either its output or parts of it")
    for part in head.parts:
        if part.cid_bytes[:-DIGEST_SIZE] != PREFIX["raw"]:
            raise RecordError("not an answer record: a part that is not a raw block")
    return head


def _body(head: _AnswerHead, fetch: Callable[[bytes], bytes | None]) -> bytes:
    body = bytearray()
    for part in head.parts:
        leaf = fetch(part.cid_bytes)
        if leaf is None:
            raise RecordError(f"the part {cid_text(part.cid_bytes)} is missing")
        if len(leaf) > BLOCK_SIZE or not verify(part.cid_bytes, leaf):
            raise RecordError(f"the part {cid_text(part.cid_bytes)} has other bytes")
        body += leaf
    return bytes(body)


def _answer_record(head: _AnswerHead, fetch: Callable[[bytes], bytes | None]) -> AnswerRecord:
    messages = head.output
    if messages is None:
        messages = _read(_body(head, fetch), tuple[_Output, ...])
    if len(messages) != 1:
        raise RecordError("not an answer record: it has one output message")
    (output,) = messages
    return AnswerRecord(
        model=head.model,
        weights=head.weights,
        engine=head.engine,
        numerics=head.numerics,
        completion=Completion(
            text=output.text,
            reasoning=output.reasoning,
            tool_calls=output.tool_calls,
            logprobs=output.logprobs,
            finish_reason=head.finish_reason,
            usage=head.usage,
        ),
    )


def _embedding_record(head: _EmbeddingHead) -> EmbeddingRecord:
    return EmbeddingRecord(
        model=head.model,
        weights=head.weights,
        engine=head.engine,
        numerics=head.numerics,
        embedding=Embedding(vector=head.vector, usage=head.usage),
    )
