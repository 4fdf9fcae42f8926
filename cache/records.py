"""The answer record: what is stored of an answer, as IPFS blocks.

A record is one dag-cbor block of at most 64 KiB. A larger one keeps its head in the root block and
its output, encoded, in raw leaves of 64 KiB (the last one shorter) that the root links to::

    {"v": 1, "kind": "llm-response", "model": "...", "finish_reason": "stop",
     "usage": {"prompt_tokens": 7, "completion_tokens": 2},
     "weights"?, "engine"?, "numerics"?: "...",
     "output": [{"role": "assistant", "text"?, "reasoning"?, "tool_calls"?, "logprobs"?}]}
    {... instead of output: "parts": [link, ...], "bytes": 70000}

It holds no time, peer, signature, key or prompt, and leaves out every field that has its default:
two honest nodes that compute the same answer make the same CID. Its only floats are log
probabilities, 64-bit as dag-cbor wants them; an answer with one that is not finite has no record.

Blocks may come from strangers. `decode` takes only what `encode` makes, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import cbrrr
import msgspec

from ..providers.base import Completion, FinishReason, ToolCall, Usage
from .cid import DIGEST_SIZE, PREFIX, cid_bytes, cid_text, verify
from .record_bounds import BLOCK_SIZE, MAX_OUTPUT, RecordError, check

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a record with their CIDs, the root first."""

    cid: bytes
    blocks: tuple[tuple[bytes, bytes], ...]

    @property
    def size(self) -> int:
        """Bytes of all blocks."""
        return sum(len(block) for _, block in self.blocks)


class AnswerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An answer and what made it."""

    model: str
    completion: Completion
    #: Digest of the weights, engine with version, numerics class; None: not known.
    weights: str | None = None
    engine: str | None = None
    numerics: str | None = None


def encode(record: AnswerRecord) -> Blocks:
    """The blocks of a record. Raises `RecordError` if the answer is not whole or not storable."""
    check(record.completion, (record.model, record.weights, record.engine, record.numerics))
    head: Any = _plain_head(record)
    output: Any = [_plain_output(record.completion)]
    try:
        root = cbrrr.encode_dag_cbor({**head, "output": output})
        if len(root) <= BLOCK_SIZE:
            return _blocks(root, [])
        body = cbrrr.encode_dag_cbor(output)
    except (TypeError, ValueError) as error:
        raise RecordError(f"the answer cannot be written as dag-cbor: {error}") from error
    if len(body) > MAX_OUTPUT:
        raise RecordError(f"an answer of {len(body)} bytes; {MAX_OUTPUT} is the most")
    leaves = [body[i : i + BLOCK_SIZE] for i in range(0, len(body), BLOCK_SIZE)]
    parts: Any = [cbrrr.CID(cid_bytes(leaf, "raw")) for leaf in leaves]
    return _blocks(cbrrr.encode_dag_cbor({**head, "parts": parts, "bytes": len(body)}), leaves)


def links(root: bytes) -> tuple[bytes, ...]:
    """The CIDs of the leaves that a root block needs, in order. Raises `RecordError`."""
    return tuple(part.cid_bytes for part in _head(root).parts)


def decode(root: bytes, fetch: Callable[[bytes], bytes | None] = lambda cid: None) -> AnswerRecord:
    """The record of a root block, whose leaves `fetch` finds by CID.

    Raises `RecordError` for anything but what `encode` makes, and for a leaf that is missing or is
    not what its CID names.
    """
    head = _head(root)
    output = head.output
    if output is None:
        output = _read(_body(head, fetch), tuple[_Output, ...])
    if len(output) != 1:
        raise RecordError("not an answer record: it has one output message")
    record = _record(head, output[0])
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


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    v: Literal[1]
    kind: Literal["llm-response"]
    model: str
    finish_reason: FinishReason
    usage: Usage = Usage()
    weights: str | None = None
    engine: str | None = None
    numerics: str | None = None
    output: tuple[_Output, ...] | None = None
    parts: tuple[cbrrr.CID, ...] = ()
    bytes: int = 0


def _blocks(root: bytes, leaves: list[bytes]) -> Blocks:
    cid = cid_bytes(root)
    # Equal leaves are one block.
    named = {cid_bytes(leaf, "raw"): leaf for leaf in leaves}
    return Blocks(cid, ((cid, root), *named.items()))


def _plain_head(record: AnswerRecord) -> dict[str, Any]:
    completion = record.completion
    usage = {
        "prompt_tokens": completion.usage.prompt_tokens or None,
        "completion_tokens": completion.usage.completion_tokens or None,
        "exact": None if completion.usage.exact else False,
    }
    return {
        "v": 1,
        "kind": "llm-response",
        "model": record.model,
        "finish_reason": completion.finish_reason,
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


def _read(block: bytes, form: type[_T]) -> _T:
    try:
        return msgspec.convert(cbrrr.decode_dag_cbor(block), form)
    except (ValueError, RecursionError) as error:  # msgspec.ValidationError is a ValueError
        raise RecordError(f"not an answer record: {error}") from error


def _head(root: bytes) -> _Head:
    if len(root) > BLOCK_SIZE:
        raise RecordError(f"a root block of {len(root)} bytes; {BLOCK_SIZE} is the most")
    head = _read(root, _Head)
    if not 0 <= head.bytes <= MAX_OUTPUT or len(head.parts) != -(-head.bytes // BLOCK_SIZE):
        raise RecordError("not an answer record: its parts do not fit its length")
    if (head.output is None) != bool(head.parts):
        raise RecordError("not an answer record: it needs either its output or parts of it")
    for part in head.parts:
        if part.cid_bytes[:-DIGEST_SIZE] != PREFIX["raw"]:
            raise RecordError("not an answer record: a part that is not a raw block")
    return head


def _body(head: _Head, fetch: Callable[[bytes], bytes | None]) -> bytes:
    body = bytearray()
    for part in head.parts:
        leaf = fetch(part.cid_bytes)
        if leaf is None:
            raise RecordError(f"the part {cid_text(part.cid_bytes)} is missing")
        if len(leaf) > BLOCK_SIZE or not verify(part.cid_bytes, leaf):
            raise RecordError(f"the part {cid_text(part.cid_bytes)} has other bytes")
        body += leaf
    return bytes(body)


def _record(head: _Head, output: _Output) -> AnswerRecord:
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
