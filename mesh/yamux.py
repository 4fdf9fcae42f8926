"""Yamux: many streams on one connection. Bytes in, bytes out: the socket belongs to others.

Ours and not py-libp2p's, because there

- a task cancelled while it reads or writes leaves the cipher out of step, and the connection dies;
- a peer that ignores its window fills our memory, 65536 bytes at a time, and is only logged;
- a reader that nobody serves, or a full queue of new streams, stops every stream;
- each small message costs three locks and a window update, twice the work of the message itself;
- the 257th stream waits for ever, and a finished one that the peer keeps open is never forgotten.

Here a frame is made and queued in one step without an `await`, a reader takes bytes only when it
returns them, and a window is enforced where the frame arrives.
"""

from __future__ import annotations

from typing import Protocol

import trio

from .transport import PeerId, TransportError
from .yamux_frames import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    YamuxViolation,
)
from .yamux_stream import FULL_WINDOW, YamuxStream

#: How many streams of a connection may have a full window.
FULL_WINDOWS = 16
#: Streams that each end may have opened. One more of the peer's is reset.
MAX_STREAMS = 256


class Output(Protocol):
    """Where frames go."""

    def queue(self, frame: bytes) -> None:
        """Send it after those before it. Does not block."""
        ...

    @property
    def congested(self) -> bool:
        """So much is queued that who sends data has to wait."""
        ...

    async def wait_low(self) -> None:
        """Wait until it is not congested, or nothing will be sent any more."""
        ...


class YamuxSession:
    """Both ends of all streams of a connection: `receive` what arrives, `output` gets the rest."""

    def __init__(self, peer: PeerId, output: Output, *, client: bool) -> None:
        self.peer = peer
        self._output = output
        self._streams: dict[int, YamuxStream] = {}
        self._parity = 1 if client else 0
        self._next = 1 if client else 2
        self._opened = {0: 0, 1: 0}
        self._full_windows: set[int] = set()
        self._pings: dict[int, trio.Event] = {}
        self._pinged = 0
        #: Why the connection is over.
        self.lost = ""
        self.retired = False
        self._accept_in, self._accept_out = trio.open_memory_channel[YamuxStream](2 * MAX_STREAMS)
        self._head = bytearray()
        #: Of the data frame that is arriving: whose it is, its flags, and what is still to come.
        self._target: YamuxStream | None = None
        self._flags = self._missing = 0

    def open(self) -> YamuxStream:
        """A new stream. Raises `TransportError`."""
        if self.lost:
            raise TransportError(self.lost)
        if self._opened[self._parity] >= MAX_STREAMS:
            raise TransportError(f"{MAX_STREAMS} streams to {self.peer} are open already")
        stream = self._add(self._next)
        self._next += 2
        self.send(WINDOW_UPDATE, SYN, stream.number, 0)
        return stream

    def protocols(self) -> list[str]:
        """What is spoken on the streams that are open."""
        return [stream.protocol for stream in self._streams.values()]

    async def accept(self) -> YamuxStream:
        """The next stream that the peer opens. Raises `TransportError` at the end."""
        try:
            return await self._accept_out.receive()
        except trio.EndOfChannel:
            raise TransportError(self.lost) from None

    async def ping(self) -> float:
        """The round trip to the peer's yamux, in seconds. Raises `TransportError`."""
        if self.lost:
            raise TransportError(self.lost)
        self._pinged = (self._pinged + 1) & 0xFFFFFFFF
        number, answered = self._pinged, trio.Event()
        self._pings[number] = answered
        try:
            started = trio.current_time()
            self.send(PING, SYN, 0, number)
            await answered.wait()
        finally:
            self._pings.pop(number, None)
        if self.lost:
            raise TransportError(self.lost)
        return trio.current_time() - started

    def close(self, why: str, *, violation: bool = False) -> None:
        """The connection ends: say so, and break every stream."""
        if not self.lost:
            self.send(GO_AWAY, 0, 0, 1 if violation else 0)
            self.end(why)

    def end(self, why: str) -> None:
        """The connection has ended."""
        self.lost = self.lost or why
        for stream in list(self._streams.values()):
            stream.broken(self.lost)
        for answered in self._pings.values():
            answered.set()
        self._accept_in.close()

    # --- for the streams --------------------------------------------------------------------------

    def send(self, kind: int, flags: int, number: int, length: int, data: bytes = b"") -> None:
        if not self.lost:
            self._output.queue(HEADER.pack(0, kind, flags, number, length) + data)

    @property
    def congested(self) -> bool:
        return self._output.congested

    async def wait_low(self) -> None:
        await self._output.wait_low()

    def take_full_window(self, stream: YamuxStream) -> bool:
        if len(self._full_windows) < FULL_WINDOWS:
            self._full_windows.add(stream.number)
        return stream.number in self._full_windows

    def forget(self, stream: YamuxStream) -> bool:
        if self._streams.pop(stream.number, None) is None:
            return False
        self._opened[stream.number & 1] -= 1
        self._full_windows.discard(stream.number)
        return True

    def _add(self, number: int) -> YamuxStream:
        stream = self._streams[number] = YamuxStream(self, number)
        self._opened[number & 1] += 1
        return stream

    # --- what arrives -----------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Act on the next bytes of the connection. Raises `YamuxViolation`."""
        rest = memoryview(data)
        while rest and not self.lost:
            if self._missing:
                piece = rest[: self._missing]
                rest = rest[len(piece) :]
                self._missing -= len(piece)
                self._payload(bytes(piece))
                continue
            wanted = HEADER.size - len(self._head)
            self._head += rest[:wanted]
            rest = rest[wanted:]
            if len(self._head) == HEADER.size:
                header = HEADER.unpack(self._head)
                self._head.clear()
                self._frame(*header)

    def _frame(self, version: int, kind: int, flags: int, number: int, length: int) -> None:
        if version != 0 or kind > GO_AWAY:
            raise YamuxViolation(f"version {version}, type {kind}")
        if kind == PING:
            self._ping(flags, length)
        elif kind == GO_AWAY:
            self.end("the peer closed the connection")
        else:
            self._stream_frame(kind, flags, number, length)

    def _ping(self, flags: int, number: int) -> None:
        if flags & SYN:
            self.send(PING, ACK, 0, number)
        elif number in self._pings:
            self._pings[number].set()

    def _stream_frame(self, kind: int, flags: int, number: int, length: int) -> None:
        if flags & SYN:
            self._syn(number)
        stream = self._streams.get(number)  # None: it was reset, and the peer did not know yet
        if kind == DATA:
            if stream is not None:
                stream.reserve(length)
            elif length > FULL_WINDOW:
                raise YamuxViolation(f"a frame of {length} bytes")
            self._target, self._flags, self._missing = stream, flags, length
            if not length:
                self._end_of_frame()
        elif stream is not None:
            stream.credited(length)
            self._closing_flags(stream, flags)

    def _syn(self, number: int) -> None:
        """The peer opens a stream."""
        if number == 0 or number & 1 == self._parity or number in self._streams:
            raise YamuxViolation(f"cannot open stream {number}")
        if self._opened[number & 1] >= MAX_STREAMS:
            self.send(WINDOW_UPDATE, RST, number, 0)
            return
        stream = self._add(number)
        try:
            self._accept_in.send_nowait(stream)
        except trio.WouldBlock:
            stream.broken("nobody accepts streams")
            self.send(WINDOW_UPDATE, RST, number, 0)
        else:
            self.send(WINDOW_UPDATE, ACK, number, 0)

    def _payload(self, data: bytes) -> None:
        if self._target is not None:
            self._target.arrived(data)
        if not self._missing:
            self._end_of_frame()

    def _end_of_frame(self) -> None:
        if self._target is not None:
            self._closing_flags(self._target, self._flags)
            self._target = None

    def _closing_flags(self, stream: YamuxStream, flags: int) -> None:
        if flags & RST:
            stream.broken(f"{self.peer} reset the stream")
        elif flags & FIN:
            stream.finished()
