"""An answer broke after its first token: who can go on from there, and how the parts are joined.

Pure. There are two ways. To *continue*: the candidate gets the text so far as `prefix`, and what it
gives is the rest. To *restart*: it computes the whole answer again, and what was sent already is
compared with it, piece by piece, and left out. Nothing that was sent is ever sent again or lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

from ..providers.base import (
    CacheControl,
    Chunk,
    GenerateError,
    GenerateRequest,
    ModelOffer,
    ToolCallDelta,
    Usage,
)
from ..providers.tokens import text_tokens

_UNSTORED = CacheControl(mode="bypass")
Way = Literal["continue", "restart"]


class Mismatch(GenerateError):
    """A restarted answer differs from what was sent."""


class SoFar:
    """What the caller has of an answer."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        #: The arguments and the name of each tool call.
        self._calls: dict[int, list[str]] = {}
        self._logprobs: list[dict[str, Any]] = []
        self._pieces = 0

    def add(self, chunk: Chunk) -> None:
        """This was given to the caller."""
        self._pieces += 1
        if chunk.text:
            self._text.append(chunk.text)
        if chunk.reasoning:
            self._reasoning.append(chunk.reasoning)
        if chunk.logprobs:
            self._logprobs.extend(chunk.logprobs)
        for delta in chunk.tool_calls:
            self._calls.setdefault(delta.index, []).append(delta.name + "\0" + delta.arguments)

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def calls(self) -> dict[int, tuple[str, str]]:
        """The name of each tool call, and its arguments so far."""
        found = {}
        for index, parts in self._calls.items():
            names, arguments = zip(*(part.split("\0", 1) for part in parts), strict=True)
            found[index] = "".join(names), "".join(arguments)
        return found

    @property
    def logprobs(self) -> Sequence[dict[str, Any]]:
        return self._logprobs

    @property
    def is_text(self) -> bool:
        """Is it nothing but text, which is all that a `prefix` can say?"""
        return not self._reasoning and not self._calls

    @property
    def empty(self) -> bool:
        """Was nothing given yet?"""
        return self.is_text and not self._text and not self._logprobs

    @property
    def counted(self) -> bool:
        """Are its tokens known one by one?"""
        return bool(self._logprobs)

    @property
    def tokens(self) -> int:
        """Its tokens: counted where there are log probabilities of them, else an estimate."""
        if self._logprobs:
            return len(self._logprobs)
        return max(self._pieces, math.ceil(text_tokens(self.text) + text_tokens(self.reasoning)))


def way_of(request: GenerateRequest, by: Sequence[ModelOffer], offer: ModelOffer) -> Way | None:
    """How the model of `offer` could go on, as far as the request decides. None: it cannot.

    `by`: whose text there is so far.
    """
    if offer.can_continue and _is_free(request):
        return "continue"
    return "restart" if is_same(request, by, offer) else None


def is_same(request: GenerateRequest, by: Sequence[ModelOffer], offer: ModelOffer) -> bool:
    """Would it give the same answer again that those have begun?"""
    return request.deterministic and all(
        each.repeatable
        and offer.repeatable
        and (each.weights, each.engine, each.numerics)
        == (offer.weights, offer.engine, offer.numerics)
        for each in by
    )


def way_on(
    request: GenerateRequest, by: Sequence[ModelOffer], offer: ModelOffer, so_far: SoFar
) -> Way | None:
    """How it can go on after what there is. None: it cannot."""
    if so_far.empty:
        return "restart"
    way = way_of(request, by, offer)
    if way == "continue" and not (so_far.is_text and _has_room(request, so_far, offer)):
        return "restart" if is_same(request, by, offer) else None
    return way


def _is_free(request: GenerateRequest) -> bool:
    """Is the form of the answer free? Engines that enforce one begin it anew after a prefix."""
    form, choice = request.response_format, request.tool_choice
    return (form is None or form.type == "text") and (
        choice is None or choice.mode in ("auto", "none")
    )


def _has_room(request: GenerateRequest, so_far: SoFar, offer: ModelOffer) -> bool:
    """Is it known how many tokens the rest may have, here or there?

    By an estimate it would end too early and be taken for whole, or be longer than was allowed.
    """
    most = request.sampling.max_tokens
    if most is None or counts_there(request, so_far, offer):
        return True
    return so_far.counted and so_far.tokens < most


def counts_there(request: GenerateRequest, so_far: SoFar, offer: ModelOffer) -> bool:
    """Is what there is counted by who goes on? Only where it matters, and nobody has."""
    return offer.counts_begun and request.sampling.max_tokens is not None and not so_far.counted


def continued(request: GenerateRequest, so_far: SoFar, offer: ModelOffer) -> GenerateRequest:
    """The request for the rest of the answer. Nobody will ask for that again: it is not stored."""
    sampling, begun = request.sampling, 0
    if counts_there(request, so_far, offer):
        begun = len(so_far.text)
    elif sampling.max_tokens is not None:
        sampling = msgspec.structs.replace(sampling, max_tokens=sampling.max_tokens - so_far.tokens)
    return msgspec.structs.replace(
        request,
        prefix=request.prefix + so_far.text,
        begun=begun,
        sampling=sampling,
        cache=_UNSTORED,
    )


class Seam(Protocol):
    """Makes of the chunks of who goes on the rest of the answer."""

    def join(self, chunk: Chunk) -> Chunk | None:
        """What of it is to be given; None: nothing. Raises `Mismatch`."""
        ...


class Continued:
    """The rest of an answer by another engine: it is nobody's whole answer, and has no CID.

    `tokens` are those of the beginning that its usage lacks.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def join(self, chunk: Chunk) -> Chunk:
        if chunk.finish_reason is None:
            return chunk
        usage = chunk.usage or Usage()
        usage = msgspec.structs.replace(
            usage, completion_tokens=self._tokens + usage.completion_tokens, exact=False
        )
        return msgspec.structs.replace(chunk, usage=usage, cid=None)


class Restarted:
    """The same answer from its beginning: what was sent is compared, and left out.

    Nothing new is given before all that was sent has come again.
    """

    def __init__(self, so_far: SoFar) -> None:
        self._text = _Rest("text", so_far.text)
        self._reasoning = _Rest("reasoning", so_far.reasoning)
        self._calls = {
            index: (_Rest("name of a tool", name), _Rest("arguments", arguments))
            for index, (name, arguments) in so_far.calls.items()
        }
        self._tokens = [entry.get("token") for entry in so_far.logprobs]
        #: What is new, while something is missing.
        self._held: list[Chunk] = []
        self._over = so_far.empty

    def join(self, chunk: Chunk) -> Chunk | None:
        if self._over:
            return chunk
        joined = msgspec.structs.replace(
            chunk,
            reasoning=self._reasoning.skip(chunk.reasoning),
            text=self._text.skip(chunk.text),
            tool_calls=tuple(filter(None, map(self._call, chunk.tool_calls))),
            logprobs=self._new_logprobs(chunk.logprobs),
        )
        if joined == Chunk():
            return None
        if self._open:
            if joined.finish_reason is not None:
                raise Mismatch("its answer ended before all came that was sent already")
            self._held.append(joined)
            return None
        self._over = True
        return _together([*self._held, joined])

    @property
    def _open(self) -> bool:
        """Is there more that must come again?"""
        rests = [self._text, self._reasoning, *(r for call in self._calls.values() for r in call)]
        return bool(self._tokens) or any(rest.left for rest in rests)

    def _call(self, delta: ToolCallDelta) -> ToolCallDelta | None:
        """What is new of a piece of a tool call. The id that was sent stays."""
        if delta.index not in self._calls:
            return delta
        name, arguments = self._calls[delta.index]
        new = ToolCallDelta(
            index=delta.index, name=name.skip(delta.name), arguments=arguments.skip(delta.arguments)
        )
        return new if new.name or new.arguments else None

    def _new_logprobs(self, entries: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        again = min(len(entries), len(self._tokens))
        if [entry.get("token") for entry in entries[:again]] != self._tokens[:again]:
            raise Mismatch("its tokens differ from those that were sent already")
        del self._tokens[:again]
        return entries[again:]


def _together(chunks: Sequence[Chunk]) -> Chunk:
    """Several pieces as one."""
    return msgspec.structs.replace(
        chunks[-1],
        text="".join(c.text for c in chunks),
        reasoning="".join(c.reasoning for c in chunks),
        tool_calls=tuple(delta for c in chunks for delta in c.tool_calls),
        logprobs=tuple(entry for c in chunks for entry in c.logprobs),
    )


class _Rest:
    """What must come again of one kind."""

    def __init__(self, kind: str, text: str) -> None:
        self._kind = kind
        self._text = text
        self._at = 0

    @property
    def left(self) -> bool:
        """Must more come again?"""
        return self._at < len(self._text)

    def skip(self, new: str) -> str:
        """What is new. Raises `Mismatch`."""
        again = min(len(new), len(self._text) - self._at)
        if not self._text.startswith(new[:again], self._at):
            raise Mismatch(f"its {self._kind} differs from what was sent already")
        self._at += again
        return new[again:]


def seam_of(way: Way, request: GenerateRequest, so_far: SoFar, offer: ModelOffer) -> Seam:
    """Joins the rest, by who made that offer, to what there is."""
    if way == "restart":
        return Restarted(so_far)
    return Continued(0 if counts_there(request, so_far, offer) else so_far.tokens)
