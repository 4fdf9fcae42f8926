"""The OpenAI dialect, inwards: the body of a chat call becomes a `GenerateRequest`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from ..providers.base import (
    CacheControl,
    GenerateRequest,
    Image,
    Message,
    Policy,
    Prefer,
    Priority,
    Privacy,
    RequestRejected,
    ResponseFormat,
    Role,
    Sampling,
    Text,
    TimeLimits,
    Tool,
    ToolCall,
    ToolChoice,
)

_Body = TypeVar("_Body", bound=msgspec.Struct)

#: A name of a model, a provider, a peer or a namespace: no longer one can be stored.
Name = Annotated[str, msgspec.Meta(max_length=1024)]
#: Characters of a reason: some repeat what is wrong.
MAX_REASON = 300


class _ImageUrl(msgspec.Struct):
    url: str
    detail: str | None = None


class _Part(msgspec.Struct):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: _ImageUrl | None = None


class _Function(msgspec.Struct):
    name: str
    arguments: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Call(msgspec.Struct):
    id: str
    function: _Function
    type: Literal["function"] = "function"


class _Message(msgspec.Struct):
    role: Role
    content: str | list[_Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None


class _Tool(msgspec.Struct):
    function: _Function
    type: Literal["function"] = "function"


class _NamedFunction(msgspec.Struct):
    name: str


class _NamedChoice(msgspec.Struct):
    function: _NamedFunction
    type: Literal["function"] = "function"


class _Schema(msgspec.Struct):
    name: str = "answer"
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class _Format(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class _Cache(msgspec.Struct, forbid_unknown_fields=True):
    mode: Literal["use", "refresh", "bypass", "only"] = "use"
    ttl: _Seconds | None = None
    max_age: _Seconds | None = None
    scope: Literal["local", "mesh"] = "mesh"
    namespace: Name = ""
    min_agreement: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None
    any_sample: bool = False


_Limit = Annotated[float, msgspec.Meta(gt=0, le=86400)]


class _Limits(msgspec.Struct, forbid_unknown_fields=True):
    connect_s: _Limit | None = None
    first_token_s: _Limit | None = None
    gap_s: _Limit | None = None


class MeshFields(msgspec.Struct, forbid_unknown_fields=True):
    """The `promptmesh` object of a request."""

    provider: Name | None = None
    peer: Name | None = None
    policy: Policy | None = None
    privacy: Privacy = "any"
    #: US dollars.
    max_cost: Annotated[float, msgspec.Meta(ge=0)] | None = None
    prefer: Prefer | None = None
    cache: _Cache = msgspec.field(default_factory=_Cache)
    priority: Priority = "own"
    deadline_s: _Seconds | None = None
    deadlines: _Limits | None = None
    hedge: bool | None = None


class _ChatBody(msgspec.Struct):
    model: Name
    messages: list[_Message]
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = 1
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[_Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | _NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: _Format | None = None
    promptmesh: MeshFields = msgspec.field(default_factory=MeshFields)


#: What a caller says about itself rather than about the answer: neither sent on nor in the key.
ABOUT_THE_CALLER = frozenset({"user", "metadata", "store", "safety_identifier"})
_KNOWN = frozenset(_ChatBody.__struct_fields__) | ABOUT_THE_CALLER
_decode_body = msgspec.json.Decoder(_ChatBody).decode
#: The fields without what is in them, which only the unknown ones need.
_decode_names = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
#: The largest number that every provider and every peer can be sent.
_MOST = 2**63 - 1
#: The range of a number, by the OpenAI reference.
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (0, _MOST),
    "max_tokens": (1, _MOST),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "top_logprobs": (0, 20),
    "seed": (-_MOST - 1, _MOST),
}


#: Bodies that are remembered with what they mean, and the bytes of the largest. A question that is
#: asked again mostly comes in the same bytes, and nothing that was decoded is ever changed. What is
#: not to be stored anywhere is not remembered either.
MAX_REMEMBERED, MAX_REMEMBERED_SIZE = 512, 16 * 1024
_remembered: dict[bytes, ChatCall] = {}


class ChatCall(msgspec.Struct, frozen=True):
    """A decoded call: the request, and how its answer is to be sent."""

    request: GenerateRequest
    stream: bool
    include_usage: bool


def decode_chat(body: bytes, request_id: str, *, remember: bool = True) -> ChatCall:
    """Decode the body of `POST /v1/chat/completions`; `remember`: may it be kept in memory?

    Raises `RequestRejected`, with the field that is wrong.
    """
    call = _remembered.get(body)
    if call is None:
        call = _decode(body)
        if remember and len(body) <= MAX_REMEMBERED_SIZE and call.request.cache.mode != "bypass":
            if len(_remembered) >= MAX_REMEMBERED:
                _remembered.clear()
            _remembered[body] = call
    request = msgspec.structs.replace(call.request, id=request_id)
    return msgspec.structs.replace(call, request=request)


def _decode(body: bytes) -> ChatCall:
    chat, extra = decode_body(body, _decode_body, _KNOWN)
    return ChatCall(
        request=_request(chat, extra),
        stream=bool(chat.stream),
        include_usage=chat.stream_options is not None and chat.stream_options.include_usage,
    )


def decode_body(
    body: bytes, decode: Callable[[bytes], _Body], known: frozenset[str]
) -> tuple[_Body, dict[str, Any]]:
    """A body's fields that are known, and the others as they are. Raises `RequestRejected`."""
    try:
        fields = decode(body)
        extra = {
            name: msgspec.json.decode(value)
            for name, value in _decode_names(body).items()
            if name not in known
        }
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").lstrip(".") or None
        raise RequestRejected(f"{field or 'body'}: {reason[:MAX_REASON]}", field=field) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestRejected(f"the body is not a JSON object: {error}") from None
    return fields, extra


def routing(mesh: MeshFields) -> dict[str, Any]:
    """The fields that all requests have, of who may answer and how the cache is used."""
    cache = msgspec.structs.asdict(mesh.cache)
    return {
        "provider": mesh.provider,
        "peer": mesh.peer,
        "policy": mesh.policy,
        "privacy": mesh.privacy,
        "max_cost": mesh.max_cost,
        "prefer": mesh.prefer,
        "cache": CacheControl(**cache),
        "priority": mesh.priority,
        "deadline": mesh.deadline_s,
        "hedge": mesh.hedge,
        "limits": mesh.deadlines and _time_limits(mesh.deadlines),
    }


def _time_limits(said: _Limits) -> TimeLimits:
    return TimeLimits(connect=said.connect_s, first_token=said.first_token_s, gap=said.gap_s)


def _request(chat: _ChatBody, extra: dict[str, Any]) -> GenerateRequest:
    if not chat.messages:
        raise RequestRejected("messages: at least one is needed", field="messages")
    if chat.n not in (None, 1):
        raise RequestRejected("n: only 1 answer at a time is given", field="n")
    return GenerateRequest(
        model=chat.model,
        messages=tuple(_message(m, i) for i, m in enumerate(chat.messages)),
        sampling=_sampling(chat),
        tools=tuple(_tool(t) for t in chat.tools or ()),
        tool_choice=_tool_choice(chat),
        parallel_tool_calls=chat.parallel_tool_calls,
        response_format=_response_format(chat.response_format),
        dialect="openai",
        extra=extra,
        **routing(chat.promptmesh),
    )


def _message(message: _Message, index: int) -> Message:
    content = message.content
    if content is None:
        parts: tuple[Text | Image, ...] = ()
    elif isinstance(content, str):
        parts = (Text(text=content),)
    else:
        parts = tuple(_part(p, f"messages[{index}].content[{j}]") for j, p in enumerate(content))
    return Message(
        role=message.role,
        content=parts,
        name=message.name,
        reasoning=message.reasoning_content,
        tool_calls=tuple(
            ToolCall(id=c.id, name=c.function.name, arguments=c.function.arguments)
            for c in message.tool_calls or ()
        ),
        tool_call_id=message.tool_call_id,
    )


def _part(part: _Part, field: str) -> Text | Image:
    if part.type == "text" and part.text is not None:
        return Text(text=part.text)
    if part.type == "image_url" and part.image_url is not None:
        return Image(url=part.image_url.url, detail=part.image_url.detail)
    raise RequestRejected(f"{field}: `{part.type}` is missing its content", field=field)


def _sampling(chat: _ChatBody) -> Sampling:
    max_tokens = chat.max_tokens
    if chat.max_completion_tokens is not None:
        max_tokens = chat.max_completion_tokens
    stop = (chat.stop,) if isinstance(chat.stop, str) else tuple(chat.stop or ())
    sampling = Sampling(
        temperature=chat.temperature,
        top_p=chat.top_p,
        top_k=chat.top_k,
        max_tokens=max_tokens,
        stop=tuple(s for s in stop if s),
        seed=chat.seed,
        presence_penalty=chat.presence_penalty,
        frequency_penalty=chat.frequency_penalty,
        logit_bias=chat.logit_bias,
        logprobs=bool(chat.logprobs),
        top_logprobs=chat.top_logprobs,
    )
    for name, (low, high) in _RANGES.items():
        value = getattr(sampling, name)
        if value is not None and not low <= value <= high:
            raise RequestRejected(f"{name}: {value} is not in {low} to {high}", field=name)
    return sampling


def _tool(tool: _Tool) -> Tool:
    function = tool.function
    return Tool(
        name=function.name,
        description=function.description,
        parameters=function.parameters or {},
        strict=function.strict,
    )


def _tool_choice(chat: _ChatBody) -> ToolChoice | None:
    if isinstance(chat.tool_choice, _NamedChoice):
        return ToolChoice(mode="function", name=chat.tool_choice.function.name)
    return None if chat.tool_choice is None else ToolChoice(mode=chat.tool_choice)


def _response_format(form: _Format | None) -> ResponseFormat | None:
    if form is None:
        return None
    schema = form.json_schema or _Schema()
    if form.type != "json_schema":
        return ResponseFormat(type=form.type)
    return ResponseFormat(
        type="json_schema", name=schema.name, schema=schema.schema, strict=schema.strict
    )
