"""Connections and streams as libp2p wants them, over our own yamux (yamux.py).

`SecureYamux` carries the frames: one loop reads the socket, opens the noise messages and hands
them to the session; what the session sends is sealed and queued in one step. `LibraryStream` shows
a stream to the library's own protocols (identify, pubsub), which catch the library's errors.
`select` and `negotiate` agree on a stream's protocol (multistream-select), in one round trip.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

import trio
from libp2p.abc import IMuxedConn, IMuxedStream, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.io.exceptions import IOException
from libp2p.peer.id import ID
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamReset
from multiaddr import Multiaddr  # type: ignore[import-untyped]
from noise.exceptions import NoiseInvalidMessage  # type: ignore[import-untyped]

from .pnet import HIGH_WATER, Wire
from .transport import NotSpoken, Stream, TransportError
from .yamux import YamuxSession
from .yamux_frames import YamuxViolation
from .yamux_stream import YamuxStream

log = logging.getLogger(__name__)

#: Seconds that leaving waits for the socket to take what is queued.
LINGER = 0.5
#: Bytes of the longest protocol id that is looked at.
MAX_PROTOCOL = 512
_MULTISTREAM = "/multistream/1.0.0"
_NOT_AVAILABLE = "na"


class SecureYamux(IMuxedConn):
    """The streams of one authenticated connection. `start` runs it until it is over."""

    def __init__(self, conn: ISecureConn, peer_id: ID) -> None:
        # The library's noise session, of which we use the cipher and the socket beneath it.
        assert isinstance(conn, SecureSession), conn
        assert isinstance(conn.conn, NoiseTransportReadWriter), conn.conn
        wire = conn.conn.read_writer.read_write_closer
        assert isinstance(wire, Wire), wire
        #: What carries it.
        self.wire = wire
        self._noise = conn.conn.noise_state
        self._early = conn._drain(None)
        self.peer_id = peer_id
        self.session = YamuxSession(peer_id.to_base58(), self, client=conn.is_initiator)
        self.event_started = trio.Event()
        self._running = trio.CancelScope()

    # --- what the session sends -------------------------------------------------------------------

    def queue(self, frame: bytes) -> None:
        sealed = self._noise.encrypt(frame)
        self.wire.queue(len(sealed).to_bytes(2, "big") + sealed)

    @property
    def congested(self) -> bool:
        return self.wire.pending > HIGH_WATER

    async def wait_low(self) -> None:
        await self.wire.wait_low()

    # --- the two loops ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Carry frames until the connection is over. Its failures end it and nothing else."""
        try:
            with self._running:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._read)
                    self.event_started.set()
        finally:
            self.session.end("the connection was closed")
            self.wire.abort()

    async def _read(self) -> None:
        try:
            if self._early:
                self.session.receive(self._early)
            await self._read_messages()
            self.session.end("the connection was lost")
        except YamuxViolation as violation:
            log.warning("closing %s, which broke the yamux protocol: %s", self.peer_id, violation)
            self.session.close("the peer broke the protocol", violation=True)
        except (IOException, NoiseInvalidMessage) as error:
            self.session.end(f"the connection was lost: {error}")
        except Exception:  # a bug of ours: this connection ends, and the log has it
            log.exception("reading from %s failed", self.peer_id)
            self.session.end("the connection failed")
        self._running.cancel()

    async def _read_messages(self) -> None:
        """Until the end of the socket: noise messages, each 2 bytes of length and its bytes."""
        buffered = bytearray()
        while not self.session.lost:
            received = await self.wire.receive()
            if not received:
                return
            buffered += received
            start = 0
            while len(buffered) - start >= 2:
                end = start + 2 + int.from_bytes(buffered[start : start + 2], "big")
                if len(buffered) < end:
                    break
                self.session.receive(self._noise.decrypt(bytes(buffered[start + 2 : end])))
                start = end
            del buffered[:start]

    async def _write(self) -> None:
        """Send what the socket did not take at once."""
        try:
            while True:
                await self.wire.work.wait()
                await self.wire.drain()
        except (IOException, trio.ClosedResourceError) as error:
            self.session.end(f"the connection was lost: {error}")
            self._running.cancel()

    # --- IMuxedConn -------------------------------------------------------------------------------

    @property
    def is_initiator(self) -> bool:
        return self.wire.is_initiator

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and not self.is_closed

    @property
    def is_closed(self) -> bool:
        return bool(self.session.lost)

    async def open_stream(self) -> IMuxedStream:
        try:
            return LibraryStream(self.session.open(), self)
        except TransportError as error:
            raise MuxedConnUnavailable(str(error)) from error

    async def accept_stream(self) -> IMuxedStream:
        try:
            return LibraryStream(await self.session.accept(), self)
        except TransportError as error:
            raise MuxedConnUnavailable(str(error)) from error

    async def close(self) -> None:
        """Say goodbye if the socket takes it within `LINGER`, and end. Safe while cancelled."""
        self.session.close("the connection was closed")
        with trio.CancelScope(shield=True, deadline=trio.current_time() + LINGER):
            await self.wire.wait_empty()
        self.wire.abort()
        self._running.cancel()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.wire.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self.wire.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self.wire.get_connection_type()


class LibraryStream(IMuxedStream):
    """A stream as the library's protocols use it."""

    muxed_conn: SecureYamux

    def __init__(self, stream: YamuxStream, conn: SecureYamux) -> None:
        self.stream = stream
        self.muxed_conn = conn

    async def read(self, n: int | None = None) -> bytes:
        if n == 0:
            return b""
        try:
            data = await self.stream.receive_some(65536 if n is None or n < 0 else n)
        except TransportError as error:
            raise MuxedStreamReset(str(error)) from error
        if not data:
            raise MuxedStreamEOF("the peer has finished")
        return data

    async def write(self, data: bytes) -> None:
        try:
            await self.stream.send_all(data)
        except TransportError as error:
            raise MuxedStreamReset(str(error)) from error

    async def close(self) -> None:
        await self.stream.send_eof()

    async def reset(self) -> None:
        await self.stream.reset()

    @property
    def is_closed(self) -> bool:
        return self.stream.is_over

    def set_deadline(self, ttl: int) -> None:
        raise NotImplementedError("time limits are trio's cancel scopes")

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.muxed_conn.get_remote_address()

    async def __aenter__(self) -> LibraryStream:
        return self


# --- multistream-select ---------------------------------------------------------------------------


async def select(stream: Stream, protocols: Sequence[str]) -> str:
    """Ask for the first of the protocols that the peer speaks. Raises `TransportError`, `NotSpoken`
    where it speaks none."""
    await stream.send_all(_line(_MULTISTREAM) + _line(protocols[0]))
    if await _read_line(stream) != _MULTISTREAM:
        raise TransportError(f"{stream.peer} does not speak multistream-select")
    for tried, protocol in enumerate(protocols):
        if tried:
            await stream.send_all(_line(protocol))
        if await _read_line(stream) == protocol:
            return protocol
    raise NotSpoken(f"{stream.peer} does not speak {' or '.join(protocols)}")


async def negotiate(stream: Stream, protocols: Collection[str]) -> str:
    """Agree to what the peer asks for on a stream it opened. Raises `TransportError`."""
    await stream.send_all(_line(_MULTISTREAM))
    if await _read_line(stream) != _MULTISTREAM:
        raise TransportError(f"{stream.peer} does not speak multistream-select")
    for _ in range(8):
        protocol = await _read_line(stream)
        if protocol in protocols:
            await stream.send_all(_line(protocol))
            return protocol
        await stream.send_all(_line(_NOT_AVAILABLE))
    raise TransportError(f"{stream.peer} asks for nothing that is spoken here")


def _line(text: str) -> bytes:
    """A line of multistream-select: its length, the text and a newline."""
    data = text.encode() + b"\n"
    length = len(data)
    return (bytes((length,)) if length < 128 else bytes((length & 127 | 128, length >> 7))) + data


async def _read_line(stream: Stream) -> str:
    length = (await _read_exactly(stream, 1))[0]
    if length & 128:
        length = length & 127 | (await _read_exactly(stream, 1))[0] << 7
    if not 0 < length <= MAX_PROTOCOL:
        raise TransportError(f"{stream.peer} sent a protocol id of {length} bytes")
    line = await _read_exactly(stream, length)
    if not line.endswith(b"\n"):
        raise TransportError(f"{stream.peer} sent a protocol id without its end")
    return line[:-1].decode(errors="replace")


async def _read_exactly(stream: Stream, count: int) -> bytes:
    """Exactly so many bytes, and none of what comes after them."""
    data = b""
    while len(data) < count:
        piece = await stream.receive_some(count - len(data))
        if not piece:
            raise TransportError(f"{stream.peer} closed the stream while it was opened")
        data += piece
    return data


async def read_delimited(stream: Stream, limit: int) -> bytes:
    """A message behind the varint of its length, and none of what follows it.

    Raises `TransportError`.
    """
    length = shift = 0
    while True:
        byte = (await _read_exactly(stream, 1))[0]
        length |= (byte & 127) << shift
        shift += 7
        if byte < 128 or shift > 28:
            break
    if length > limit:
        raise TransportError(f"{stream.peer} sent a message of {length} bytes")
    return await _read_exactly(stream, length)
