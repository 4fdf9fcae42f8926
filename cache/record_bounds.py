"""What an answer record may hold: the same bounds for making one and for reading a stranger's."""

from __future__ import annotations

from typing import Any

from ..providers.base import Completion, Embedding, FinishReason, Usage, vector_fault

#: Bytes of the largest block of a record.
BLOCK_SIZE = 64 * 1024
#: Bytes of the largest output: 15,000 tokens with five alternatives each, or a million without.
#: A hostile one of this size, all empty lists, takes 300 MB to read.
MAX_OUTPUT = 4 * 1024 * 1024
#: How deep the JSON of the log probabilities may be nested; the OpenAI form needs four.
MAX_DEPTH = 8
#: Characters of a model's, an engine's or a digest's name.
MAX_NAME = 1024
#: The largest integer; JSON has no larger ones that every reader reads alike.
MAX_COUNT = 2**53

#: Answers that are whole. One cut by a filter is not what the model would say.
WHOLE: tuple[FinishReason, ...] = ("stop", "length", "tool_calls")

_JSON = (str, int, float, bool, type(None))


class RecordError(ValueError):
    """Not an answer record, or an answer that none can be made of. The message says why."""


def check(completion: Completion, names: tuple[str | None, ...]) -> None:
    """Raises `RecordError` for an answer that no record may hold."""
    if completion.finish_reason not in WHOLE:
        raise RecordError(f"an answer that ended by {completion.finish_reason} is not whole")
    _check_head(names, completion.usage)
    _check_json(completion.logprobs)


def check_embedding(embedding: Embedding, names: tuple[str | None, ...]) -> None:
    """Raises `RecordError` for an embedding that no record may hold."""
    if fault := vector_fault(embedding.vector):
        raise RecordError(fault)
    _check_head(names, embedding.usage)


def _check_head(names: tuple[str | None, ...], usage: Usage) -> None:
    for name in names:
        if name is not None and len(name) > MAX_NAME:
            raise RecordError(f"a name of {len(name)} characters")
    for count in (usage.prompt_tokens, usage.completion_tokens):
        if not 0 <= count <= MAX_COUNT:
            raise RecordError(f"a count of {count} tokens")


def _check_json(values: tuple[dict[str, Any], ...]) -> None:
    """Is this JSON that every dialect and the wire can carry? Not recursive: it may be hostile."""
    level: list[Any] = list(values)
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            kind = type(value)
            if kind is dict:
                inner.extend(value.values())
            elif kind is list:
                inner.extend(value)
            elif (kind is int and abs(value) > MAX_COUNT) or kind not in _JSON:
                raise RecordError("log probabilities that are not JSON")
        if not inner:
            return
        level = inner
    raise RecordError("log probabilities that are nested too deeply")
