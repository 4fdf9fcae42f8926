"""How a node is reached that others may not be able to dial: joins what is beside this file.

Members say whether this node can be dialled (reachability.py). If not, it keeps places at relays
(relay_client.py), and what comes through them is made direct where that can be done
(hole_punching.py). A node whose owner wants it is a relay itself (relay.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio
from libp2p.peer.id import ID

from .addresses import Circuit
from .hole_punching import DIRECT_TIME, HolePunching
from .library_host import LibraryHost
from .link import Link
from .patches import Network
from .reachability import DialBack, ReachabilityCheck
from .relay import Relay
from .relay_client import RelayClient
from .relay_messages import HOP
from .transport import PeerId, Reach


class Traversal:
    """What a host does about routers that are in the way."""

    def __init__(
        self,
        network: Network,
        library: LibraryHost,
        *,
        relay: bool,
        listening: Callable[[], Sequence[str]],
        connect: Callable[[PeerId, Sequence[str]], Awaitable[str]],
        dial: Callable[[ID, Sequence[str], float], Awaitable[str]],
        readdressed: Callable[[], None],
    ) -> None:
        """`listening`: where this node can be dialled if nothing is in the way. `connect` and
        `dial` make a connection, the latter a new one. `readdressed` is called when `outside` or
        `circuits` are others than before."""
        self._library = library
        self._dial = dial
        self._readdressed = readdressed
        self.relay = Relay(network, addresses=listening) if relay else None
        DialBack(network)
        self._punching = HolePunching(network, dial=self._dial_anew)
        self._check = ReachabilityCheck(
            network,
            own=lambda: [address.partition("/p2p/")[0] for address in listening()],
            speaks=self._speaks,
            first=self._offers,
            changed=self._learned,
        )
        self._client = RelayClient(
            network,
            offers=self._offers,
            connect=connect,
            changed=readdressed,
            began=self._punching.began,
        )
        library.on_identified.append(self._identified)

    @property
    def state(self) -> Reach:
        """Can others dial this node?"""
        return self._check.known.state

    @property
    def outside(self) -> Sequence[str]:
        """Where members have reached this node, that it does not know of itself."""
        return self._check.known.outside

    @property
    def circuits(self) -> Sequence[str]:
        """Where it is reached through relays."""
        return self._client.addresses

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._check.run)
            nursery.start_soon(self._client.run)

    async def dial(self, circuit: Circuit, peer_id: ID, *, address: str) -> None:
        """Connect to that peer through a relay. Raises whatever goes wrong."""
        await self._client.dial(circuit, peer_id, address=address)

    async def _dial_anew(self, link: Link, addresses: Sequence[str]) -> None:
        await self._dial(link.muxed_conn.peer_id, addresses, DIRECT_TIME)

    def _learned(self) -> None:
        self._client.want(self.state == "unreachable")
        self._readdressed()

    def _identified(self, peer: PeerId) -> None:
        self._check.met(peer)
        if self._offers(peer):
            self._client.look()

    def _offers(self, peer: PeerId) -> bool:
        return self._speaks(peer, HOP)

    def _speaks(self, peer: PeerId, protocol: str) -> bool:
        return self._library.speaks(ID.from_base58(peer), protocol)
