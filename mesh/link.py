"""One connection to a peer, with the streams on it; what it mends of the library: see `patches`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.network.connection import swarm_connection
from libp2p.network.stream.net_stream import NetStream, StreamState
from libp2p.network.swarm import Swarm

from .pnet import SocketWire
from .streams import LibraryStream, SecureYamux, negotiate, select
from .transport import PeerId, TransportError
from .yamux_stream import YamuxStream

log = logging.getLogger(__name__)

#: Seconds for agreeing on a stream's protocol.
NEGOTIATE_TIMEOUT = 10.0
#: What runs on every connection and is no request: gossip, identify, bitswap, DCUtR.
BACKGROUND = ("/meshsub/", "/ipfs/", "/libp2p/")


class Link(swarm_connection.SwarmConn):
    """One connection to a peer, with the streams on it."""

    muxed_conn: SecureYamux

    def __init__(
        self,
        muxed: SecureYamux,
        swarm: Swarm,
        *,
        handlers: Mapping[str, Callable[[INetStream], Any]],
        over: Callable[[Link], None],
        address: str,
        relay: PeerId = "",
    ) -> None:
        """`handlers` serve the streams that the peer opens, by protocol; `over` is told the end."""
        super().__init__(muxed, swarm)
        self._handlers = handlers
        self._over = over
        self.peer: PeerId = muxed.peer_id.to_base58()
        #: Where it was dialled, or where it comes from.
        self.address = address
        #: Who carries it; "": it is direct.
        self.relay = relay
        self.set_transport_info(muxed.get_transport_addresses(), muxed.get_connection_type())
        self.event_started.set()

    @property
    def is_closed(self) -> bool:
        return self.muxed_conn.is_closed

    @property
    def in_use(self) -> bool:
        """Is something asked on it?"""
        return any(not p.startswith(BACKGROUND) for p in self.muxed_conn.session.protocols())

    def local_address(self) -> tuple[str, int]:
        """Where it leaves from, as other connections may (see mesh/sockets.py).

        Raises `TransportError` if it did not leave from a port of this machine, or is over.
        """
        wire = self.muxed_conn.wire
        if not isinstance(wire, SocketWire) or not wire.is_initiator:
            raise TransportError("it was not dialled from here")
        try:
            return wire.local_address()
        except OSError as error:
            raise TransportError(f"the connection is over: {error}") from error

    async def close(self) -> None:
        await self.muxed_conn.close()

    async def run(self) -> None:
        """Serve the peer until the connection is over. Its handlers end with it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve, nursery)
            nursery.start_soon(self.swarm.notify_connected, self)
            await self.muxed_conn.start()
            self.event_closed.set()
            self._over(self)
            nursery.cancel_scope.cancel()

    async def _serve(self, nursery: trio.Nursery) -> None:
        try:
            while True:
                nursery.start_soon(self._serve_stream, await self.muxed_conn.session.accept())
        except TransportError:
            return

    async def _serve_stream(self, stream: YamuxStream) -> None:
        finished = False
        try:
            with trio.fail_after(NEGOTIATE_TIMEOUT):
                stream.protocol = await negotiate(stream, self._handlers)
            await self._handlers[stream.protocol](self.library_stream(stream))
            finished = True
        except (TransportError, IOException) as error:  # the peer changed its mind: its right
            log.debug("a stream of %s ended: %s", self.peer, error)
        except Exception as error:  # the log has it, and the peer sees a reset
            log.warning("serving a stream of %s failed: %r", self.peer, error)
        finally:
            await (stream.aclose() if finished else stream.reset())

    def library_stream(self, stream: YamuxStream) -> NetStream:
        """The stream as the library's protocols use it."""
        shown = NetStream(LibraryStream(stream, self.muxed_conn), None, None)
        shown._state = StreamState.OPEN
        shown.set_protocol(TProtocol(stream.protocol))
        return shown


async def open_stream(link: Link, protocols: Sequence[str]) -> YamuxStream:
    """A new stream with the first of the protocols that the peer speaks. Raises `TransportError`,
    `NotSpoken` where it speaks none."""
    stream = link.muxed_conn.session.open()
    try:
        with trio.fail_after(NEGOTIATE_TIMEOUT):
            stream.protocol = await select(stream, protocols)
            return stream
    except trio.TooSlowError:
        await stream.reset()
        raise TransportError(f"{link.peer} did not open a stream in time") from None
    except BaseException:
        await stream.reset()
        raise
