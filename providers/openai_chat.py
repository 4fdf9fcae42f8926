"""The OpenAI chat dialect, outwards: a request becomes the body of `POST /chat/completions`."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .base import GenerateRequest, Image, Message, RequestRejected, Text

#: How a server is asked to continue an answer: not at all; by vLLM's and SGLang's
#: `continue_final_message`; or because it always continues a final assistant message (llama.cpp).
Continuation = Literal["none", "continue_final_message", "assistant_prefill"]


class Quirks:
    """What a server turned out not to take."""

    def __init__(self) -> None:
        self.no_stream_options = False
        #: Newer models of OpenAI refuse `max_tokens`; everybody else knows it.
        self.max_completion_tokens = False

    def learn(self, message: str) -> bool:
        """Learn from the refusal of a request; True if another try could go better."""
        if "max_completion_tokens" in message and not self.max_completion_tokens:
            self.max_completion_tokens = True
            return True
        if "stream_options" in message and not self.no_stream_options:
            self.no_stream_options = True
            return True
        return False


def encode_request(
    request: GenerateRequest, quirks: Quirks, continuation: Continuation = "none"
) -> bytes:
    """The body of `POST /chat/completions`. It always asks for a stream."""
    body: dict[str, Any] = dict(request.extra) if request.dialect == "openai" else {}
    body.pop("n", None)  # One answer, ever.
    body["model"] = request.model
    body["messages"] = encode_messages(request)
    body["stream"] = True
    if not quirks.no_stream_options:
        body["stream_options"] = {"include_usage": True}
    _add_sampling(body, request, quirks)
    _add_tools(body, request)
    if request.response_format is not None:
        body["response_format"] = _response_format(request)
    if request.prefix and continuation == "continue_final_message":
        body["continue_final_message"] = True
        body["add_generation_prompt"] = False
    try:
        return msgspec.json.encode(body)
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestRejected(f"the request cannot be written as JSON: {error}") from None


def encode_messages(request: GenerateRequest) -> list[dict[str, Any]]:
    """Its messages, and as the last one the answer that is to be continued."""
    messages = [_message(m) for m in request.messages]
    if request.prefix:
        messages.append({"role": "assistant", "content": request.prefix})
    return messages


def _message(message: Message) -> dict[str, Any]:
    # Many servers do not know `developer`; those that do take `system` as the same.
    role = "system" if message.role == "developer" else message.role
    fields: dict[str, Any] = {"role": role, "content": _content(message)}
    if message.name is not None:
        fields["name"] = message.name
    if message.reasoning is not None:
        fields["reasoning_content"] = message.reasoning
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["content"] = fields["content"] or None
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    return fields


def _content(message: Message) -> str | list[dict[str, Any]]:
    """A plain string where it is only text: some servers take nothing else."""
    if not any(isinstance(part, Image) for part in message.content):
        return message.text
    return [_part(part) for part in message.content]


def _part(part: Text | Image) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    url: dict[str, Any] = {"url": part.url}
    if part.detail is not None:
        url["detail"] = part.detail
    return {"type": "image_url", "image_url": url}


def _add_sampling(body: dict[str, Any], request: GenerateRequest, quirks: Quirks) -> None:
    sampling = request.sampling
    limit = "max_completion_tokens" if quirks.max_completion_tokens else "max_tokens"
    fields = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        limit: sampling.max_tokens,
        "stop": sampling.stop or None,
        "seed": sampling.seed,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": sampling.logit_bias,
        "logprobs": sampling.logprobs or None,
        "top_logprobs": sampling.top_logprobs,
    }
    body.update((name, value) for name, value in fields.items() if value is not None)


def encode_tools(request: GenerateRequest) -> list[dict[str, Any]]:
    """Its tools."""
    return [
        {
            "type": "function",
            "function": _present(
                name=tool.name,
                description=tool.description,
                parameters=tool.parameters,
                strict=tool.strict,
            ),
        }
        for tool in request.tools
    ]


def _add_tools(body: dict[str, Any], request: GenerateRequest) -> None:
    if request.tools:
        body["tools"] = encode_tools(request)
    choice = request.tool_choice
    if choice is not None:
        named = {"type": "function", "function": {"name": choice.name}}
        body["tool_choice"] = named if choice.mode == "function" else choice.mode
    if request.parallel_tool_calls is not None:
        body["parallel_tool_calls"] = request.parallel_tool_calls


def _response_format(request: GenerateRequest) -> dict[str, Any]:
    wanted = request.response_format
    assert wanted is not None
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    schema = _present(name=wanted.name or "answer", schema=wanted.schema, strict=wanted.strict)
    return {"type": "json_schema", "json_schema": schema}


def _present(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
