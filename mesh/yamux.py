"""Yamux: many streams on one connection. Bytes in, bytes out: the socket belongs to others.

Ours and not py-libp2p's, because there

- a task cancelled while it reads or writes leaves the cipher out of step, and the connection dies;
- a peer that ignores its window fills our memory, 65536 bytes at a time, and is only logged;
- a reader that nobody serves, or a full queue of new streams, stops every stream;
- each small message costs three locks and a window update, twice the work of the message itself;
- the 257th stream waits for ever, and a finished one that the peer keeps open is never forgotten.

Here a frame is made and queued in one step without an `await`, a reader takes bytes only when it
returns them, and a window is enforced where the frame arrives.

https://github.com/hashicorp/yamux/blob/master/spec.md
"""

from __future__ import annotations

import struct
from typing import Protocol

import trio

from .transport import PeerId, TransportError

PROTOCOL_ID = "/yamux/1.0.0"

DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
_HEADER = struct.Struct("!BBHII")  # version, type, flags, stream, length
HEADER_SIZE = _HEADER.size

#: Bytes of a stream that its receiver has room for at first (the protocol's own number).
INITIAL_WINDOW = 256 * 1024
#: What the window of a stream grows to that carries much.
FULL_WINDOW = 1024 * 1024
#: How many streams of a connection may have a full window.
FULL_WINDOWS = 16
#: Payload of a frame: with its header it fits one noise message.
MAX_PAYLOAD = 65519 - HEADER_SIZE
#: Streams that each end may have opened. One more of the peer's is reset.
MAX_STREAMS = 256
#: Seconds a sender waits for a receiver that takes nothing.
WINDOW_TIMEOUT = 5.0


class YamuxViolation(Exception):
    """The peer broke the protocol: the connection must end."""


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


class YamuxStream:
    """One stream: a `Stream` of mesh/transport.py."""

    def __init__(self, session: YamuxSession, number: int) -> None:
        self.number = number
        self.session = session
        #: What is spoken on it, once that is agreed on.
        self.protocol = ""
        self._in = bytearray()
        #: Bytes the peer may still send.
        self._room = INITIAL_WINDOW
        #: Bytes taken by the reader that the peer does not know of yet.
        self._taken = 0
        self._full_window = False
        #: Bytes we may still send.
        self._credit = INITIAL_WINDOW
        self._finished_in = self._finished_out = False
        #: Why nothing can be sent any more, and nothing but what has arrived be received.
        self._over = ""
        self._let_go = False
        self._receiving = self._sending = False
        self._readable: trio.Event | None = None
        self._writable: trio.Event | None = None

    @property
    def peer(self) -> PeerId:
        return self.session.peer

    @property
    def retired(self) -> bool:
        """Does a better connection replace the one that it is on?"""
        return self.session.retired

    @property
    def is_over(self) -> bool:
        """Is there nothing more to come in either direction?"""
        return bool(self._over) or (self._finished_in and self._finished_out)

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        """1 to `max_bytes` bytes, or `b""` at the end. Loses nothing if it is cancelled.

        Raises `TransportError` if the stream was reset or its connection lost.
        """
        if self._receiving:
            raise trio.BusyResourceError("another task receives from this stream")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._receiving = True
        try:
            while not self._in:
                if self._over:
                    raise TransportError(self._over)
                if self._finished_in:
                    return b""
                self._readable = trio.Event()
                await self._readable.wait()
        finally:
            self._receiving = False
        data = bytes(self._in[:max_bytes])
        del self._in[:max_bytes]
        self._give_credit(len(data))
        return data

    def _give_credit(self, taken: int) -> None:
        """Let the peer send more, once it is worth a frame of its own."""
        self._taken += taken
        window = FULL_WINDOW if self._full_window else INITIAL_WINDOW
        if self._taken * 2 < window or self._finished_in or self._over:
            return
        credit = self._taken
        self._taken = 0
        if not self._full_window and self.session.take_full_window(self):
            self._full_window = True
            credit += FULL_WINDOW - INITIAL_WINDOW
        self._room += credit
        self.session.send(WINDOW_UPDATE, 0, self.number, credit)

    async def send_all(self, data: bytes) -> None:
        """Send it all. What was cancelled or failed half-way resets the stream.

        Raises `TransportError` if the stream was reset, its connection lost, or if the peer took
        nothing for `WINDOW_TIMEOUT`.
        """
        if self._sending:
            raise trio.BusyResourceError("another task sends on this stream")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._sending = True
        rest = memoryview(data)
        try:
            while rest:
                await self._wait_sendable()
                piece = rest[: min(self._credit, MAX_PAYLOAD)]
                rest = rest[len(piece) :]
                self._credit -= len(piece)
                self.session.send(DATA, 0, self.number, len(piece), bytes(piece))
        except BaseException:
            self._abort("a send on this stream did not finish", tell=True)
            raise
        finally:
            self._sending = False
        # Others may want to run, but it is too late to be cancelled: all has been sent.
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def _wait_sendable(self) -> None:
        """Wait for credit of the peer and room in the socket."""
        while True:
            if self._over or self._finished_out:
                raise TransportError(self._over or "this end of the stream was closed")
            if self.session.congested:
                await self.session.wait_low()
            elif self._credit:
                return
            else:
                self._writable = trio.Event()
                with trio.move_on_after(WINDOW_TIMEOUT) as limit:
                    await self._writable.wait()
                if limit.cancelled_caught:
                    raise TransportError(f"the peer took nothing for {WINDOW_TIMEOUT:g} s")

    async def send_eof(self) -> None:
        """Finish sending; receiving goes on. Never raises."""
        if not self._over and not self._finished_out:
            self._finished_out = True
            self.session.send(WINDOW_UPDATE, FIN, self.number, 0)
            self._wake()
            self._forget_if_over()

    async def aclose(self) -> None:
        """Finish sending and let the stream go: what the peer still sends, resets it."""
        await self.send_eof()
        self._let_go = True
        if self._in:  # nobody will read it
            self._abort("this stream was closed", tell=True)
        self._in.clear()
        self._over = self._over or "this stream was closed"
        self._wake()

    async def reset(self) -> None:
        """Abort in both directions. Never raises."""
        self.abort()

    def abort(self) -> None:
        """Abort in both directions at once."""
        self._in.clear()
        self._abort("this stream was reset", tell=True)

    # --- what the session does to it --------------------------------------------------------------

    def arrived(self, data: bytes) -> None:
        """Data of a frame. Its length was taken from the room when the header came."""
        if self._let_go:
            self._abort("this stream was closed", tell=True)
        else:
            self._in += data
            self._wake_reader()

    def reserve(self, length: int) -> None:
        """A frame of so many bytes begins. Raises `YamuxViolation` if there is no room for it."""
        if length > self._room or self._finished_in:
            raise YamuxViolation(f"{length} bytes where there is room for {self._room}")
        self._room -= length

    def credited(self, length: int) -> None:
        """The peer has room for so many bytes more."""
        self._credit += length
        if self._writable is not None:
            self._writable.set()

    def finished(self) -> None:
        """The peer has finished sending."""
        self._finished_in = True
        self._wake_reader()
        self._forget_if_over()

    def broken(self, why: str) -> None:
        """The peer reset the stream, or the connection is lost."""
        self._abort(why, tell=False)

    def _abort(self, why: str, *, tell: bool) -> None:
        if self.session.forget(self) and tell:
            self.session.send(WINDOW_UPDATE, RST, self.number, 0)
        self._over = self._over or why
        self._wake()

    def _forget_if_over(self) -> None:
        if self._finished_in and self._finished_out:
            self.session.forget(self)

    def _wake(self) -> None:
        self._wake_reader()
        if self._writable is not None:
            self._writable.set()

    def _wake_reader(self) -> None:
        if self._readable is not None:
            self._readable.set()


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
        #: Another connection replaces it: what is asked anew goes there.
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
            self._output.queue(_HEADER.pack(0, kind, flags, number, length) + data)

    @property
    def congested(self) -> bool:
        return self._output.congested

    async def wait_low(self) -> None:
        await self._output.wait_low()

    def take_full_window(self, stream: YamuxStream) -> bool:
        """May this stream have a full window? Not if too many have one already."""
        if len(self._full_windows) < FULL_WINDOWS:
            self._full_windows.add(stream.number)
        return stream.number in self._full_windows

    def forget(self, stream: YamuxStream) -> bool:
        """Let go of a stream that is over. Was it there?"""
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
            wanted = HEADER_SIZE - len(self._head)
            self._head += rest[:wanted]
            rest = rest[wanted:]
            if len(self._head) == HEADER_SIZE:
                header = _HEADER.unpack(self._head)
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
