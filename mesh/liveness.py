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
#: A ping that ends this late (s) says that this node was held up: it proves nothing of the peer.
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
        self._watched: set[PeerId] = set()

    async def run(self) -> None:
        """Ping until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                for peer in self._transport.connected():
                    if peer not in self._watched:
                        self._watched.add(peer)
                        nursery.start_soon(self._watch, peer)
                await trio.sleep(PERIOD)

    async def _watch(self, peer: PeerId) -> None:
        """Ping one peer for as long as it is connected."""
        missed = 0
        try:
            while peer in self._transport.connected():
                began = trio.current_time()
                if await self._answers(peer):
                    missed = 0
                elif trio.current_time() - began <= PATIENCE + LATE:
                    missed += 1
                if missed >= MISSES:
                    reason = f"it did not answer {MISSES} pings"
                    logger.warning("peer %s is gone: %s", peer, reason)
                    await self._lost(peer, reason)
                    return
                await trio.sleep_until(began + PERIOD)
        finally:
            self._watched.discard(peer)

    async def _answers(self, peer: PeerId) -> bool:
        with trio.move_on_after(PATIENCE):
            try:
                self._table.answered(peer, await self._transport.ping(peer))
                return True
            except TransportError as error:
                logger.debug("ping of %s: %s", peer, error)
        return False
