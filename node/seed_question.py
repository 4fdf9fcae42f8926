"""A call of the Python API as the question that a provider is asked, and its answer as a text."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec
import trio

from ..providers.base import (
    CacheControl,
    Completion,
    ContentFiltered,
    GenerateRequest,
    Message,
    Text,
)
from .seed_ask import Ask, Options
from .seed_providers import Plan


def question(ask: Ask, plan: Plan) -> GenerateRequest:
    """The question to that provider."""
    options = ask.options
    texts = [("system", options.system)] if options.system else []
    messages = [
        Message(role=role, content=(Text(text=text),))  # type: ignore[arg-type] # two literals
        for role, text in [*texts, ("user", ask.prompt)]
    ]
    most = options.sampling.max_tokens or plan.max_tokens
    return GenerateRequest(
        model=plan.model,
        messages=tuple(messages),
        sampling=msgspec.structs.replace(options.sampling, max_tokens=most),
        cache=_cache(options, plan),
        deadline=max(0.0, trio.current_effective_deadline() - trio.current_time()),
        id=ask.trace.request_id,
        **_extra(options.more, plan),
    )


def _cache(options: Options, plan: Plan) -> CacheControl:
    return CacheControl(
        mode="use" if options.use_cache else "bypass",
        any_sample=True,
        max_age=max(0.0, time.time() - options.not_before) if options.not_before else None,
        namespace="/".join(map(str, plan.key)) if plan.kind == "plain" else "",
    )


def _extra(more: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Options that are none of ours, in the request: they are part of the question."""
    if not more or not plan.kind:
        return {}
    if plan.kind == "plain":
        return {"extra": {name: repr(value) for name, value in more.items()}}
    return {"dialect": "openai", "extra": dict(more)}


def text_of(completion: Completion) -> str:
    """The text of a whole answer. Raises `ContentFiltered`."""
    if completion.finish_reason == "content_filter":
        raise ContentFiltered("the provider's filter cut the answer", partial=completion.text)
    return completion.text
