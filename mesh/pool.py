"""Streams to peers, kept for the next request: opening one costs more than most requests.

One request at a time runs on a stream. A task reads each stream for as long as it lives: so its
peer is never held up by a slow reader here (libp2p breaks a stream that is left unread for 5 s),
and an idle stream that ends is noticed before it is used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from ..providers.base import Chunk, GenerateError, Origin
from .frames import Done, Failed, Head, Piece, RemoteProtocolError, Request
from .protocol import PROTOCOL, Asker, frame_error, merge_text
from .transport import PeerId, Stream, Transport, TransportError

#: Idle streams kept for each peer.
MAX_IDLE = 8
#: Requests at once to one peer. A libp2p connection has 256 outbound streams, and blocks after.
MAX_AT_ONCE = 160
#: Seconds to get a stream and to send the request.
CONNECT = 5.0
#: Bytes of an answer that wait for a slow reader here; after that the request is given up.
MAX_UNREAD = 8 * 1024 * 1024


class NotRead(TransportError):
    """An answer waited here for its reader until it was too much: no fault of the peer's."""


class NoPlace(TransportError):
    """This node has as many requests under way at the peer as it may: no fault of the peer's."""


class AskStream:
    """A stream that carries this node's requests to a peer, one after the other."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        #: A byte of the reply to the present request has come.
        self.replied = False
        #: When the last byte came.
        self.arrived = 0.0
        self.ended: Exception | None = None
        self._exchange = Asker()
        self._frames: list[Any] = []
        self._unread = 0
        self._arrival = trio.lowlevel.ParkingLot()

    @property
    def idle(self) -> bool:
        """Can it carry the next request?"""
        return self.ended is None and self._exchange.idle and not self._frames

    @property
    def retired(self) -> bool:
        """Does a better connection replace the one that it is on?"""
        return self.stream.retired

    async def send(self, request: Request) -> None:
        """Begin a request. Raises `TransportError`; then, or if cancelled, the stream is dead."""
        self.replied = False
        data = self._exchange.send(request)
        if self.ended is not None:
            raise TransportError(str(self.ended))
        try:
            await self.stream.send_all(data)
        except BaseException:
            self.ended = self.ended or TransportError("the request was not sent whole")
            raise

    async def wait_frame(self) -> None:
        """Wait until a frame of the reply is there.

        Raises `TransportError` if the stream ended, `RemoteProtocolError` if it carried nonsense.
        """
        while not self._frames:
            if self.ended is not None:
                # Not the exception itself: each raise would add to its traceback.
                kinds = (RemoteProtocolError, NotRead, TransportError)
                kind = next(k for k in kinds if isinstance(self.ended, k))
                raise kind(str(self.ended))
            await self._arrival.park()

    def take_frames(self) -> list[Any]:
        """The frames that have come."""
        frames, self._frames = self._frames, []
        self._unread = 0
        return frames

    async def read(self) -> None:
        """Take in what comes until the stream ends. Its pool runs this."""
        try:
            while data := await self.stream.receive_some():
                self.replied = True
                self.arrived = trio.current_time()
                self._frames += self._exchange.receive(data)
                self._unread += len(data)
                if self._unread > MAX_UNREAD:
                    raise NotRead("the answer was not read here, and was given up")
                if self._arrival:
                    self._arrival.unpark_all()
            self.ended = TransportError("the peer ended the stream")
        except (TransportError, RemoteProtocolError) as error:
            self.ended = error
        finally:
            self.ended = self.ended or TransportError("the network of this node was closed")
            self._arrival.unpark_all()
            await self.stream.reset()


class _NotTaken(TransportError):
    """The peer did not take the request in time."""


@dataclass(slots=True)
class _Streams:
    """The streams to one peer."""

    idle: list[AskStream] = field(default_factory=list)
    places: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(MAX_AT_ONCE))


class StreamPool:
    """The streams of a node to its peers. Their readers run in the nursery given."""

    def __init__(
        self,
        transport: Transport,
        nursery: trio.Nursery,
        *,
        reach: Callable[[PeerId], Awaitable[None]],
    ) -> None:
        self._transport = transport
        self._nursery = nursery
        #: Sees to it that the peer is connected; raises `TransportError`.
        self._reach = reach
        self._streams: dict[PeerId, _Streams] = {}

    def idle(self, peer: PeerId) -> int:
        """Idle streams to that peer."""
        return len(self._streams[peer].idle) if peer in self._streams else 0

    @asynccontextmanager
    async def ask(
        self, peer: PeerId, request: Request, *, connect: float = CONNECT
    ) -> AsyncIterator[AskStream]:
        """Send a request and wait for the first frame of the reply.

        Leaving before the reply is whole resets the stream, so that the peer stops. `connect` (s)
        limits the time until the request is sent; the caller limits the rest. Raises
        `TransportError`, `RemoteProtocolError`.
        """
        streams = self._streams.setdefault(peer, _Streams())
        await _take_place(streams, connect)
        try:
            used = await self._begin(peer, streams, request, connect)
            try:
                yield used
            finally:
                await _release(streams, used)
        finally:
            streams.places.release()

    async def _begin(
        self, peer: PeerId, streams: _Streams, request: Request, connect: float
    ) -> AskStream:
        """Send the request on an idle stream, or on a new one.

        An idle stream that ends unanswered proves nothing about a peer that is still connected: it
        may have let go of it just then. So the request is sent once more on a new one.
        """
        if streams.idle and streams.idle[-1].retired:
            await self.renew(peer)
        if streams.idle:
            stream = streams.idle.pop()
            try:
                await _converse(stream, request, connect)
            except _NotTaken:
                raise
            except TransportError:
                if stream.replied or peer not in self._transport.connected():
                    raise
            else:
                return stream
        stream = await self._open(peer, connect)
        await _converse(stream, request, connect)
        return stream

    async def renew(self, peer: PeerId) -> None:
        """Let go of the idle streams whose connection a better one replaces."""
        streams = self._streams.get(peer, _Streams())
        old = [stream for stream in streams.idle if stream.retired]
        streams.idle[:] = [stream for stream in streams.idle if not stream.retired]
        for stream in old:
            await stream.stream.aclose()

    async def _open(self, peer: PeerId, connect: float) -> AskStream:
        with trio.move_on_after(connect):
            if peer not in self._transport.connected():
                await self._reach(peer)
            stream = AskStream(await self._transport.open_stream(peer, PROTOCOL))
            self._nursery.start_soon(self._read, peer, stream)
            return stream
        raise TransportError(f"no stream to it within {connect:g} s")

    async def _read(self, peer: PeerId, stream: AskStream) -> None:
        await stream.read()
        streams = self._streams[peer]
        if stream in streams.idle:
            streams.idle.remove(stream)


async def _take_place(streams: _Streams, connect: float) -> None:
    try:
        streams.places.acquire_nowait()
    except trio.WouldBlock:
        with trio.move_on_after(connect):
            await streams.places.acquire()
            return
        raise NoPlace(f"{MAX_AT_ONCE} requests to it are under way") from None


async def _converse(stream: AskStream, request: Request, connect: float) -> None:
    """Send the request and wait for the reply to begin; else the stream is reset."""
    try:
        with trio.move_on_after(connect) as limit:
            await stream.send(request)
        if limit.cancelled_caught:
            raise _NotTaken(f"it did not take the request within {connect:g} s")
        await stream.wait_frame()
    except BaseException:
        await stream.stream.reset()
        raise


async def _release(streams: _Streams, stream: AskStream) -> None:
    """Keep it for the next request if this one is over, else make the peer stop."""
    if not stream.idle:
        await stream.stream.reset()
    elif len(streams.idle) >= MAX_IDLE or stream.retired:
        await stream.stream.aclose()
    else:
        streams.idle.append(stream)


class PeerAnswer:
    """A peer's answer as it comes: read the chunks once."""

    def __init__(self, stream: AskStream) -> None:
        self._stream = stream
        self._chunks: deque[Chunk] = deque()
        self._error: GenerateError | None = None
        self.origin = Origin()
        #: What closed it: the load of the peer's providers and the claim are in there.
        self.closing: Done | Failed | None = None

    @property
    def arrived(self) -> float:
        """When its last byte so far came."""
        return self._stream.arrived

    async def wait_head(self) -> None:
        """Wait until it is known who answers. Raises the `GenerateError` the peer sent."""
        await self._receive()
        if self._error is not None and not self._chunks:
            raise self._error

    def __aiter__(self) -> PeerAnswer:
        return self

    async def __anext__(self) -> Chunk:
        """The next chunk. Raises the `GenerateError` the peer sent, and as `AskStream`."""
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self.closing is not None:
                raise StopAsyncIteration
            await self._receive()
        return self._chunks.popleft()

    async def _receive(self) -> None:
        await self._stream.wait_frame()
        chunks = []
        for frame in self._stream.take_frames():
            if isinstance(frame, Piece):
                chunks.append(frame.chunk)
            elif isinstance(frame, Head):
                self.origin = frame.origin
            elif isinstance(frame, Done):
                chunks.append(frame.chunk)
                self.closing = frame
            elif isinstance(frame, Failed):
                self._error = frame_error(frame)
                self.closing = frame
        self._chunks.extend(merge_text(chunks))
