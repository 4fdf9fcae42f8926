"""The bytes of a connection, in a private network under its pre-shared key.

A libp2p private network ("pnet") encrypts everything with XSalsa20 under the key of the network:
each side sends 24 random bytes, then its stream. py-libp2p has plain Salsa20 with 8 bytes, which
no other implementation understands, and waits for ever for a peer with another key. Every libp2p
connection begins with the same 20 bytes (`GREETING`), so a peer that is not of this network is
known by its first bytes, and refused at once.

https://github.com/libp2p/specs/blob/master/pnet/Private-Networks-PSK-V1.md
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress

import trio
from Crypto.Cipher import Salsa20
from libp2p.abc import IRawConnection
from libp2p.connection_types import ConnectionType
from libp2p.io.exceptions import ConnectionClosedError, IOException
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from .transport import TransportError
from .yamux_stream import YamuxStream

NONCE_SIZE = 24
#: What both sides send first on any libp2p connection.
GREETING = b"\x13/multistream/1.0.0\n"
#: So many bytes of a greeting where a nonce should be are no chance: the peer has no key.
TELLTALE = 8

#: Seconds in which a socket that we write to must take at least something.
WRITE_TIMEOUT = 10.0
#: Bytes waiting to be sent above which who sends more has to wait.
HIGH_WATER = 256 * 1024
#: Bytes waiting above which the peer is given up: it makes us answer and does not read.
OVERFLOW = 8 * 1024 * 1024
#: The kernel asks a silent peer after 20 s, every 5 s, 3 times: a machine that vanished is noticed.
KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
#: The handshake reads so little at a time because its reader gathers what it reads.
HANDSHAKE_READ = 4096


class NotInThisNetwork(IOException):
    """The peer has another key of the private network, or none."""


class Stalled(IOException):
    """The peer's side of the socket took nothing for `WRITE_TIMEOUT`, or lets answers pile up."""


def hsalsa20(key: bytes, nonce: bytes) -> bytes:
    """HSalsa20 (Bernstein, Extending the Salsa20 nonce): 32 bytes of key, 16 of nonce."""
    c = struct.unpack("<4I", b"expand 32-byte k")
    k = struct.unpack("<8I", key)
    n = struct.unpack("<4I", nonce)
    x = [c[0], *k[:4], c[1], *n, c[2], *k[4:], c[3]]

    def add_rotate_xor(to: int, a: int, b: int, bits: int) -> None:
        v = (x[a] + x[b]) & 0xFFFFFFFF
        x[to] ^= ((v << bits) | (v >> (32 - bits))) & 0xFFFFFFFF

    columns = (0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11)
    rows = (0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14)
    for _ in range(10):
        for a, b, c_, d in (*columns, *rows):
            add_rotate_xor(b, a, d, 7)
            add_rotate_xor(c_, b, a, 9)
            add_rotate_xor(d, c_, b, 13)
            add_rotate_xor(a, d, c_, 18)
    return struct.pack("<8I", *(x[i] for i in (0, 5, 10, 15, 6, 7, 8, 9)))


def xsalsa20(key: bytes, nonce: bytes) -> Salsa20.Salsa20Cipher:
    """The XSalsa20 key stream for a nonce of 24 bytes."""
    return Salsa20.new(key=hsalsa20(key, nonce[:16]), nonce=nonce[16:])


class Protection:
    """What the private network does to the bytes of one connection, both ways."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._outgoing: Salsa20.Salsa20Cipher | None = None
        self._incoming: Salsa20.Salsa20Cipher | None = None
        self._nonce = b""
        self._expected = GREETING

    @property
    def greeted(self) -> bool:
        """Has the peer shown that it has the key?"""
        return not self._expected

    def encrypt(self, data: bytes) -> bytes:
        """The bytes to send; the first ones come with the nonce."""
        if self._outgoing is not None:
            return self._outgoing.encrypt(data)
        nonce = os.urandom(NONCE_SIZE)
        self._outgoing = xsalsa20(self._key, nonce)
        return nonce + self._outgoing.encrypt(data)

    def decrypt(self, data: bytes) -> bytes:
        """What the received bytes say so far. Raises `NotInThisNetwork`."""
        if self._incoming is None:
            self._nonce += data
            if len(self._nonce) >= TELLTALE and GREETING.startswith(self._nonce[: len(GREETING)]):
                raise NotInThisNetwork("the peer is not in a private network")
            if len(self._nonce) < NONCE_SIZE:
                return b""
            data = self._nonce[NONCE_SIZE:]
            self._nonce = self._nonce[:NONCE_SIZE]
            self._incoming = xsalsa20(self._key, self._nonce)
        plain = self._incoming.decrypt(data)
        if self._expected:
            seen = plain[: len(self._expected)]
            if not self._expected.startswith(seen):
                raise NotInThisNetwork("the peer has the key of another private network")
            self._expected = self._expected[len(seen) :]
        return plain


class Wire(IRawConnection):
    """Bytes to a peer for libp2p: buffered, and protected where there is a key.

    Writing is one step without an `await` in it: `queue` encrypts and sends what can be sent now,
    and keeps the rest in order for `drain`. So whoever is cancelled, the cipher of no layer ever
    gets out of step with what was sent, and nobody needs a lock.
    """

    def __init__(self, *, initiator: bool, key: bytes | None) -> None:
        self.is_initiator = initiator
        self._protection = Protection(key) if key is not None else None
        self._in = bytearray()
        self._out = bytearray()
        self._closed = False
        self._failure: Exception | None = None
        #: Set while there is something for `drain` to do.
        self.work = trio.Event()
        self._drained = trio.Event()

    # --- what carries the bytes -------------------------------------------------------------------

    def _send_now(self) -> None:
        """Send what can be sent without waiting."""
        raise NotImplementedError

    async def _send_some(self) -> None:
        """Wait until something can be sent, and send it. What fails is given to `_fail`."""
        raise NotImplementedError

    async def _receive_some(self) -> bytes:
        """The next bytes as they come, `b""` at the end. Raises `ConnectionClosedError`."""
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError

    # --- sending ----------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Bytes that are not on their way yet."""
        return len(self._out)

    def queue(self, data: bytes) -> None:
        """Send these bytes in their turn. What fails, fails in `drain`."""
        if self._closed or self._failure is not None:
            return
        idle = not self._out
        self._out += self._protection.encrypt(data) if self._protection else data
        if idle:
            self._send_now()
        if self._out:
            self.work.set()
        if len(self._out) > OVERFLOW:
            self._fail(Stalled("the peer does not read what it asks for"))

    def _sent(self, count: int) -> None:
        """The first so many bytes are on their way."""
        del self._out[:count]
        if len(self._out) <= HIGH_WATER // 2:
            self._signal_drained()

    def _fail(self, failure: Exception) -> None:
        self._failure = self._failure or failure
        self._out.clear()
        self.work.set()
        self._signal_drained()

    def _signal_drained(self) -> None:
        self._drained.set()
        self._drained = trio.Event()

    async def drain(self) -> None:
        """Send all that is queued. For one task at a time. Raises if the connection is dead."""
        while self._out:
            await self._send_some()
        if self._failure is not None:
            raise self._failure
        self.work = trio.Event()

    async def wait_low(self) -> None:
        """Wait until few bytes are queued, or none will be sent any more."""
        while len(self._out) > HIGH_WATER // 2:
            await self._drained.wait()

    async def wait_empty(self) -> None:
        """Wait until nothing is queued."""
        while self._out:
            await self._drained.wait()

    async def write(self, data: bytes) -> None:
        self.queue(data)
        await self.drain()

    # --- receiving --------------------------------------------------------------------------------

    async def receive(self) -> bytes:
        """The next bytes, `b""` at the end. Raises `IOException` if the connection is dead."""
        if self._in:
            data = bytes(self._in)
            self._in.clear()
            return data
        while True:
            try:
                data = await self._receive_some()
            except ConnectionClosedError:
                self._check_greeted()
                raise
            if not data:
                self._check_greeted()
            if not data or self._protection is None:
                return data
            plain = self._protection.decrypt(data)
            if plain:
                return plain

    def _check_greeted(self) -> None:
        """At the end of the connection: was it refused for its key?"""
        if self._protection is not None and not self._protection.greeted:
            raise NotInThisNetwork("the peer hung up: it may be of another private network")

    async def read(self, n: int | None = None) -> bytes:
        if not self._in:
            self._in += await self.receive()
        taken = bytes(self._in[: HANDSHAKE_READ if n is None else min(n, HANDSHAKE_READ)])
        del self._in[: len(taken)]
        return taken

    # --- the rest ---------------------------------------------------------------------------------

    def abort(self) -> None:
        """Close at once. What is queued is lost."""
        if not self._closed:
            self._closed = True
            self._close()
            self._out.clear()
            self.work.set()
            self._signal_drained()

    async def close(self) -> None:
        self.abort()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None

    def get_transport_addresses(self) -> list[Multiaddr]:
        if (remote := self.get_remote_address()) is None:
            return []
        host, port = remote
        return [Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}")]

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.DIRECT


class SocketWire(Wire):
    """A connection of its own."""

    def __init__(self, stream: trio.SocketStream, *, initiator: bool, key: bytes | None) -> None:
        super().__init__(initiator=initiator, key=key)
        self._stream = stream
        # The same socket, for calls that need no scheduler. It is detached before the close.
        own = stream.socket
        self._socket = socket.socket(own.family, own.type, own.proto, fileno=own.fileno())
        self._socket.setblocking(False)
        _keep_alive(self._socket)
        self._remote = _remote_address(self._socket)

    def local_address(self) -> tuple[str, int]:
        """Raises `OSError` if the connection is gone."""
        host, port = self._socket.getsockname()[:2]
        return str(host), int(port)

    def _send_now(self) -> None:
        try:
            while self._out:
                with memoryview(self._out)[:65536] as piece:
                    sent = self._socket.send(piece)
                self._sent(sent)
        except BlockingIOError:
            pass
        except OSError as error:
            self._fail(ConnectionClosedError(f"the connection broke: {error}", transport="tcp"))

    async def _send_some(self) -> None:
        with trio.move_on_after(WRITE_TIMEOUT) as limit:
            await trio.lowlevel.wait_writable(self._socket.fileno())
        if limit.cancelled_caught:
            self._fail(Stalled(f"the peer took nothing for {WRITE_TIMEOUT:g} s"))
        else:
            self._send_now()

    async def _receive_some(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(65536))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError("the connection broke", transport="tcp") from error

    def _close(self) -> None:
        self._socket.detach()
        self._stream.socket.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._remote


class StreamWire(Wire):
    """A circuit: a stream to a relay, which carries its bytes on."""

    def __init__(self, stream: YamuxStream, *, initiator: bool, key: bytes | None) -> None:
        super().__init__(initiator=initiator, key=key)
        self._stream = stream

    def _send_now(self) -> None:
        """A stream has its window: `drain` waits for it."""

    async def _send_some(self) -> None:
        piece = bytes(self._out[:65536])
        try:
            await self._stream.send_all(piece)
            self._sent(len(piece))
        except TransportError as error:
            self._fail(ConnectionClosedError(f"the circuit broke: {error}", transport="relay"))

    async def _receive_some(self) -> bytes:
        try:
            return await self._stream.receive_some(65536)
        except TransportError as error:
            raise ConnectionClosedError("the circuit broke", transport="relay") from error

    def _close(self) -> None:
        self._stream.abort()

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.RELAYED


def _keep_alive(own: socket.socket) -> None:
    with suppress(OSError):  # the connection may be gone already
        own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # not every system has them
                own.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _remote_address(own: socket.socket) -> tuple[str, int] | None:
    """Who is at the other end; None if it has gone already."""
    try:
        host, port = own.getpeername()[:2]
    except OSError:
        return None
    return str(host).partition("%")[0], int(port)
