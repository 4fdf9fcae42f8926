"""The candidates for a request: who offers the model, how busy and how fast they are.

This node's own providers are candidates like those of its peers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import trio

from ..providers.base import Asked, GenerateRequest, ModelOffer, Priority, Provider
from .adverts import ProviderAdvert
from .backend_id import BackendId, Measured
from .frames import Load
from .ladder import Bill, is_paid
from .loads import Busy
from .measure import Experience
from .peers import Offered, PeerState, PeerTable
from .policies import Allowance, Candidate
from .ruling_out import Obstacle, RuledOut, rule_out
from .transport import PeerId

#: Seconds after which a node may be back that was lost no longer than `JUST_LOST` (s) ago; after
#: which any other node may be, or a provider that is not ready.
BACK_SOON, JUST_LOST, BACK_LATER = 1.0, 10.0, 5.0


class HasLoad(Protocol):
    """How busy a provider of this node is."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def wait(self) -> float | None: ...


@dataclass(frozen=True, kw_only=True)
class LocalBackend:
    """A provider of this node."""

    provider: Provider
    name: str
    kind: str
    #: May peers use it?
    shared: bool
    #: How busy it is to a request of that priority, which does not wait for less urgent ones.
    load: Callable[[Priority], HasLoad]
    #: It spends somebody's money or subscription, where an offer has no price.
    paid: bool = False
    #: Not while its last check found it unavailable.
    available: Callable[[], bool] = lambda: True
    #: What may still be spent there today, by the asker (`GenerateRequest.asker`).
    allowance: Callable[[PeerId], Allowance] = lambda asker: Allowance()


class Source(NamedTuple):
    """A model as one provider of one node offers it."""

    peer: PeerId
    node: str
    provider: str
    kind: str
    offer: ModelOffer
    own: bool
    #: Not where its provider says that it is unavailable, or its node cannot or may not be asked.
    available: bool = True
    #: It spends somebody's money or subscription, where the offer has no price.
    paid: bool = False


class Candidates:
    """What this node knows of everybody who offers a model."""

    def __init__(
        self,
        *,
        local: Callable[[], Sequence[LocalBackend]],
        peers: PeerTable,
        peer_id: PeerId,
        node: str,
        experience: Experience,
        why_not_ask: Callable[[PeerId], str] = lambda peer: "",
        options_fault: Callable[[str, Mapping[str, Any]], str] = lambda kind, extra: "",
    ) -> None:
        """`why_not_ask` says why no request may go to a peer, "" if it may; `options_fault` why a
        provider of that kind does not take what a request says in its `extra`."""
        self._why_not_ask = why_not_ask
        self._options_fault = options_fault
        self._local = local
        self._peers = peers
        self._peer_id = peer_id
        self._node = node
        self._experience = experience

    def sources(self, *, with_peers: bool, only_shared: bool = False) -> Iterator[Source]:
        """Every model with who offers it: this node's own providers, then the peers'."""
        for backend in self._local():
            for offer in backend.provider.models() if backend.shared or not only_shared else ():
                yield Source(
                    self._peer_id,
                    self._node,
                    backend.name,
                    backend.kind,
                    offer,
                    True,
                    backend.available(),
                    backend.paid,
                )
        for offered in self._peers.models().values() if with_peers else ():
            for peer, provider, offer in offered:
                yield Source(
                    peer.peer,
                    peer.node,
                    provider.name,
                    provider.kind,
                    offer,
                    False,
                    self._may_answer(peer, provider),
                    provider.paid,
                )

    def _may_answer(self, peer: PeerState, provider: ProviderAdvert) -> bool:
        return (
            peer.state != "unreachable"
            and provider.state != "unavailable"
            and not self._why_not_ask(peer.peer)
        )

    def is_paused(self, source: Source) -> bool:
        """Did it fail or refuse lately, so that it is left alone?"""
        what = Measured(source.peer, source.provider, source.offer.id)
        return self._experience.held_back(what, trio.current_time()) is not None

    def local(self, name: str) -> LocalBackend | None:
        """This node's provider of that name."""
        return next((b for b in self._local() if b.name == name), None)

    def loads(self) -> dict[str, Load]:
        """How busy the providers are that peers may use."""
        return {b.name: _load(b, "member") for b in self._local() if b.shared}

    def sort(
        self, request: Asked, *, with_peers: bool, only_shared: bool
    ) -> tuple[list[Candidate], list[RuledOut]]:
        """Who may answer, and who not and why."""
        suitable, ruled_out = [], []
        for candidate, obstacle in self._of(request, with_peers, only_shared):
            reason = rule_out(candidate, request, obstacle)
            if reason is None:
                suitable.append(candidate)
            else:
                ruled_out.append(reason)
        return suitable, ruled_out

    def refresh(self, candidates: Sequence[Candidate], priority: Priority) -> None:
        """Take over what was learnt of their load since they were sorted."""
        now = trio.current_time()
        loads = self._experience.loads
        for candidate in candidates:
            busy = None
            if candidate.own:
                backend = self.local(candidate.provider)
                if backend is not None:
                    busy = self._own_busy(backend, priority)
            else:
                known = Load(running=candidate.busy.others, slots=candidate.busy.slots)
                busy = loads.get(candidate.backend, known)
                candidate.age = now - busy.at
            if busy is not None:
                candidate.busy = busy

    def _of(
        self, request: Asked, with_peers: bool, only_shared: bool
    ) -> Iterator[tuple[Candidate, Obstacle | None]]:
        now = trio.current_time()
        bill = Bill(
            request, lambda: self._experience.measures.length(request.model, kind=request.kind)
        )
        for backend in self._local():
            if backend.shared or not only_shared:
                for offer in backend.provider.models():
                    if offer.id == request.model:
                        candidate = self._own(backend, offer, request, bill)
                        yield candidate, self.obstacle(candidate, now)
        for offered in self._peers.offers(request.model) if with_peers else ():
            candidate = self._remote(offered, now, request, bill)
            yield candidate, self.obstacle(candidate, now)

    def _own(
        self, backend: LocalBackend, offer: ModelOffer, request: Asked, bill: Bill
    ) -> Candidate:
        busy = self._own_busy(backend, request.priority)
        paid = is_paid(offer.price, backend.paid)
        return Candidate(
            peer=self._peer_id,
            node=self._node,
            provider=backend.name,
            offer=offer,
            own=True,
            busy=busy,
            speed=self._experience.measures.get(Measured(self._peer_id, backend.name, offer.id)),
            paid=paid,
            cost=bill.at(offer.price, paid=paid),
            allowance=backend.allowance(request.asker),
            forbidden=self._unfit(backend.kind, request),
        )

    def _unfit(self, kind: str, request: Asked) -> str:
        """Why no provider of that kind takes the request; "": it does."""
        if not request.extra or not isinstance(request, GenerateRequest):
            return ""
        return self._options_fault(kind, request.extra)

    def _own_busy(self, backend: LocalBackend, priority: Priority) -> Busy:
        """All its requests come through here: what it counts are ours."""
        load = _load(backend, priority)
        count = load.running + load.waiting
        return Busy(0, count, load.slots, told=count, wait=load.wait, at=trio.current_time())

    def _remote(self, offered: Offered, now: float, request: Asked, bill: Bill) -> Candidate:
        peer, provider, offer = offered
        paid = is_paid(offer.price, provider.paid)
        busy = self._experience.loads.get(BackendId(peer.peer, provider.name), provider.load)
        return Candidate(
            peer=peer.peer,
            node=peer.node,
            provider=provider.name,
            offer=offer,
            busy=busy,
            age=now - busy.at,
            rtt=peer.rtt,
            speed=self._experience.measures.get(Measured(peer.peer, provider.name, offer.id)),
            said_ttft=provider.ttft,
            said_rate=provider.rate,
            forbidden=self._why_not_ask(peer.peer) or self._unfit(provider.kind, request),
            paid=paid,
            cost=bill.at(offer.price, paid=paid),
        )

    def obstacle(self, candidate: Candidate, now: float) -> Obstacle | None:
        """What keeps it from being asked now. It may be news since the candidates were sorted."""
        peer = None if candidate.own else self._peers.get(candidate.peer)
        if peer is not None and peer.state == "unreachable":
            wait = BACK_SOON if now < peer.since + JUST_LOST else BACK_LATER
            return Obstacle(f"its node is not reachable: {peer.reason}", wait)
        held = self._experience.held_back(candidate.measured, now)
        if held is None:
            return None if peer is None else _not_ready(peer, candidate.provider)
        what = "refused such a request" if held.refused else "failed"
        reason = f"it {what} and is left alone for {held.wait:.1f} s more: {held.reason}"
        return Obstacle(reason, held.wait, held.refused)


def _load(backend: LocalBackend, priority: Priority) -> Load:
    load = backend.load(priority)
    slots = max(load.slots, 1)
    return Load(running=load.running, waiting=load.waiting, slots=slots, wait=load.wait)


def _not_ready(peer: PeerState, name: str) -> Obstacle | None:
    """What its node says of the provider of that name."""
    for provider in peer.providers:
        if provider.name == name and provider.state != "ready":
            return Obstacle(f"it is {provider.state}: {provider.reason}", BACK_LATER)
    return None
