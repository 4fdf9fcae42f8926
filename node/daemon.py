"""The daemon: opens everything in one nursery, serves until it is told to stop, closes in order."""

from __future__ import annotations

import functools
import gc
import logging
import resource
import signal
from contextlib import AbstractAsyncContextManager
from random import Random
from typing import TYPE_CHECKING

import msgspec
import trio

from ..cache.keys import key_text
from ..cache.layers import PublicStore
from ..mesh.adverts import Advert
from ..mesh.frames import Place
from ..mesh.serving import Services
from ..mesh.transport import TransportError
from ..providers.base import Answering, Asked, EmbedRequest
from ..providers.options import SettingsError
from ..providers.private_folder import remove_abandoned
from ..providers.slots import Waiting
from .api_cache import CacheApi
from .api_embeddings import EmbeddingsApi
from .api_ipfs import IpfsApi
from .api_kubo_commands import kubo_api
from .api_mesh import MeshApi
from .api_metrics import MetricsApi
from .api_openai import OpenAIApi
from .api_requests import RequestsApi
from .api_rights import RightsApi
from .api_share import ShareApi
from .api_usage import UsageApi
from .config import child_environment, home_path
from .config_sections import Config
from .embed_router import EmbedRouter
from .finding_servers import ServerFinder
from .home import Home, HomeError
from .http_server import HttpServer, Limits, open_listeners
from .logs import set_up_logging
from .machine import Gpus, read_machine
from .membership import Membership
from .parts import Parts, open_parts, version
from .rights import unstored
from .routes import Routes
from .waiting_notes import WaitingNotes

if TYPE_CHECKING:
    # The stubs that come with libp2p know `trio` without it.
    from trio_typing import TaskStatus

logger = logging.getLogger(__name__)

#: What keeps a node from starting and says so in a sentence.
_REFUSALS = (SettingsError, HomeError, TransportError, PublicStore, OSError)
#: Seconds that answers in progress get when the node is told to stop.
GRACE = 1.0
#: Seconds between two looks at the machine: NVML takes a few milliseconds a card.
MACHINE_PERIOD = 2.0
#: Files and sockets that may be open at once.
OPEN_FILES = 16384


def run(config: Config, home: Home) -> int:
    """Run a node until SIGINT or SIGTERM. Returns the process's exit status.

    Who calls holds `home.lock()`.
    """
    set_up_logging(json_lines=config.node.json_logs)
    _allow_many_files()
    started = trio.Event()
    try:
        trio.run(_main, config, home, started)
    except Exception as error:  # a fault that is no refusal ends the process, with its traceback
        refusal = _refusal(error)
        if refusal is None or started.is_set():
            raise
        return _refuse(refusal)
    return 0


def _allow_many_files() -> None:
    """Raise the limit of open files: HTTP and mesh connections together exceed the usual 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _refusal(error: Exception) -> Exception | None:
    """What keeps the node from starting, out of the groups of the nurseries around it."""
    if isinstance(error, ExceptionGroup):
        refusals = [_refusal(each) for each in error.exceptions]
        return None if None in refusals else refusals[0]
    return error if isinstance(error, _REFUSALS) else None


def _refuse(error: Exception) -> int:
    # An `OSError` of ours says what is wrong in words; the number before them helps nobody.
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    logger.error("the node cannot start: %s", reason)
    return 1


async def _main(config: Config, home: Home, started: trio.Event) -> None:
    with open_parts(config, home, child_environment()) as parts:
        async with trio.open_nursery() as nursery:
            node = Node(config, home, parts, nursery)
            await nursery.start(_stop_on_signals, node)
            await node.run(started)
            nursery.cancel_scope.cancel()


class Node:
    """All of a node, joined. Its tasks run in the nursery given."""

    def __init__(self, config: Config, home: Home, parts: Parts, nursery: trio.Nursery) -> None:
        self._config = config
        self._home = home
        self._parts = parts
        self._nursery = nursery
        self.scope = nursery.cancel_scope
        #: Set when the node is told to stop.
        self.stopping = trio.Event()
        self._sharing = parts.sharing
        self._router = parts.router(config, nursery)
        self._embed_router = EmbedRouter(self._router)
        self._gpus = Gpus()
        self._machine = read_machine(self._gpus)
        self._membership = Membership(
            config=config.mesh,
            home=home,
            table=parts.peers,
            backends=parts.backends,
            sharing=self._sharing,
            reading=parts.reading,
            services=self._services(),
            describe=self._describe,
            rng=Random(),
            admits=parts.rights.may_connect,
        )
        parts.providers.on_change += [parts.backends.health_changed, self._membership.changed]

    async def run(self, started: trio.Event) -> None:
        """Serve until `stopping` is set, then close in order. Sets `started` once all runs."""
        if self._parts.layers is not None:
            await self._parts.layers.start()
        server = HttpServer(
            self._routes(),
            Limits(
                max_body=self._config.limits.max_body,
                max_connections=self._config.limits.max_connections,
            ),
        )
        http = self._config.http
        listeners = await open_listeners(http.host, http.port)
        port = listeners[0].socket.getsockname()[1]
        address = f"[{http.host}]:{port}" if ":" in http.host else f"{http.host}:{port}"
        await self._nursery.start(server.serve, listeners)
        with self._home.announced(address):
            self._nursery.start_soon(trio.to_thread.run_sync, remove_abandoned)
            await self._nursery.start(self._parts.providers.run)
            self._nursery.start_soon(ServerFinder(self._config, self._parts.providers).run)
            self._nursery.start_soon(self._parts.answers.run)
            self._nursery.start_soon(self._parts.ledger.run)
            if self._parts.layers is not None:
                self._nursery.start_soon(self._parts.layers.run)
            self._nursery.start_soon(self._sharing.run)
            self._nursery.start_soon(self._watch_machine)
            await self._nursery.start(self._membership.run)
            self._say_hello(address)
            _spare_the_collector()
            started.set()
            await self.stopping.wait()
        async with trio.open_nursery() as closing:
            closing.start_soon(server.stop, GRACE)
            closing.start_soon(self._membership.announce_leaving)

    # --- what the mesh is told

    def _describe(self) -> Advert:
        return Advert(
            node=self._parts.node,
            version=version(),
            machine=self._machine,
            providers=self._parts.providers.adverts(),
        )

    async def _watch_machine(self) -> None:
        limiter = trio.CapacityLimiter(1)
        while True:
            await trio.sleep(MACHINE_PERIOD)
            self._machine = await trio.to_thread.run_sync(read_machine, self._gpus, limiter=limiter)

    # --- what peers may ask

    def _services(self) -> Services:
        return Services(
            answer=self._answer_peer,
            block=self._sharing.block,
            claims=self._sharing.since,
            put_claims=self._sharing.put_claims,
            find_claims=self._sharing.find_claims,
            loads=self._parts.backends.loads,
            claim_for=self._sharing.claim_for,
            place=self._place_of_peers,
            may_serve=self._parts.rights.may_serve,
        )

    def _answer_peer(self, request: Asked, peer: str) -> AbstractAsyncContextManager[Answering]:
        request = msgspec.structs.replace(request, asker=peer)
        if not self._parts.rights.may_cache(peer):
            request = unstored(request)
        if isinstance(request, EmbedRequest):
            return self._embed_router.open(request, local_only=True)
        return self._router.open(request, local_only=True)

    # --- what programs may ask

    def _routes(self) -> Routes:
        parts = self._parts
        cache = self._config.cache
        written = functools.partial(key_text, form=cache.key, base=cache.cid_base)
        notes = WaitingNotes(self._nursery, waiting=self._where_it_waits, busy=self._busy)
        openai = OpenAIApi(self._router, parts.names, notes, written)
        embeddings = EmbeddingsApi(self._embed_router, written)
        ipfs = IpfsApi(parts.reading)
        kubo = kubo_api(
            parts,
            self._membership,
            cache_path=self._home.cache_path,
            max_bytes=cache.max_bytes,
            max_body=self._config.limits.max_body,
        )
        mesh = MeshApi(
            peer=parts.peer,
            node=parts.node,
            policy=self._config.mesh.policy,
            peers=parts.peers,
            providers=parts.providers,
            machine=lambda: self._machine,
            answers=parts.answers,
            claims=parts.claims.live,
            kubo=parts.layers.state if parts.layers else None,
            membership=self._membership,
            rights=parts.rights,
            experience=parts.backends.experience,
            ready=lambda: bool(parts.backends.models()),
        )
        routes = Routes()
        routes.add("POST", "/v1/chat/completions", openai.chat_completions)
        routes.add("POST", "/v1/embeddings", embeddings.embeddings)
        routes.add("GET", "/v1/models", openai.models)
        routes.add("GET", "/mesh/v1/status", mesh.status)
        routes.add("GET", "/mesh/v1/peers", mesh.peers)
        routes.add("GET", "/mesh/v1/providers", mesh.providers)
        requests = RequestsApi(
            parts.trace,
            written,
            reuse=cache.reuse,
            node_of=parts.node_of,
            waiting=self._where_it_waits,
        )
        routes.add("GET", "/mesh/v1/requests", requests.last)
        routes.add_below("GET", "/mesh/v1/requests/", requests.one)
        routes.add("POST", "/mesh/v1/reload", mesh.reload)
        routes.add("POST", "/mesh/v1/leave", mesh.leave)
        routes.add("GET", "/healthz", mesh.healthz)
        routes.add("GET", "/readyz", mesh.readyz)
        bring = parts.layers.bring if parts.layers else None
        CacheApi(
            parts.answers,
            parts.blocks,
            bring,
            claimed=self._sharing.claimed,
            node_of=parts.node_of,
        ).add_to(routes)
        ShareApi(parts).add_to(routes)
        UsageApi(parts.ledger, parts.node_of).add_to(routes)
        MetricsApi(parts).add_to(routes)
        RightsApi(
            parts.rights,
            peer=parts.peer,
            node=parts.node,
            peers=parts.peers,
            changed=self._membership.admission_changed,
        ).add_to(routes)
        routes.add_below("GET", "/ipfs/", ipfs.content)
        kubo.add_to(routes)
        return routes

    async def _where_it_waits(self, request_id: str) -> Waiting | None:
        """Where a request stands, or the one whose computation it shares, here or at a peer."""
        parts, worker = self._parts, self._parts.trace.worker(request_id)
        waiting, record = parts.providers.waiting(worker), parts.trace.find(worker)
        if waiting is not None or record is None or record.route is None:
            return waiting
        place = await parts.backends.place_at_peer(worker, record.route)
        return None if place is None else Waiting(place=place.place, of=place.of, wait=place.wait)

    def _place_of_peers(self, request_id: str, peer: str) -> Place | None:
        """Where a peer's request stands here."""
        parts = self._parts
        if not parts.trace.is_of(request_id, peer):
            return None
        waiting = parts.providers.waiting(parts.trace.worker(request_id))
        if waiting is None:
            return None
        return Place(place=waiting.place, of=waiting.of, wait=waiting.wait)

    def _busy(self) -> bool:
        """Might a request that comes now have to wait for a slot?"""
        return self._parts.providers.busy() or self._parts.backends.peers_busy()

    def _say_hello(self, address: str) -> None:
        logger.info("%s is up: http://%s/v1 (peer %s)", self._parts.node, address, self._parts.peer)
        for mesh_address in self._membership.addresses:
            logger.info("peers reach it at %s", mesh_address)
        command = "promptmesh"
        if self._home.path != home_path():
            command += f" --home {self._home.path}"
        logger.info("next: `%s ask 'Why is the sky blue?'`, `%s invite`", command, command)


def _spare_the_collector() -> None:
    """Keep the garbage collector from walking all imported code again and again.

    What is loaded by now stays for as long as the process lives. A request makes few cycles, so a
    rarer search for them costs little memory.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


async def _stop_on_signals(
    node: Node, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """The first signal stops the node in order, the second at once."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as received:
        task_status.started()
        async for number in received:
            if node.stopping.is_set():
                logger.warning("stopping at once")
                node.scope.cancel()
                return
            logger.info("%s: stopping", signal.Signals(number).name)
            node.stopping.set()
