"""Gossip: py-libp2p's gossipsub 1.1, with what a peer can do to it bounded.

Mended here, each because of what happens without it:

- Any exception in the library's tasks (a malformed message, a bad key, a validator that raises)
  stops its service and with it the host; its service manager also breaks at 1000 tasks. So its
  tasks run under `Tasks`, which logs, and messages are read and checked by `Gossip`.
- Message numbers start at the time in seconds, so a node that comes back repeats some, and is not
  heard for two minutes. Here they start at the time in nanoseconds.
- A signed record of addresses goes with every message, and is checked twice: half of the CPU time.
  Nothing here uses it. It is left out.
- What is received goes into queues that drop; here a handler sees it at once and decides whether
  it goes on.
- Members of the gossip mesh are scored by rules that differ from the specification's. No scores:
  the private network is the wall.
- A peer can make a node remember any topic, dial any address (peer exchange), and send 64 kB for
  each 38 bytes of a request. Control messages are cut down to what the protocol needs.
- Where one of two connections to a peer ends, each end forgets the topics of the other when it
  notices, which may be after the other has told them anew: they are silent from then on.
- Its list of first messages and its list of delivery times only grow.
- The thread of its cache outlives it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import IHost, IMuxedConn, INetStream
from libp2p.peer.id import ID
from libp2p.pubsub import gossipsub, pubsub
from libp2p.pubsub.pb.rpc_pb2 import RPC, ControlMessage, Message
from libp2p.pubsub.validators import signature_validator

from .streams import LibraryStream, SecureYamux
from .transport import GossipHandler, Stream, TransportError

log = logging.getLogger(__name__)

#: Bytes of the longest message, and of the longest bundle of messages.
MAX_MESSAGE = 64 * 1024
MAX_RPC = 256 * 1024
#: Seconds between two looks at the gossip mesh.
HEARTBEAT = 1.0
#: Seconds a peer that was pruned is left alone. It also hears nothing in that time, hence short.
PRUNE_BACKOFF = 5
#: Seconds between two looks whether everything was written.
FLUSH_LOOK = 0.005
#: Message ids that are looked at in one offer or request of a peer.
MAX_OFFERED = 512
MAX_REQUESTED = 32


class Tasks:
    """Stands in for the library's service manager. A task that fails is logged, and no more."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.is_running = True

    def run_task(self, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        self._nursery.start_soon(self._run, function, args)

    def run_daemon_task(self, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        self._nursery.start_soon(self._run_for_ever, function, args)

    async def wait_finished(self) -> None:
        await trio.sleep_forever()

    async def _run(self, function: Callable[..., Awaitable[Any]], args: Iterable[Any]) -> None:
        try:
            await function(*args)
        except Exception:  # the log has it; gossip goes on
            log.exception("a task of gossip failed")

    async def _run_for_ever(
        self, function: Callable[..., Awaitable[Any]], args: Iterable[Any]
    ) -> None:
        while True:
            await self._run(function, args)
            await trio.sleep(HEARTBEAT)


class Router(gossipsub.GossipSub):
    """The gossip mesh: who of the peers gets a message from us."""

    def __init__(self, topics: frozenset[str]) -> None:
        super().__init__(
            [gossipsub.PROTOCOL_ID_V11],  # 1.2 doubles the CPU time
            degree=6,
            degree_low=4,
            degree_high=12,
            heartbeat_interval=cast(int, HEARTBEAT),
            prune_back_off=PRUNE_BACKOFF,
            unsubscribe_back_off=PRUNE_BACKOFF,
            spam_protection_enabled=False,  # counts what a peer forwards as if it were its own
            adaptive_gossip_enabled=False,
            eclipse_protection_enabled=False,
        )
        self.scorer = None
        self._topics = topics

    async def handle_rpc(self, rpc: RPC, sender_peer_id: ID) -> None:
        await super().handle_rpc(RPC(control=self._bounded(rpc.control)), sender_peer_id)

    def _bounded(self, control: ControlMessage) -> ControlMessage:
        """What of a peer's control message is acted on."""
        kept = ControlMessage()
        for offer in control.ihave[: len(self._topics)]:
            if offer.topicID in self._topics:
                ids = dict.fromkeys(offer.messageIDs[:MAX_OFFERED])
                kept.ihave.add(topicID=offer.topicID, messageIDs=ids)
        requested = dict.fromkeys(
            id_ for request in control.iwant[:MAX_REQUESTED] for id_ in request.messageIDs
        )
        if requested:
            kept.iwant.add(messageIDs=list(requested)[:MAX_REQUESTED])
        for topic in dict.fromkeys(graft.topicID for graft in control.graft):
            if topic in self._topics:
                kept.graft.add(topicID=topic)
        for topic in dict.fromkeys(prune.topicID for prune in control.prune):
            if topic in self._topics:
                kept.prune.add(topicID=topic, backoff=PRUNE_BACKOFF)
        return kept

    async def _emit_control_msgs(
        self,
        peers_to_graft: dict[ID, list[str]],
        peers_to_prune: dict[ID, list[str]],
        peers_to_gossip: dict[ID, dict[str, list[bytes]]],
    ) -> None:
        # The library sends each peer also the grafts that are meant for the peers before it.
        for peer in {*peers_to_graft, *peers_to_prune, *peers_to_gossip}:
            control = ControlMessage()
            for topic in peers_to_graft.get(peer, ()):
                control.graft.add(topicID=topic)
            for topic in peers_to_prune.get(peer, ()):
                control.prune.add(topicID=topic, backoff=PRUNE_BACKOFF)
            for topic, ids in peers_to_gossip.get(peer, {}).items():
                control.ihave.add(topicID=topic, messageIDs=ids[-MAX_OFFERED:])
            await self.emit_control_message(control, peer)

    async def publish(self, msg_forwarder: ID, pubsub_msg: Message) -> None:
        await super().publish(msg_forwarder, pubsub_msg)
        self.recent_message_deliveries.clear()

    def _check_equivocation(self, msg: Message) -> bool:
        return True  # a second message of the same number has been dropped before


class Gossip(pubsub.Pubsub):
    """Signed messages on topics, to whoever subscribed."""

    def __init__(self, host: IHost, topics: frozenset[str]) -> None:
        super().__init__(host, Router(topics), allowed_topics=topics, max_inbound_rpc_size=MAX_RPC)
        self.counter = time.time_ns()
        self._listeners: dict[str, GossipHandler] = {}
        #: Messages that are being written.
        self._writing = 0

    @contextmanager
    def running(self, nursery: trio.Nursery) -> Iterator[None]:
        """Gossip with every connected peer, as long as the nursery and the context last."""
        tasks = Tasks(nursery)
        services: tuple[Any, ...] = (self, self.router)
        for service in services:
            service._manager = tasks
            nursery.start_soon(service.run)
        try:
            yield
        finally:
            tasks.is_running = False
            self.seen_messages.stop()

    async def listen(self, topic: str, handler: GossipHandler) -> None:
        """Hear a topic. The handler decides at once whether a message is passed on."""
        if self.allowed_topics is not None and topic not in self.allowed_topics:
            raise ValueError(f"{topic} is not a topic of this host")
        self._listeners[topic] = handler
        await self.subscribe(topic)

    async def stream_handler(self, stream: INetStream) -> None:
        """Read what a peer gossips. What cannot be read resets its stream."""
        muxed = cast(LibraryStream, stream.muxed_stream)  # type: ignore[attr-defined]
        peer = muxed.muxed_conn.peer_id
        buffered = bytearray()
        while (frame := await _read_frame(muxed.stream, buffered)) is not None:
            rpc = RPC()
            try:
                rpc.ParseFromString(frame)
            except DecodeError as error:
                raise TransportError(f"{peer} gossips nonsense") from error
            await self._received(rpc, peer)

    async def _received(self, rpc: RPC, peer: ID) -> None:
        for subscription in rpc.subscriptions[: 2 * len(self.allowed_topics or ())]:
            self.handle_subscription(peer, subscription)
        for message in rpc.publish:
            if self._is_subscribed_to_msg(message):
                await self.push_msg(peer, message)
        if rpc.HasField("control"):
            await self.router.handle_rpc(rpc, peer)

    async def push_msg(self, msg_forwarder: ID, msg: Message) -> None:
        """Pass a message on: our own, or one that is new, signed, and wanted here."""
        if msg_forwarder == self.my_id:
            self._mark_msg_seen(msg)
        elif self._is_msg_seen(msg) or not self._is_wanted(msg):
            return
        await self.router.publish(msg_forwarder, msg)

    def _is_wanted(self, msg: Message) -> bool:
        if len(msg.data) > MAX_MESSAGE or len(msg.topicIDs) != 1 or not _is_signed(msg):
            return False
        # From here on its number is spent, whatever becomes of it; not before: it could be forged.
        self._mark_msg_seen(msg)
        handler = self._listeners.get(msg.topicIDs[0])
        origin = ID(msg.from_id)
        if handler is None or origin == self.my_id:
            return False
        try:
            return handler(origin.to_base58(), msg.data)
        except Exception:  # the log has it; the message ends here
            log.exception("a handler of %s failed", msg.topicIDs[0])
            return False

    def move(self, connection: IMuxedConn) -> None:
        """That connection is over or about to be, while the peer has another: go on there."""
        peer: ID = cast(SecureYamux, connection).peer_id
        stream = self.peers.get(peer)
        if stream is not None and stream.muxed_conn is connection:
            self._handle_dead_peer(peer)

    def _handle_dead_peer(self, peer_id: ID) -> None:
        # A peer that is still connected has not unsubscribed, and will not subscribe again: each
        # end notices by itself, and the library would have it forget what the other just said.
        kept = [topic for topic, peers in self.peer_topics.items() if peer_id in peers]
        super()._handle_dead_peer(peer_id)
        if self._peer_is_connected(peer_id):
            for topic in kept:
                self.peer_topics.setdefault(topic, set()).add(peer_id)
            self._peer_subscription_count[peer_id] = len(kept)

    async def write_msg(self, stream: INetStream, rpc_msg: RPC) -> bool:
        rpc_msg.ClearField("senderRecord")
        self._writing += 1
        try:
            return await super().write_msg(stream, rpc_msg)
        finally:
            self._writing -= 1

    async def flush(self) -> None:
        """Wait until nothing waits to be written to a peer."""
        # The library's queues tell nobody when they are empty.
        while self._writing or any(map(len, self.peer_queues.values())):  # noqa: ASYNC110
            await trio.sleep(FLUSH_LOOK)

    def get_hello_packet(self) -> RPC:
        hello = RPC()
        for topic in self.topic_ids:
            hello.subscriptions.add(subscribe=True, topicid=topic)
        return hello


def _is_signed(msg: Message) -> bool:
    try:
        return signature_validator(msg)
    except Exception as error:  # a key or peer id that is none; only the sender would care
        log.debug("a message with a malformed key was dropped: %r", error)
        return False


async def _read_frame(stream: Stream, buffered: bytearray) -> bytes | None:
    """The next frame: a varint of its length, and so many bytes. None at the end."""
    while True:
        length = shift = 0
        for position, byte in enumerate(buffered[:3]):
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                end = position + 1 + length
                if length > MAX_RPC:
                    raise TransportError(f"{stream.peer} gossips {length} bytes at once")
                if len(buffered) >= end:
                    frame = bytes(buffered[position + 1 : end])
                    del buffered[:end]
                    return frame
                break
        else:
            if len(buffered) >= 3:
                raise TransportError(f"{stream.peer} gossips too much at once")
        received = await stream.receive_some()
        if not received:
            return None
        buffered += received
