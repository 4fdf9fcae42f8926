"""The providers of this program: those that it registered, by name, and what tells them apart."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary


@runtime_checkable
class LLMProvider(Protocol):
    """What `register_llm_provider` takes and `get_llm_provider` gives: a prompt in, text out."""

    def generate(self, prompt: str, *, model_name: str | None = None, **kwargs: object) -> str: ...


@dataclass(frozen=True)
class Registered:
    """A provider of this program. `number` tells it from earlier ones of the same name."""

    factory: Callable[[], Any]
    number: int


_registered: dict[str, Registered] = {}
_serials: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_numbers = itertools.count(1)


def register(name: str, factory: Callable[[], Any]) -> None:
    """Make a provider known to this program. Raises `ValueError` or `TypeError`."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a provider is a text, not a {type(name).__name__}")
    if not callable(factory):
        raise TypeError(f"the factory of a provider must be callable, not {factory!r}")
    found = name.strip().lower()
    if not found:
        raise ValueError("the name of a provider is empty")
    _registered[found] = Registered(factory, next(_numbers))


def registered(name: str) -> Registered | None:
    """This program's own provider, which stands before all others of its name."""
    return _registered.get(name.strip().lower())


def registered_names() -> list[str]:
    """Their names."""
    return list(_registered)


def serial(instance: object) -> int:
    """A number for this object, and for those equal to it, and no other, ever."""
    try:
        return _serials.setdefault(instance, next(_numbers))
    except TypeError:  # one that cannot be referred to weakly, or has no hash
        return next(_numbers)
