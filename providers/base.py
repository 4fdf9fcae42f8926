"""The vocabulary: what a request, an answer, a provider and a failure are.

Every other room speaks in these types, and imports nothing else of `providers`. A request enters
at the edge (an HTTP dialect, the command line, the Python API), becomes a `GenerateRequest` once,
and never is a dict again. All values are immutable; all of them cross the wire as MessagePack maps
with the field names below, defaults left out and unknown fields ignored.
"""

from __future__ import annotations

import math
import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, ClassVar, Literal, Protocol

import msgspec

Role = Literal["system", "developer", "user", "assistant", "tool"]
Privacy = Literal["local", "mesh", "any"]
#: Whose request it is, the most urgent first: of a program of this machine, of another member of
#: the mesh, or one that nobody waits for.
Priority = Literal["own", "member", "background"]
Policy = Literal["round_robin", "least_loaded", "best_performance"]
FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
#: Whether free providers are asked before paid ones, and this node's own before its peers'.
Prefer = Literal["own", "free", "any"]
CacheStatus = Literal["hit-local", "hit-mesh", "miss", "bypass", "coalesced"]
#: What a model is for: it answers a chat, or makes vectors of texts.
Task = Literal["generate", "embed"]

#: Inputs of one `EmbedRequest`, and tokens of an input that is given as tokens.
MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 16_384
#: Numbers of a vector, and bytes of each: float32, little-endian.
MAX_DIMENSIONS = 4096
FLOAT_SIZE = 4
#: Fields of `extra` that decide who pays, how it travels and what is logged, but no answer.
TRANSPORT = frozenset(
    {
        "keep_alive",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "stream",
        "stream_options",
        "timeout",
        "user",
    }
)


class Value(msgspec.Struct, frozen=True, omit_defaults=True):
    """An immutable value whose defaults are left out on the wire."""


# --- the request --------------------------------------------------------------------------------


class Text(Value, frozen=True, kw_only=True, tag_field="type", tag="text"):
    """A piece of a message: text."""

    text: str


class Image(Value, frozen=True, kw_only=True, tag_field="type", tag="image"):
    """A piece of a message: an image, by `https:` or `data:` URL."""

    url: str
    detail: str | None = None


class ToolCall(Value, frozen=True, kw_only=True):
    """A call the model made. `arguments` is the JSON text as the model produced it."""

    id: str
    name: str
    arguments: str


class Message(Value, frozen=True, kw_only=True):
    """One turn. `tool_call_id` says which call a `tool` message answers."""

    role: Role
    content: tuple[Text | Image, ...] = ()
    name: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The text pieces, joined."""
        return "".join(part.text for part in self.content if isinstance(part, Text))


class Tool(Value, frozen=True, kw_only=True):
    """A function the model may call. `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] = {}
    strict: bool | None = None


class ToolChoice(Value, frozen=True, kw_only=True):
    """Whether a tool must be called; `name` only with mode `function`."""

    mode: Literal["auto", "none", "required", "function"] = "auto"
    name: str | None = None


class ResponseFormat(Value, frozen=True, kw_only=True):
    """The form the answer must have; `schema` only with type `json_schema`."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class Sampling(Value, frozen=True, kw_only=True):
    """How tokens are drawn. None: the provider's own default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool = False
    top_logprobs: int | None = None


class CacheControl(Value, frozen=True, kw_only=True):
    """What the asker wants of the cache.

    `use` reads and stores, `refresh` only stores, `bypass` does neither, `only` never computes.
    `ttl` (s) is how long the answer may be kept, `max_age` (s) how old a stored one may be; `scope`
    says whether the answer may leave this node; answers of different namespaces never mix. So many
    trusted nodes as `min_agreement` says must have computed the same answer before a stored one of
    another node is used; None: as many as this node's configuration wants.
    """

    mode: Literal["use", "refresh", "bypass", "only"] = "use"
    ttl: float | None = None
    max_age: float | None = None
    scope: Literal["local", "mesh"] = "mesh"
    namespace: str = ""
    min_agreement: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None
    #: Reuse also sampled answers: the caller asked for any stored answer (`generate_text`, `ask`).
    any_sample: bool = False


_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]


class TimeLimits(Value, frozen=True, kw_only=True):
    """Seconds that parts of an answer may take. None: what is usual.

    `connect`: to reach the peer that is asked; `first_token`: from there to the first token; `gap`:
    between two tokens.
    """

    connect: _Seconds | None = None
    first_token: _Seconds | None = None
    gap: _Seconds | None = None


class ModelRequest(Value, frozen=True, kw_only=True):
    """What all requests have in common.

    Everything above `provider`, here and in the classes below, decides the answer and is part of
    its cache key; everything from there on says who may answer and how long that may take.
    """

    #: What the model that answers must be for.
    task: ClassVar[Task]

    model: str
    #: The form it was asked in; `extra` holds its fields we do not know, sent on to providers that
    #: speak the same dialect. A provider of another kind finds its own options there.
    dialect: str = ""
    extra: dict[str, Any] = {}

    #: Ask only this provider, or only this peer (peer id or node name).
    provider: str | None = None
    peer: str | None = None
    policy: Policy | None = None
    #: `local`: this machine, no third party; `mesh`: members, no third party; `any`: anybody.
    privacy: Privacy = "any"
    #: US dollars that the answer may be expected to cost; None: any.
    max_cost: Annotated[float, msgspec.Meta(ge=0)] | None = None
    #: None: as the node's configuration says.
    prefer: Prefer | None = None
    cache: CacheControl = CacheControl()
    #: Who goes first where requests wait for a slot.
    priority: Priority = "own"
    #: Seconds that remain for the whole answer, from the moment the value is received.
    deadline: float | None = None
    #: What the asker wants otherwise than is usual.
    limits: TimeLimits | None = None
    #: Ask a second candidate when the first token is late; None: as the node is configured.
    hedge: bool | None = None
    #: Names this request in logs, headers and `explain`, on every node it visits.
    id: str = ""
    #: The member whose request it is, set by the node that serves it, whatever the peer says; "":
    #: a program of this machine.
    asker: str = ""


class GenerateRequest(ModelRequest, frozen=True, kw_only=True):
    """A whole chat request."""

    task = "generate"

    messages: tuple[Message, ...]
    sampling: Sampling = Sampling()
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    #: Text of the answer that exists already and is to be continued.
    prefix: str = ""
    #: Characters at the end of `prefix` that count as this answer's: their tokens are among
    #: `max_tokens`, and among those of its usage. Only for an offer with `counts_begun`.
    begun: Annotated[int, msgspec.Meta(ge=0)] = 0

    @property
    def kind(self) -> str:
        """What is known beforehand of how long an answer will be.

        Programs ask for the same again and again, each with its own limit: one that sorts mails
        allows 10 tokens, one that writes code 4096.
        """
        form = self.response_format.type if self.response_format else "text"
        return f"{self.sampling.max_tokens}/{form}/{bool(self.tools)}"

    @property
    def deterministic(self) -> bool:
        """Would an honest engine give the same answer again? (greedy, or with a seed)"""
        return self.sampling.temperature == 0 or self.sampling.seed is not None


Token = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
#: A text, or the tokens that the model's own tokenizer made of one.
Input = str | Annotated[tuple[Token, ...], msgspec.Meta(min_length=1, max_length=MAX_INPUT_TOKENS)]


class EmbedRequest(ModelRequest, frozen=True, kw_only=True):
    """Texts of which a model makes vectors, one of each."""

    task = "embed"
    #: The same model makes the same vector of the same text.
    deterministic: ClassVar[bool] = True

    kind: ClassVar[str] = "embed"

    inputs: Annotated[tuple[Input, ...], msgspec.Meta(min_length=1, max_length=MAX_INPUTS)]
    #: Numbers of each vector; None: as many as the model likes.
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=MAX_DIMENSIONS)] | None = None


#: What a node or a provider can be asked.
Asked = GenerateRequest | EmbedRequest


# --- the answer ---------------------------------------------------------------------------------


class Usage(Value, frozen=True, kw_only=True):
    """Tokens counted by who generated them. `exact` is false where they are an estimate."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False
    exact: bool = True

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class ToolCallDelta(Value, frozen=True, kw_only=True):
    """A piece of the tool call number `index`; `id` and `name` come with its first piece."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class Price(Value, frozen=True, kw_only=True):
    """What a provider charges, in US dollars for a million tokens."""

    prompt: float = 0.0
    completion: float = 0.0


class Origin(Value, frozen=True, kw_only=True):
    """Who answers, and how it came to that."""

    peer: str = ""
    node: str = ""
    provider: str = ""
    model: str = ""
    cache: CacheStatus = "miss"
    policy: str = ""
    attempts: int = 0
    #: The CID of the answer record, where it is known before the first chunk (a cache hit).
    cid: str | None = None
    #: Seconds since a stored answer was made, and seconds until it expires.
    age: float | None = None
    ttl: float | None = None
    #: What the answer record says of the engine, as in the `ModelOffer` that was used.
    weights: str | None = None
    engine: str | None = None
    numerics: str | None = None
    #: Who gave the beginning of the text, where it broke off and this one continued it.
    begun_by: str = ""
    #: What the offer charges for computing it, as the asking node knows it.
    price: Price | None = None


class Embedding(Value, frozen=True, kw_only=True):
    """The vector of one input: its numbers as float32, little-endian, one after the other."""

    vector: Annotated[
        bytes, msgspec.Meta(min_length=FLOAT_SIZE, max_length=MAX_DIMENSIONS * FLOAT_SIZE)
    ]
    #: Tokens of this input.
    usage: Usage = Usage()
    #: Of the record that is stored of it.
    cid: str | None = None


def floats(vector: bytes) -> tuple[float, ...]:
    """The numbers of a vector."""
    return struct.unpack(f"<{len(vector) // FLOAT_SIZE}f", vector)


def vector_fault(vector: bytes) -> str:
    """Why these bytes are not the vector of an `Embedding`; empty if they are."""
    numbers, rest = divmod(len(vector), FLOAT_SIZE)
    if rest or not 0 < numbers <= MAX_DIMENSIONS:
        return f"a vector of {len(vector)} bytes"
    # The sum of so few float32 cannot overflow: it is finite exactly if all of them are.
    if not math.isfinite(sum(floats(vector))):
        return "a vector with a number that is not finite"
    return ""


def total_usage(usages: Iterable[Usage]) -> Usage:
    """The tokens of several inputs together; `cached` if all of them are."""
    each = list(usages)
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in each),
        cached=all(usage.cached for usage in each),
        exact=all(usage.exact for usage in each),
    )


class Chunk(Value, frozen=True, kw_only=True):
    """A piece of an answer: of a text, or some of the embeddings that were asked for, in order.

    Exactly one chunk has a `finish_reason`, and it is the last one; a stream that ends without it
    was cut. The last one may also carry `usage`, the answer's `cid`, and the true `origin`, where
    another backend took over after the first chunk.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    #: Log probabilities of this chunk's tokens, in the OpenAI form.
    logprobs: tuple[dict[str, Any], ...] = ()
    embeddings: Annotated[tuple[Embedding, ...], msgspec.Meta(max_length=MAX_INPUTS)] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    cid: str | None = None
    origin: Origin | None = None


class Completion(Value, frozen=True, kw_only=True):
    """A whole answer: what the cache stores."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[dict[str, Any], ...] = ()
    finish_reason: FinishReason
    usage: Usage = Usage()

    def chunks(self) -> Iterable[Chunk]:
        """The answer as a stream: its content, then the closing chunk."""
        if self.reasoning:
            yield Chunk(reasoning=self.reasoning)
        if self.text or self.logprobs:
            yield Chunk(text=self.text, logprobs=self.logprobs)
        if self.tool_calls:
            yield Chunk(
                tool_calls=tuple(
                    ToolCallDelta(index=i, id=c.id, name=c.name, arguments=c.arguments)
                    for i, c in enumerate(self.tool_calls)
                )
            )
        yield Chunk(finish_reason=self.finish_reason, usage=self.usage)


class CompletionBuilder:
    """Adds chunks up to a `Completion`."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._calls: dict[int, list[str]] = {}
        self._arguments: dict[int, list[str]] = {}
        self._usage = Usage()
        self._finish_reason: FinishReason | None = None

    def add(self, chunk: Chunk) -> None:
        """Take the next chunk. Nothing may follow the one with a `finish_reason`."""
        if chunk.text:
            self._text.append(chunk.text)
        if chunk.reasoning:
            self._reasoning.append(chunk.reasoning)
        if chunk.logprobs:
            self._logprobs.extend(chunk.logprobs)
        for delta in chunk.tool_calls:
            head = self._calls.setdefault(delta.index, ["", ""])
            head[0] = delta.id or head[0]
            head[1] = delta.name or head[1]
            self._arguments.setdefault(delta.index, []).append(delta.arguments)
        if chunk.usage is not None:
            self._usage = chunk.usage
        if chunk.finish_reason is not None:
            self._finish_reason = chunk.finish_reason

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._text)

    @property
    def finished(self) -> bool:
        """Did the closing chunk come?"""
        return self._finish_reason is not None

    def completion(self) -> Completion:
        """The whole answer. Raises `StreamInterrupted` if the closing chunk never came."""
        if self._finish_reason is None:
            raise StreamInterrupted("the answer ended without its end marker", partial=self.text)
        return Completion(
            text=self.text,
            reasoning="".join(self._reasoning),
            tool_calls=tuple(
                ToolCall(id=id_, name=name, arguments="".join(self._arguments[index]))
                for index, (id_, name) in sorted(self._calls.items())
            ),
            logprobs=tuple(self._logprobs),
            finish_reason=self._finish_reason,
            usage=self._usage,
        )


class Answering:
    """An answer under way. `origin` is known before the first chunk; `chunks` is read once.

    `key` is the key of the question, where whoever answers knows it.
    """

    __slots__ = ("chunks", "key", "origin")

    def __init__(self, origin: Origin, chunks: AsyncIterator[Chunk], key: bytes = b"") -> None:
        self.origin = origin
        self.chunks = chunks
        self.key = key

    async def completion(self) -> Completion:
        """Read to the end. Raises what the stream raises, or `StreamInterrupted`."""
        completion, _ = await self.whole()
        return completion

    async def whole(self) -> tuple[Completion, Chunk]:
        """Read to the end: the answer, and its last chunk. Raises as `completion`."""
        builder, closing = CompletionBuilder(), Chunk()
        async for chunk in self.chunks:
            builder.add(chunk)
            closing = chunk
        return builder.completion(), closing


class Ready:
    """Chunks that need not be waited for."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._chunks = iter(chunks)

    def __aiter__(self) -> Ready:
        return self

    async def __anext__(self) -> Chunk:
        chunk = next(self._chunks, None)
        if chunk is None:
            raise StopAsyncIteration
        return chunk


# --- the provider -------------------------------------------------------------------------------


class ModelOffer(Value, frozen=True, kw_only=True):
    """A model that can be asked, and what it can do. None: not known."""

    id: str
    #: What it is for, of `Task` (a newer node may know more); nothing else is asked of it.
    tasks: tuple[str, ...] = ("generate",)
    context_length: int | None = None
    modalities: tuple[str, ...] = ("text",)
    tools: bool = False
    #: Continues an answer from `GenerateRequest.prefix`.
    can_continue: bool = False
    #: Counts the tokens of what was `begun`, as it has the tokenizer.
    counts_begun: bool = False
    #: Digest of the weights, and the engine with its version.
    weights: str | None = None
    engine: str | None = None
    #: The numerics class: dtype, quantisation and whether batching changes a greedy answer, such as
    #: `float32/invariant` or `bfloat16/batch-dependent`.
    numerics: str | None = None
    #: A greedy answer is the same alone, in a batch, and restarted.
    repeatable: bool = False
    #: It is in memory: the next answer does not wait until it is loaded.
    loaded: bool | None = None
    #: A prompt leaves the members' machines for a third party.
    egress: bool = False
    price: Price | None = None


class Health(Value, frozen=True, kw_only=True):
    """Can a provider be asked? `hint` is the next step for a person where it cannot."""

    state: Literal["ready", "starting", "unavailable"] = "ready"
    reason: str = ""
    hint: str = ""


class Provider(Protocol):
    """Something that turns a prompt into text, or texts into vectors, or both."""

    @property
    def name(self) -> str: ...

    def models(self) -> Sequence[ModelOffer]:
        """What can be asked now. Never blocks: a provider that must ask a server remembers."""
        ...

    def open(self, request: GenerateRequest) -> AbstractAsyncContextManager[Answering]:
        """Begin an answer. Entering waits until it is known who answers; leaving cancels the work.

        Raises a `GenerateError`, on entering or from the chunks.
        """
        ...

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        """The embedding of each input, in order; cancelling stops the work.

        Only asked for models whose offer says `embed`. Raises a `GenerateError`.
        """
        ...

    async def check(self) -> Health:
        """Can it be asked? Costs no money, takes at most 2 s, never raises."""
        ...


# --- failures -----------------------------------------------------------------------------------


class GenerateError(RuntimeError):
    """An answer that could not be given.

    Leaves, by what another try could do::

        RequestRejected      the request is at fault; nobody else will take it
          ContextTooLong     only a model with a larger context helps
          ContentFiltered    a filter refused; never tried again
          ModelNotFound      nobody here has that model
        ProviderUnavailable  this provider cannot now; another may (`retry_after` in seconds)
          ProviderBusy       its queue is full or too long: no fault of it
          ProviderRefused    it works, and takes no such request: by key, credit, rate or model
          Declined           its owner does not let this asker use it, or not for so much money
          DeadlineExceeded   a time limit passed (of connecting, first token, gap or the whole)
        StreamInterrupted    it broke after text was produced; `partial` holds that text
        CacheOnlyMiss        the request allowed only a stored answer, and there is none
    """

    #: Names the class on the wire and in error bodies.
    code: ClassVar[str] = "generate_error"

    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None = None,
        partial: str = "",
        field: str | None = None,
        again: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        self.partial = partial
        #: The request's field that is at fault.
        self.field = field
        #: It may pass at once: another try at the same place is worth while.
        self.again = again

    def __str__(self) -> str:
        return self.message


class RequestRejected(GenerateError):
    """The request itself is at fault: do not try elsewhere."""

    code = "request_rejected"


class ContextTooLong(RequestRejected):
    """The prompt and the tokens asked for do not fit; only a larger model helps."""

    code = "context_too_long"


class ContentFiltered(RequestRejected):
    """A content filter refused. Never tried again."""

    code = "content_filtered"


class ModelNotFound(RequestRejected):
    """Nobody offers that model."""

    code = "model_not_found"


class ProviderUnavailable(GenerateError):
    """This provider cannot answer now; try elsewhere."""

    code = "provider_unavailable"


class ProviderBusy(ProviderUnavailable):
    """It has more to do than it can in the time: no fault of it, and another may be free."""

    code = "provider_busy"


class ProviderRefused(ProviderUnavailable):
    """It works, and takes no such request from us now: a key is wrong, a right or some credit is
    missing, it does not have the model, or it is asked too often."""

    code = "provider_refused"


class Declined(ProviderUnavailable):
    """It could, and may not for this asker: by a right or a limit of money. No fault of it."""

    code = "declined"


class DeadlineExceeded(ProviderUnavailable):
    """A time limit passed: of connecting, of the first token, between tokens, or of the whole."""

    code = "deadline_exceeded"


class StreamInterrupted(GenerateError):
    """The answer broke after some text; `partial` is what there was."""

    code = "stream_interrupted"


class CacheOnlyMiss(GenerateError):
    """Only a stored answer was allowed, and there is none."""

    code = "cache_only_miss"


ERRORS: dict[str, type[GenerateError]] = {
    error.code: error
    for error in (
        GenerateError,
        RequestRejected,
        ContextTooLong,
        ContentFiltered,
        ModelNotFound,
        ProviderUnavailable,
        ProviderBusy,
        ProviderRefused,
        Declined,
        DeadlineExceeded,
        StreamInterrupted,
        CacheOnlyMiss,
    )
}
