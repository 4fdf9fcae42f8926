"""The library's own host over our network: identify, ping, gossip. What it mends: see `patches`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import IHost, INetStream
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.host.exceptions import StreamFailure
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify.identify import (
    _mk_identify_protobuf,
    _remote_address_to_multiaddr,
)
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.identity.update import update_peerstore_from_identify
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.utils import encode_varint_prefixed
from libp2p.utils.varint import decode_varint_with_size
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from .link import NEGOTIATE_TIMEOUT, Link, open_stream
from .patches import Network
from .transport import PeerId, Stream, TransportError

log = logging.getLogger(__name__)

#: Bytes of what a peer says of itself, and characters of the name of its program.
MAX_IDENTIFY, MAX_AGENT = 65536, 128
#: Seconds between two looks whether a peer has said what it is.
IDENTIFY_LOOK = 0.01


class LibraryHost(BasicHost):
    """A host for the library's protocols: identify, ping, gossipsub."""

    _network: Network

    def __init__(
        self, network: Network, *, agent: str, addresses: Callable[[], Sequence[str]]
    ) -> None:
        #: Where others can dial it, directly.
        self.addresses = addresses
        #: Called with each peer that has said what it is.
        self.on_identified: list[Callable[[PeerId], None]] = []
        super().__init__(network, disable_identify_address_discovery=True)
        network.handlers = cast(Any, self.multiselect.handlers)
        self.set_stream_handler(IDENTIFY, _identify_handler(self, agent))

    def get_transport_addrs(self) -> list[Multiaddr]:
        return [Multiaddr(address.partition("/p2p/")[0]) for address in self.addresses()]

    def get_addrs(self) -> list[Multiaddr]:
        return [Multiaddr(address) for address in self.addresses()]

    async def new_stream(self, peer_id: ID, protocol_ids: Sequence[TProtocol]) -> INetStream:
        try:
            link = self._network.link(peer_id)
            stream = await open_stream(link, [str(p) for p in protocol_ids])
        except TransportError as error:
            raise StreamFailure(str(error)) from error
        return link.library_stream(stream)

    def _schedule_identify(self, peer_id: ID, *, reason: str) -> None:
        if peer_id not in self._identify_inflight and peer_id not in self._identified_peers:
            self._identify_inflight.add(peer_id)
            self._network.background_nursery.start_soon(self._identify, peer_id, reason)

    async def _identify(self, peer_id: ID, reason: str) -> None:
        try:
            await self._identify_task_entry(peer_id, reason)
        except Exception as error:  # what a peer says of itself is of no importance here
            log.debug("%s could not be identified: %r", peer_id, error)

    async def _identify_peer(self, peer_id: ID, *, reason: str) -> None:
        said = await read_identify(self._network.link(peer_id))
        await update_peerstore_from_identify(self.peerstore, peer_id, said)
        if self._network.get_connections(peer_id):
            # The library keeps a time here, of which nothing is made, until the peer disconnects.
            agent = "".join(filter(str.isprintable, said.agent_version))
            self._identified_peers[peer_id] = agent[:MAX_AGENT]
            for told in list(self.on_identified):
                told(peer_id.to_base58())

    def speaks(self, peer_id: ID, protocol: str) -> bool:
        """Has the peer said that it speaks that protocol?"""
        try:
            return protocol in self.peerstore.get_protocols(peer_id)
        except PeerStoreError:
            return False

    async def agent(self, peer_id: ID) -> str:
        """Which program the peer says it is, in printable characters. Raises `TransportError`."""
        # Some answer one question at a time, and tell nobody when it is over.
        while peer_id in self._identify_inflight:  # noqa: ASYNC110
            await trio.sleep(IDENTIFY_LOOK)
        self._network.link(peer_id)  # the library hears of a disconnection later
        if peer_id not in self._identified_peers:
            try:
                await self._identify_peer(peer_id, reason="asked")
            except Exception as error:  # from the library, by a stranger's fields: who asks sees it
                raise TransportError(f"{peer_id} does not say what it is: {error}") from error
        return self._identified_peers.get(peer_id, "")


async def read_identify(link: Link) -> Identify:
    """What the peer says of itself. Raises `TransportError`.

    A Kubo may send a second message with more addresses, and Helia resets the stream when it has
    spoken. So the first message is all that is read.
    """
    stream = await open_stream(link, [IDENTIFY])
    said = bytearray()
    try:
        with trio.fail_after(NEGOTIATE_TIMEOUT):
            while (message := _first_message(said)) is None:
                said += await _receive_more(stream)
        identified = Identify.FromString(message)
        identified.agent_version.encode()  # a string may be none
        return identified
    except (DecodeError, ValueError, trio.TooSlowError) as error:
        raise TransportError(f"{link.peer} does not say what it is: {error}") from error
    finally:
        await stream.aclose()


def _first_message(said: bytearray) -> bytes | None:
    """What stands behind the varint of its length, if it is whole. Raises `ValueError`."""
    if len(said) > MAX_IDENTIFY:
        raise ValueError("it says too much")
    if not any(byte < 128 for byte in said[:10]):
        return None
    length, start = decode_varint_with_size(bytes(said[:10]))
    return bytes(said[start : start + length]) if len(said) >= start + length else None


async def _receive_more(stream: Stream) -> bytes:
    data = await stream.receive_some()
    if not data:
        raise TransportError(f"{stream.peer} closed the stream")
    return data


def _identify_handler(host: IHost, agent: str) -> Callable[[INetStream], Any]:
    async def identify(stream: INetStream) -> None:
        message = _mk_identify_protobuf(
            host, _remote_address_to_multiaddr(stream.get_remote_address())
        )
        message.agent_version = agent
        await stream.write(encode_varint_prefixed(message.SerializeToString()))

    return identify
