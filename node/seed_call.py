"""A call of the Python API: its arguments checked, and begun in the loop of what it was given.

And the handles of a provider that a program keeps, as each of them makes calls.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .config import router_settings
from .config_sections import Config
from .home import Home
from .seed_ask import PROVIDER, RESPONSE, Ask
from .seed_keywords import options_of
from .seed_pieces import async_pieces, pieces
from .seed_providers import NodeWishes, Plan, Planner
from .seed_registered import serial
from .seed_trace import GenerationTrace, begin_trace

if TYPE_CHECKING:
    from ..providers.tokens import TokenCount
    from .loop_thread import Job
    from .seed_engine import Engine

T = TypeVar("T")
POLICIES = ("round_robin", "least_loaded", "best_performance")


class Deps(Protocol):
    """What a call needs of its `RouterDeps`."""

    backend_manager: Any
    remote_cache: Any
    not_before: float

    @property
    def home(self) -> Path: ...

    def config(self) -> Config: ...

    def set_cached(self, key: str, value: Any) -> Any: ...

    def get_or_create(self, key: str, factory: Callable[[], Any]) -> Any: ...

    def submit(self, work: Callable[[Engine], Awaitable[T]]) -> Job[T]: ...


@dataclass(frozen=True)
class Call:
    """A call whose arguments are checked. Each method begins it."""

    ask: Ask
    deps: Deps

    def text(self) -> str:
        """The answer, for a thread that may block."""
        from .loop_waiting import wait

        job = self._answer(lambda text: None)
        return wait(job, job.future)

    async def text_async(self) -> str:
        """The answer, for a task of trio or asyncio."""
        from .loop_waiting import wait_async

        job = self._answer(lambda text: None)
        return await wait_async(job, job.future)

    def pieces(self) -> Iterator[str]:
        """The answer as it comes, for a thread that may block."""
        return pieces(self._answer)

    def pieces_async(self) -> AsyncIterator[str]:
        """The answer as it comes, for a task of trio or asyncio."""
        return async_pieces(self._answer)

    def tokens(self) -> TokenCount:
        """The tokens of its prompt, for a thread that may block."""
        from .loop_waiting import wait

        job = self._count()
        return wait(job, job.future)

    async def tokens_async(self) -> TokenCount:
        """The tokens of its prompt, for a task of trio or asyncio."""
        from .loop_waiting import wait_async

        job = self._count()
        return await wait_async(job, job.future)

    def _answer(self, emit: Callable[[str], None]) -> Job[str]:
        begin_trace(self.ask.trace)

        async def work(engine: Engine) -> str:
            text = await engine.answer(self.ask, emit)
            trace = self.ask.trace
            if trace.key and trace.cid:
                self.deps.set_cached(RESPONSE + trace.key, trace.cid)
            return text

        return self.deps.submit(work)

    def _count(self) -> Job[TokenCount]:
        async def work(engine: Engine) -> TokenCount:
            return await engine.count(self.ask)

        return self.deps.submit(work)


def make_call(
    prompt: str,
    model: str | None,
    provider: str | None,
    instance: object,
    deps: Deps,
    kwargs: Mapping[str, Any],
) -> Call:
    """Raises `TypeError`, `ValueError` or `ConfigError` for what is wrong in it."""
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt is a text, not a {type(prompt).__name__}")
    if not prompt:
        raise ValueError("the prompt is empty")
    prompt.encode()  # UnicodeEncodeError, a ValueError, for what is no text
    if isinstance(instance, Bound):
        provider, instance = instance.name, None
    node = instance if isinstance(instance, NodeWishes) else None
    planner = planner_of(deps, node)
    name = "backend_manager" if node else provider or planner.settings.llm_provider
    is_own = instance is not None and node is None
    ask = Ask(
        prompt=prompt,
        model=model or None,
        names=[name] if name else list(planner.order()),
        named=bool(name),
        planner=planner,
        options=options_of(kwargs, planner.settings, deps.not_before),
        fixed=_fixed(instance, provider, model) if is_own else None,
        plain=lambda plan, keep: object_of(deps, plan, keep and not is_own),
        remote=deps.remote_cache,
        trace=GenerationTrace(asked_provider=provider, asked_model=model),
    )
    return Call(ask, deps)


def planner_of(deps: Deps, manager: Any = None) -> Planner:
    """What finds the provider of a call. `manager` goes before the one of `deps`."""
    manager = deps.backend_manager if manager is None else manager
    return Planner(deps.config(), router_settings(), Home(deps.home), manager)


def object_of(deps: Deps, plan: Plan, keep: bool) -> Any:
    """The object of a plan that is of this program, or of another package."""
    assert plan.plain is not None
    if not keep:
        return plan.plain()
    return deps.get_or_create(PROVIDER + "#".join(map(str, plan.key)), plan.plain)


def _fixed(instance: object, provider: str | None, model: str | None) -> Plan:
    """The plan for an object of the caller. Raises `TypeError`."""
    from ..providers.plain import check_plain, is_provider

    if not is_provider(instance):
        check_plain(instance)
    said = getattr(instance, "name", None)
    name = provider or (said if isinstance(said, str) and said else type(instance).__name__)
    return Plan(
        name=name,
        kind="plain",
        model=model or name,
        plain=lambda: instance,
        key=(name, "instance", serial(instance)),
    )


# --- handles ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """A provider that answers in this process, or the running node, as an `LLMProvider`."""

    name: str
    deps: Deps

    def generate(self, prompt: str, *, model_name: str | None = None, **kwargs: Any) -> str:
        """Takes and raises what `generate_text` does."""
        deps = kwargs.pop("deps", None) or self.deps
        return make_call(prompt, model_name, None, self, deps, kwargs).text()

    def stream(self, prompt: str, *, model_name: str | None = None, **kwargs: Any) -> Iterator[str]:
        """Takes and raises what `stream_text` does."""
        deps = kwargs.pop("deps", None) or self.deps
        return make_call(prompt, model_name, None, self, deps, kwargs).pieces()


@dataclass
class BackendManagerHandle(NodeWishes):
    """What `get_backend_manager` gives: the running node, asked as it says."""

    #: What its own calls share, as far as they say nothing else.
    deps: Callable[[], Deps] = field(kw_only=True, repr=False, compare=False)

    def generate(self, prompt: str, *, model_name: str | None = None, **kwargs: Any) -> str:
        """Ask the running node. Takes and raises what `generate_text` does."""
        deps = kwargs.pop("deps", None) or self.deps()
        return make_call(prompt, model_name, None, self, deps, kwargs).text()


def make_manager(
    deps: Callable[[], Deps], strategy: str | None, check_first: bool
) -> BackendManagerHandle:
    """A handle of the running node. Raises `ValueError` for a strategy that is none."""
    if strategy not in (None, *POLICIES):
        raise ValueError(f"{strategy!r} is none of {', '.join(POLICIES)}")
    return BackendManagerHandle(strategy or "", check_first, deps=deps)


def deps_of(instance: object) -> Deps | None:
    """What the calls of a handle share; None: it is no handle."""
    if isinstance(instance, Bound):
        return instance.deps
    return instance.deps() if isinstance(instance, BackendManagerHandle) else None
