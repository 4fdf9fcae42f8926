"""promptmesh: a peer-to-peer LLM inference mesh. `docs/python.md` tells of what is here.

Nothing is imported before it is asked for: `import promptmesh` costs what this file does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from promptmesh.node.python_api import (
        acount_tokens,
        agenerate_text,
        astream_text,
        count_tokens,
        generate_text,
        stream_text,
    )
    from promptmesh.node.python_providers import (
        clear_llm_router_caches,
        get_backend_manager,
        get_llm_provider,
        register_llm_provider,
    )
    from promptmesh.node.router_deps import (
        RouterDeps,
        get_default_router_deps,
        set_default_router_deps,
    )
    from promptmesh.node.seed_registered import LLMProvider
    from promptmesh.node.seed_trace import get_last_generation_trace

__all__ = [
    "LLMProvider",
    "RouterDeps",
    "acount_tokens",
    "agenerate_text",
    "astream_text",
    "clear_llm_router_caches",
    "count_tokens",
    "generate_text",
    "get_backend_manager",
    "get_default_router_deps",
    "get_last_generation_trace",
    "get_llm_provider",
    "llm_router_available",
    "register_llm_provider",
    "set_default_router_deps",
    "stream_text",
]

#: For programs that ask whether the router could be imported.
llm_router_available = True

_HOMES = {
    "LLMProvider": "seed_registered",
    "RouterDeps": "router_deps",
    "clear_llm_router_caches": "python_providers",
    "get_backend_manager": "python_providers",
    "get_default_router_deps": "router_deps",
    "get_last_generation_trace": "seed_trace",
    "get_llm_provider": "python_providers",
    "register_llm_provider": "python_providers",
    "set_default_router_deps": "router_deps",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f".node.{_HOMES.get(name, 'python_api')}", __name__)
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
