"""A call of the Python API whose arguments are checked, on its way to the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..providers.base import Sampling
from .seed_providers import Plan, Planner
from .seed_settings import RouterSettings
from .seed_trace import GenerationTrace

#: What the names of our own entries begin with, in a `router_cache` and a `remote_cache`.
PROVIDER, RESPONSE = "llm_provider::", "llm_response::"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a call wants beside its prompt; None: as the provider likes, or as usual for it."""

    sampling: Sampling
    system: str | None
    timeout: float
    #: Reuse and store the answer? And what was built?
    use_cache: bool
    keep_provider: bool
    #: No answer that was stored before (Unix time).
    not_before: float
    #: Options that only the provider knows.
    more: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One call."""

    prompt: str
    model: str | None
    #: Tried one after the other; a single one if it was named.
    names: Sequence[str]
    named: bool
    planner: Planner
    options: Options
    #: The only one who may answer, in place of `names`.
    fixed: Plan | None = None
    #: Makes or finds the object of a plan that is `plain`.
    plain: Callable[[Plan, bool], Any]
    remote: Any = None
    trace: GenerationTrace

    @property
    def settings(self) -> RouterSettings:
        return self.planner.settings
