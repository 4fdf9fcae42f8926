"""The Python API: `generate_text` and its kin, for programs that want text and nothing else.

A named provider answers in this process; `backend_manager` is the node that runs on this machine.
The environment is read again at each call. See `docs/python.md`.

Importing this module loads neither trio nor a database: what a call needs comes with the first one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .router_deps import RouterDeps, get_default_router_deps
from .seed_call import Call, deps_of, make_call

if TYPE_CHECKING:
    from ..providers.tokens import TokenCount


def generate_text(
    prompt: str,
    *,
    model_name: str | None = None,
    provider: str | None = None,
    provider_instance: object = None,
    deps: RouterDeps | None = None,
    **kwargs: Any,
) -> str:
    """The answer to a prompt.

    `provider` names who answers (so does the variable PROMPTMESH_LLM_PROVIDER), and it fails rather
    than being replaced; without one the providers are tried in the order of `docs/python.md`.
    `provider_instance` answers in place of all of them. Further keywords: `max_tokens` (or
    `max_new_tokens`; 256, of `local_hf` 128), `temperature` (0.2), `timeout` (120 s for all),
    `use_cache`, `system`, `top_p`, `top_k`, `stop`, `seed`, `presence_penalty`,
    `frequency_penalty`; others go to a provider that takes them.

    Raises `ValueError` for an unknown provider or a wrong value, `TypeError` for a wrong keyword,
    and a `GenerateError`, which is a `RuntimeError`, where no answer could be given: its message
    lists each provider with the reason. `get_last_generation_trace` tells the rest.
    """
    return _call(prompt, model_name, provider, provider_instance, deps, kwargs).text()


async def agenerate_text(
    prompt: str,
    *,
    model_name: str | None = None,
    provider: str | None = None,
    provider_instance: object = None,
    deps: RouterDeps | None = None,
    **kwargs: Any,
) -> str:
    """`generate_text` for a task of trio or asyncio. Cancelling it cancels the work."""
    return await _call(prompt, model_name, provider, provider_instance, deps, kwargs).text_async()


def stream_text(
    prompt: str,
    *,
    model_name: str | None = None,
    provider: str | None = None,
    provider_instance: object = None,
    deps: RouterDeps | None = None,
    **kwargs: Any,
) -> Iterator[str]:
    """The same, piece by piece as it comes. Closing the iterator cancels the work.

    An answer that breaks off ends with an error (`StreamInterrupted`), never as if it were whole.
    """
    return _call(prompt, model_name, provider, provider_instance, deps, kwargs).pieces()


def astream_text(
    prompt: str,
    *,
    model_name: str | None = None,
    provider: str | None = None,
    provider_instance: object = None,
    deps: RouterDeps | None = None,
    **kwargs: Any,
) -> AsyncIterator[str]:
    """`stream_text` for a task of trio or asyncio. Who leaves early closes it
    (`contextlib.aclosing`)."""
    return _call(prompt, model_name, provider, provider_instance, deps, kwargs).pieces_async()


def count_tokens(
    prompt: str,
    *,
    model_name: str | None = None,
    provider: str | None = None,
    provider_instance: object = None,
    deps: RouterDeps | None = None,
    **kwargs: Any,
) -> TokenCount:
    """How many tokens the prompt has for the provider that would answer it, without asking it to.

    `(tokens, exact)`: `exact` where the model's own tokenizer counted, else it is an estimate.
    Takes and raises what `generate_text` does.
    """
    return _call(prompt, model_name, provider, provider_instance, deps, kwargs).tokens()


async def acount_tokens(
    prompt: str,
    *,
    model_name: str | None = None,
    provider: str | None = None,
    provider_instance: object = None,
    deps: RouterDeps | None = None,
    **kwargs: Any,
) -> TokenCount:
    """`count_tokens` for a task of trio or asyncio."""
    return await _call(prompt, model_name, provider, provider_instance, deps, kwargs).tokens_async()


def _call(
    prompt: str,
    model: str | None,
    provider: str | None,
    instance: object,
    deps: RouterDeps | None,
    kwargs: Mapping[str, Any],
) -> Call:
    """Raises `TypeError`, `ValueError` or `ConfigError` for what is wrong in it."""
    shared = deps or deps_of(instance) or get_default_router_deps()
    return make_call(prompt, model, provider, instance, shared, kwargs)
