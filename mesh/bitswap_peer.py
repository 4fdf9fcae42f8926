"""What goes out by bitswap to one peer: this node's wants, and the answers to the peer's.

All of it goes on a stream of this node's own, also the answers: Kubo and Helia read only streams
that were opened to them. What became ready during a write goes out in the next message. A block is
looked up when the message before it is out, so a slow peer holds one message in memory and no more.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from .bitswap_messages import (
    MAX_BLOCK,
    PROTOCOLS,
    Message,
    Presence,
    Reader,
    Want,
    as_v1,
    digest_of,
    encode,
)
from .frames import RemoteProtocolError
from .transport import PeerId, Stream, Transport, TransportError

logger = logging.getLogger(__name__)

#: Bytes that fill a message, and wants or answers.
FULL_BYTES, FULL_COUNT = 512 * 1024, 1024
#: Who only wants to know whether a block is there gets one of up to so many bytes at once.
SMALL = 1024
#: The peer's wants that wait for their turn; more, and its next message waits.
MAX_WAITING = 1024
#: The peer's wants for what is not here that are remembered; the oldest is forgotten.
MAX_MISSING = 1024
#: The peer's wants that are looked up a second, and in a burst.
RATE, BURST = 1000.0, 2000.0
#: Seconds without anything to say after which the stream is let go of.
IDLE = 60.0

#: The block with that CID for that peer: if it is here, and the peer may have it.
GetBlock = Callable[[PeerId, bytes], Awaitable[bytes | None]]


class Correspondent:
    """One connected peer that bitswap is spoken with."""

    def __init__(
        self,
        peer: PeerId,
        transport: Transport,
        *,
        get: GetBlock,
        received: Callable[[PeerId, Message], Awaitable[None]],
        failed: Callable[[PeerId, TransportError], None],
    ) -> None:
        """`received` takes what the peer answers on this node's stream; `failed` hears that
        nothing can be told to it now."""
        self.peer = peer
        self._transport = transport
        self._get = get
        self._received = received
        self._failed = failed
        #: Digests of the blocks that it was asked for.
        self.asked: set[bytes] = set()
        #: What it is yet to be told of this node's wants, by CID.
        self._news: dict[bytes, Want] = {}
        #: What it wants: not yet looked up, by CID; and not here, by digest.
        self._waiting: dict[bytes, Want] = {}
        self._missing: dict[bytes, Want] = {}
        self._rate = _Rate()
        self._work = trio.Event()
        self._room = trio.lowlevel.ParkingLot()
        self._stream: Stream | None = None
        self._writing = trio.Lock()
        self.scope = trio.CancelScope()

    # --- what it is to be told

    def ask(self, digest: bytes, want: Want) -> None:
        """Ask it for a block, or cancel that."""
        if want.cancel:
            self.asked.discard(digest)
        else:
            self.asked.add(digest)
        self._news[want.cid] = want
        self._work.set()

    async def take_wants(self, message: Message) -> None:
        """Remember what it wants; waits while it wants too much."""
        if message.full:
            self._waiting.clear()
            self._missing.clear()
            self._room.unpark_all()
        for want in message.wants:
            digest = digest_of(want.cid) or b""
            self._missing.pop(digest, None)
            if want.cancel:
                self._waiting.pop(want.cid, None)
                continue
            while len(self._waiting) >= MAX_WAITING:
                await self._room.park()
            self._waiting[want.cid] = want
            self._work.set()

    def stored(self, digest: bytes) -> None:
        """A block is here now that it may have asked for."""
        want = self._missing.pop(digest, None)
        if want is not None:
            self._waiting[want.cid] = want
            self._work.set()

    # --- telling it

    async def run(self) -> None:
        """Tell it what there is to tell, until cancelled."""
        with self.scope:
            async with trio.open_nursery() as nursery:
                while True:
                    await self._wait_for_work()
                    try:
                        await self._send(await self._next_message(), nursery)
                    except TransportError as error:
                        self._give_up(error)

    async def _wait_for_work(self) -> None:
        while not (self._news or self._waiting):
            self._work = trio.Event()
            with trio.move_on_after(IDLE) as idle:
                await self._work.wait()
            if idle.cancelled_caught and self._stream is not None:
                await self._retire(self._stream)
        await trio.lowlevel.checkpoint()  # what is asked for at the same time goes out together

    async def _next_message(self) -> Message:
        news = list(self._news)[:FULL_COUNT]
        message = Message(wants=[self._news.pop(cid) for cid in news])
        size = 0
        for _ in range(FULL_COUNT):
            if not self._waiting or size >= FULL_BYTES:
                break
            want = self._waiting.pop(next(iter(self._waiting)))
            await trio.sleep(self._rate.take(trio.current_time()))
            size += await self._answer(want, message)
        self._room.unpark_all()
        return message

    async def _answer(self, want: Want, message: Message) -> int:
        """Look a want up and write the answer; returns how many bytes of blocks that is."""
        digest = digest_of(want.cid)
        block = None if digest is None else await self._look_up(as_v1(want.cid))
        if block is None:
            if want.send_dont_have:
                message.presences.append(Presence(want.cid, have=False))
            if digest is not None:
                self._remember(digest, want)
            return 0
        if want.have and len(block) > SMALL:
            message.presences.append(Presence(want.cid, have=True))
            return 0
        message.blocks.append((want.cid, block))
        return len(block)

    async def _look_up(self, cid: bytes) -> bytes | None:
        try:
            block = await self._get(self.peer, cid)
        except Exception:  # the log has it, and the peer hears that the block is not here
            logger.exception("a block for %s could not be read", self.peer)
            return None
        return None if block is None or len(block) > MAX_BLOCK else block

    def _remember(self, digest: bytes, want: Want) -> None:
        if len(self._missing) >= MAX_MISSING:
            del self._missing[next(iter(self._missing))]
        self._missing[digest] = want

    def _give_up(self, error: TransportError) -> None:
        """It cannot be told anything now: forget what was to be told."""
        for waiting in (self._news, self._waiting, self._missing):
            waiting.clear()
        self.asked.clear()
        self._room.unpark_all()
        self._failed(self.peer, error)

    # --- the stream

    async def _send(self, message: Message, nursery: trio.Nursery) -> None:
        """Raises `TransportError`. A stream that was kept may have ended: then on a new one."""
        if not (message.wants or message.blocks or message.presences):
            return
        if self._stream is not None:
            try:
                await self._write(self._stream, message)
            except TransportError:
                self._stream = None
            else:
                return
        self._stream = await self._transport.open_stream(self.peer, *PROTOCOLS)
        nursery.start_soon(self._listen, self._stream)
        await self._write(self._stream, message)

    async def _write(self, stream: Stream, message: Message) -> None:
        async with self._writing:
            await stream.send_all(encode(message, stream.protocol))

    async def _listen(self, stream: Stream) -> None:
        """Hear what comes on this node's stream.

        Kubo says nothing there and Helia ends its side at once, but goes on reading: what is being
        written must arrive, so the stream is finished and not reset, and the next message goes on
        a new one. py-libp2p answers on it.
        """
        reader = Reader()
        try:
            while data := await stream.receive_some():
                for message in reader.receive(data):
                    await self._received(self.peer, message)
        except TransportError:
            pass  # it is over: the next message goes on a new one
        except RemoteProtocolError as error:
            logger.warning("peer %s broke the bitswap protocol: %s", self.peer, error)
            await stream.reset()
        await self._retire(stream)

    async def _retire(self, stream: Stream) -> None:
        if self._stream is stream:
            self._stream = None
        async with self._writing:
            await stream.aclose()


class _Rate:
    """How fast a peer's wants are looked up. Told the time."""

    def __init__(self) -> None:
        self._left = BURST
        self._at = 0.0

    def take(self, now: float) -> float:
        """One more; returns the seconds to wait before it."""
        self._left = min(self._left + (now - self._at) * RATE, BURST) - 1
        self._at = now
        return max(-self._left / RATE, 0.0)
