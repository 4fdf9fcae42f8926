"""This node's membership in a mesh, which can end and begin anew while the node runs.

The host, the network over it and everything that speaks through them live in one task, which is
left and entered again when the mesh secret changes (`join`, `leave`). The rest of the node goes on:
it only sees a network that is there or not.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING

import trio

from ..mesh import mdns
from ..mesh.addresses import is_circuit
from ..mesh.adverts import Advert
from ..mesh.backends import BackendManager
from ..mesh.bitswap import Bitswap
from ..mesh.dialing import peer_of
from ..mesh.gossip import ADVERTS, CLAIMS
from ..mesh.host import HostSettings, open_host
from ..mesh.network import Network
from ..mesh.peers import PeerTable
from ..mesh.serving import Services
from ..mesh.transport import BLOCKED, PeerId, Reach, Relaying, Transport, TransportError
from .config_sections import MeshConfig
from .home import Home, HomeError, KnownPeers
from .reading import Reading
from .sharing import Sharing

if TYPE_CHECKING:
    # The stubs that come with libp2p know `trio` without it.
    from trio_typing import TaskStatus

logger = logging.getLogger(__name__)

#: Seconds until another try, where the mesh could not be entered again.
RETRY = 5.0


class Membership:
    """Keeps this node in the mesh of its home folder."""

    def __init__(
        self,
        *,
        config: MeshConfig,
        home: Home,
        table: PeerTable,
        backends: BackendManager,
        sharing: Sharing,
        reading: Reading,
        services: Services,
        describe: Callable[[], Advert],
        rng: Random,
        admits: Callable[[PeerId], bool] = lambda peer: True,
    ) -> None:
        """`admits`: may this peer be connected?"""
        self._admits = admits
        self._config = config
        self._home = home
        self._table = table
        self._backends = backends
        self._sharing = sharing
        self._reading = reading
        self._services = services
        self._describe = describe
        self._rng = rng
        #: Why the node is not in the mesh though it should be; "" if it is.
        self._problem = ""
        self._alone = not config.enabled
        self._network: Network | None = None
        self._transport: Transport | None = None
        #: The present session, or the pause before the next try.
        self._scope = trio.CancelScope()
        self._settled = trio.Event()
        #: One at a time has it begin anew, and sees how that one ended.
        self._beginning = trio.Lock()
        self._saver = _Saver(home)

    @property
    def problem(self) -> str:
        """Why the node is not in the mesh though it should be, or not well; "" if it is."""
        return self._problem or (self._network.problem if self._network else "")

    @property
    def addresses(self) -> list[str]:
        """Where peers can dial this node now, each with its peer id."""
        return list(self._transport.addresses) if self._transport else []

    @property
    def reachability(self) -> Reach:
        """Can others dial this node directly, as far as members have found?"""
        return self._transport.reachability if self._transport else "unknown"

    @property
    def relaying(self) -> Relaying | None:
        """What goes through this node; None: it is no relay."""
        return self._transport.relaying if self._transport else None

    @property
    def connections(self) -> Mapping[PeerId, str]:
        """The connected peers, members or not, each with the address of the connection."""
        return self._transport.connected() if self._transport else {}

    async def connect(self, address: str) -> None:
        """Be connected to the peer at that multiaddr, which ends in `/p2p/PEERID`.

        Raises `ValueError` for another address, and `TransportError`.
        """
        peer = peer_of(address)
        if self._transport is None:
            raise TransportError(self.problem or "this node is in no mesh")
        await self._transport.connect(peer, [address])

    async def admission_changed(self, peer: PeerId) -> None:
        """Whether that peer may be connected has changed: see to it."""
        if self._network is None:
            return
        if self._admits(peer):
            self._network.retry(peer)
        else:
            await self._network.disconnect(peer, BLOCKED)

    def changed(self) -> None:
        """What this node offers has changed."""
        if self._network is not None:
            self._network.changed()

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be in the mesh until cancelled.

        Raises `TransportError` or `HomeError` if it cannot be entered the first time; later that is
        logged and tried again.
        """
        await self._session(task_status)
        while True:
            try:
                await self._session(trio.TASK_STATUS_IGNORED)
            except (TransportError, HomeError) as error:
                logger.error("not in the mesh: %s", error)
                self._settle(str(error))
                with trio.CancelScope() as self._scope:
                    await trio.sleep(RETRY)

    async def reload(self) -> None:
        """Be in the mesh that the home folder names now. Raises `TransportError`."""
        self._alone = not self._config.enabled
        # The file is of another mesh by now, which the peers of this one must not be mixed into.
        self._saver.enabled = False
        await self._begin_anew()
        if self._problem:
            raise TransportError(self._problem)

    async def leave(self) -> None:
        """Tell the peers, and be alone until `reload`."""
        if self._network is not None:
            await self._network.announce_leaving()
        self._alone = True
        await self._begin_anew()

    async def announce_leaving(self) -> None:
        """Tell the peers that this node goes. Never raises."""
        if self._network is not None:
            await self._network.announce_leaving()

    async def _begin_anew(self) -> None:
        async with self._beginning:
            self._settled = trio.Event()
            self._scope.cancel()
            await self._settled.wait()

    def _settle(self, problem: str) -> None:
        self._problem = problem
        self._settled.set()

    async def _session(self, task_status: TaskStatus[None]) -> None:
        """Be a member, or alone, until the scope is cancelled."""
        with trio.CancelScope() as self._scope:
            if self._alone:
                self._settle("")
                task_status.started()
                await trio.sleep_forever()
            key = self._home.swarm_key()
            settings = HostSettings(
                seed=self._home.identity(),
                listen=self._config.listen,
                psk=key,
                topics=frozenset({ADVERTS, CLAIMS}),
                admits=self._admits,
                relay=self._config.relay,
                readdressed=self.changed,
            )
            try:
                async with open_host(settings) as transport, trio.open_nursery() as nursery:
                    # First: a Kubo asks at once what is spoken here.
                    bitswap = Bitswap(
                        transport, get=self._reading.give, is_member=self._table.is_member
                    )
                    await nursery.start(bitswap.run)
                    network = await self._open_network(transport, nursery)
                    self._enter(transport, network, bitswap, key)
                    if self._config.mdns:
                        nursery.start_soon(self._discover, transport, network, key)
                    nursery.start_soon(self._saver.run)
                    self._settle("")
                    task_status.started()
                    await trio.sleep_forever()
            finally:
                self._leave()
                with trio.CancelScope(shield=True):
                    await self._saver.write()

    async def _open_network(self, transport: Transport, nursery: trio.Nursery) -> Network:
        known = self._home.known_peers()
        bootstrap = tuple(dict.fromkeys((*self._config.bootstrap, *known.bootstrap)))
        self._saver.bootstrap = known.bootstrap
        self._saver.enabled = True
        network = Network(
            transport,
            self._table,
            self._services,
            describe=self._describe,
            epoch=self._home.next_epoch(int(time.time() * 1000)),
            rng=self._rng,
            on_claims=self._sharing.hear,
            on_met=self._sharing.meet,
            bootstrap=bootstrap,
            known=known.peers,
            save_known=self._saver.save,
        )
        await nursery.start(network.run)
        return network

    def _enter(self, transport: Transport, network: Network, bitswap: Bitswap, key: bytes) -> None:
        self._transport, self._network = transport, network
        self._backends.attach(network)
        self._sharing.attach(network, key)
        self._reading.attach(bitswap)

    def _leave(self) -> None:
        self._backends.detach()
        self._sharing.detach()
        self._reading.detach()
        self._transport = self._network = None
        # The next mesh may be another one, with other peers.
        self._table.clear()

    async def _discover(self, transport: Transport, network: Network, key: bytes) -> None:
        """Look for members on the local network. Others see only a tag made from the secret."""
        tag = hmac.new(key, b"promptmesh mdns", hashlib.sha256).hexdigest()[:16]
        await mdns.discover(
            transport.peer_id,
            lambda: [address for address in transport.addresses if not is_circuit(address)],
            tag=tag,
            found=network.found,
        )


class _Saver:
    """Writes down the peers that are known, in a thread: the disk may take its time."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self.bootstrap: tuple[str, ...] = ()
        self.enabled = True
        self._known: Mapping[PeerId, Sequence[str]] | None = None
        self._changed = trio.Event()
        self._limiter = trio.CapacityLimiter(1)

    def save(self, known: Mapping[PeerId, Sequence[str]]) -> None:
        """Have these written soon. Does not block."""
        self._known = known
        self._changed.set()

    async def run(self) -> None:
        """Write what changed, until cancelled."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            await self.write()

    async def write(self) -> None:
        """Write what was not written yet."""
        known, self._known = self._known, None
        if known is None or not self.enabled:
            return
        peers = {peer: tuple(addresses) for peer, addresses in known.items()}
        to_keep = KnownPeers(bootstrap=self.bootstrap, peers=peers)
        try:
            await trio.to_thread.run_sync(
                self._home.write_known_peers, to_keep, limiter=self._limiter
            )
        except HomeError as error:
            logger.warning("the peers are not remembered for the next start: %s", error)
