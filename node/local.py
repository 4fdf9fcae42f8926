"""Answering in this process, where no node runs: own providers and cache, no network."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec
import trio

from ..providers.base import (
    Answering,
    Chunk,
    CompletionBuilder,
    GenerateRequest,
    ProviderUnavailable,
)
from .api_openai import new_request_id
from .config import child_environment
from .config_sections import Config
from .home import Home
from .openai_answers import origin_fields, usage_fields
from .own_providers import OwnProviders
from .parts import open_parts

logger = logging.getLogger(__name__)

#: Seconds between two looks at providers that are starting.
LOOK = 0.05


def ask(
    config: Config, home: Home, request: GenerateRequest, on_text: Callable[[str], None]
) -> dict[str, Any]:
    """Answer one request, giving its text to `on_text` as it comes.

    Returns the fields that `promptmesh ask --json` prints. Raises a `GenerateError`.
    """
    request = msgspec.structs.replace(request, id=new_request_id())
    try:
        return trio.run(_ask, config, home, request, on_text)
    except BaseExceptionGroup as group:
        raise _only(group) from None


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What was raised, out of the groups of the nurseries around it."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


async def _ask(
    config: Config, home: Home, request: GenerateRequest, on_text: Callable[[str], None]
) -> dict[str, Any]:
    with open_parts(config, home, child_environment()) as parts:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(parts.providers.run)
            nursery.start_soon(parts.answers.run)
            nursery.start_soon(parts.ledger.run)
            await _wait_for_models(parts.providers, config.deadlines.first_token)
            router = parts.router(config, nursery)
            async with router.open(request) as answering:
                answer = await _read(answering, request, on_text)
            nursery.cancel_scope.cancel()
    return answer


async def _wait_for_models(providers: OwnProviders, limit: float) -> None:
    """Until no provider is starting any more; says what is loading, as it may take long."""
    told = ""
    with trio.move_on_after(limit):
        while starting := [p for p in providers if p.health.state == "starting"]:
            reason = starting[0].health.reason
            if reason != told:
                told = reason
                logger.info("%s: %s", starting[0].name, reason)
            await trio.sleep(LOOK)
    if not list(providers):
        raise ProviderUnavailable(
            "no provider is configured: set local_hf.model or add [[providers]] in config.toml, "
            "or start the node (`promptmesh up`) of a machine that is in a mesh"
        )
    problems = [p for p in providers if p.health.state != "ready"]
    if len(problems) == len(list(providers)):
        told = "; ".join(f"{p.name}: {p.health.reason} {p.health.hint}".strip() for p in problems)
        raise ProviderUnavailable(f"no provider is ready: {told}")


async def _read(
    answering: Answering, request: GenerateRequest, on_text: Callable[[str], None]
) -> dict[str, Any]:
    builder = CompletionBuilder()
    closing = Chunk()
    async for chunk in answering.chunks:
        builder.add(chunk)
        on_text(chunk.text)
        closing = chunk
    completion = builder.completion()
    origin = closing.origin or answering.origin
    fields = origin_fields(origin, request.id, closing.cid or origin.cid)
    names = ("model", "provider", "peer", "node", "cid", "cache", "attempts")
    return {
        "text": completion.text,
        **{name: fields.get(name) for name in names},
        "usage": usage_fields(completion.usage),
        "finish_reason": completion.finish_reason,
    }
