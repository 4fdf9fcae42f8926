"""The dialect of Anthropic's Messages API, outwards: a request becomes a body.

What this API has no place for is refused in words that send the caller elsewhere (images of a kind
it does not take, log probabilities, JSON without a schema). A seed, penalties and `logit_bias` are
passed over: they change how an answer is drawn, not what is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec

from .base import (
    GenerateRequest,
    Image,
    Message,
    ProviderUnavailable,
    RequestRejected,
    Text,
    Tool,
    ToolCall,
)
from .options import read_options

Effort = Literal["low", "medium", "high", "xhigh", "max"]
#: Tokens of thinking, of which the API allows not fewer; or as many as the model likes.
Thinking = Annotated[int, msgspec.Meta(ge=1024, le=200_000)] | Literal["adaptive"]

#: Models that continue an answer whose beginning they are given: those before 4.6.
_PREFILLS = re.compile(r"claude-(2|instant|3|(opus|sonnet|haiku)-4(?!\d)(?!-([2-46-9]|\d\d)\b))")
_DATA_URL = re.compile(r"data:(image/[\w.+-]+);base64,([A-Za-z0-9+/=\s]+)")
#: How the API refuses a field that a model does not take any more, or not beside another.
_REFUSED = re.compile(r"deprecated|not supported|cannot both|unsupported", re.IGNORECASE)


class ClaudeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What Claude can be told beyond the vocabulary. None: as the vendor has it."""

    effort: Effort | None = None
    #: In addition to the tokens of the answer.
    thinking: Thinking | None = None


def read_claude_options(request: GenerateRequest, usual: ClaudeOptions) -> ClaudeOptions:
    """What this request says, else what is usual here. Raises `RequestRejected`."""
    if not request.extra:
        return usual
    said = read_options(ClaudeOptions, request.extra)
    return ClaudeOptions(
        effort=said.effort or usual.effort, thinking=said.thinking or usual.thinking
    )


class Quirks:
    """Which sampling fields a model turned out not to take."""

    def __init__(self) -> None:
        self._refused: dict[str, set[str]] = {}

    def takes(self, model: str, field: str) -> bool:
        return field not in self._refused.get(model, ())

    def learn(self, model: str, message: str) -> bool:
        """Learn from the refusal of a request; True if another try could go better.

        From 4.1 on models take only one of `temperature` and `top_p`, the newest ones none.
        """
        if not _REFUSED.search(message):
            return False
        refused = self._refused.setdefault(model, set())
        named = [f for f in ("top_p", "top_k", "temperature") if f in message and f not in refused]
        refused.update(named[:1])
        return bool(named)


def takes_prefix(model: str) -> bool:
    """Does the model continue an answer?"""
    return _PREFILLS.search(model) is not None


def encode_request(
    request: GenerateRequest, options: ClaudeOptions, quirks: Quirks, max_tokens: int
) -> bytes:
    """The body of `POST /v1/messages`, which always asks for a stream.

    `max_tokens` is for requests that say none. Raises `RequestRejected`, or `ProviderUnavailable`
    for what another provider could do.
    """
    _check(request, options)
    body = _question(request)
    body["max_tokens"] = request.sampling.max_tokens or max_tokens
    body["stream"] = True
    if stop := [text for text in request.sampling.stop if text.strip()]:
        body["stop_sequences"] = stop
    thinks = _add_thinking(body, request, options)
    if not thinks:  # which goes with the default sampling only
        _add_sampling(body, request, quirks)
    _add_output(body, request, options)
    if prefill := request.prefix.rstrip():
        body["messages"].append({"role": "assistant", "content": prefill})
    return _encode(body)


def blank_stops(request: GenerateRequest) -> list[str]:
    """The stop strings of white space alone, which the API refuses: we look for them."""
    return [text for text in request.sampling.stop if not text.strip()]


def encode_count(request: GenerateRequest) -> bytes:
    """The body of `POST /v1/messages/count_tokens`. Raises as `encode_request`."""
    return _encode(_question(request))


def _encode(body: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(body)
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestRejected(f"the request cannot be written as JSON: {error}") from None


def _check(request: GenerateRequest, options: ClaudeOptions) -> None:
    """Raises `ProviderUnavailable` for what is not possible here."""
    sampling, form, choice = request.sampling, request.response_format, request.tool_choice
    forced = choice is not None and choice.mode in ("required", "function")
    for impossible, what in (
        (request.prefix and not takes_prefix(request.model), "continue an answer"),
        (request.prefix and options.thinking, "continue an answer and think"),
        (forced and options.thinking, "be made to call a tool while it thinks"),
        (sampling.logprobs, "give log probabilities"),
        ((sampling.temperature or 0) > 1, "take a temperature above 1"),
        (form and form.type == "json_object", "answer in JSON without a schema"),
    ):
        if impossible:
            raise ProviderUnavailable(f"{request.model} cannot {what}")


# --- the question -------------------------------------------------------------------------------


def _question(request: GenerateRequest) -> dict[str, Any]:
    """The part that tokens are counted of."""
    body: dict[str, Any] = {"model": request.model, "messages": _turns(request.messages)}
    system = [m.text for m in request.messages if m.role in ("system", "developer") and m.text]
    if system:
        body["system"] = "\n\n".join(system)
    _add_tools(body, request)
    return body


def _turns(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """The chat in turns: all results of one turn's tool calls have to be in the one after it."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        if message.role in ("system", "developer"):
            continue
        role = "assistant" if message.role == "assistant" else "user"
        blocks = _blocks(message)
        if blocks and turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        elif blocks:
            turns.append({"role": role, "content": blocks})
    if not turns:
        raise RequestRejected("there is no message with a text", field="messages")
    return turns


def _blocks(message: Message) -> list[dict[str, Any]]:
    """Its content. Empty texts are left out: the API refuses them."""
    parts = [_part(part) for part in message.content if not isinstance(part, Text) or part.text]
    if message.role == "tool":
        if not message.tool_call_id:
            raise RequestRejected("a tool's message says no tool_call_id", field="messages")
        return [{"type": "tool_result", "tool_use_id": message.tool_call_id, "content": parts}]
    return parts + [_use(call) for call in message.tool_calls]


def _part(part: Text | Image) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    if not part.url.startswith("data:"):
        return {"type": "image", "source": {"type": "url", "url": part.url}}
    found = _DATA_URL.fullmatch(part.url)
    if found is None:
        raise RequestRejected("an image's data URL is not one of base64", field="messages")
    source = {"type": "base64", "media_type": found[1], "data": found[2]}
    return {"type": "image", "source": source}


def _use(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(call.arguments or "{}", type=dict[str, Any])
    except (ValueError, RecursionError):
        text = f"the arguments of the tool call {call.id!r} are not a JSON object"
        raise ProviderUnavailable(text) from None
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


# --- tools and how to answer --------------------------------------------------------------------


def _add_tools(body: dict[str, Any], request: GenerateRequest) -> None:
    if not request.tools:
        return
    body["tools"] = [_tool(tool) for tool in request.tools]
    choice = request.tool_choice
    names = {None: "auto", "auto": "auto", "none": "none", "required": "any", "function": "tool"}
    wanted: dict[str, Any] = {"type": names[choice.mode if choice else None]}
    if choice is not None and choice.mode == "function":
        wanted["name"] = choice.name
    if request.parallel_tool_calls is False and wanted["type"] != "none":
        wanted["disable_parallel_tool_use"] = True
    if choice is not None or len(wanted) > 1:
        body["tool_choice"] = wanted


def _tool(tool: Tool) -> dict[str, Any]:
    schema = {"type": "object", **tool.parameters}
    fields = {"description": tool.description, "strict": tool.strict}
    said = {name: value for name, value in fields.items() if value is not None}
    return {"name": tool.name, "input_schema": schema, **said}


def _add_thinking(body: dict[str, Any], request: GenerateRequest, options: ClaudeOptions) -> bool:
    """Will it think? Not where it goes on after a tool call: the API wants its thoughts back then,
    signed, and nobody kept them."""
    last = request.messages[-1].role if request.messages else "user"
    if options.thinking is None or last == "tool":
        return False
    if options.thinking == "adaptive":
        body["thinking"] = {"type": "adaptive"}
    else:
        body["thinking"] = {"type": "enabled", "budget_tokens": options.thinking}
        body["max_tokens"] += options.thinking
    return True


def _add_sampling(body: dict[str, Any], request: GenerateRequest, quirks: Quirks) -> None:
    sampling = request.sampling
    fields = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
    }
    body.update(
        (name, value)
        for name, value in fields.items()
        if value is not None and quirks.takes(request.model, name)
    )


def _add_output(body: dict[str, Any], request: GenerateRequest, options: ClaudeOptions) -> None:
    wanted: dict[str, Any] = {"effort": options.effort} if options.effort else {}
    form = request.response_format
    if form is not None and form.type == "json_schema":
        wanted["format"] = {"type": "json_schema", "schema": form.schema or {}}
    if wanted:
        body["output_config"] = wanted
