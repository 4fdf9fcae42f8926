"""What a provider is asked in a test, and the whole answer to it."""

from __future__ import annotations

from typing import Any

import trio

from promptmesh.providers.base import Completion, GenerateRequest, Message, Provider, Text

#: Seconds for a whole answer, on a machine that is busy.
PATIENCE = 120


def asked(
    text: str = "Tell me a tale.", system: str = "", *, model: str = "stub-model", **fields: Any
) -> GenerateRequest:
    said = [Message(role="system", content=(Text(text=system),))] if system else []
    turns = (*said, Message(role="user", content=(Text(text=text),)))
    return GenerateRequest(model=model, messages=turns, **fields)


async def ask(provider: Provider, request: GenerateRequest | None = None) -> Completion:
    with trio.fail_after(PATIENCE):
        async with provider.open(request or asked()) as answering:
            return await answering.completion()
