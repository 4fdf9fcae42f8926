"""Between pubsub and the tables: this node's advert goes out, the others' come in.

Gossip has a budget of 5 received messages a second, so a node speaks only every few seconds, and
less often the more nodes there are. Who has just connected asks for the table instead of waiting.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

import msgspec
import trio

from .adverts import MAX_TTL, Advert, SignedAdvert, fitting, is_signed, open_sealed, seal
from .frames import RemoteProtocolError, encode_value
from .peers import PeerTable
from .transport import PeerId, Transport, TransportError

logger = logging.getLogger(__name__)

ADVERTS = "/promptmesh/1/adverts"
CLAIMS = "/promptmesh/1/claims"
#: Seconds between two adverts of a node in a small mesh; in one of n nodes n / NODES_A_SECOND.
SHORTEST_PERIOD = 5.0
NODES_A_SECOND = 2.5
#: Changes are told at most once in so many seconds.
SHORTEST_PAUSE = 1.0
#: An advert holds for so many periods: three may be lost.
PERIODS_TO_LIVE = 3.5
#: Seconds to tell the others that this node goes.
GOODBYE = 2.0
#: Seconds by which who passes an advert on may be mistaken about its age.
AGE_ERROR = 5.0
#: What to do where two nodes have one identity.
TWIN = (
    "another node runs with the identity of this one, as happens where its folder was copied, and "
    "the mesh confuses the two: stop one of them, delete identity.key in its folder, start it again"
)


class Gossip:
    """Tells the mesh of this node, and the table of the others."""

    def __init__(
        self,
        transport: Transport,
        table: PeerTable,
        *,
        describe: Callable[[], Advert],
        epoch: int,
        on_advert: Callable[[Advert], None],
        on_claims: Callable[[PeerId, bytes], bool],
        rng: Random,
    ) -> None:
        self._transport = transport
        self._table = table
        #: The node, its machine and providers now; what is known here is filled in.
        self._describe = describe
        self._epoch = epoch
        self._seq = 0
        #: When this node began to speak, and the last number of each of its epochs since.
        self._began = trio.current_time()
        self._spoken: dict[int, int] = {}
        #: The stamp of an advert of its own that it met, and that is of no epoch of these.
        self.other: tuple[int, int] | None = None
        #: Does another node speak with its identity?
        self.twin = False
        self._on_advert = on_advert
        self._on_claims = on_claims
        self._rng = rng
        self._own: SignedAdvert | None = None
        #: What the last one did not hold, as the log says.
        self._left_out: Sequence[str] = ()
        self._made = 0.0
        self._changed = trio.Event()
        self._leaving = False

    @property
    def period(self) -> float:
        """Seconds between two adverts of this node."""
        return max(SHORTEST_PERIOD, (len(self._table) + 1) / NODES_A_SECOND)

    def changed(self) -> None:
        """What `describe` gives has changed in a way that others should know soon."""
        self._changed.set()

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Speak and listen until cancelled."""
        await self._transport.subscribe(ADVERTS, self._hear)
        await self._transport.subscribe(CLAIMS, self._on_claims)
        self._began = trio.current_time()
        self._renew()
        task_status.started()
        while not self._leaving:
            await self._publish()
            await trio.sleep_until(self._made + SHORTEST_PAUSE)
            rest = self.period * self._rng.uniform(0.9, 1.0) - SHORTEST_PAUSE
            with trio.move_on_after(rest):
                await self._changed.wait()
            self._changed = trio.Event()
            self._renew()

    async def announce_leaving(self) -> None:
        """Tell the others that this node goes. Nothing is told after that. Never raises."""
        self._leaving = True
        with trio.CancelScope(deadline=trio.current_time() + GOODBYE, shield=True):
            self._renew()
            await self._publish()
            await self._transport.flush()

    async def announce_claims(self, batch: bytes) -> None:
        """Gossip a batch of claims."""
        await self._transport.publish(CLAIMS, batch)

    def _renew(self) -> None:
        """Make this node's advert anew."""
        self._seq += 1
        self._spoken[self._epoch] = self._seq
        described = self._describe()
        advert = msgspec.structs.replace(
            Advert(node=described.node, leaving=True) if self._leaving else described,
            peer=self._transport.peer_id,
            epoch=self._epoch,
            seq=self._seq,
            ttl=min(PERIODS_TO_LIVE * self.period, MAX_TTL),
            addresses=tuple(self._transport.addresses),
        )
        self._made = trio.current_time()
        try:
            self._own = seal(self._fitting(advert), self._transport.sign)
        except ValueError as error:
            logger.error("this node tells the mesh nothing: %s", error)

    def _fitting(self, advert: Advert) -> Advert:
        """As much of it as peers take; what they do not is logged, once."""
        advert, left_out = fitting(advert)
        if left_out and left_out != self._left_out:
            logger.warning("too much for one advert; peers are not told of %s", "; ".join(left_out))
        self._left_out = left_out
        return advert

    async def _publish(self) -> None:
        if self._own is None or not self._transport.connected():
            return
        try:
            await self._transport.publish(ADVERTS, encode_value(self._own))
        except TransportError as error:
            logger.warning("an advert was not published: %s", error)

    # --- what comes in

    def _hear(self, signer: PeerId, data: bytes) -> bool:
        """An advert by gossip: only its subject may send it."""
        try:
            sealed, advert = open_sealed(data)
        except RemoteProtocolError as error:
            logger.warning("peer %s gossiped nonsense: %s", signer, error)
            return False
        if advert.peer != signer or sealed.age:
            return False
        if self._table.is_twin(advert, trio.current_time()):
            self._meet_twin(sealed, advert)
        return self._take(sealed, advert)

    def _meet_twin(self, sealed: SignedAdvert, advert: Advert) -> None:
        if not is_signed(sealed, advert.peer, self._transport.verify):
            return
        if self._table.twin(advert.peer, trio.current_time()):
            logger.warning("two nodes have one identity: %s (%s)", advert.node, advert.peer)

    def take_relayed(self, item: bytes) -> None:
        """An advert that a peer passed on. Raises `RemoteProtocolError`."""
        sealed, advert = open_sealed(item)
        if advert.peer == self._table.own:
            self._meet_own(sealed, advert)
        else:
            self._take(sealed, advert)

    def _take(self, sealed: SignedAdvert, advert: Advert) -> bool:
        """Is it newer than what we know, and signed by its subject?"""
        if not self._table.is_news(advert):
            return False
        if not is_signed(sealed, advert.peer, self._transport.verify):
            logger.warning("an advert of %s is not signed by it", advert.peer)
            return False
        if self._table.observe(advert, sealed, trio.current_time(), sealed.age):
            self._on_advert(advert)
        return True

    def _meet_own(self, sealed: SignedAdvert, advert: Advert) -> None:
        """An advert of this node that it has not made in this run: of an earlier one, or a twin's.

        It is a twin's if its numbers rise while this node runs. If it is of a later epoch than this
        one, the clock has gone back since then; this node outdoes its own past, and is heard again.
        """
        if advert.seq <= self._spoken.get(advert.epoch, 0):
            return
        if not is_signed(sealed, advert.peer, self._transport.verify):
            return
        epoch, seq = self.other or (-1, 0)
        since = trio.current_time() - sealed.age - self._began
        if advert.epoch == epoch and advert.seq > seq and since > AGE_ERROR and not self.twin:
            self.twin = True
            logger.error("%s", TWIN)
        self.other = advert.stamp
        if not self.twin and advert.stamp > (self._epoch, self._seq):  # else it would never end
            self._epoch, self._seq = advert.epoch + 1, 0
            self.changed()

    def relayed(self, asker: PeerId) -> Iterable[bytes]:
        """The adverts to tell a peer that asks: this node's own, and those it heard."""
        now = trio.current_time()
        if self._own is not None:
            age = max(now - self._made, 0.0)
            yield encode_value(msgspec.structs.replace(self._own, age=age))
        for sealed in self._table.relayed(asker, now):
            yield encode_value(sealed)
