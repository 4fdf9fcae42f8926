"""The mesh as one object: joins the parts of this folder over one `Transport`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from random import Random
from typing import Any

import trio

from ..providers.base import Asked, EmbedRequest, RequestRejected
from .adverts import Advert
from .dialing import Dialing
from .frames import (
    AskBlock,
    AskClaims,
    AskLoads,
    AskTable,
    Block,
    Embed,
    End,
    Failed,
    FindClaims,
    Generate,
    Items,
    Known,
    PresentLoads,
    PutClaims,
    RemoteProtocolError,
    Request,
)
from .gossip import TWIN, Gossip
from .liveness import Liveness
from .peers import LATE, PeerTable
from .pool import CONNECT, PeerAnswer, StreamPool
from .protocol import PROTOCOL, request_fault
from .serving import Services, Serving
from .transport import NotSpoken, PeerId, Transport, TransportError

logger = logging.getLogger(__name__)

#: Seconds to get a block; a peer's table or claims.
BLOCK_TIME, LIST_TIME = 10.0, 30.0
#: Tries to greet a peer that has just connected, which may still be starting, and the pause (s).
GREETINGS, GREETING_PAUSE = 3, 1.0
#: Seconds between two looks for adverts that have ended.
EXPIRE_PERIOD = 1.0


async def _nothing(peer: PeerId) -> None:
    await trio.lowlevel.checkpoint()


@contextmanager
def _blaming_no_peer(asked: Request) -> Iterator[None]:
    """A peer resets the stream of a request that it may not take: the peer is not broken, then."""
    try:
        yield
    except (TransportError, OverflowError) as error:
        fault = request_fault(asked)
        if not fault:
            raise
        raise RequestRejected(f"no peer can be sent this request: {fault}") from error


class Network:
    """This node in its mesh, while `run` runs."""

    def __init__(
        self,
        transport: Transport,
        table: PeerTable,
        services: Services,
        *,
        describe: Callable[[], Advert],
        epoch: int,
        rng: Random,
        on_claims: Callable[[PeerId, bytes], bool] = lambda peer, data: False,
        on_met: Callable[[PeerId], Awaitable[None]] = _nothing,
        bootstrap: Sequence[str] = (),
        known: Mapping[PeerId, Sequence[str]] | None = None,
        save_known: Callable[[Mapping[PeerId, Sequence[str]]], None] = lambda known: None,
    ) -> None:
        """What a node passes in.

        `describe` gives the advert's node, version, machine and providers; `epoch` must be greater
        at each start. `on_claims` takes a batch that came by gossip and says whether it may be
        passed on; `on_met` runs for each peer that connects, after its table was read. `known` are
        the peers of last time, and `save_known` takes those for next time (it must not block).
        Raises `ValueError` for a bootstrap address without a peer id.
        """
        self.table = table
        self._transport = transport
        self._on_met = on_met
        self._gossip = Gossip(
            transport,
            table,
            describe=describe,
            epoch=epoch,
            on_advert=self._heard,
            on_claims=on_claims,
            rng=rng,
        )
        self._serving = Serving(services, self._gossip.relayed)
        self._liveness = Liveness(transport, table, lost=self._lost)
        self._dialing = Dialing(
            transport, table, bootstrap=bootstrap, known=known or {}, save=save_known, rng=rng
        )
        self._nursery: trio.Nursery | None = None
        self._pool: StreamPool | None = None
        #: Was a peer asked once more for what it knows of this node?
        self._asked_again = False
        #: Why a connection is being cut.
        self._reasons: dict[PeerId, str] = {}
        self._advert_listeners: list[Callable[[Advert], None]] = []
        self._connection_listeners: list[Callable[[PeerId, bool], None]] = []

    @property
    def peer_id(self) -> PeerId:
        return self._transport.peer_id

    def listen(
        self, *, advert: Callable[[Advert], None], connection: Callable[[PeerId, bool], None]
    ) -> None:
        """Be told of each new advert of a peer, and of each connection that comes or goes."""
        self._advert_listeners.append(advert)
        self._connection_listeners.append(connection)

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Be in the mesh until cancelled."""
        transport = self._transport
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._pool = StreamPool(transport, nursery, reach=self._dialing.reach)
                await nursery.start(self._gossip.run)
                transport.handle(PROTOCOL, self._serving.handle)
                transport.on_connection(self._connection)
                for peer in transport.connected():
                    self._connection(peer, True)
                nursery.start_soon(self._liveness.run)
                nursery.start_soon(self._dialing.run)
                nursery.start_soon(self._expire)
                task_status.started()
        finally:
            self._nursery = self._pool = None

    def connected(self) -> Sequence[PeerId]:
        """The members that are connected now."""
        return [peer for peer in self._transport.connected() if not self._is_foreign(peer)]

    @property
    def problem(self) -> str:
        """What is wrong with this node's membership; "": nothing."""
        return TWIN if self._gossip.twin else ""

    def members(self) -> int:
        """How many nodes the mesh has, as far as this one knows."""
        return self.table.members() + 1

    def _is_foreign(self, peer: PeerId) -> bool:
        state = self.table.get(peer)
        return state is not None and state.foreign

    def member_ids(self) -> list[PeerId]:
        """The nodes that the mesh has, this one among them, as far as their adverts tell."""
        return [self.peer_id, *(state.peer for state in self.table if state.advert)]

    # --- asking

    @asynccontextmanager
    async def ask(
        self, peer: PeerId, request: Asked, *, connect: float = CONNECT
    ) -> AsyncIterator[PeerAnswer]:
        """A peer's answer, once it is known who there answers. Leaving makes the peer stop.

        `connect` (s) limits the time until the request is sent. Raises `TransportError`,
        `RemoteProtocolError` and what the peer says, a `GenerateError`; here or from the chunks.
        `RequestRejected` here is a request that no peer takes.
        """
        asked: Request = (
            Embed(request=request)
            if isinstance(request, EmbedRequest)
            else Generate(request=request)
        )
        with _blaming_no_peer(asked):
            async with self._open_pool().ask(peer, asked, connect=connect) as stream:
                answer = PeerAnswer(stream)
                await answer.wait_head()
                yield answer

    async def probe(self, peer: PeerId, question: AskLoads, *, limit: float) -> PresentLoads:
        """How busy the peer's providers are, if it says so within `limit` seconds.

        Raises `TransportError`, `RemoteProtocolError`.
        """
        loads = PresentLoads()

        def take(frame: PresentLoads) -> None:
            nonlocal loads
            loads = frame

        await self._collect(peer, question, limit, take)
        return loads

    async def fetch_block(self, peer: PeerId, cid: bytes, proof: bytes = b"") -> bytes | None:
        """The block with that CID, not checked yet; None if the peer does not give it.

        Raises `TransportError`, `RemoteProtocolError`.
        """
        block: bytes | None = None

        def take(frame: Block) -> None:
            nonlocal block
            block = frame.block

        await self._collect(peer, AskBlock(cid=cid, proof=proof), BLOCK_TIME, take)
        return block

    async def ask_claims(self, peer: PeerId, known: Mapping[PeerId, Known]) -> Sequence[bytes]:
        """A page of the batches of claims that the peer has and that are not `known`.

        Raises `TransportError`, `RemoteProtocolError`.
        """
        page: list[bytes] = []
        await self._take_items(peer, AskClaims(known=dict(known)), page.append)
        return page

    async def find_claims(self, peer: PeerId, keys: Sequence[bytes]) -> Sequence[bytes]:
        """The batches that claim these keys, as the peer has them: it is a home of theirs.

        Raises `TransportError`, `RemoteProtocolError`.
        """
        found: list[bytes] = []
        await self._take_items(peer, FindClaims(keys=tuple(keys)), found.append)
        return found

    # --- telling

    def changed(self) -> None:
        """What `describe` gives has changed: the mesh should know soon."""
        self._gossip.changed()

    async def announce_claims(self, batch: bytes) -> None:
        """Gossip a signed batch of claims."""
        await self._gossip.announce_claims(batch)

    async def put_claims(self, peer: PeerId, envelopes: Sequence[bytes]) -> None:
        """Have a home keep these batches of this node.

        Raises `TransportError`, `RemoteProtocolError`.
        """
        await self._collect(
            peer, PutClaims(envelopes=tuple(envelopes)), LIST_TIME, lambda frame: None
        )

    async def announce_leaving(self) -> None:
        """Tell the mesh that this node goes, just before it does. Never raises."""
        await self._gossip.announce_leaving()

    def found(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """A member was found on the LAN."""
        if peer != self.peer_id:
            self._dialing.found(peer, addresses)

    async def disconnect(self, peer: PeerId, reason: str) -> None:
        """Close every connection to that peer."""
        await self._lost(peer, reason)

    def retry(self, peer: PeerId) -> None:
        """Try at once to be connected to a peer that could not be reached."""
        if peer not in self._transport.connected():
            self._dialing.retry(peer)

    # --- what happens

    def _heard(self, advert: Advert) -> None:
        if advert.leaving:
            logger.info("%s left the mesh", advert.node or advert.peer)
            self._dialing.left(advert.peer)
        elif advert.addresses:
            self._dialing.found(advert.peer, advert.addresses, advertised=True)
        for tell in self._advert_listeners:
            tell(advert)

    def _connection(self, peer: PeerId, connected: bool) -> None:
        if self._nursery is None:
            return
        now = trio.current_time()
        address = self._transport.connected().get(peer, "")
        if connected:
            self.table.connected(peer, address, now)
            self._nursery.start_soon(self._greet, peer)
        else:
            reason = self._reasons.pop(peer, "the connection was lost")
            state = self.table.get(peer)
            if state is not None and not state.left:
                logger.info("%s is gone: %s", state.node or peer, reason)
            self.table.disconnected(peer, reason, now)
        self._dialing.connection(peer, connected)
        for tell in self._connection_listeners:
            tell(peer, connected)

    async def _lost(self, peer: PeerId, reason: str) -> None:
        self._reasons[peer] = reason
        await self._transport.disconnect(peer)
        self._reasons.pop(peer, None)

    async def _greet(self, peer: PeerId) -> None:
        """Learn what a peer knows that has just connected."""
        failure: TransportError | None = None
        for _ in range(GREETINGS):
            try:
                await self._take_items(peer, AskTable(), self._gossip.take_relayed)
                state = self.table.get(peer)
                logger.info("%s is here (%s)", (state and state.node) or "a member", peer)
                self._look_for_twin(peer)
                await self._on_met(peer)
                return
            except RemoteProtocolError as error:
                logger.warning("peer %s broke the protocol: %s", peer, error)
                return
            except TransportError as error:
                logger.debug("peer %s did not tell its table: %s", peer, error)
                failure = error
            await trio.sleep(GREETING_PAUSE)
            if peer not in self._transport.connected():
                return
        if isinstance(failure, NotSpoken):
            await self._meet_foreign(peer)

    def _look_for_twin(self, peer: PeerId) -> None:
        """Where a peer knows an advert of this node that it has not made, ask it once more."""
        if self._gossip.other is not None and not self._asked_again and self._nursery:
            self._asked_again = True
            self._nursery.start_soon(self._ask_again, peer)

    async def _ask_again(self, peer: PeerId) -> None:
        await trio.sleep(max(LATE, 2 * self._gossip.period))
        try:
            await self._take_items(peer, AskTable(), self._gossip.take_relayed)
        except (TransportError, RemoteProtocolError) as error:
            logger.debug("peer %s did not tell its table again: %s", peer, error)

    async def _meet_foreign(self, peer: PeerId) -> None:
        """A peer with the mesh secret that is no member, such as a Kubo."""
        try:
            with trio.move_on_after(CONNECT):
                self.table.is_foreign(peer, await self._transport.agent(peer))
                state = self.table.get(peer)
                logger.info("an IPFS peer is here: %s (%s)", (state and state.agent) or "", peer)
        except TransportError as error:
            logger.debug("peer %s did not say what it is: %s", peer, error)

    async def _expire(self) -> None:
        while True:
            self.table.expire(trio.current_time())
            await self._follow_paths()
            await trio.sleep(EXPIRE_PERIOD)

    async def _follow_paths(self) -> None:
        """Take note of peers that are reached on another way than before."""
        for peer, address in self._transport.connected().items():
            if self.table.moved(peer, address) and self._pool is not None:
                await self._pool.renew(peer)

    # --- requests with a list or a block for a reply

    async def _take_items(
        self, peer: PeerId, request: Request, take: Callable[[bytes], None]
    ) -> None:
        def each(frame: Items | End) -> None:
            for item in frame.items if isinstance(frame, Items) else ():
                take(item)

        await self._collect(peer, request, LIST_TIME, each)

    async def _collect(
        self, peer: PeerId, request: Request, limit: float, take: Callable[..., None]
    ) -> None:
        """Send a request and give each frame of the reply to `take`."""
        with trio.move_on_after(limit):
            async with self._open_pool().ask(peer, request, connect=CONNECT) as stream:
                while True:
                    await stream.wait_frame()
                    for frame in stream.take_frames():
                        if isinstance(frame, Failed):
                            raise TransportError(f"the peer says: {frame.message[:500]}")
                        take(frame)
                    if stream.idle:
                        return
        raise TransportError(f"no whole reply within {limit:g} s")

    def _open_pool(self) -> StreamPool:
        if self._pool is None:
            raise TransportError("this node is not in the mesh")
        return self._pool
