"""The Python API: `generate_text` and its kin, for programs that want text and nothing else.

A named provider answers in this process; `backend_manager` is the node that runs on this machine.
The environment is read again at each call. See `docs/python.md`.

Importing this module loads neither trio nor a database: what a call needs comes with the first one.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..providers.base import GenerateError, Sampling
from .config import router_settings
from .home import Home
from .router_deps import RouterDeps, get_default_router_deps
from .seed_ask import PROVIDER, RESPONSE, Ask, Options
from .seed_providers import BackendManagerHandle, LLMProvider, Plan, Planner, Unusable, register
from .seed_trace import GenerationTrace, begin_trace

if TYPE_CHECKING:
    from ..providers.tokens import TokenCount
    from .loop_thread import Job
    from .seed_engine import Engine

TEMPERATURE, TIMEOUT = 0.2, 120.0
POLICIES = ("round_robin", "least_loaded", "best_performance")

_serials: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_serial_lock = threading.Lock()
_numbers = itertools.count(1)


# --- text ---------------------------------------------------------------------------------------


def generate_text(
    prompt: str,
    *,
    model_name: str | None = None,
    provider: str | None = None,
    provider_instance: object = None,
    deps: RouterDeps | None = None,
    **kwargs: Any,
) -> str:
    """The answer to a prompt.

    `provider` names who answers (so does the variable PROMPTMESH_LLM_PROVIDER), and it fails rather
    than being replaced; without one the providers are tried in the order of `docs/python.md`.
    `provider_instance` answers in place of all of them. Further keywords: `max_tokens` (or
    `max_new_tokens`; 256, of `local_hf` 128), `temperature` (0.2), `timeout` (120 s for all),
    `use_cache`, `system`, `top_p`, `top_k`, `stop`, `seed`, `presence_penalty`,
    `frequency_penalty`; others go to a provider that takes them.

    Raises `ValueError` for an unknown provider or a wrong value, `TypeError` for a wrong keyword,
    and a `GenerateError`, which is a `RuntimeError`, where no answer could be given: its message
    lists each provider with the reason. `get_last_generation_trace` tells the rest.
    """
    call = _call(prompt, model_name, provider, provider_instance, deps, kwargs)
    job = call.begin(lambda text: None)
    from .loop_thread import wait

    return wait(job, job.future)


async def agenerate_text(
    prompt: str,
    *,
    model_name: str | None = None,
    provider: str | None = None,
    provider_instance: object = None,
    deps: RouterDeps | None = None,
    **kwargs: Any,
) -> str:
    """`generate_text` for a task of trio or asyncio. Cancelling it cancels the work."""
    call = _call(prompt, model_name, provider, provider_instance, deps, kwargs)
    job = call.begin(lambda text: None)
    from .loop_thread import wait_async

    return await wait_async(job, job.future)


def stream_text(
    prompt: str,
    *,
    model_name: str | None = None,
    provider: str | None = None,
    provider_instance: object = None,
    deps: RouterDeps | None = None,
    **kwargs: Any,
) -> Iterator[str]:
    """The same, piece by piece as it comes. Closing the iterator cancels the work.

    An answer that breaks off ends with an error (`StreamInterrupted`), never as if it were whole.
    """
    return _pieces(_call(prompt, model_name, provider, provider_instance, deps, kwargs))


def astream_text(
    prompt: str,
    *,
    model_name: str | None = None,
    provider: str | None = None,
    provider_instance: object = None,
    deps: RouterDeps | None = None,
    **kwargs: Any,
) -> AsyncIterator[str]:
    """`stream_text` for a task of trio or asyncio. Who leaves early closes it
    (`contextlib.aclosing`)."""
    return _async_pieces(_call(prompt, model_name, provider, provider_instance, deps, kwargs))


def count_tokens(
    prompt: str,
    *,
    model_name: str | None = None,
    provider: str | None = None,
    provider_instance: object = None,
    deps: RouterDeps | None = None,
    **kwargs: Any,
) -> TokenCount:
    """How many tokens the prompt has for the provider that would answer it, without asking it to.

    `(tokens, exact)`: `exact` where the model's own tokenizer counted, else it is an estimate.
    Takes and raises what `generate_text` does.
    """
    call = _call(prompt, model_name, provider, provider_instance, deps, kwargs)
    job = call.count()
    from .loop_thread import wait

    return wait(job, job.future)


async def acount_tokens(
    prompt: str,
    *,
    model_name: str | None = None,
    provider: str | None = None,
    provider_instance: object = None,
    deps: RouterDeps | None = None,
    **kwargs: Any,
) -> TokenCount:
    """`count_tokens` for a task of trio or asyncio."""
    call = _call(prompt, model_name, provider, provider_instance, deps, kwargs)
    job = call.count()
    from .loop_thread import wait_async

    return await wait_async(job, job.future)


def _pieces(call: _Call) -> Iterator[str]:
    from .loop_thread import wait

    pieces = _Pieces()
    job = call.begin(pieces.put)
    job.future.add_done_callback(pieces.end)
    try:
        while (text := wait(job, pieces.next())) is not None:
            yield text
        job.future.result()
    finally:
        job.cancel()


async def _async_pieces(call: _Call) -> AsyncIterator[str]:
    from .loop_thread import wait_async

    pieces = _Pieces()
    job = call.begin(pieces.put)
    job.future.add_done_callback(pieces.end)
    try:
        while (text := await wait_async(job, pieces.next())) is not None:
            yield text
        job.future.result()
    finally:
        job.cancel()


class _Pieces:
    """Text on its way from the loop to one reader elsewhere."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready: deque[str | None] = deque()
        self._waiting: Future[str | None] | None = None

    def put(self, text: str | None) -> None:
        """Give the next piece; None after the last."""
        with self._lock:
            waiting, self._waiting = self._waiting, None
            if waiting is None:
                self._ready.append(text)
        if waiting is not None:
            waiting.set_result(text)

    def end(self, _: Future[Any]) -> None:
        """There are no more."""
        self.put(None)

    def next(self) -> Future[str | None]:
        """The next piece, when it comes."""
        future: Future[str | None] = Future()
        with self._lock:
            if not self._ready:
                self._waiting = future
                return future
            text = self._ready.popleft()
        future.set_result(text)
        return future


# --- providers ----------------------------------------------------------------------------------


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
    planner = _planner(deps)
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
            found: LLMProvider = _plain(deps, plan, keep)
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
    if load_balancing_strategy not in (None, *POLICIES):
        raise ValueError(f"{load_balancing_strategy!r} is none of {', '.join(POLICIES)}")
    return BackendManagerHandle(load_balancing_strategy or "", enable_health_checks)


@dataclass(frozen=True)
class Bound:
    """A provider that answers in this process, or the running node, as an `LLMProvider`."""

    name: str
    deps: RouterDeps

    def generate(self, prompt: str, *, model_name: str | None = None, **kwargs: Any) -> str:
        """Takes and raises what `generate_text` does."""
        kwargs.setdefault("deps", self.deps)
        return generate_text(prompt, model_name=model_name, provider=self.name, **kwargs)

    def stream(self, prompt: str, *, model_name: str | None = None, **kwargs: Any) -> Iterator[str]:
        """Takes and raises what `stream_text` does."""
        kwargs.setdefault("deps", self.deps)
        return stream_text(prompt, model_name=model_name, provider=self.name, **kwargs)


def _planner(deps: RouterDeps, manager: Any = None) -> Planner:
    manager = deps.backend_manager if manager is None else manager
    return Planner(deps.config(), router_settings(), Home(deps.home), manager)


def _plain(deps: RouterDeps, plan: Plan, keep: bool) -> Any:
    """The object of a plan that is of this program, or of another package."""
    assert plan.plain is not None
    if not keep:
        return plan.plain()
    return deps.get_or_create(PROVIDER + "#".join(map(str, plan.key)), plan.plain)


# --- a call -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A call whose arguments are checked."""

    ask: Ask
    deps: RouterDeps

    def begin(self, emit: Any) -> Job[str]:
        """Begin it in the background."""
        begin_trace(self.ask.trace)

        async def work(engine: Engine) -> str:
            text = await engine.answer(self.ask, emit)
            trace = self.ask.trace
            if trace.key and trace.cid:
                self.deps.set_cached(RESPONSE + trace.key, trace.cid)
            return text

        return self.deps.submit(work)

    def count(self) -> Job[TokenCount]:
        """Count its tokens in the background."""

        async def work(engine: Engine) -> TokenCount:
            return await engine.count(self.ask)

        return self.deps.submit(work)


def _call(
    prompt: str,
    model: str | None,
    provider: str | None,
    instance: object,
    deps: RouterDeps | None,
    kwargs: Mapping[str, Any],
) -> _Call:
    """Raises `TypeError`, `ValueError` or `ConfigError` for what is wrong in it."""
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt is a text, not a {type(prompt).__name__}")
    if not prompt:
        raise ValueError("the prompt is empty")
    prompt.encode()  # UnicodeEncodeError, a ValueError, for what is no text
    if isinstance(instance, Bound):
        deps, provider = deps or instance.deps, instance.name
    deps = deps or get_default_router_deps()
    manager = instance if isinstance(instance, BackendManagerHandle) else None
    planner = _planner(deps, manager)
    name = "backend_manager" if manager else provider or planner.settings.llm_provider
    foreign = instance is not None and manager is None and not isinstance(instance, Bound)
    ask = Ask(
        prompt=prompt,
        model=model or None,
        names=[name] if name else list(planner.order()),
        named=bool(name),
        planner=planner,
        options=_options(kwargs, planner, deps),
        fixed=_fixed(instance, provider, model) if foreign else None,
        plain=lambda plan, keep: _plain(deps, plan, keep and not foreign),
        remote=deps.remote_cache,
        trace=GenerationTrace(asked_provider=provider, asked_model=model),
    )
    return _Call(ask, deps)


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
        key=(name, "instance", _serial(instance)),
    )


def _serial(instance: object) -> int:
    """A number for this object and no other, ever."""
    with _serial_lock:
        try:
            return _serials.setdefault(instance, next(_numbers))
        except TypeError:  # one that cannot be referred to weakly, or has no hash
            return next(_numbers)


def _options(kwargs: Mapping[str, Any], planner: Planner, deps: RouterDeps) -> Options:
    """The keywords of a call. Raises `ValueError` or `TypeError`."""
    more = dict(kwargs)
    if more.pop("stream", False):
        raise TypeError("stream_text and astream_text give an answer piece by piece")
    said = planner.settings
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
        not_before=deps.not_before,
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
