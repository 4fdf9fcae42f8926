"""The parts that answer a request on this machine, joined: what `up` and `ask` have in common."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

import trio

from ..cache.answers import AnswerCache, Limits
from ..cache.blocks import SqliteBlocks
from ..cache.claim_index import ClaimIndex
from ..cache.claims import ClaimLog, Sign
from ..cache.conduct import Conduct
from ..cache.database import Database
from ..cache.kubo import KuboBlocks
from ..cache.layers import LayeredBlocks
from ..cache.namespaces import Namespaces
from ..cache.trust import Trust
from ..mesh.asking import Deadlines
from ..mesh.backends import BackendManager
from ..mesh.identity import Identity, verify
from ..mesh.peers import PeerTable
from ..mesh.policies import Candidate
from ..providers.base import TimeLimits
from ..providers.registry import options_fault
from .config_sections import Config
from .home import Home
from .ledger import Ledger
from .metrics import Metrics
from .names import Names
from .node_database import NodeDatabase
from .own_providers import LOCAL, OwnProviders, build_providers
from .permissions import Permissions
from .pricing import Purse
from .reading import Reading
from .rights import Rights
from .router import Router
from .sharing import Sharing
from .trace import Trace


def version() -> str:
    """The installed version."""
    return importlib.metadata.version("promptmesh")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What answers requests here. The databases are open for as long as they are."""

    peer: str
    #: Signs as this node.
    sign: Sign
    node: str
    providers: OwnProviders
    database: Database
    node_database: NodeDatabase
    blocks: SqliteBlocks
    #: With the Kubo behind them; None: there is none.
    layers: LayeredBlocks | None
    answers: AnswerCache
    namespaces: Namespaces
    permissions: Permissions
    #: What each peer may.
    rights: Rights
    ledger: Ledger
    #: Pays what this node's providers cost.
    purse: Purse
    reading: Reading
    peers: PeerTable
    backends: BackendManager
    names: Names
    claims: ClaimIndex
    trust: Trust
    sharing: Sharing
    trace: Trace
    metrics: Metrics

    def router(self, config: Config, nursery: trio.Nursery) -> Router:
        """A router over them; the computations that requests share run in the nursery."""
        return Router(
            backends=self.backends,
            names=self.names,
            answers=self.answers,
            shared=self.sharing,
            ledger=self.ledger,
            nursery=nursery,
            peer=self.peer,
            node_of=self.node_of,
            reuse=config.cache.reuse,
            deadline=config.deadlines.whole,
            min_agreement=config.cache.min_agreement,
            urge=self.providers.urge,
            trace=self.trace,
        )

    def node_of(self, peer: str) -> str:
        """The name of a peer's node, as far as it is known."""
        if peer == self.peer:
            return self.node
        state = self.peers.get(peer)
        return state.node if state else ""


@contextmanager
def open_parts(config: Config, home: Home, environment: Mapping[str, str]) -> Iterator[Parts]:
    """Build them.

    Raises `SettingsError` or `HomeError` for what is wrong in the configuration or the folder.
    """
    identity = Identity(home.identity())
    peer = identity.peer_id
    node_database = NodeDatabase(home.database_path)
    ledger = Ledger(node_database, peer=peer)
    purse = Purse(
        ledger,
        peer=peer,
        per_day=config.limits.max_cost_per_day,
        per_day_by_members=config.limits.max_member_cost_per_day,
    )
    database = Database(home.cache_path)
    try:
        providers = build_providers(config, environment, home.path, purse)
        rights = Rights(node_database)
        blocks = SqliteBlocks(database)
        limits = Limits(
            max_bytes=config.cache.max_bytes,
            default_ttl=config.cache.ttl,
            max_ttl=config.cache.ttl,
        )
        answers = AnswerCache(database, blocks, peer=peer, limits=limits)
        conduct = Conduct(database)
        claims = ClaimIndex(database, peer=peer, verify=verify, conduct=conduct)
        namespaces = Namespaces()
        permissions = Permissions(
            answers=answers, namespaces=namespaces, may_use_cache=rights.may_cache
        )
        peers = PeerTable(peer)
        trust = Trust(
            conduct,
            own=peer,
            trusted=config.cache.trust,
            min_agreement=config.cache.min_agreement,
            name_of=peers.name_of,
            allowed=rights.may_cache,
        )
        layers = _layers(config, blocks, permissions)
        sharing = Sharing(
            answers=answers,
            blocks=blocks,
            log=ClaimLog(database, peer=peer, sign=identity.sign),
            index=claims,
            conduct=conduct,
            trust=trust,
            namespaces=namespaces,
            permissions=permissions,
            peer=peer,
            rng=Random(),
        )
        metrics = Metrics(peer)
        trace = Trace(metrics)
        backends = BackendManager(
            local=providers.backends,
            peers=peers,
            policy=config.mesh.policy,
            peer_id=peer,
            node=config.node.name,
            rng=Random(),
            deadlines=Deadlines(
                connect=config.deadlines.connect,
                first_token=config.deadlines.first_token,
                gap=config.deadlines.gap,
            ),
            limits=functools.partial(time_limits, config),
            on_claim=sharing.take_claim,
            why_not_ask=rights.why_not_ask,
            options_fault=options_fault,
            prefer=config.mesh.prefer,
            hedge=config.mesh.hedge,
            on_route=trace.route,
        )
        yield Parts(
            peer=peer,
            sign=identity.sign,
            node=config.node.name,
            providers=providers,
            database=database,
            node_database=node_database,
            blocks=blocks,
            layers=layers,
            answers=answers,
            namespaces=namespaces,
            permissions=permissions,
            rights=rights,
            ledger=ledger,
            purse=purse,
            reading=Reading(
                blocks=blocks, permissions=permissions, beyond=layers.beyond if layers else None
            ),
            peers=peers,
            backends=backends,
            names=Names(backends.sources, prefer=config.mesh.prefer, is_paused=backends.is_paused),
            claims=claims,
            trust=trust,
            sharing=sharing,
            trace=trace,
            metrics=metrics,
        )
    finally:
        database.close()
        ledger.write()
        node_database.close()


def time_limits(config: Config, candidate: Candidate) -> TimeLimits | None:
    """What the configuration says of the time that a candidate has."""
    if not candidate.own:
        peers = config.deadlines.peers
        return peers.get(candidate.peer) or peers.get(candidate.node)
    # What was found here has no table.
    local = config.local_hf.deadlines if candidate.provider in LOCAL else None
    tables = (table.deadlines for table in config.providers if table.name == candidate.provider)
    return next(tables, local)


def _layers(config: Config, blocks: SqliteBlocks, permissions: Permissions) -> LayeredBlocks | None:
    kubo = config.kubo
    if not kubo.api:
        return None
    return LayeredBlocks(
        blocks,
        KuboBlocks(kubo.api, timeout=kubo.timeout),
        # A Kubo is a program like any other, and gives what it has to whoever reaches it.
        may_leave=functools.partial(permissions.may_serve, None),
        publish=kubo.publish,
        pin=kubo.pin,
    )
