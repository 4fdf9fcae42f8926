"""Whose present load is asked before a choice, and the asking.

What a node knows of its peers' load is as old as their last reply or advert. Where that is too old
to tell who is free, a few candidates are asked (as in Prequal), on the streams that are open to
them anyhow: that costs one round trip, where an answer takes many.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import trio

from .backend_id import BackendId
from .frames import AskLoads, Place, PresentLoads, RemoteProtocolError
from .loads import Loads
from .policies import Candidate, Work, expected_times
from .transport import PeerId, TransportError

logger = logging.getLogger(__name__)

#: Candidates asked at once, for one request.
MAX_PROBES = 5
#: What is known of a load is old after this share of an answer's time there, and this long (s).
OLD_SHARE, OLD_LEAST = 0.05, 0.02
#: A round trip may cost this share of the answer's time.
WORTH = 0.05
#: Seconds that a probe may take: so many round trips, within these bounds.
PATIENCE_ROUND_TRIPS, PATIENCE_LEAST, PATIENCE_MOST = 3.0, 0.05, 0.5
#: Round trips until the request is where the choice sent it.
CHOICE_ROUND_TRIPS = 2.0


def worth_probing(candidates: Sequence[Candidate], work: Work, now: float) -> Sequence[Candidate]:
    """Those whose present load could change who is chosen, the most promising first."""
    if len(candidates) < 2:
        return ()
    times = expected_times(candidates, work, now)
    best = math.inf
    old = []
    for candidate, time in zip(candidates, times, strict=True):
        if is_old(candidate, time.idle):
            old.append((time.idle, candidate))
        else:
            best = min(best, time.total)
    old.sort(key=lambda pair: pair[0])
    return [c for idle, c in old if idle < best and (c.rtt or 0.0) <= WORTH * idle][:MAX_PROBES]


def is_old(candidate: Candidate, service: float) -> bool:
    """Is what is known of its load too old to choose by, and can it be asked?"""
    if candidate.own or candidate.rtt is None or candidate.silent:
        return False
    return candidate.age > max(OLD_SHARE * service, OLD_LEAST)


class Prober(Protocol):
    """Asks a peer how busy its providers are (`mesh.network.Network.probe`)."""

    async def __call__(self, peer: PeerId, question: AskLoads, *, limit: float) -> PresentLoads: ...


class Probes:
    """Asks peers how busy they are; requests that want the same at once share one question."""

    def __init__(self, loads: Loads, providers: Callable[[PeerId], Sequence[str]]) -> None:
        self._loads = loads
        #: The names of the providers that a peer is known to have.
        self._providers = providers
        self._asked: dict[PeerId, trio.Event] = {}

    async def ask(self, candidates: Sequence[Candidate], probe: Prober, since: float) -> None:
        """Learn how busy they are now; who did not say it in time is `silent`. Never raises."""
        longest = max(c.rtt or 0.0 for c in candidates)
        limit = min(max(PATIENCE_ROUND_TRIPS * longest, PATIENCE_LEAST), PATIENCE_MOST)
        question = AskLoads(model=candidates[0].offer.id, within=CHOICE_ROUND_TRIPS * longest)
        peers = {candidate.peer for candidate in candidates}
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(self._ask, peer, question, limit, probe)
        for candidate in candidates:
            told = self._loads.told(candidate.backend)
            candidate.silent = told is None or told < since

    async def _ask(self, peer: PeerId, question: AskLoads, limit: float, probe: Prober) -> None:
        asked = self._asked.get(peer)
        if asked is not None:
            with trio.move_on_after(limit):
                await asked.wait()
            return
        self._asked[peer] = trio.Event()
        try:
            await self._learn(peer, question, limit, probe)
        finally:
            self._asked.pop(peer).set()

    async def _learn(self, peer: PeerId, question: AskLoads, limit: float, probe: Prober) -> None:
        sent = {name: self._in_flight(peer, name) for name in self._providers(peer)}
        try:
            said = await probe(peer, question, limit=limit)
        except (TransportError, RemoteProtocolError) as error:
            logger.debug("peer %s did not say how busy it is: %s", peer, error)
            return
        now = trio.current_time()
        for name, known in sent.items():
            load = said.loads.get(name)
            if load is not None:
                backend = BackendId(peer, name)
                self._loads.report(backend, load, now, known=known, rivals=said.rivals)

    def _in_flight(self, peer: PeerId, provider: str) -> int:
        return self._loads.in_flight(BackendId(peer, provider))


async def place_of(request_id: str, candidates: Iterable[Candidate], probe: Prober) -> Place | None:
    """Where a request stands that waits at one of these. None: it does not, or nobody says."""
    for candidate in candidates:
        if candidate.own:
            continue
        try:
            said = await probe(candidate.peer, AskLoads(request=request_id), limit=PATIENCE_MOST)
        except (TransportError, RemoteProtocolError) as error:
            logger.debug("peer %s did not say where a request stands: %s", candidate.peer, error)
        else:
            if said.place is not None:
                return said.place
    return None
