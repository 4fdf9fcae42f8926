"""Notices peers that are gone without a word: a black hole looks like an idle peer to libp2p.

Every connected peer is pinged each second, and has a second to answer. Two misses, and the
connection is cut, so that everything that waits for that peer fails at once and goes elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from .peers import PeerTable
from .transport import PeerId, Transport, TransportError

logger = logging.getLogger(__name__)

#: Seconds between two pings, and to answer one.
PERIOD, PATIENCE = 1.0, 1.0
#: Pings in a row that may go unanswered before the peer counts as gone.
MISSES = 2
#: A round that began this late (s) says that this node was held up: it proves nothing of others.
LATE = 0.5


class Liveness:
    """Pings the connected peers."""

    def __init__(
        self,
        transport: Transport,
        table: PeerTable,
        *,
        lost: Callable[[PeerId, str], Awaitable[None]],
    ) -> None:
        self._transport = transport
        self._table = table
        #: Cuts the connection to a peer that does not answer, for the reason given.
        self._lost = lost
        self._missed: dict[PeerId, int] = {}
        self._pinging: set[PeerId] = set()

    async def run(self) -> None:
        """Ping until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                began = trio.current_time()
                connected = self._transport.connected()
                self._missed = {p: n for p, n in self._missed.items() if p in connected}
                for peer in connected:
                    if peer not in self._pinging:
                        nursery.start_soon(self._ping, peer)
                await trio.sleep_until(began + PERIOD)
                if trio.current_time() - began > PERIOD + LATE:
                    self._missed.clear()

    async def _ping(self, peer: PeerId) -> None:
        self._pinging.add(peer)
        began = trio.current_time()
        try:
            with trio.move_on_after(PATIENCE):
                self._table.answered(peer, await self._transport.ping(peer))
                self._missed.pop(peer, None)
                return
        except TransportError as error:
            logger.debug("ping of %s: %s", peer, error)
        finally:
            self._pinging.discard(peer)
        if trio.current_time() - began <= PATIENCE + LATE:
            await self._miss(peer)

    async def _miss(self, peer: PeerId) -> None:
        self._missed[peer] = self._missed.get(peer, 0) + 1
        if self._missed[peer] >= MISSES and peer in self._transport.connected():
            del self._missed[peer]
            reason = f"it did not answer {MISSES} pings"
            logger.warning("peer %s is gone: %s", peer, reason)
            await self._lost(peer, reason)
