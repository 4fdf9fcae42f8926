"""What a candidate is asked: the request as it is to get it, its time, and where that goes.

And what comes back beside the answer: who it is from as this node sees it, loads and claims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec
import trio

from ..providers.base import (
    Answering,
    Asked,
    EmbedRequest,
    GenerateRequest,
    Origin,
    ProviderUnavailable,
    TimeLimits,
)
from .adverts import Advert
from .asking import Asking, Deadlines
from .attempts import Attempts, Step
from .backend_id import BackendId
from .candidates import Candidates
from .continuing import continued
from .embedding import answer_of
from .frames import AskLoads, PresentLoads
from .measure import Experience
from .peers import PeerTable
from .policies import Candidate
from .pool import PeerAnswer
from .route import Route
from .transport import PeerId


class PeerNetwork(Protocol):
    """The network that the peers' providers are asked over (`mesh.network.Network`)."""

    def ask(
        self, peer: PeerId, request: Asked, *, connect: float
    ) -> AbstractAsyncContextManager[PeerAnswer]: ...

    async def probe(self, peer: PeerId, question: AskLoads, *, limit: float) -> PresentLoads: ...

    def listen(
        self, *, advert: Callable[[Advert], None], connection: Callable[[PeerId, bool], None]
    ) -> None: ...


class Forwarding:
    """Asks candidates, at this node and over the network while there is one."""

    def __init__(
        self,
        *,
        candidates: Candidates,
        peers: PeerTable,
        experience: Experience,
        deadlines: Deadlines,
        limits: Callable[[Candidate], TimeLimits | None],
        on_claim: Callable[[PeerId, bytes, str], None],
    ) -> None:
        self.network: PeerNetwork | None = None
        self._candidates = candidates
        self._peers = peers
        self._experience = experience
        self._deadlines = deadlines
        #: The times that a candidate has, where they are not the usual ones.
        self._limits = limits
        self._on_claim = on_claim

    def ask(self, step: Step, attempts: Attempts, started: float, route: Route) -> Asking:
        """The candidate of that step, ready to be asked. The request came at `started`."""
        candidate, request = step.candidate, attempts.request
        deadlines = self._deadlines.with_limits(self._limits(candidate), request.limits)
        if self._experience.on_trial(candidate.measured) and attempts.may_go_elsewhere:
            deadlines = deadlines.on_trial(candidate)
        forwarded = self._forwarded(candidate, request, started, deadlines)
        whole = True
        if step.way == "continue" and isinstance(forwarded, GenerateRequest):
            assert attempts.so_far is not None
            forwarded, whole = continued(forwarded, attempts.so_far, candidate.offer), False
        return Asking(
            candidate,
            lambda: self._source(candidate, forwarded, deadlines.connect),
            deadlines=deadlines,
            experience=self._experience,
            kind=request.kind if whole else None,
            stamp=lambda origin: _seen_from_here(origin, candidate, route.policy, step.number),
            closed=self._closed,
            finished=route.finished,
            embed=request if isinstance(request, EmbedRequest) else None,
        )

    def _forwarded(
        self, candidate: Candidate, request: Asked, started: float, deadlines: Deadlines
    ) -> Asked:
        left, limits = request.deadline, None
        if left is not None:
            left = max(left - (trio.current_time() - started), 0.0)
        if deadlines is not self._deadlines and not candidate.own:  # its own may be shorter
            limits = TimeLimits(first_token=deadlines.first_token, gap=deadlines.gap)
        return msgspec.structs.replace(
            request,
            provider=candidate.provider,
            peer=None,
            policy=None,
            deadline=left,
            limits=limits,
            hedge=None,
        )

    def _source(
        self, candidate: Candidate, request: Asked, connect: float
    ) -> AbstractAsyncContextManager[Answering | PeerAnswer]:
        if not candidate.own:
            if self.network is None:
                raise ProviderUnavailable("this node has left the mesh")
            return self.network.ask(candidate.peer, request, connect=connect)
        backend = self._candidates.local(candidate.provider)
        if backend is None:
            raise ProviderUnavailable("this provider was removed")
        return answer_of(backend.provider, request)

    def _closed(self, candidate: Candidate, answer: PeerAnswer) -> None:
        """Take what a peer's closing frame carries beside the answer."""
        closing = answer.closing
        if closing is None:
            return
        now = trio.current_time()
        for name in self.provider_names(candidate.peer):
            load = closing.loads.get(name)
            if load is not None:
                self._experience.loads.report(BackendId(candidate.peer, name), load, now)
        claim, chunk = getattr(closing, "claim", None), getattr(closing, "chunk", None)
        if claim is not None and chunk is not None and chunk.cid:
            self._on_claim(candidate.peer, claim, chunk.cid)

    def provider_names(self, peer: PeerId) -> Sequence[str]:
        """The names under which a peer may say how busy it is."""
        state = self._peers.get(peer)
        return [provider.name for provider in state.providers] if state else []


def _seen_from_here(origin: Origin, candidate: Candidate, policy: str, attempts: int) -> Origin:
    """What a backend says of itself, with what this node knows better."""
    offer = candidate.offer
    stored_there = origin.cache == "hit-local" and not candidate.own
    return msgspec.structs.replace(
        origin,
        cache="hit-mesh" if stored_there else origin.cache,
        peer=candidate.peer,
        node=candidate.node,
        provider=origin.provider if origin.cache.startswith("hit") else candidate.provider,
        model=offer.id,
        policy=policy,
        attempts=attempts,
        weights=origin.weights or offer.weights,
        engine=origin.engine or offer.engine,
        numerics=origin.numerics or offer.numerics,
        price=offer.price,
    )
