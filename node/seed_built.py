"""The providers of the Python API that were built, and how long they are kept.

A model that is loaded, a login and connections outlive the call that needed them first.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import trio

from ..providers.base import ProviderUnavailable
from ..providers.plain import MAX_THREADS, PlainProvider, is_provider
from ..providers.registry import Runs
from .pricing import Purse
from .running_node import RunningNode
from .seed_ask import Ask
from .seed_providers import Plan

logger = logging.getLogger(__name__)

#: A thread cannot be cancelled; it is left to finish. (The type stubs know the older name only.)
_LEAVE_BEHIND: dict[str, Any] = {"abandon_on_cancel": True}
#: Seconds between two looks at a provider that is starting.
LOOK = 0.05
#: Models of `local_hf` that are kept loaded; of more, the one used longest ago is let go.
MAX_LOADED = 2
#: Providers of other kinds that are kept: a key that changes makes another one.
MAX_KEPT = 32


@dataclass(eq=False)
class Built:
    """A provider that was built, which may outlive the call."""

    plan: Plan
    provider: Any
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    started: bool = False
    #: What it is doing before it can be asked.
    progress: str = ""
    users: int = 0
    used_at: float = 0.0

    @property
    def in_memory(self) -> bool:
        """Are its answers of no use to others?"""
        return self.plan.kind == "plain"


class BuiltProviders:
    """Builds them, keeps those of equal plans, and runs what they do beside answers."""

    def __init__(self, purse: Purse, nursery: trio.Nursery) -> None:
        self._purse = purse
        self._nursery = nursery
        self._kept: dict[tuple[object, ...], Built] = {}
        #: Those that calls are using: what one does beside its answers is done once.
        self._used: dict[tuple[object, ...], Built] = {}
        self._limiters: WeakKeyDictionary[Any, trio.CapacityLimiter] = WeakKeyDictionary()

    def starting(self) -> dict[str, str]:
        """Those that cannot be asked yet, and what they are doing."""
        return {b.plan.name: b.progress for b in self._kept.values() if b.progress}

    async def get(self, ask: Ask, plan: Plan) -> Built:
        """What was built for such a plan, or is built now."""
        if plan.kind == "plain":
            return await self._plain(ask, plan)
        kept = self._kept.get(plan.key)
        if kept is not None and ask.options.keep_provider:
            return kept
        if plan.kind == "backend_manager":
            _, policy, check = plan.key
            provider: Any = RunningNode(
                ask.planner.home, policy=str(policy), check_first=bool(check)
            )
        else:
            assert plan.build is not None
            try:
                provider = plan.build(self._purse).backend().provider
            except ValueError as error:  # SettingsError: it says which setting
                raise ProviderUnavailable(f"{plan.name} cannot be used: {error}") from error
        built = Built(plan, provider)
        if ask.options.keep_provider:
            self._kept[plan.key] = built
            self._let_go()
        return built

    async def _plain(self, ask: Ask, plan: Plan) -> Built:
        """The program's own object, as a provider that knows what this call wants."""
        try:
            target = await trio.to_thread.run_sync(
                ask.plain, plan, ask.options.keep_provider, **_LEAVE_BEHIND
            )
            if is_provider(target):
                used = self._used.get(plan.key)
                return used if used and used.provider is target else Built(plan, target)
            provider = PlainProvider(
                plan.name,
                target,
                models=() if plan.model == plan.name else (plan.model,),
                options={"timeout": ask.options.timeout, **ask.options.more},
                limiter=self._limiter(target),
            )
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            # Whatever a foreign factory raises: the caller sees it.
            raise ProviderUnavailable(
                f"{plan.name} cannot be used: {type(error).__name__}: {error}"
            ) from error
        return Built(plan, provider)

    def _limiter(self, target: object) -> trio.CapacityLimiter:
        """One for each object, for all of its calls."""
        try:
            return self._limiters.setdefault(target, trio.CapacityLimiter(MAX_THREADS))
        except TypeError:  # one that cannot be referred to weakly, or has no hash
            return trio.CapacityLimiter(MAX_THREADS)

    @contextmanager
    def used(self, built: Built) -> Iterator[None]:
        """While inside, it is not ended."""
        key = built.plan.key
        self._used[key] = built
        built.users += 1
        try:
            yield
        finally:
            built.users -= 1
            built.used_at = trio.current_time()
            if not built.users and self._used.get(key) is built:
                del self._used[key]
            if not built.users and self._kept.get(key) is not built:
                built.scope.cancel()

    def _let_go(self) -> None:
        """End what was used longest ago and is not in use, of models sooner than of others."""
        for is_model, most in ((True, MAX_LOADED), (False, MAX_KEPT)):
            kept = [b for b in self._kept.values() if (b.plan.kind == "local_hf") == is_model]
            idle = sorted((b for b in kept if not b.users and b.used_at), key=lambda b: b.used_at)
            for built in idle[: max(0, len(kept) - most)]:
                del self._kept[built.plan.key]
                built.scope.cancel()

    def clear(self) -> None:
        """Forget what was built; what is in use ends with its last call."""
        kept, self._kept = self._kept, {}
        for built in kept.values():
            if not built.users:
                built.scope.cancel()

    async def ready(self, built: Built) -> None:
        """Start it, and wait until it can be asked. Raises `ProviderUnavailable`."""
        self.start(built)
        if built.in_memory or (built.plan.kind != "local_hf" and built.provider.models()):
            return  # The request itself shows whether it answers.
        while (health := await built.provider.check()).state == "starting":
            built.progress = health.reason
            await trio.sleep(LOOK)
        built.progress = ""
        if health.state == "unavailable":
            reason = " ".join(part for part in (health.reason, health.hint) if part)
            raise ProviderUnavailable(f"{built.plan.name}: {reason}")

    def start(self, built: Built) -> None:
        """Let it do what it does beside its answers."""
        if not built.started:
            built.started = True
            self._nursery.start_soon(self._run, built)

    async def _run(self, built: Built) -> None:
        """What it does beside its answers, as long as it is kept."""
        inner = getattr(built.provider, "provider", built.provider)
        try:
            with built.scope:
                if isinstance(inner, Runs):
                    await inner.run()
        except (Exception, SystemExit, KeyboardInterrupt):
            # It must not take the others along: who looks at the log sees it.
            logger.exception("%s failed, and is built anew for the next call", built.plan.name)
            if self._kept.get(built.plan.key) is built:
                del self._kept[built.plan.key]

    async def with_model(self, built: Built) -> Plan:
        """The plan with the first model of a server that was asked for none."""
        await self.ready(built)
        for offer in built.provider.models():
            if "generate" in offer.tasks:
                return dataclasses.replace(built.plan, model=offer.id)
        raise ProviderUnavailable(f"{built.plan.name} lists no model")
