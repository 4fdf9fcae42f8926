"""The block exchange of IPFS: gives blocks to peers that ask, and gets them from peers that have.

    bitswap = Bitswap(transport, get=get)
    await nursery.start(bitswap.run)
    block = await bitswap.fetch(cid, timeout=10)

A block is taken only if it was asked for and is what its CID names; anything else that a peer
pushes is dropped. Nothing is stored here: `get` reads for others, and who fetches keeps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from .bitswap_messages import MAX_BLOCK, PROTOCOLS, Message, Reader, Want, digest, digest_of
from .bitswap_peer import Correspondent, GetBlock
from .bitswap_search import Search
from .frames import RemoteProtocolError
from .transport import NotSpoken, PeerId, Stream, Transport, TransportError

logger = logging.getLogger(__name__)

#: Blocks that are searched for at once; more wait.
MAX_SEARCHES = 256
#: Streams that a peer may keep open to this node; with one more, the one that was silent for
#: longest is reset.
MAX_STREAMS = 16
#: Bytes of unfinished messages of one peer, on all its streams.
MAX_UNFINISHED = 8 * 1024 * 1024
#: Seconds in which the next bytes of a message must come that has begun.
MESSAGE_PAUSE = 30.0


class _Fetch:
    """A block that somebody waits for."""

    def __init__(self, cid: bytes, now: float) -> None:
        self.cid = cid
        self.search = Search(now)
        self.waiters = 0
        self.block: bytes | None = None
        self.failure = ""
        self.over = trio.Event()
        #: Something happened that the search should know of.
        self.news = trio.Event()
        self.scope = trio.CancelScope()


class Bitswap:
    """This node's end of the exchange, while `run` runs."""

    def __init__(
        self,
        transport: Transport,
        *,
        get: GetBlock,
        is_member: Callable[[PeerId], bool] = lambda peer: False,
    ) -> None:
        """`get` gives a peer a block if it may have it; members are asked after foreign peers."""
        self._transport = transport
        self._get = get
        self._is_member = is_member
        self._nursery: trio.Nursery | None = None
        #: By digest.
        self._fetches: dict[bytes, _Fetch] = {}
        self._places = trio.Semaphore(MAX_SEARCHES)
        self._correspondents: dict[PeerId, Correspondent] = {}
        self._inbound: dict[PeerId, dict[Stream, Reader]] = {}
        #: Connected peers that do not speak it.
        self._silent: set[PeerId] = set()
        #: Who gave the last block: probably it has the next one too.
        self._giver: PeerId | None = None

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Exchange blocks until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for protocol in PROTOCOLS:
                    self._transport.handle(protocol, self._serve)
                self._transport.on_connection(self._connection)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            self._correspondents.clear()
            for wanted in list(self._fetches):
                self._finish(wanted, failure="this node left the network")

    # --- getting blocks

    async def fetch(self, cid: bytes, *, timeout: float) -> bytes:
        """The block, checked against its CID. Raises `TransportError` if no peer gives it.

        At once if every peer says that it lacks it, or after `timeout` seconds.
        """
        wanted = digest_of(cid)
        if wanted is None:
            raise TransportError("bitswap gets blocks by CIDs of sha2-256 only")
        with trio.move_on_after(timeout):
            if wanted in self._fetches:  # somebody searches for it already
                return await self._wait(wanted, cid)
            async with self._places:
                return await self._wait(wanted, cid)
        raise TransportError(f"no peer gave the block within {timeout:g} s")

    def stored(self, cid: bytes) -> None:
        """A block is here now: whoever asked for it gets it."""
        wanted = digest_of(cid)
        if wanted is not None:
            for correspondent in self._correspondents.values():
                correspondent.stored(wanted)

    async def _wait(self, wanted: bytes, cid: bytes) -> bytes:
        fetch = self._fetches.get(wanted)
        if fetch is None:
            if self._nursery is None:
                raise TransportError("this node is in no network")
            fetch = self._fetches[wanted] = _Fetch(cid, trio.current_time())
            self._nursery.start_soon(self._search, wanted, fetch)
        fetch.waiters += 1
        try:
            await fetch.over.wait()
        finally:
            fetch.waiters -= 1
            if not fetch.waiters and not fetch.over.is_set():
                self._finish(wanted, failure="nobody waits for it")
        if fetch.block is None:
            raise TransportError(fetch.failure)
        return fetch.block

    async def _search(self, wanted: bytes, fetch: _Fetch) -> None:
        """Ask one peer after the other, until the fetch is over."""
        with fetch.scope:
            while True:
                now = trio.current_time()
                foreign, members = self._peers()
                for peer, have in fetch.search.next_asks(foreign, members, now):
                    want = Want(fetch.cid, have=have, send_dont_have=True)
                    self._correspondent(peer).ask(wanted, want)
                if fetch.search.is_hopeless([*foreign, *members]):
                    self._finish(wanted, failure="no connected peer has the block")
                fetch.news = trio.Event()
                with trio.move_on_at(fetch.search.next_time(now)):
                    await fetch.news.wait()

    def _peers(self) -> tuple[Sequence[PeerId], Sequence[PeerId]]:
        """The connected peers that may speak it: foreign ones, and members of the mesh."""
        peers = [peer for peer in self._transport.connected() if peer not in self._silent]
        if self._giver in peers:
            peers.insert(0, peers.pop(peers.index(self._giver)))
        return (
            [peer for peer in peers if not self._is_member(peer)],
            [peer for peer in peers if self._is_member(peer)],
        )

    def _finish(self, wanted: bytes, *, block: bytes | None = None, failure: str = "") -> None:
        """End a fetch; who may remember the want is told to forget it."""
        fetch = self._fetches.pop(wanted)
        fetch.block, fetch.failure = block, failure
        fetch.over.set()
        fetch.scope.cancel()
        for peer in fetch.search.asked:
            correspondent = self._correspondents.get(peer)
            if correspondent is not None and wanted in correspondent.asked:
                correspondent.ask(wanted, Want(fetch.cid, cancel=True))

    # --- what comes

    async def _serve(self, stream: Stream) -> None:
        """Read a stream that a peer opened, to its end."""
        self._silent.discard(stream.peer)  # it speaks it by now
        async with self._reading(stream) as reader:
            try:
                while True:
                    pause = MESSAGE_PAUSE if len(reader) else math.inf
                    with trio.fail_after(pause):
                        data = await stream.receive_some()
                    if not data:
                        return
                    streams = self._inbound[stream.peer]
                    streams[stream] = streams.pop(stream)  # the last one was heard last
                    for message in reader.receive(data):
                        await self._received(stream.peer, message)
                    if sum(map(len, self._inbound[stream.peer].values())) > MAX_UNFINISHED:
                        raise RemoteProtocolError("too many unfinished messages")
            except (RemoteProtocolError, trio.TooSlowError) as error:
                reason = str(error) or "a message was not finished"
                logger.warning("peer %s broke the bitswap protocol: %s", stream.peer, reason)
                await stream.reset()

    @asynccontextmanager
    async def _reading(self, stream: Stream) -> AsyncIterator[Reader]:
        streams = self._inbound.setdefault(stream.peer, {})
        reader = streams[stream] = Reader()
        try:
            if len(streams) > MAX_STREAMS:
                await next(iter(streams)).reset()
            yield reader
        finally:
            streams.pop(stream, None)
            if not streams:
                self._inbound.pop(stream.peer, None)

    async def _received(self, peer: PeerId, message: Message) -> None:
        for _, block in message.blocks:
            self._take_block(peer, block)
        for presence in message.presences:
            fetch = self._fetches.get(digest_of(presence.cid) or b"")
            if fetch is not None:
                (fetch.search.has if presence.have else fetch.search.lacks)(peer)
                fetch.news.set()
        if message.wants or message.full:
            await self._correspondent(peer).take_wants(message)

    def _take_block(self, peer: PeerId, block: bytes) -> None:
        """Take a block if it was asked for; else it does not even cost its hash."""
        correspondent = self._correspondents.get(peer)
        if correspondent is None or not correspondent.asked or len(block) > MAX_BLOCK:
            return
        wanted = digest(block)
        correspondent.asked.discard(wanted)
        if wanted in self._fetches:
            self._giver = peer
            self._finish(wanted, block=block)

    # --- peers

    def _correspondent(self, peer: PeerId) -> Correspondent:
        correspondent = self._correspondents.get(peer)
        if correspondent is None:
            if self._nursery is None or peer not in self._transport.connected():
                raise TransportError(f"{peer} is not connected any more")
            correspondent = self._correspondents[peer] = Correspondent(
                peer,
                self._transport,
                get=self._get,
                received=self._received,
                failed=self._cannot_tell,
            )
            self._nursery.start_soon(correspondent.run)
        return correspondent

    def _connection(self, peer: PeerId, connected: bool) -> None:
        if not connected:
            self._silent.discard(peer)
            correspondent = self._correspondents.pop(peer, None)
            if correspondent is not None:
                correspondent.scope.cancel()
        for fetch in self._fetches.values():
            if not connected:
                fetch.search.gone(peer)
            fetch.news.set()

    def _cannot_tell(self, peer: PeerId, error: TransportError) -> None:
        """A peer that does not speak it is not asked again until it connects anew."""
        logger.debug("peer %s hears no bitswap: %s", peer, error)
        if isinstance(error, NotSpoken):
            self._silent.add(peer)
        for fetch in self._fetches.values():
            fetch.search.lacks(peer)
            fetch.news.set()
