"""`BackendManager`: one provider over all candidates, this node's own and its peers'.

It is thin: `attempts` and `policies` decide, `asking` carries out, `measure` remembers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from random import Random
from typing import Any

import trio

from ..providers.base import (
    Answering,
    Asked,
    DeadlineExceeded,
    Embedding,
    EmbedRequest,
    GenerateError,
    GenerateRequest,
    Health,
    ModelOffer,
    Policy,
    Prefer,
    TimeLimits,
)
from .adverts import Advert
from .affinity import Affinity, Beginning, beginnings
from .asking import Asking, Deadlines
from .attempts import Attempts, Step, retry_budget
from .backend_id import BackendId
from .budget import Budget
from .candidates import Candidates, LocalBackend, Source
from .forwarding import Forwarding, PeerNetwork
from .frames import Load, Place
from .handover import Handover, tasks
from .hedging import hedge_budget
from .ladder import rung
from .measure import Experience
from .peers import PeerTable
from .policies import Candidate, Choice, Turns, Work
from .probing import Probes, place_of, worth_probing
from .route import Route
from .transport import PeerId

logger = logging.getLogger(__name__)


class BackendManager:
    """Chooses who answers, and asks them. See the module."""

    name = "backend_manager"

    def __init__(
        self,
        *,
        local: Callable[[], Sequence[LocalBackend]],
        peers: PeerTable,
        policy: Policy,
        peer_id: PeerId,
        node: str,
        rng: Random,
        deadlines: Deadlines | None = None,
        on_claim: Callable[[PeerId, bytes, str], None] = lambda peer, claim, cid: None,
        why_not_ask: Callable[[PeerId], str] = lambda peer: "",
        options_fault: Callable[[str, Mapping[str, Any]], str] = lambda kind, extra: "",
        limits: Callable[[Candidate], TimeLimits | None] = lambda candidate: None,
        prefer: Prefer = "free",
        hedge: bool = False,
        on_route: Callable[[Asked, bool, Route], None] = lambda request, local_only, route: None,
    ) -> None:
        """`on_route` is told of each request how it goes, at its beginning.

        `limits` are the times that a candidate has, where they are not the usual ones.
        """
        self.experience = Experience()
        self._candidates = Candidates(
            local=local,
            peers=peers,
            peer_id=peer_id,
            node=node,
            experience=self.experience,
            why_not_ask=why_not_ask,
            options_fault=options_fault,
        )
        self._local = local
        self._peer_id = peer_id
        self._policy: Policy = policy
        self._prefer: Prefer = prefer
        self._hedge = hedge
        self._rng = rng
        self._whole = deadlines.whole if deadlines else None
        self._on_route = on_route
        self._turns = Turns()
        self._affinity = Affinity()
        self._forwarding = Forwarding(
            candidates=self._candidates,
            peers=peers,
            experience=self.experience,
            deadlines=deadlines or Deadlines(),
            limits=limits,
            on_claim=on_claim,
        )
        self._probes = Probes(self.experience.loads, self._forwarding.provider_names)
        #: Made with the first request: before it there may be no clock.
        self._budget: Budget | None = None
        self._hedges: Budget | None = None

    # --- the network, which may come and go

    def attach(self, network: PeerNetwork) -> None:
        """The peers' providers are candidates from now on."""
        self._forwarding.network = network
        network.listen(advert=self._heard, connection=self.experience.connection)

    def detach(self) -> None:
        """Only this node's own providers are candidates from now on."""
        self._forwarding.network = None

    def _heard(self, advert: Advert) -> None:
        now = trio.current_time()
        for provider in advert.providers:
            backend = BackendId(advert.peer, provider.name)
            self.experience.loads.report(backend, provider.load, now)
            self.experience.health(backend, provider.state == "ready")

    def health_changed(self) -> None:
        """A provider of this node is ready, or no longer."""
        for backend in self._local():
            which = BackendId(self._peer_id, backend.name)
            self.experience.health(which, backend.available())

    # --- what there is

    def sources(self) -> Iterator[Source]:
        """Every model with who offers it: this node's own providers, then the peers'."""
        return self._candidates.sources(with_peers=self._forwarding.network is not None)

    def is_paused(self, source: Source) -> bool:
        """Did it fail or refuse lately, so that it is left alone?"""
        return self._candidates.is_paused(source)

    def models(self) -> Sequence[ModelOffer]:
        """The models that can be asked, each once."""
        found: dict[str, ModelOffer] = {}
        for source in self.sources():
            found.setdefault(source.offer.id, source.offer)
        return list(found.values())

    async def check(self) -> Health:
        """Is there any model?"""
        if self.models():
            return Health()
        return Health(
            state="unavailable",
            reason="there is no model, here or at a peer",
            hint="configure a provider, or join a mesh that has one",
        )

    def loads(self) -> dict[str, Load]:
        """How busy the providers are that peers may use."""
        return self._candidates.loads()

    def peers_busy(self) -> bool:
        """Might a request have to wait at a peer?"""
        return self._forwarding.network is not None and self.experience.loads.any_full()

    async def place_at_peer(self, request_id: str, route: Route) -> Place | None:
        """Where a request stands that waits for a slot of a peer. None: it does not, it seems."""
        network = self._forwarding.network
        asked = tuple(route.under_way)
        return await place_of(request_id, asked, network.probe) if network else None

    # --- answering

    def open(
        self, request: Asked, *, local_only: bool = False, key: bytes = b""
    ) -> AbstractAsyncContextManager[Answering]:
        """Answer the request, whose model is resolved, by the candidate that the policy chooses.

        With `local_only` (a peer asks) the candidates are this node's shared providers. `key` names
        the question: equal ones go to the same candidate where the policy sees no difference.
        Raises a `GenerateError`, on entering, from the chunks or on leaving.
        """
        answering = self._answer(request, local_only, key)
        return answering if self._whole is None else _limited(answering, self._whole)

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        """The embeddings, by the candidate that the policy chooses. As `open` in all else."""
        async with self.open(request) as answering:
            return [e async for chunk in answering.chunks for e in chunk.embeddings]

    @asynccontextmanager
    async def _answer(
        self, request: Asked, local_only: bool, key: bytes
    ) -> AsyncIterator[Answering]:
        policy = request.policy or self._policy
        started = trio.current_time()
        attempts, choice, prompt = self._attempts(request, policy, local_only, key)
        route = Route(
            policy,
            tuple(attempts.left),
            attempts.ruled_out,
            choice.decisions,
            attempts.tried,
            attempts.under_way,
        )
        self._on_route(request, local_only, route)

        async def next_step() -> Step:
            return await self._next_step(attempts, choice, policy)

        def ask(step: Step) -> Asking:
            return self._forwarding.ask(step, attempts, started, route)

        def answered(step: Step, asking: Asking) -> None:
            attempts.answered(step.candidate, asking.seconds)
            now = trio.current_time()
            route.first_at = route.first_at or now
            self._affinity.saw(prompt, step.candidate.backend, now)

        try:
            if attempts.may_go_on or attempts.may_hedge:
                async with tasks() as nursery:
                    handover = Handover(
                        attempts, nursery, next_step=next_step, ask=ask, answered=answered
                    )
                    yield Answering(await handover.begin(), handover)
                return
            while True:
                step = await next_step()
                asking = ask(step)
                try:
                    async with asking.open() as answering:
                        answered(step, asking)
                        yield answering
                except GenerateError as error:
                    if asking.begun:
                        raise
                    logger.info("request %s: %s failed: %s", request.id, step.candidate, error)
                    attempts.failed(step.candidate, error, asking.seconds)
                else:
                    return
        finally:
            route.settle()

    async def _next_step(self, attempts: Attempts, choice: Choice, policy: Policy) -> Step:
        """Whom to ask now, once it may be asked. Raises the error that ends the request."""
        while True:
            if policy == "best_performance":
                await self._look(attempts, choice)
            step = attempts.next(trio.current_time())
            if not step.pause:
                return step
            await trio.sleep(step.pause)
            obstacle = self._candidates.obstacle(step.candidate, trio.current_time())
            if obstacle is None:
                return step
            attempts.passed_over(step, obstacle)

    def _attempts(
        self, request: Asked, policy: Policy, local_only: bool, key: bytes
    ) -> tuple[Attempts, Choice, Sequence[Beginning]]:
        now = trio.current_time()
        self._budget = self._budget or retry_budget(now)
        self._budget.earn(now)
        with_peers = self._forwarding.network is not None and not local_only
        suitable, ruled_out = self._candidates.sort(
            request, with_peers=with_peers, only_shared=local_only
        )
        choice = Choice(policy, turns=self._turns, key=key, work=self._work(request), rng=self._rng)
        prompt = self._compare(request, suitable) if policy == "best_performance" else ()
        attempts = Attempts(
            request,
            suitable,
            ruled_out,
            choose=lambda left: choice.take(self._rung(request, left), trio.current_time()),
            models=lambda: (
                source.offer.id
                for source in self._candidates.sources(
                    with_peers=with_peers, only_shared=local_only
                )
            ),
            obstacle=lambda c: self._candidates.obstacle(c, trio.current_time()),
            budget=self._budget,
            hedges=self._hedges_for(request, now) if not local_only else None,
            rng=self._rng,
            until=math.inf if request.deadline is None else now + request.deadline,
            for_peer=local_only,
        )
        return attempts, choice, prompt

    def _hedges_for(self, request: Asked, now: float) -> Budget | None:
        """The budget for second requests, if this one may be hedged."""
        hedge = self._hedge if request.hedge is None else request.hedge
        if not hedge or not isinstance(request, GenerateRequest):
            return None
        self._hedges = self._hedges or hedge_budget(now)
        self._hedges.earn(now)
        return self._hedges

    def _rung(self, request: Asked, left: Sequence[Candidate]) -> Sequence[Candidate]:
        return rung(left, request.prefer or self._prefer)

    def _work(self, request: Asked) -> Work:
        measures = self.experience.measures
        most = request.sampling.max_tokens if isinstance(request, GenerateRequest) else None
        tokens = measures.length(request.model, kind=request.kind)
        typical = measures.length(request.model)
        return Work(tokens if most is None else min(tokens, most), typical)

    def _compare(self, request: Asked, candidates: Sequence[Candidate]) -> Sequence[Beginning]:
        """Note who has seen how much of the prompt. One candidate is taken in any case."""
        if len(candidates) < 2 or not isinstance(request, GenerateRequest):
            return ()
        prompt = beginnings(request)
        if prompt:
            now = trio.current_time()
            for candidate in candidates:
                candidate.seen = self._affinity.share(prompt, candidate.backend, now)
        return prompt

    async def _look(self, attempts: Attempts, choice: Choice) -> None:
        """Ask how busy those are that may be chosen, where it is not known well enough."""
        left = attempts.may_be_asked
        if not left:
            return
        if attempts.tried:
            self._candidates.refresh(left, attempts.request.priority)
        now = trio.current_time()
        drawn = choice.draw(self._rung(attempts.request, left), now)
        asked = worth_probing(drawn, choice.work, now) if self._forwarding.network else ()
        if asked and self._forwarding.network is not None:
            await self._probes.ask(asked, self._forwarding.network.probe, now)
            self._candidates.refresh(drawn, attempts.request.priority)


@asynccontextmanager
async def _limited(
    answering: AbstractAsyncContextManager[Answering], seconds: float
) -> AsyncIterator[Answering]:
    """The same, ended with `DeadlineExceeded` when the time for the whole is over."""
    with trio.move_on_after(seconds) as limit:
        async with answering as begun:
            yield begun
    if limit.cancelled_caught:
        raise DeadlineExceeded(f"there was no whole answer within {seconds:g} s")
