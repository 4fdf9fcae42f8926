"""The Gemini dialect, outwards: a request becomes the body of `:streamGenerateContent`.

What Gemini has no word for and what would change the answer (`logit_bias`, more than five stop
sequences, images by `http:`) is `ProviderUnavailable`: another provider may. `parallel_tool_calls`
and the names of speakers it does not know, and thoughts are not sent back.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Annotated, Any
from urllib.parse import unquote_to_bytes

import msgspec

from .base import (
    GenerateRequest,
    Image,
    Message,
    ProviderUnavailable,
    RequestRejected,
    Sampling,
    Text,
    Tool,
    ToolCall,
)
from .gemini_options import GeminiOptions, least_thoughts, safety_settings, thinking_config

#: Stop sequences of a request.
MAX_STOP = 5
#: Signatures of tool calls that are remembered, and their characters together.
MAX_SIGNATURES, MAX_SIGNED = 4096, 16 * 1024 * 1024
#: In place of a signature that is not known, by Google's documentation: the call is taken as it is.
NO_SIGNATURE = "skip_thought_signature_validator"

#: Of the ends of file names.
_IMAGE_TYPES = {
    "jpg": "image/jpeg",
    **{end: f"image/{end}" for end in ("jpeg", "png", "webp", "gif", "heic", "heif")},
}
_FUNCTION_MODES = {"auto": "AUTO", "none": "NONE", "required": "ANY", "function": "ANY"}
#: The media type may have parameters before `;base64`.
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[^;,]*)*?)(;base64)?,", re.ASCII)


class Signatures:
    """What Gemini signed its tool calls with, by the ids of the calls.

    It wants the signature back with the call, and our vocabulary has no place for one. Who asks
    another node the next time, or later, sends `NO_SIGNATURE` instead, which costs some quality.
    """

    def __init__(self) -> None:
        self._by_call: OrderedDict[str, str] = OrderedDict()
        self._size = 0

    def keep(self, call_id: str, signature: str) -> None:
        """Remember it, and forget the oldest."""
        self._size += len(signature) - len(self._by_call.pop(call_id, ""))
        self._by_call[call_id] = signature
        while len(self._by_call) > MAX_SIGNATURES or self._size > MAX_SIGNED:
            self._size -= len(self._by_call.popitem(last=False)[1])

    def of(self, call_id: str) -> str | None:
        return self._by_call.get(call_id)


class Quirks:
    """What a server turned out to want."""

    def __init__(self) -> None:
        #: Models that refuse a tool call without a signature, and those that refuse to think less.
        self.signed: set[str] = set()
        self.thoughtful: set[str] = set()

    def learn(self, model: str, message: str) -> bool:
        """Learn from the refusal of a request; True if another try could go better."""
        if "thought_signature" in message and model not in self.signed:
            self.signed.add(model)
            return True
        if re.search("thinking|budget", message, re.IGNORECASE) and model not in self.thoughtful:
            self.thoughtful.add(model)
            return True
        return False


def encode_request(
    request: GenerateRequest, options: GeminiOptions, signatures: Signatures, quirks: Quirks
) -> bytes:
    """The body. Raises `RequestRejected` and `ProviderUnavailable`."""
    if request.sampling.logit_bias:
        raise ProviderUnavailable("Gemini has no logit_bias")
    if len(request.sampling.stop) > MAX_STOP:
        raise ProviderUnavailable(f"Gemini takes {MAX_STOP} stop sequences at most")
    body = _contents(request, signatures, signed=request.model in quirks.signed)
    if request.tools:
        body["tools"] = [{"functionDeclarations": [_declaration(tool) for tool in request.tools]}]
        body["toolConfig"] = {"functionCallingConfig": _calling(request)}
    least = None if request.model in quirks.thoughtful else least_thoughts(request)
    body["generationConfig"] = _generation(request, thinking_config(options, least))
    if found := safety_settings(options):
        body["safetySettings"] = found
    try:
        return msgspec.json.encode({name: value for name, value in body.items() if value})
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestRejected(f"the request cannot be written as JSON: {error}") from None


def encode_count(body: bytes, model: str) -> bytes:
    """The body of `:countTokens` for a request with such a body."""
    name = msgspec.json.encode(f"models/{model}")
    return b'{"generateContentRequest":{"model":%s,%s}' % (name, body[1:])


class _Count(msgspec.Struct, rename="camel"):
    total_tokens: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


_decode_count = msgspec.json.Decoder(_Count).decode


def read_count(body: bytes) -> int:
    """The tokens of a prompt. Raises `ValueError`."""
    return _decode_count(body).total_tokens


# --- the conversation ---------------------------------------------------------------------------


def _contents(request: GenerateRequest, signatures: Signatures, *, signed: bool) -> dict[str, Any]:
    """`systemInstruction` and `contents`: turns of one role are one content."""
    calls = {call.id: call.name for message in request.messages for call in message.tool_calls}
    system: list[dict[str, Any]] = []
    contents: list[dict[str, Any]] = []
    for message in request.messages:
        if message.role in ("system", "developer"):
            system += _parts(message)
            continue
        role = "model" if message.role == "assistant" else "user"
        if message.role == "assistant":
            parts = [*_parts(message), *_calls(message.tool_calls, signatures, signed=signed)]
        elif message.role == "tool":
            parts = [_response(message, calls)]
        else:
            parts = _parts(message) or [{"text": ""}]
        if contents and contents[-1]["role"] == role:
            contents[-1]["parts"] += parts
        elif parts:
            contents.append({"role": role, "parts": parts})
    if not contents:
        raise ProviderUnavailable("Gemini takes no request with nothing but a system message")
    return {"systemInstruction": {"parts": system} if system else None, "contents": contents}


def _parts(message: Message) -> list[dict[str, Any]]:
    return [
        {"text": part.text} if isinstance(part, Text) else _image(part)
        for part in message.content
        if not isinstance(part, Text) or part.text
    ]


def _image(image: Image) -> dict[str, Any]:
    """By `data:` URL within the request, by `https:` URL fetched by Google."""
    head = _DATA_URL.match(image.url)
    if head is not None:
        data = image.url[head.end() :]
        if not head[3]:
            data = base64.b64encode(unquote_to_bytes(data)).decode()
        elif not _is_base64(data):
            raise RequestRejected("an image's data is not valid base64", field="messages")
        return {"inlineData": {"mimeType": head[1] or "text/plain", "data": data}}
    if not image.url.startswith("https://"):
        raise ProviderUnavailable("Gemini takes images by `data:` and `https:` URLs only")
    file = {"fileUri": image.url}
    end = re.split("[?#]", image.url, maxsplit=1)[0].rpartition(".")[2].lower()
    if kind := _IMAGE_TYPES.get(end):
        file["mimeType"] = kind
    return {"fileData": file}


def _is_base64(data: str) -> bool:
    try:
        base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        return False
    return True


def _calls(
    calls: Iterable[ToolCall], signatures: Signatures, *, signed: bool
) -> list[dict[str, Any]]:
    """Gemini signs the first of several calls at once, and wants no more than that back."""
    parts = []
    known = [signatures.of(call.id) for call in calls]
    for place, (call, signature) in enumerate(zip(calls, known, strict=True)):
        part: dict[str, Any] = {
            "functionCall": {"id": call.id, "name": call.name, "args": _arguments(call)}
        }
        if signature is None and signed and place == 0 and not any(known):
            signature = NO_SIGNATURE
        if signature is not None:
            part["thoughtSignature"] = signature
        parts.append(part)
    return parts


def _arguments(call: ToolCall) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(call.arguments or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        text = f"the arguments of the tool call {call.id!r} are no JSON object"
        raise RequestRejected(text, field="messages")
    return found


def _response(message: Message, calls: Mapping[str, str]) -> dict[str, Any]:
    """The result of a tool: an object as it is, anything else as the object's `result`."""
    name = calls.get(message.tool_call_id or "") or message.name
    if not name:
        text = f"no tool call has the id {message.tool_call_id!r}"
        raise RequestRejected(text, field="messages")
    if any(isinstance(part, Image) for part in message.content):
        raise ProviderUnavailable("Gemini takes no images as the result of a tool")
    try:
        found = msgspec.json.decode(message.text)
    except (ValueError, RecursionError):
        found = None
    result = found if isinstance(found, dict) else {"result": message.text}
    response: dict[str, Any] = {"name": name, "response": result}
    if message.tool_call_id:
        response["id"] = message.tool_call_id
    return {"functionResponse": response}


# --- tools and sampling -------------------------------------------------------------------------


def _declaration(tool: Tool) -> dict[str, Any]:
    fields = {
        "name": tool.name,
        "description": tool.description,
        # Plain JSON schema; the older `parameters` takes a part of OpenAPI's only.
        "parametersJsonSchema": tool.parameters or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _calling(request: GenerateRequest) -> dict[str, Any]:
    choice = request.tool_choice
    mode = _FUNCTION_MODES[choice.mode] if choice else "AUTO"
    if mode == "AUTO" and any(tool.strict for tool in request.tools):
        mode = "VALIDATED"  # text, or a call that keeps to its schema
    found: dict[str, Any] = {"mode": mode}
    if choice is not None and choice.mode == "function":
        found["allowedFunctionNames"] = [choice.name]
    return found


def _generation(request: GenerateRequest, thinking: dict[str, Any]) -> dict[str, Any]:
    fields = {
        **sampling_fields(request.sampling),
        **_form(request),
        "thinkingConfig": thinking or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """Those of `generationConfig`; None: as Gemini likes."""
    return {
        "temperature": sampling.temperature,
        "topP": sampling.top_p,
        "topK": sampling.top_k,
        "maxOutputTokens": sampling.max_tokens,
        "stopSequences": sampling.stop or None,
        # It is an int32 there: equal seeds stay equal.
        "seed": None if sampling.seed is None else sampling.seed % 2**31,
        "presencePenalty": sampling.presence_penalty,
        "frequencyPenalty": sampling.frequency_penalty,
        "responseLogprobs": sampling.logprobs or None,
        "logprobs": sampling.top_logprobs if sampling.logprobs else None,
    }


def _form(request: GenerateRequest) -> dict[str, Any]:
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return {}
    fields: dict[str, Any] = {"responseMimeType": "application/json"}
    if wanted.type == "json_schema":
        fields["responseJsonSchema"] = wanted.schema
    return fields
