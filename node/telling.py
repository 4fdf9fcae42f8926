"""Tells everybody what this node claims, by gossip: in a mesh of up to 64 members.

Gossip has a budget of received messages, so several batches travel in one; and a peer believes only
so many claims a second of one that tells them, so this node keeps to that pace. What is lost, or
waits here, the others get by asking.
"""

from __future__ import annotations

import logging

import msgspec
import trio

from ..cache.conduct import RATE, Bucket
from ..mesh.transport import TransportError
from .claim_network import Link
from .claiming import Claiming

logger = logging.getLogger(__name__)

#: Nodes whose claims make one gossip message a second (adverts have the same share of the budget).
NODES_A_SECOND = 2.5
#: Seconds between two messages of this node at least, and the bytes of one.
SHORTEST_PAUSE = 0.5
MAX_MESSAGE = 48 * 1024
#: Claims told at once: somewhat fewer than others believe, as messages may come closer together.
TOLD_AT_ONCE = 192.0


class Telling:
    """This node's claims, as gossip."""

    def __init__(self, link: Link, claiming: Claiming) -> None:
        self._link = link
        self._claiming = claiming
        self._pace = Bucket(TOLD_AT_ONCE, 0.0)

    async def tell(self) -> None:
        """Gossip one message of what waits, and pause as the budget wants it."""
        message = self._fill()
        network = self._link.network
        if message and network is not None:
            try:
                await network.announce_claims(msgspec.msgpack.encode(message))
            except TransportError as error:
                # The batches are kept: whoever lacks them asks for them.
                logger.debug("claims were not gossiped: %s", error)
        # Who had nothing to say has not used up its turn.
        members = network.members() if message and network is not None else 0
        await trio.sleep(max(SHORTEST_PAUSE, members / NODES_A_SECOND))

    def _fill(self) -> list[bytes]:
        """What one message carries: bounded by its bytes, and by what this node may tell now."""
        self._claiming.sign_waiting()
        message: list[bytes] = []
        size = 0
        while (signed := self._claiming.take_signed()) is not None:
            envelope, group = signed
            claims = len(group.entries)
            if size + len(envelope) > MAX_MESSAGE or claims > self._take(0):
                self._claiming.give_back(signed)
                self._claiming.wake()
                break
            self._take(claims)
            message.append(envelope)
            size += len(envelope)
        return message

    def _take(self, claims: int) -> float:
        return self._pace.take(claims, self._link.clock(), rate=RATE, burst=TOLD_AT_ONCE)
