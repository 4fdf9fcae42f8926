"""Programs of the Python API: their classes, and with what each test of them begins."""

import itertools
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes_openrouter import Vendor, vendor

from promptmesh import (
    RouterDeps,
    get_last_generation_trace,
    register_llm_provider,
    set_default_router_deps,
)

names = (f"own-{number}" for number in itertools.count())


def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine is to be found."""
    for name in list(os.environ):
        if re.match("(?i)promptmesh_|ipfs_|openrouter_|copilot_|google_|gemini_|anthropic_", name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PROMPTMESH_LOCAL_SERVERS_ENABLED", "false")
    # No program of a vendor is installed.
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))


@contextmanager
def default_deps(home: Path) -> Iterator[RouterDeps]:
    """What calls share that say nothing else."""
    with RouterDeps(home=home) as found:
        set_default_router_deps(found)
        yield found
        set_default_router_deps(None)


@contextmanager
def openrouter_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vendor]:
    """A server that is taken for OpenRouter, and a key for it."""
    with vendor() as running:
        monkeypatch.setenv("OPENROUTER_API_KEY", "sk-or-secret")
        monkeypatch.setenv("IPFS_ACCELERATE_PY_OPENROUTER_BASE_URL", running.url)
        yield running


class Own:
    """A class as the programs of others have them."""

    def __init__(self, text: str = "own") -> None:
        self.text = text
        self.calls: list[dict[str, Any]] = []

    def generate(self, prompt: str, *, model_name: str | None = None, **kwargs: Any) -> str:
        self.calls.append({"prompt": prompt, "model_name": model_name, **kwargs})
        return f"{self.text}: {prompt} {len(self.calls)}"


def registered(own: object) -> str:
    name = next(names)
    register_llm_provider(name, lambda: own)
    return name


def trace() -> dict[str, Any]:
    found = get_last_generation_trace()
    assert found is not None
    return found
