"""One stream of a yamux connection, with the windows of its two directions."""

from __future__ import annotations

from typing import Protocol

import trio

from .transport import PeerId, TransportError
from .yamux_frames import DATA, FIN, MAX_PAYLOAD, RST, WINDOW_UPDATE, YamuxViolation

#: Bytes of a stream that its receiver has room for at first (the protocol's own number).
INITIAL_WINDOW = 256 * 1024
#: What the window of a stream grows to that carries much.
FULL_WINDOW = 1024 * 1024
#: Seconds a sender waits for a receiver that takes nothing.
WINDOW_TIMEOUT = 5.0


class Session(Protocol):
    """What a stream needs of its connection (`yamux.YamuxSession`)."""

    peer: PeerId
    #: Another connection replaces it: what is asked anew goes there.
    retired: bool

    def send(self, kind: int, flags: int, number: int, length: int, data: bytes = b"") -> None:
        """Send a frame after those before it. Does not block."""
        ...

    @property
    def congested(self) -> bool:
        """So much is queued that who sends data has to wait."""
        ...

    async def wait_low(self) -> None:
        """Wait until it is not congested, or nothing will be sent any more."""
        ...

    def take_full_window(self, stream: YamuxStream) -> bool:
        """May this stream have a full window? Not if too many have one already."""
        ...

    def forget(self, stream: YamuxStream) -> bool:
        """Let go of a stream that is over. Was it there?"""
        ...


class YamuxStream:
    """One stream: a `Stream` of mesh/transport.py."""

    def __init__(self, session: Session, number: int) -> None:
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
