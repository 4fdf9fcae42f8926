"""The tokens of a prompt as a model server counts them, where it has a tokenizer to ask.

vLLM and newer SGLang count a chat (`/tokenize` with `messages`), llama.cpp writes its prompt first
(`/apply-template`, then `/tokenize` of the text), older SGLang counts a text only. Ollama and LM
Studio have nothing of the kind. Which it is, the first answer shows. These paths lie beside `/v1`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
import trio

from .base import GenerateRequest, Image
from .http_answer import read_body
from .http_client import open_client
from .http_reply import HttpFailure
from .openai_chat import encode_messages, encode_tools
from .tokens import MESSAGE_TOKENS, TokenCount, estimate

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: Seconds that the server may take. Who waits wants to ask something else.
TIME = 2.0
#: Seconds until a server that counts nothing is asked again: it may be another one by then.
FORGET = 600.0
#: Bytes of a reply: a prompt of a million tokens lists them in 7 MB.
MAX_REPLY = 16 * 1024 * 1024


class _Template(msgspec.Struct):
    prompt: str


class _Count(msgspec.Struct):
    count: Annotated[int, msgspec.Meta(gt=0)]


class _List(msgspec.Struct):
    #: llama.cpp gives none where the text is missing.
    tokens: Annotated[list[Any], msgspec.Meta(min_length=1)]


class ServerTokens:
    """Asks one server."""

    def __init__(self, base_url: str, headers: Mapping[str, str]) -> None:
        root = base_url.rstrip("/").removesuffix("/v1")
        self._client = open_client(root, headers, connect_timeout=TIME, read_timeout=TIME)
        self._ways = (self._of_messages, self._of_template, self._of_text)
        #: The one that it answered to, by its number.
        self._way: int | None = None
        self._ask_again = -math.inf

    async def count(self, request: GenerateRequest) -> TokenCount:
        """What the server says, else the estimate. An image it may count as it likes."""
        now = trio.current_time()
        seen = any(isinstance(part, Image) for m in request.messages for part in m.content)
        if seen or (self._way is None and now < self._ask_again):
            return estimate(request)
        with trio.move_on_after(TIME):
            try:
                for number, way in enumerate(self._ways):
                    if self._way in (None, number) and (found := await way(request)) is not None:
                        self._way = number
                        return found
            except HttpFailure as error:
                logger.debug("the server does not count tokens now: %s", error)
                return estimate(request)
        self._way, self._ask_again = None, now + FORGET
        return estimate(request)

    async def aclose(self) -> None:
        """Close the idle connections."""
        await self._client.aclose()

    async def _of_messages(self, request: GenerateRequest) -> TokenCount | None:
        body = {"model": request.model, **_chat(request)}
        found = await self._ask("/tokenize", body, _Count)
        return None if found is None else TokenCount(found.count, True)

    async def _of_template(self, request: GenerateRequest) -> TokenCount | None:
        written = await self._ask("/apply-template", _chat(request), _Template)
        if written is None:
            return None
        # The template wrote the special tokens as text, and the first of all is not in it.
        text = {"content": written.prompt, "add_special": True, "parse_special": True}
        found = await self._ask("/tokenize", text, _List)
        return None if found is None else TokenCount(len(found.tokens), True)

    async def _of_text(self, request: GenerateRequest) -> TokenCount | None:
        text = "\n".join(message.text for message in request.messages) + request.prefix
        found = await self._ask("/tokenize", {"model": request.model, "prompt": text}, _Count)
        if found is None:
            return None
        return TokenCount(found.count + MESSAGE_TOKENS * len(request.messages), False)

    async def _ask(self, path: str, body: Mapping[str, Any], type_: type[T]) -> T | None:
        """What it answers; None where that is nothing of the kind. Raises `HttpFailure`."""
        async with self._client.request("POST", path, msgspec.json.encode(body)) as reply:
            if reply.status != 200:
                return None
            try:
                return msgspec.json.decode(await read_body(reply, MAX_REPLY), type=type_)
            except msgspec.MsgspecError:
                return None


def _chat(request: GenerateRequest) -> dict[str, Any]:
    """What a template writes into the prompt."""
    tools = {"tools": encode_tools(request)} if request.tools else {}
    return {"messages": encode_messages(request), **tools}
