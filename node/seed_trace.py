"""What is told of a call of the Python API: who answered, who was tried, who could not be used."""

from __future__ import annotations

import secrets
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ..providers.base import Chunk, Completion, Origin
from .openai_answers import usage_fields


@dataclass
class GenerationTrace:
    """One call, as far as it has come."""

    #: Names the call in logs, and at the running node to `promptmesh explain`.
    request_id: str = field(default_factory=lambda: "req-" + secrets.token_hex(10))
    #: What was asked for; None: not said.
    asked_provider: str | None = None
    asked_model: str | None = None
    provider: str | None = None
    model: str | None = None
    node: str | None = None
    peer: str | None = None
    #: `hit-local`, `hit-mesh`, `hit-remote`, `miss`, `bypass`, `coalesced`.
    cache: str | None = None
    #: By which the node that runs here chose who answers.
    policy: str | None = None
    key: str | None = None
    cid: str | None = None
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    #: Providers that were asked before, and failed: name, model, error.
    failed: list[dict[str, str]] = field(default_factory=list)
    #: Providers that could not be used, and why.
    skipped: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    seconds: float | None = None
    _started: float = field(default_factory=time.monotonic, repr=False)

    def answered(self, origin: Origin, provider: str) -> None:
        """Note who answers."""
        self.provider = provider
        self.model, self.node, self.peer = origin.model, origin.node or None, origin.peer or None
        self.cache, self.cid, self.policy = origin.cache, origin.cid, origin.policy or None

    def found(self, provider: str, model: str) -> None:
        """Note that a `remote_cache` had the answer of that one."""
        self.provider, self.model, self.cache = provider, model, "hit-remote"

    def ended(self, completion: Completion, closing: Chunk) -> None:
        """Note a whole answer."""
        self.finish_reason = completion.finish_reason
        self.usage = usage_fields(completion.usage)
        self.cid = closing.cid or self.cid

    def over(self, error: BaseException | None = None) -> None:
        """Note the end, and what went wrong."""
        self.seconds = time.monotonic() - self._started
        if error is not None:
            self.error = f"{type(error).__name__}: {error}"

    def fields(self) -> dict[str, Any]:
        """All of it as a new dictionary."""
        return {
            **{k: v for k, v in vars(self).items() if not k.startswith("_")},
            "failed": [dict(each) for each in self.failed],
            "skipped": dict(self.skipped),
        }


_last: ContextVar[GenerationTrace | None] = ContextVar("promptmesh_generation", default=None)


def begin_trace(trace: GenerationTrace) -> None:
    """It is the last one of this thread or task from now on."""
    _last.set(trace)


def get_last_generation_trace() -> dict[str, Any] | None:
    """What is known of the last call of this thread or task; None before the first.

    `provider`, `model` and `node` say who answered, `failed` and `skipped` why not the ones before,
    `cache` and `cid` whether it was a stored answer and which.
    """
    trace = _last.get()
    return None if trace is None else trace.fields()
