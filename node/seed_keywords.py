"""The keywords of a call of the Python API: those that are ours, checked, and what is left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..providers.base import Sampling
from .seed_ask import Options
from .seed_settings import RouterSettings

#: What a call has that says nothing of it; seconds.
TEMPERATURE, TIMEOUT = 0.2, 120.0


def options_of(kwargs: Mapping[str, Any], said: RouterSettings, not_before: float) -> Options:
    """The keywords of a call. Raises `ValueError` or `TypeError`."""
    more = dict(kwargs)
    if more.pop("stream", False):
        raise TypeError("stream_text and astream_text give an answer piece by piece")
    use_cache = more.pop("use_cache", None)
    sampling = Sampling(
        max_tokens=_max_tokens(more),
        temperature=_number("temperature", more.pop("temperature", None), TEMPERATURE),
        top_p=_number("top_p", more.pop("top_p", None), None),
        top_k=_whole("top_k", more.pop("top_k", None)),
        seed=_whole("seed", more.pop("seed", None)),
        presence_penalty=_number("presence_penalty", more.pop("presence_penalty", None), None, -2),
        frequency_penalty=_number(
            "frequency_penalty", more.pop("frequency_penalty", None), None, -2
        ),
        stop=_stop(more.pop("stop", None)),
    )
    timeout = _number("timeout", more.pop("timeout", None), TIMEOUT)
    if not timeout:
        raise ValueError("timeout: expected seconds above 0")
    system = more.pop("system", None)
    if system is not None and not isinstance(system, str):
        raise TypeError("system: expected a text")
    return Options(
        sampling=sampling,
        system=system,
        timeout=timeout,
        use_cache=said.router_response_cache if use_cache is None else bool(use_cache),
        keep_provider=said.router_cache if use_cache is None else bool(use_cache),
        not_before=not_before,
        more=more,
    )


def _max_tokens(more: dict[str, Any]) -> int | None:
    given = [more.pop(name) for name in ("max_tokens", "max_new_tokens") if name in more]
    said = {_whole("max_tokens", value, 1) for value in given} - {None}
    if len(said) > 1:
        raise ValueError("max_tokens and max_new_tokens are one, and say different numbers")
    return said.pop() if said else None


def _whole(name: str, value: Any, least: int = -(2**63)) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, not {value}")
    return value


def _number(name: str, value: Any, usual: float | None, least: float = 0) -> Any:
    if value is None:
        return usual
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, not {value!r}")
    if not math.isfinite(value) or value < least:
        raise ValueError(f"{name}: expected a number of at least {least}, not {value}")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else list(value or ())
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("stop: expected a text, or texts")
    return tuple(texts)
