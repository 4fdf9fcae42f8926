"""Providers of other packages, by the entry point `promptmesh.providers`.

The entry point names a class, or a function: called with the settings of its table in `config.toml`
(from Python with none) it gives a `Provider`, or an object with `generate(prompt, ...)`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

GROUP = "promptmesh.providers"


def plugins() -> Sequence[str]:
    """The names under which installed packages offer a provider, sorted. Imports none of them."""
    return sorted(importlib.metadata.entry_points(group=GROUP).names)


def load_plugin(name: str) -> Callable[..., Any] | None:
    """What the entry point of that name gives; None if there is none.

    Raises `ValueError` if its package cannot be imported or gives something else.
    """
    found = importlib.metadata.entry_points(group=GROUP, name=name)
    if not found:
        return None
    entry = next(iter(found))
    try:
        loaded = entry.load()
    except Exception as error:  # Whatever that package raises; who builds the provider sees it.
        raise ValueError(
            f"{entry.value} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(loaded):
        raise ValueError(f"{entry.value} is a {type(loaded).__name__}, not a class or a function")
    return loaded  # type: ignore[no-any-return] # entry points have no types
