"""A request to the tokens a model reads, or the reason why this model cannot take it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from .base import ContextTooLong, GenerateRequest, Message, RequestRejected, Sampling, Text, Tool
from .hf_load import LoadedModel
from .hf_sampling import Draw
from .hf_tools import ToolCallScanner

#: Most tokens of an answer whose request sets no `max_tokens`: a small model that never finds its
#: end would hold its place for minutes. The answer then ends with `length`, as a full context does.
OPEN_END = 4096
#: Bounds on what is compared with every piece of text.
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
#: The OpenAI dialect has no more.
MAX_TOP_LOGPROBS = 20


class Prepared(NamedTuple):
    """What an engine needs of a request, and what its text needs.

    `primer` are the tokens of the text that is to be continued, of which the last `begun` count as
    the answer's; `tools` is there where the answer may call some.
    """

    prompt: list[int]
    limit: int
    draw: Draw
    stops: tuple[str, ...]
    primer: list[int]
    tools: ToolCallScanner | None
    begun: int = 0


def prepare(request: GenerateRequest, model: LoadedModel) -> Prepared:
    """Raises `RequestRejected` (with the field at fault) or `ContextTooLong`."""
    refuse_unsupported(request, model)
    stops = checked_stops(request.sampling.stop)
    prompt, primer = tokenize(request, model)
    draw = draw_for(request.sampling, model, len(prompt))
    begun = begun_tokens(request, model, primer) if request.begun else 0
    most = request.sampling.max_tokens
    limit = answer_limit(len(prompt) - begun, most, model.context_length) - begun
    tools = None
    if wanted_tools(request):
        tools = ToolCallScanner(len(prompt), single=request.parallel_tool_calls is False)
    return Prepared(prompt, max(limit, 0), draw, stops, primer, tools, begun)


def refuse_unsupported(request: GenerateRequest, model: LoadedModel) -> None:
    """Raises `RequestRejected` for what the engine would have to ignore."""
    form = request.response_format
    if form is not None and form.type != "text":
        raise RequestRejected(
            f"{model.id} cannot be held to response_format {form.type!r} here",
            field="response_format",
        )
    if request.tools and not model.tools:
        raise RequestRejected(f"{model.id} has no form for tools", field="tools")
    if request.tools and request.tool_choice and request.tool_choice.mode not in ("auto", "none"):
        raise RequestRejected(f"{model.id} cannot be made to call a tool", field="tool_choice")
    for message in request.messages:
        if not all(isinstance(part, Text) for part in message.content):
            raise RequestRejected(f"{model.id} reads text only, no images", field="messages")
    if not request.messages:
        raise RequestRejected("there is no message", field="messages")


def checked_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """The stop strings, if they are few, short, and not empty."""
    if len(stops) > MAX_STOPS:
        raise RequestRejected(f"at most {MAX_STOPS} stop strings can be given", field="stop")
    if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise RequestRejected(
            f"a stop string must have 1 to {MAX_STOP_LENGTH} characters", field="stop"
        )
    return tuple(stops)


def wanted_tools(request: GenerateRequest) -> tuple[Tool, ...]:
    """The tools the model may call: none where the request says so."""
    choice = request.tool_choice
    return () if choice is not None and choice.mode == "none" else request.tools


# --- the prompt ---------------------------------------------------------------------------------


def tokenize(request: GenerateRequest, model: LoadedModel) -> tuple[list[int], list[int]]:
    """The tokens of the prompt with the answer's beginning, and those of the beginning alone."""
    text, is_rendered = render(request, model)
    if len(text) + len(request.prefix) > model.context_length * model.longest_token:
        # Not worth a tokenizer's minutes: no text of that length fits.
        raise ContextTooLong(
            f"a prompt of {len(text)} characters does not fit into the "
            f"{model.context_length} tokens of {model.id}",
            field="messages",
        )
    prompt = model.encode(text, special=not is_rendered)
    if not request.prefix:
        return prompt, []
    # The model would go on after exactly these prompt tokens, so they must stay. Together with the
    # prefix they usually do, and then the first word is what it is in the middle of a text (alone,
    # some tokenizers put a space before it).
    both = model.encode(text + request.prefix, special=not is_rendered)
    if both[: len(prompt)] == prompt:
        return both, both[len(prompt) :]
    prefix = model.encode(request.prefix, special=False)
    return prompt + prefix, prefix


def begun_tokens(request: GenerateRequest, model: LoadedModel, primer: Sequence[int]) -> int:
    """How many of the prefix's tokens count as the answer's: all but those of what was before."""
    before = msgspec.structs.replace(request, prefix=request.prefix[: -request.begun], begun=0)
    return max(len(primer) - len(tokenize(before, model)[1]), 0)


def render(request: GenerateRequest, model: LoadedModel) -> tuple[str, bool]:
    """The conversation as the model was trained to read it, and whether its template wrote it.

    A base model has no template: it gets the bare text of the messages.
    """
    if not model.tokenizer.chat_template:
        return "\n".join(message.text for message in request.messages), False
    messages = [template_message(message) for message in request.messages]
    tools = [template_tool(tool) for tool in wanted_tools(request)] or None
    try:
        text = model.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False
        )
    except Exception as error:
        # A template is a program that came with the model; some refuse a system message or two
        # turns of one role. The asker sees its words.
        raise RequestRejected(
            f"the chat template of {model.id} refuses this conversation: {error}", field="messages"
        ) from error
    return str(text), True


def template_message(message: Message) -> dict[str, Any]:
    """A message in the form that chat templates read."""
    role = "system" if message.role == "developer" else message.role
    form: dict[str, Any] = {"role": role, "content": message.text}
    if message.name is not None:
        form["name"] = message.name
    if message.tool_call_id is not None:
        form["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        form["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": arguments_value(call.arguments)},
            }
            for call in message.tool_calls
        ]
    return form


def arguments_value(arguments: str) -> Any:
    """Templates want the arguments of a call as a value; what is no JSON stays text."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def template_tool(tool: Tool) -> dict[str, Any]:
    """A tool in the form that chat templates read."""
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description or "",
            "parameters": tool.parameters,
        },
    }


# --- numbers ------------------------------------------------------------------------------------


def answer_limit(prompt: int, max_tokens: int | None, context: int) -> int:
    """Most tokens of the answer. Raises `ContextTooLong` where prompt and answer do not fit."""
    room = context - prompt
    if max_tokens is None:
        if room < 1:
            raise ContextTooLong(
                f"the prompt has {prompt} tokens; the context has {context}", field="messages"
            )
        return min(room, OPEN_END)
    if max_tokens < 1:
        raise RequestRejected("max_tokens must be at least 1", field="max_tokens")
    if max_tokens > room:
        raise ContextTooLong(
            f"the prompt has {prompt} tokens and max_tokens is {max_tokens}; "
            f"the context has {context}",
            field="messages" if room < 1 else "max_tokens",
        )
    return max_tokens


def draw_for(sampling: Sampling, model: LoadedModel, prompt_length: int) -> Draw:
    """How the tokens are drawn; what the request leaves open is the model's own default."""
    temperature = in_range("temperature", sampling.temperature, 0, 100)
    top_p = in_range("top_p", sampling.top_p, 0, 1)
    top_k = in_range("top_k", sampling.top_k, -1, 2**31)
    own = model.sampling
    return Draw(
        temperature=own.temperature if temperature is None else temperature,
        top_p=own.top_p if top_p is None else top_p,
        top_k=own.top_k if top_k is None else int(top_k),
        seed=sampling.seed,
        presence_penalty=in_range("presence_penalty", sampling.presence_penalty, -100, 100) or 0.0,
        frequency_penalty=in_range("frequency_penalty", sampling.frequency_penalty, -100, 100)
        or 0.0,
        bias=checked_bias(sampling.logit_bias, model.vocabulary),
        logprobs=checked_logprobs(sampling),
        prompt_length=prompt_length,
    )


def in_range(field: str, value: float | None, low: float, high: float) -> float | None:
    if value is not None and not low <= value <= high:  # also refuses NaN
        raise RequestRejected(f"{field} must be from {low} to {high}", field=field)
    return value


def checked_bias(bias: dict[str, float] | None, vocabulary: int) -> dict[int, float]:
    """Keys are token numbers as text, as in the OpenAI dialect."""
    checked: dict[int, float] = {}
    for key, value in (bias or {}).items():
        if not key.isdecimal() or len(key) > 9 or int(key) >= vocabulary:
            raise RequestRejected(
                f"logit_bias: {key[:20]!r} is no token of this model", field="logit_bias"
            )
        if not math.isfinite(value):
            raise RequestRejected("logit_bias: a value is not finite", field="logit_bias")
        checked[int(key)] = value
    return checked


def checked_logprobs(sampling: Sampling) -> int | None:
    """How many of the likeliest tokens are to be told; None: no log probabilities at all."""
    if not sampling.logprobs:
        return None
    count = sampling.top_logprobs or 0
    if not 0 <= count <= MAX_TOP_LOGPROBS:
        raise RequestRejected(
            f"top_logprobs must be from 0 to {MAX_TOP_LOGPROBS}", field="top_logprobs"
        )
    return count
