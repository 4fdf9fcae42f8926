"""What answers `generate_text`: the providers that were built, and the routers over two caches.

The answers of real models are kept in the node's own cache, which the daemon and other programs
share. Those of a class of the program are kept in memory only: the class may be another one
tomorrow, and its name says nothing to anybody else.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
import trio

from ..cache.answer_rows import StoredAnswer
from ..cache.answers import AnswerCache
from ..cache.blocks import SqliteBlocks
from ..cache.database import Database
from ..cache.keys import key_text, request_key
from ..mesh.attempts import Attempts, Step, retry_budget
from ..mesh.ladder import Bill, is_paid, refusal
from ..mesh.policies import Candidate
from ..providers.base import (
    Answering,
    Asked,
    CacheControl,
    CacheOnlyMiss,
    Chunk,
    Completion,
    CompletionBuilder,
    ContentFiltered,
    DeadlineExceeded,
    GenerateError,
    GenerateRequest,
    Message,
    ModelOffer,
    ProviderUnavailable,
    Text,
)
from ..providers.plain import MAX_THREADS, PlainProvider, is_provider
from ..providers.registry import Runs, options_fault
from ..providers.tokens import TokenCount, count_tokens
from .config import CacheConfig, Config, ProviderConfig, child_environment
from .finding_servers import find_servers, found_tables
from .home import Home, HomeError
from .parts import Parts, open_parts
from .router import Router
from .running_node import RunningNode
from .seed_ask import Ask, Options
from .seed_providers import ANY_SERVER, SERVERS, Plan, Unusable

logger = logging.getLogger(__name__)

#: A thread cannot be cancelled; it is left to finish. (The type stubs know the older name only.)
_LEAVE_BEHIND: dict[str, Any] = {"abandon_on_cancel": True}
#: Seconds between two looks at a provider that is starting.
LOOK = 0.05
#: Models of `local_hf` that are kept loaded; of more, the one used longest ago is let go.
MAX_LOADED = 2
#: Providers of other kinds that are kept: a key that changes makes another one.
MAX_KEPT = 32
#: Seconds between two looks for model servers on this machine.
LOOK_SERVERS = 10.0
#: Calls of a `remote_cache` at once.
REMOTE_CALLS = 4


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


class Engine:
    """Answers, in the loop that opened it. See the module."""

    def __init__(
        self, parts: Parts, memory: AnswerCache, nursery: trio.Nursery, cache: CacheConfig
    ) -> None:
        """`memory` is for answers that are nobody else's business."""
        self._parts = parts
        self._cache = cache
        self._nursery = nursery
        self._built: dict[tuple[object, ...], Built] = {}
        #: Those that a router may be asking for, by a name of their own.
        self._asked: dict[str, list[Built]] = {}
        self._shared = self._router(parts.answers, parts.sharing)
        self._memory = self._router(memory, _Alone())
        self._remote_limiter = trio.CapacityLimiter(REMOTE_CALLS)
        self._limiters: WeakKeyDictionary[Any, trio.CapacityLimiter] = WeakKeyDictionary()
        self._remote_told = False
        #: Model servers of this machine, as they were found last.
        self._servers: Sequence[ProviderConfig] = ()
        self._look_again = -math.inf
        self._rng = Random()
        self._budget = retry_budget(trio.current_time())

    def _router(self, answers: AnswerCache, shared: Any) -> Router:
        return Router(
            backends=self,
            names=_AsIs(),
            answers=answers,
            shared=shared,
            nursery=self._nursery,
            peer=self._parts.peer,
            node_of=self._parts.node_of,
            ledger=self._parts.ledger,
            reuse=self._cache.reuse,
            min_agreement=self._cache.min_agreement,
        )

    # --- answering

    async def answer(self, ask: Ask, emit: Callable[[str], None]) -> str:
        """The text, which `emit` gets as it comes. Raises what `generate_text` does."""
        trace, given = ask.trace, list[str]()

        def keep(text: str) -> None:
            given.append(text)
            emit(text)

        try:
            with trio.move_on_after(ask.options.timeout):
                return await self._answer(ask, keep)
            raise DeadlineExceeded(self._late(ask), partial="".join(given))
        except Exception as error:
            trace.over(error)
            raise
        finally:
            if trace.seconds is None:
                trace.over()

    def _late(self, ask: Ask) -> str:
        said = f"there was no whole answer within {ask.options.timeout:g} s"
        starting = {b.plan.name: b.progress for b in self._built.values() if b.progress}
        return f"{said} ({_listed(starting)})" if starting else said

    async def _with_servers(self, ask: Ask) -> Ask:
        """The call, with the model servers of this machine, where it may be about one."""
        if ask.fixed is not None or not {ANY_SERVER, *SERVERS}.intersection(ask.names):
            return ask
        now, config = trio.current_time(), ask.planner.config
        if now >= self._look_again:
            self._servers = found_tables(await find_servers(config), config)
            self._look_again = trio.current_time() + LOOK_SERVERS
        planner = dataclasses.replace(ask.planner, found=self._servers)
        return dataclasses.replace(ask, planner=planner)

    async def _answer(self, ask: Ask, emit: Callable[[str], None]) -> str:
        ask = await self._with_servers(ask)
        plans = {plan.name: plan for plan in self._plans(ask)}
        if not plans:
            raise ProviderUnavailable(f"no provider can be used: {_listed(ask.trace.skipped)}")
        attempts = Attempts(
            _request(ask, Plan(name="", kind="", model=ask.model or "auto")),
            [self._candidate(plan) for plan in plans.values()],
            (),
            choose=lambda left: left[0],
            models=lambda: [plan.model for plan in plans.values()],
            obstacle=lambda candidate: None,
            budget=self._budget,
            rng=self._rng,
            until=trio.current_effective_deadline(),
        )
        while True:
            step = self._next(attempts, ask)
            await trio.sleep(step.pause)
            plan = plans[step.candidate.provider]
            started, begun = trio.current_time(), _Begun(emit)
            try:
                return await self._ask(ask, plan, begun)
            except GenerateError as error:
                said = {"provider": plan.name, "model": plan.model, "error": str(error)}
                ask.trace.failed.append(said)
                if begun.yes:
                    raise
                logger.info("%s failed: %s", plan.name, error)
                attempts.failed(step.candidate, error, trio.current_time() - started)

    def _next(self, attempts: Attempts, ask: Ask) -> Step:
        """Whom to ask now. Raises the error that ends the call, whose cause is the last failure."""
        last = attempts.tried[-1].error if attempts.tried else None
        try:
            return attempts.next(trio.current_time())
        except GenerateError as error:
            if len(attempts.tried) == 1 and last is not None and not ask.trace.skipped:
                raise last from last.__cause__  # nobody else was there: it says all
            if ask.trace.skipped:
                error.message += f"; not usable: {_listed(ask.trace.skipped)}"
            raise error from last

    def _candidate(self, plan: Plan) -> Candidate:
        return Candidate(
            peer=self._parts.peer,
            node=self._parts.node,
            provider=plan.name,
            offer=ModelOffer(id=plan.model),
            own=True,
        )

    def _plans(self, ask: Ask) -> Sequence[Plan]:
        """Who can be asked, in order. Raises for one that was named and cannot, and `TypeError`
        for an option that none of them has."""
        if ask.fixed is not None:
            return [ask.fixed]
        plans, faults = [], []
        for name in ask.names:
            try:
                make = ask.planner.plan if ask.named else ask.planner.auto
                plan = make(name, ask.model)
            except Unusable as error:
                ask.trace.skipped[name] = str(error)
                if ask.named:
                    raise ProviderUnavailable(f"{name} cannot be used: {error}") from error
                continue
            fault = options_fault(plan.kind, ask.options.more)
            if fault:
                ask.trace.skipped[name] = fault
                faults.append(f"{name}: {fault}")
            else:
                plans.append(plan)
        if faults and not plans:
            raise TypeError("; ".join(faults))
        return plans

    async def _ask(self, ask: Ask, plan: Plan, emit: _Begun) -> str:
        built = await self._get(ask, plan)
        with self._used(built) as name:
            if not plan.model:
                plan = await self._with_model(built)
            if plan.kind == "backend_manager":
                self._start(built)
                request = _request(ask, plan)
                async with built.provider.open(request) as answering:
                    ask.trace.request_id = answering.request_id
                    return await self._read(ask, plan, answering, emit)
            return await self._through_router(ask, plan, built, name, emit)

    async def _through_router(
        self, ask: Ask, plan: Plan, built: Built, name: str, emit: _Begun
    ) -> str:
        request = msgspec.structs.replace(_request(ask, plan), provider=name)
        router = self._memory if built.in_memory else self._shared
        said = ask.settings
        key = key_text(request_key(request), said.router_cache_key, base=said.router_cache_cid_base)
        ask.trace.key = key
        if ask.remote is not None and ask.options.use_cache:
            found = await self._stored(ask, plan, router, request, key, emit)
            if found is not None:
                return found
        async with router.open(request) as answering:
            text = await self._read(ask, plan, answering, emit)
        if ask.remote is not None and ask.options.use_cache:
            await self._remote(ask.remote.set, f"llm_response::{key}", text)
        return text

    async def _read(self, ask: Ask, plan: Plan, answering: Answering, emit: _Begun) -> str:
        ask.trace.answered(answering.origin, plan.name)
        builder, closing = CompletionBuilder(), Chunk()
        async for chunk in answering.chunks:
            builder.add(chunk)
            closing = chunk
            if chunk.text:
                emit(chunk.text)
        if closing.origin is not None:
            ask.trace.answered(closing.origin, plan.name)
        completion = builder.completion()
        ask.trace.ended(completion, closing)
        return _text(completion)

    async def count(self, ask: Ask) -> TokenCount:
        """The tokens of the prompt, as the first that can be asked counts them.

        Raises what `generate_text` does.
        """
        with trio.move_on_after(ask.options.timeout):
            ask = await self._with_servers(ask)
            plans = self._plans(ask)
            if not plans:
                raise ProviderUnavailable(f"no provider can be used: {_listed(ask.trace.skipped)}")
            plan = plans[0]
            built = await self._get(ask, plan)
            with self._used(built):
                if not plan.model:
                    plan = await self._with_model(built)
                if plan.kind != "backend_manager":
                    await self._ready(built)
                return await count_tokens(built.provider, _request(ask, plan))
        raise DeadlineExceeded(self._late(ask))

    # --- a cache of the program's own

    async def _stored(
        self,
        ask: Ask,
        plan: Plan,
        router: Router,
        request: GenerateRequest,
        key: str,
        emit: _Begun,
    ) -> str | None:
        """An answer of this node's cache, else of the `remote_cache`."""
        cache = msgspec.structs.replace(request.cache, mode="only")
        try:
            async with router.open(msgspec.structs.replace(request, cache=cache)) as answering:
                return await self._read(ask, plan, answering, emit)
        except CacheOnlyMiss:
            found = await self._remote(ask.remote.get, f"llm_response::{key}")
        if not isinstance(found, str):
            return None
        ask.trace.provider, ask.trace.model, ask.trace.cache = plan.name, plan.model, "hit-remote"
        emit(found)
        return found

    async def _remote(self, call: Callable[..., Any], *args: Any) -> Any:
        """Ask it in a thread. A fault of a cache is a miss."""
        try:
            return await trio.to_thread.run_sync(
                call, *args, limiter=self._remote_limiter, **_LEAVE_BEHIND
            )
        except Exception as error:  # Whatever it raises: told once, and then a miss.
            log = logger.debug if self._remote_told else logger.warning
            self._remote_told = True
            log("the remote cache failed: %s: %s", type(error).__name__, error)
            return None

    # --- what is built

    async def _get(self, ask: Ask, plan: Plan) -> Built:
        """What was built for such a plan, or is built now."""
        if plan.kind == "plain":
            return await self._plain(ask, plan)
        kept = self._built.get(plan.key)
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
                provider = plan.build(self._parts.purse).backend().provider
            except ValueError as error:  # SettingsError: it says which setting
                raise ProviderUnavailable(f"{plan.name} cannot be used: {error}") from error
        built = Built(plan, provider)
        if ask.options.keep_provider:
            self._built[plan.key] = built
            self._let_go()
        return built

    async def _plain(self, ask: Ask, plan: Plan) -> Built:
        """The program's own object, as a provider that knows what this call wants."""
        try:
            target = await trio.to_thread.run_sync(
                ask.plain, plan, ask.options.keep_provider, **_LEAVE_BEHIND
            )
            if is_provider(target):
                return Built(plan, target)
            provider = PlainProvider(
                plan.name,
                target,
                models=() if plan.model == plan.name else (plan.model,),
                options={"timeout": ask.options.timeout, **ask.options.more},
                limiter=self._limiter(target),
            )
        except Exception as error:  # Whatever a foreign factory raises: the caller sees it.
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
    def _used(self, built: Built) -> Iterator[str]:
        """While inside, a router can ask for it by the name given.

        Equal objects of the program have one name, so that equal questions to them share a flight.
        """
        which = built.plan.key[-1] if built.in_memory else f"{id(built):x}"
        name = f"{built.plan.name}#{which}"
        self._asked.setdefault(name, []).append(built)
        built.users += 1
        try:
            yield name
        finally:
            self._asked[name].remove(built)
            if not self._asked[name]:
                del self._asked[name]
            built.users -= 1
            built.used_at = trio.current_time()
            if not built.users and self._built.get(built.plan.key) is not built:
                built.scope.cancel()

    def _let_go(self) -> None:
        """End what was used longest ago and is not in use, of models sooner than of others."""
        for is_model, most in ((True, MAX_LOADED), (False, MAX_KEPT)):
            kept = [b for b in self._built.values() if (b.plan.kind == "local_hf") == is_model]
            idle = sorted((b for b in kept if not b.users and b.used_at), key=lambda b: b.used_at)
            for built in idle[: max(0, len(kept) - most)]:
                del self._built[built.plan.key]
                built.scope.cancel()

    async def clear(self) -> None:
        """Forget what was built; what is in use ends with its last call."""
        kept, self._built = self._built, {}
        for built in kept.values():
            if not built.users:
                built.scope.cancel()

    async def _ready(self, built: Built) -> None:
        """Start it, and wait until it can be asked. Raises `ProviderUnavailable`."""
        self._start(built)
        if built.in_memory or (built.plan.kind != "local_hf" and built.provider.models()):
            return  # The request itself shows whether it answers.
        while (health := await built.provider.check()).state == "starting":
            built.progress = health.reason
            await trio.sleep(LOOK)
        built.progress = ""
        if health.state == "unavailable":
            reason = " ".join(part for part in (health.reason, health.hint) if part)
            raise ProviderUnavailable(f"{built.plan.name}: {reason}")

    def _start(self, built: Built) -> None:
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
        except Exception:  # It must not take the others along: who looks at the log sees it.
            logger.exception("%s failed, and is built anew for the next call", built.plan.name)
            if self._built.get(built.plan.key) is built:
                del self._built[built.plan.key]

    async def _with_model(self, built: Built) -> Plan:
        """The plan with the first model of a server that was asked for none."""
        await self._ready(built)
        for offer in built.provider.models():
            if "generate" in offer.tasks:
                return dataclasses.replace(built.plan, model=offer.id)
        raise ProviderUnavailable(f"{built.plan.name} lists no model")

    # --- Backends, for the routers

    def _check_cost(self, plan: Plan, request: GenerateRequest) -> None:
        """Raises `ProviderUnavailable` where more would be spent than a day allows."""
        candidate = self._candidate(plan)
        candidate.paid = is_paid(plan.price, plan.paid)
        bill = Bill(request, lambda: plan.max_tokens)
        candidate.cost = bill.at(plan.price, paid=candidate.paid)
        candidate.allowance = self._parts.purse.allowance(request.asker)
        refused = refusal(candidate, request)
        if refused is not None:
            raise ProviderUnavailable(f"{plan.name}: {refused.reason}", retry_after=refused.wait)

    @asynccontextmanager
    async def open(
        self, request: Asked, *, local_only: bool = False, key: bytes = b""
    ) -> AsyncIterator[Answering]:
        """Ask the one provider that the request names."""
        users = self._asked.get(request.provider or "")
        if not users or not isinstance(request, GenerateRequest):
            raise ProviderUnavailable("nobody waits for this answer any more")
        built = users[-1]
        self._check_cost(built.plan, request)
        await self._ready(built)
        asked = msgspec.structs.replace(request, provider=None, policy=None)
        async with built.provider.open(asked) as answering:
            offers = {offer.id: offer for offer in built.provider.models()}
            offer = offers.get(request.model, ModelOffer(id=request.model))
            answering.origin = msgspec.structs.replace(
                answering.origin,
                peer=self._parts.peer,
                node=self._parts.node,
                provider=built.plan.name,
                model=request.model,
                attempts=1,
                weights=offer.weights,
                engine=offer.engine,
                numerics=offer.numerics,
                price=offer.price,
            )
            yield answering


# --- opening ------------------------------------------------------------------------------------


@asynccontextmanager
async def open_engine(config: Config, home: Home) -> AsyncIterator[Engine]:
    """An engine over the node's own cache. Raises `ConfigError`."""
    with ExitStack() as stack:
        parts = _open_parts(config, home, stack)
        database = Database(None)
        stack.callback(database.close)
        memory = AnswerCache(database, SqliteBlocks(database), peer=parts.peer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(parts.answers.run)
            nursery.start_soon(memory.run)
            nursery.start_soon(parts.ledger.run)
            yield Engine(parts, memory, nursery, config.cache)
            nursery.cancel_scope.cancel()


def _open_parts(config: Config, home: Home, stack: ExitStack) -> Parts:
    """The parts without their providers, which are built when they are asked.

    Where the node's folder cannot be used the answers are kept for as long as this lives.
    """
    local_hf = dataclasses.replace(config.local_hf, model="", embedding_model="")
    bare = dataclasses.replace(config, providers=(), local_hf=local_hf)
    try:
        home.make_identity()
        return stack.enter_context(open_parts(bare, home, child_environment()))
    except (HomeError, OSError) as error:
        logger.warning("answers are not kept: %s", error)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="promptmesh-"))
    other = Home(Path(folder))
    other.make_identity()
    return stack.enter_context(open_parts(bare, other, child_environment()))


# --- the pieces ---------------------------------------------------------------------------------


class _Begun:
    """Passes text on, and remembers that there was some."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self.yes = False

    def __call__(self, text: str) -> None:
        self.yes = True
        self._emit(text)


class _AsIs:
    """Model names are what they are: no peer offers any."""

    def resolve(self, request: Any, tell: Callable[[str], None] = lambda why: None) -> Any:
        return request


class _Alone:
    """No other members: for answers that are nobody else's business."""

    async def find(
        self, key: bytes, request: Asked, tell: Callable[[str], None]
    ) -> tuple[StoredAnswer, str] | None:
        return None

    def objection(self, key: bytes, request: Asked, stored: StoredAnswer) -> str:
        return ""

    def announce(self, key: bytes, request: Asked, stored: StoredAnswer) -> None: ...


def _request(ask: Ask, plan: Plan) -> GenerateRequest:
    """The question to that provider."""
    options = ask.options
    texts = [("system", options.system)] if options.system else []
    messages = [
        Message(role=role, content=(Text(text=text),))  # type: ignore[arg-type] # two literals
        for role, text in [*texts, ("user", ask.prompt)]
    ]
    most = options.sampling.max_tokens or plan.max_tokens
    return GenerateRequest(
        model=plan.model,
        messages=tuple(messages),
        sampling=msgspec.structs.replace(options.sampling, max_tokens=most),
        cache=_cache(options, plan),
        deadline=max(0.0, trio.current_effective_deadline() - trio.current_time()),
        id=ask.trace.request_id,
        **_extra(options.more, plan),
    )


def _cache(options: Options, plan: Plan) -> CacheControl:
    return CacheControl(
        mode="use" if options.use_cache else "bypass",
        any_sample=True,
        max_age=max(0.0, time.time() - options.not_before) if options.not_before else None,
        namespace="/".join(map(str, plan.key)) if plan.kind == "plain" else "",
    )


def _extra(more: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Options that are none of ours, in the request: they are part of the question."""
    if not more or not plan.kind:
        return {}
    if plan.kind == "plain":
        return {"extra": {name: repr(value) for name, value in more.items()}}
    return {"dialect": "openai", "extra": dict(more)}


def _text(completion: Completion) -> str:
    if completion.finish_reason == "content_filter":
        raise ContentFiltered("the provider's filter cut the answer", partial=completion.text)
    return completion.text


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
