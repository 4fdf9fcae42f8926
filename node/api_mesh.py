"""The routes about the node itself: `/mesh/v1/*`, `/healthz`, `/readyz`."""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import msgspec
import trio

from ..cache.answers import AnswerCache
from ..cache.layers import FurtherState
from ..mesh.addresses import is_circuit
from ..mesh.adverts import Machine, ProviderAdvert
from ..mesh.backend_id import BackendId, Measured
from ..mesh.measure import Experience, Speed
from ..mesh.peers import TWIN_SHOWN, PeerState, PeerTable
from ..mesh.transport import Reach, Relaying, TransportError
from .api_rights import rights_fields
from .http_server import Request, Responder
from .own_providers import OwnProviders
from .provider_rows import advert_row, own_row
from .rights import Restricted, Rights
from .routes import send_problem

logger = logging.getLogger(__name__)

JSON = "application/json"
#: What is said of a peer that speaks in two epochs at once.
TWINS = "two nodes have its identity, as happens where a folder was copied"


class Reached(Protocol):
    """How this node is reached by others."""

    @property
    def addresses(self) -> list[str]: ...

    @property
    def reachability(self) -> Reach: ...


class MembershipControl(Reached, Protocol):
    """What can be told to the mesh membership (`node.membership.Membership`)."""

    @property
    def problem(self) -> str: ...

    @property
    def relaying(self) -> Relaying | None: ...

    async def reload(self) -> None: ...

    async def leave(self) -> None: ...


class MeshApi:
    """The handlers of `/mesh/v1/*`."""

    def __init__(
        self,
        *,
        peer: str,
        node: str,
        policy: str,
        peers: PeerTable,
        providers: OwnProviders,
        machine: Callable[[], Machine],
        answers: AnswerCache,
        claims: Callable[[float], int],
        kubo: Callable[[], FurtherState] | None = None,
        membership: MembershipControl,
        rights: Rights,
        experience: Experience,
        ready: Callable[[], bool],
    ) -> None:
        self._peer = peer
        self._node = node
        self._policy = policy
        self._peers = peers
        self._providers = providers
        self._machine = machine
        self._answers = answers
        #: How many claims of other nodes to have computed an answer hold at a time.
        self._claims = claims
        self._kubo = kubo
        self._membership = membership
        self._rights = rights
        #: What requests to the peers have taught.
        self._experience = experience
        self._ready = ready
        self._started = time.time()

    async def status(self, request: Request, responder: Responder) -> None:
        """`GET /mesh/v1/status`."""
        now = time.time()
        stat = await self._answers.stat(now=now)
        connected = sum(peer.state == "connected" for peer in self._peers)
        fields = {
            "peer": self._peer,
            "node": self._node,
            "version": importlib.metadata.version("promptmesh"),
            "started_at": int(self._started),
            "policy": self._policy,
            "addresses": self._membership.addresses,
            "mesh": {
                "connected": connected,
                "reachability": self._membership.reachability,
                "relaying": self._relaying(),
                "problem": self._membership.problem or None,
            },
            "machine": _machine(self._machine()),
            "providers": [own_row(p) for p in self._providers],
            "cache": {
                "answers": stat.answers,
                "bytes": stat.bytes,
                "max_bytes": stat.max_bytes,
                "hits": stat.hits,
                "tokens_saved": stat.tokens_saved,
                "claims": self._claims(now),
            },
            "kubo": self._kubo() if self._kubo else None,
        }
        await _send(responder, fields)

    async def peers(self, request: Request, responder: Responder) -> None:
        """`GET /mesh/v1/peers`: this node, then the others."""
        machine = _machine(self._machine())
        own: dict[str, Any] = {
            "peer": self._peer,
            "node": self._node,
            "state": "connected",
            "address": next(iter(self._membership.addresses), ""),
            "via": "",
            "ipfs": "",
            "providers": [advert_row(p.advert()) for p in self._providers],
            "gpus": machine["gpus"],
            "machine": machine,
            "reason": self._membership.problem,
            "warning": reach_warning(self._membership),
            "relaying": self._relaying(),
            **rights_fields(Restricted()),
        }
        now = trio.current_time()
        others = sorted(self._peers, key=lambda p: (p.state, p.node, p.peer))
        rows = [self._peer_row(p, now) | rights_fields(self._rights.of(p.peer)) for p in others]
        await _send(responder, [own, *rows, *self._absent()])

    def _relaying(self) -> dict[str, Any] | None:
        """For whom this node keeps a place as a relay, and the circuits through it."""
        relaying = self._membership.relaying
        if relaying is None:
            return None
        return {
            "places": [self._named(peer) for peer in relaying.places],
            "circuits": [
                {"from": self._named(source), "to": self._named(target), "count": count}
                for (source, target), count in sorted(relaying.circuits.items())
            ],
        }

    def _named(self, peer: str) -> dict[str, str]:
        return {"peer": peer, "node": self._peers.name_of(peer)}

    def _peer_row(self, peer: PeerState, now: float) -> dict[str, Any]:
        machine = _machine(peer.advert.machine if peer.advert else Machine())
        return {
            "peer": peer.peer,
            "node": peer.node,
            "state": peer.state,
            "address": peer.address,
            "via": peer.via,
            # A peer that is no member is one of IPFS: it has the mesh secret, and exchanges blocks.
            "ipfs": peer.agent if peer.foreign else "",
            "providers": [self._provider_of(peer.peer, p, now) for p in peer.providers],
            "gpus": machine["gpus"],
            "machine": machine,
            "rtt_ms": None if peer.rtt is None else round(peer.rtt * 1000, 3),
            # The table counts in monotonic seconds, which mean nothing outside.
            "since": int(time.time() - (now - peer.since)),
            "reason": peer.reason,
            "warning": TWINS if now < peer.twin + TWIN_SHOWN else "",
        }

    def _provider_of(self, peer: str, advert: ProviderAdvert, now: float) -> dict[str, Any]:
        """What a peer claims of a provider, and what this node measured."""
        backend = BackendId(peer, advert.name)
        seen = self._experience
        asked = [Measured(peer, advert.name, offer.id) for offer in advert.models]
        refusals = (refusal for what in asked if (refusal := seen.refusals.refusal(what, now)))
        refusal = seen.breakers.refusal(backend, now) or next(refusals, None)
        speeds = ((what.model, seen.measures.get(what)) for what in asked)
        return advert_row(advert) | {
            "measured": [_measured(model, speed, now) for model, speed in speeds if speed],
            "in_flight": seen.loads.in_flight(backend),
            "paused": refusal and {"seconds": round(refusal[0], 1), "reason": refusal[1]},
        }

    def _absent(self) -> Iterator[dict[str, Any]]:
        """The peers that may not everything and are not in the table."""
        for peer, restricted in self._rights.restricted().items():
            if self._peers.get(peer) is None:
                state = PeerState(peer, reason="it is not in the mesh now")
                row = self._peer_row(state, trio.current_time()) | rights_fields(restricted)
                yield row | {"node": restricted.node, "since": None}

    async def providers(self, request: Request, responder: Responder) -> None:
        """`GET /mesh/v1/providers`: this node's own."""
        await _send(responder, [own_row(p) for p in self._providers])

    async def reload(self, request: Request, responder: Responder) -> None:
        """`POST /mesh/v1/reload`: be in the mesh that the home folder now names."""
        try:
            await self._membership.reload()
        except TransportError as error:
            await send_problem(responder, 502, str(error))
            return
        await _send(responder, {"addresses": self._membership.addresses})

    async def leave(self, request: Request, responder: Responder) -> None:
        """`POST /mesh/v1/leave`: tell the peers, and be alone."""
        await self._membership.leave()
        await _send(responder, {"left": True})

    async def healthz(self, request: Request, responder: Responder) -> None:
        """`GET /healthz`: the process answers."""
        await _send(responder, {"status": "ok"})

    async def readyz(self, request: Request, responder: Responder) -> None:
        """`GET /readyz`: there is a model that can be asked."""
        if self._ready():
            await _send(responder, {"status": "ready"})
            return
        waiting = [f"{p.name}: {p.health.state} {p.health.reason}" for p in self._providers]
        reason = "; ".join(waiting) or "no provider is configured, and no peer offers a model"
        await _send(responder, {"status": "not ready", "reason": reason}, status=503)


async def _send(responder: Responder, value: Any, status: int = 200) -> None:
    await responder.send(status, msgspec.json.encode(value), content_type=JSON)


def reach_warning(membership: Reached) -> str:
    """What its owner should know of how this node is reached."""
    if membership.reachability != "unreachable":
        return ""
    if any(is_circuit(address) for address in membership.addresses):
        return "members cannot dial this node; they reach it through a relay"
    return "members cannot dial this node, and none of them relays for it (docs/nat.md)"


def _machine(machine: Machine) -> dict[str, Any]:
    """All its fields: on the wire those that have their default are left out."""
    fields = msgspec.structs.asdict(machine)
    fields["gpus"] = [msgspec.structs.asdict(gpu) for gpu in machine.gpus]
    return fields


def _measured(model: str, speed: Speed, now: float) -> dict[str, Any]:
    """What this node saw of a peer's model."""
    return {
        "model": model,
        "ttft_s": speed.ttft and round(speed.ttft, 4),
        "tokens_per_s": speed.rate and round(speed.rate, 2),
        "answers": speed.answers,
        "errors": round(speed.errors_at(now), 3),
    }
