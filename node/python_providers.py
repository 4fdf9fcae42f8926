"""The Python API for programs that choose a provider, or bring one."""

from __future__ import annotations

from typing import Any

from ..providers.base import GenerateError
from .router_deps import RouterDeps, get_default_router_deps
from .seed_ask import PROVIDER
from .seed_call import BackendManagerHandle, Bound, make_manager, object_of, planner_of
from .seed_providers import Unusable
from .seed_registered import LLMProvider, register


def get_llm_provider(
    provider: str | None = None, *, deps: RouterDeps | None = None, use_cache: bool | None = None
) -> LLMProvider:
    """A provider by its name, to be used again: `provider.generate(prompt)`, or as a
    `provider_instance`.

    Without a name the one of PROMPTMESH_LLM_PROVIDER, else the first that can be used. One that
    this program registered is given as its factory made it; with `use_cache` false it is made anew.
    Raises `ValueError` for an unknown name, `RuntimeError` where it, or none, can be used.
    """
    deps = deps or get_default_router_deps()
    planner = planner_of(deps)
    name = provider or planner.settings.llm_provider
    keep = planner.settings.router_cache if use_cache is None else use_cache
    skipped = {}
    for each in [name] if name else planner.order():
        try:
            plan = planner.plan(each, None) if name else planner.auto(each, None)
        except Unusable as error:
            skipped[each] = str(error)
            continue
        if plan.plain is not None:
            found: LLMProvider = object_of(deps, plan, keep)
            return found
        return deps.get_or_create(PROVIDER + plan.name, lambda n=plan.name: Bound(n, deps))  # type: ignore[misc, no-any-return]
    reasons = "; ".join(f"{each}: {reason}" for each, reason in skipped.items())
    raise GenerateError(f"no provider can be used: {reasons}")


def register_llm_provider(name: str, factory: Any) -> None:
    """Make a provider of this program known. `factory()` gives an object with
    `generate(prompt, *, model_name=None, **kwargs) -> str`, and `stream` if it can; it is called
    when the provider is first asked. A later one of that name, in any case, takes its place.

    Raises `ValueError` for an empty name, `TypeError` for a factory that cannot be called.
    """
    register(name, factory)


def clear_llm_router_caches(deps: RouterDeps | None = None) -> None:
    """Forget the providers that were built, end their processes, and use no answer that was stored
    before now. The node's store keeps its answers: `promptmesh cache rm` removes them."""
    (deps or get_default_router_deps()).clear()


def get_backend_manager(
    *,
    purpose: str = "router",
    enable_health_checks: bool = True,
    load_balancing_strategy: str | None = None,
) -> BackendManagerHandle:
    """The node that runs on this machine, for `RouterDeps.backend_manager`.

    `load_balancing_strategy` is how it chooses among the backends of the mesh (`round_robin`,
    `least_loaded`, `best_performance`; None: as the variable or the node says), and
    `enable_health_checks` whether it is asked if it is well before it gets a prompt. `purpose` is
    of no consequence. Raises `ValueError`.
    """
    return make_manager(get_default_router_deps, load_balancing_strategy, enable_health_checks)
