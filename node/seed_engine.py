"""What answers `generate_text`: whom a call asks, one after the other, over two caches.

The answers of real models are kept in the node's own cache, which the daemon and other programs
share. Those of a class of the program are kept in memory only: the class may be another one
tomorrow, and its name says nothing to anybody else.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import msgspec
import trio

from ..cache.answers import AnswerCache
from ..cache.keys import key_text, request_key
from ..mesh.attempts import Attempts, Step, retry_budget
from ..providers.base import (
    Answering,
    CacheOnlyMiss,
    Chunk,
    CompletionBuilder,
    DeadlineExceeded,
    GenerateError,
    GenerateRequest,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
)
from ..providers.registry import options_fault
from ..providers.tokens import TokenCount, count_tokens
from .config_providers import ProviderConfig
from .config_sections import CacheConfig
from .finding_servers import find_servers, found_tables
from .parts import Parts
from .router import Router
from .seed_ask import Ask
from .seed_backends import ChosenBackends, NamesAsTheyAre, NoMembers
from .seed_built import BuiltProviders
from .seed_providers import ANY_SERVER, SERVERS, Plan, Unusable
from .seed_question import question, text_of
from .seed_remote import RemoteCaches

logger = logging.getLogger(__name__)

#: Seconds between two looks for model servers on this machine.
LOOK_SERVERS = 10.0


class Engine:
    """Answers, in the loop that opened it. See the module."""

    def __init__(
        self, parts: Parts, memory: AnswerCache, nursery: trio.Nursery, cache: CacheConfig
    ) -> None:
        """`memory` is for answers that are nobody else's business."""
        self._parts = parts
        self._cache = cache
        self._nursery = nursery
        self._built = BuiltProviders(parts.purse, nursery)
        self._backends = ChosenBackends(parts, self._built)
        self._shared = self._router(parts.answers, parts.sharing)
        self._memory = self._router(memory, NoMembers())
        self._remotes = RemoteCaches()
        #: Model servers of this machine, as they were found last.
        self._servers: Sequence[ProviderConfig] = ()
        self._look_again = -math.inf
        self._rng = Random()
        self._budget = retry_budget(trio.current_time())

    def _router(self, answers: AnswerCache, shared: Any) -> Router:
        return Router(
            backends=self._backends,
            names=NamesAsTheyAre(),
            answers=answers,
            shared=shared,
            nursery=self._nursery,
            peer=self._parts.peer,
            node_of=self._parts.node_of,
            ledger=self._parts.ledger,
            reuse=self._cache.reuse,
            min_agreement=self._cache.min_agreement,
        )

    async def answer(self, ask: Ask, emit: Callable[[str], None]) -> str:
        """The text, which `emit` gets as it comes. Raises what `generate_text` does."""
        trace, given = ask.trace, _Given(emit)
        text: str | None = None
        try:
            with trio.move_on_after(ask.options.timeout) as limit:
                text = await self._answer(ask, given)
            if text is None:
                raise DeadlineExceeded(self._late(ask), partial=given.text)
            # What is answered is answered, however long a cache takes to be told.
            with trio.CancelScope(deadline=limit.deadline):
                await self._tell_remote(ask, text)
            return text
        except Exception as error:
            trace.over(error)
            raise
        finally:
            if trace.seconds is None:
                trace.over()

    async def _tell_remote(self, ask: Ask, text: str) -> None:
        """Tell a program's own cache what is new."""
        key, is_old = ask.trace.key, (ask.trace.cache or "").startswith("hit")
        if ask.remote is not None and ask.options.use_cache and key and not is_old:
            await self._remotes.set(ask.remote, key, text)

    def _late(self, ask: Ask) -> str:
        said = f"there was no whole answer within {ask.options.timeout:g} s"
        starting = self._built.starting()
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

    async def _answer(self, ask: Ask, given: _Given) -> str:
        ask = await self._with_servers(ask)
        plans = {plan.name: plan for plan in self._plans(ask)}
        if not plans:
            raise ProviderUnavailable(f"no provider can be used: {_listed(ask.trace.skipped)}")
        attempts = Attempts(
            question(ask, Plan(name="", kind="", model=ask.model or "auto")),
            [self._backends.candidate(plan) for plan in plans.values()],
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
            started = trio.current_time()
            try:
                return await self._ask(ask, plan, given)
            except GenerateError as error:
                said = {"provider": plan.name, "model": plan.model, "error": str(error)}
                ask.trace.failed.append(said)
                if given.text:
                    raise _broken_off(error, given.text) from error.__cause__
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

    async def _ask(self, ask: Ask, plan: Plan, given: _Given) -> str:
        built = await self._built.get(ask, plan)
        with self._built.used(built):
            if not plan.model:
                plan = await self._built.with_model(built)
            if plan.kind == "backend_manager":
                self._built.start(built)
                async with built.provider.open(question(ask, plan)) as answering:
                    ask.trace.request_id = answering.request_id
                    return await self._read(ask, plan, answering, given)
            with self._backends.chosen(built) as name:
                request = msgspec.structs.replace(question(ask, plan), provider=name)
                router = self._memory if built.in_memory else self._shared
                return await self._through(router, ask, plan, request, given)

    async def _through(
        self, router: Router, ask: Ask, plan: Plan, request: GenerateRequest, given: _Given
    ) -> str:
        said, key = ask.settings, request_key(request)
        ask.trace.key = key_text(key, said.router_cache_key, base=said.router_cache_cid_base)
        if ask.remote is not None and ask.options.use_cache:
            found = await self._stored(router, ask, plan, request, given)
            if found is not None:
                return found
        async with router.open(request) as answering:
            return await self._read(ask, plan, answering, given)

    async def _stored(
        self, router: Router, ask: Ask, plan: Plan, request: GenerateRequest, given: _Given
    ) -> str | None:
        """An answer of this node's cache, else of the `remote_cache`."""
        cache = msgspec.structs.replace(request.cache, mode="only")
        try:
            async with router.open(msgspec.structs.replace(request, cache=cache)) as answering:
                return await self._read(ask, plan, answering, given)
        except CacheOnlyMiss:
            found = await self._remotes.get(ask.remote, str(ask.trace.key))
        if found is not None:
            ask.trace.found(plan.name, plan.model)
            given.add(found)
        return found

    async def _read(self, ask: Ask, plan: Plan, answering: Answering, given: _Given) -> str:
        ask.trace.answered(answering.origin, plan.name)
        builder, closing = CompletionBuilder(), Chunk()
        async for chunk in answering.chunks:
            builder.add(chunk)
            closing = chunk
            if chunk.text:
                given.add(chunk.text)
        if closing.origin is not None:
            ask.trace.answered(closing.origin, plan.name)
        completion = builder.completion()
        ask.trace.ended(completion, closing)
        return text_of(completion)

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
            built = await self._built.get(ask, plan)
            with self._built.used(built):
                if not plan.model:
                    plan = await self._built.with_model(built)
                if plan.kind != "backend_manager":
                    await self._built.ready(built)
                return await count_tokens(built.provider, question(ask, plan))
        raise DeadlineExceeded(self._late(ask))

    @contextmanager
    def apart(self) -> Iterator[None]:
        """While inside, a fork shares no file of it with the child."""
        with self._parts.database.apart(), self._parts.node_database.apart():
            yield

    async def clear(self) -> None:
        """Forget what was built; what is in use ends with its last call."""
        self._built.clear()


class _Given:
    """What the caller was given so far."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self._texts: list[str] = []

    def add(self, text: str) -> None:
        """Give more."""
        self._texts.append(text)
        self._emit(text)

    @property
    def text(self) -> str:
        return "".join(self._texts)


def _broken_off(error: GenerateError, text: str) -> GenerateError:
    """The failure of an answer that had begun."""
    if isinstance(error, RequestRejected | DeadlineExceeded | StreamInterrupted):
        return error
    return StreamInterrupted(str(error), partial=text)


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
