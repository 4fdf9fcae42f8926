"""Answers what peers ask, on the streams that they opened.

The work itself is done by functions that the node passes in (`Services`). Each stream has a task
that reads it, so that an asker who leaves is noticed at once and the work for it is cancelled down
to the model; and one that writes, so that what became ready during a write goes out in the next.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import msgspec
import trio

from ..providers.base import (
    Answering,
    Asked,
    Chunk,
    Declined,
    GenerateError,
    ProviderUnavailable,
    StreamInterrupted,
)
from .embedding import pieces
from .frames import (
    AskBlock,
    AskClaims,
    AskLoads,
    AskTable,
    Block,
    Done,
    Embed,
    End,
    FindClaims,
    Frame,
    Generate,
    Head,
    Items,
    Known,
    Load,
    Piece,
    Place,
    PresentLoads,
    PutClaims,
    RemoteProtocolError,
    Reply,
    Request,
)
from .loads import Choosing
from .protocol import LocalProtocolError, Server, error_frame, merge_text
from .transport import PeerId, Stream, TransportError

logger = logging.getLogger(__name__)

#: Frames that wait to be written; more, and the provider waits.
MAX_UNSENT = 256
#: Adverts or batches that go into one frame, and their bytes.
MAX_ITEMS, MAX_BYTES = 1024, 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Services:
    """What a node does for its peers. Only `answer` and `block` may take their time."""

    #: Answers a request from this node's own providers only.
    answer: Callable[[Asked, PeerId], AbstractAsyncContextManager[Answering]]
    #: The block with that CID (36 bytes), if it is here and the peer may have it; the last argument
    #: is its proof that it knows the block's namespace.
    block: Callable[[bytes, PeerId, bytes], Awaitable[bytes | None]]
    #: A page of the batches of claims that are not among those known, by peer.
    claims: Callable[[Mapping[PeerId, Known]], Iterable[bytes]]
    #: Takes batches of claims that a peer puts here, as at a home of their keys.
    put_claims: Callable[[Sequence[bytes], PeerId], None]
    #: The batches that claim these keys.
    find_claims: Callable[[Sequence[bytes]], Iterable[bytes]]
    #: How busy the providers are that peers may use.
    loads: Callable[[], dict[str, Load]]
    #: The signed claim for an answer of this node, by the CID's text.
    claim_for: Callable[[str], bytes | None]
    #: Where the request of that id stands, if it is that peer's and waits here.
    place: Callable[[str, PeerId], Place | None] = lambda id, peer: None
    #: May that peer use this node's providers?
    may_serve: Callable[[PeerId], bool] = lambda peer: True


class Serving:
    """Serves inbound streams."""

    def __init__(self, services: Services, table: Callable[[PeerId], Iterable[bytes]]) -> None:
        self._services = services
        #: The adverts to tell a peer.
        self._table = table
        self._choosing = Choosing()

    async def handle(self, stream: Stream) -> None:
        """Answer the requests on one stream until the peer ends it."""
        conversation = _Conversation(stream, self._services, self._table, self._choosing)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(conversation.read, nursery.cancel_scope)
            nursery.start_soon(conversation.write, nursery.cancel_scope)
            await conversation.answer_requests()
        if conversation.busy:
            await stream.reset()


class _Conversation:
    """One inbound stream: a task reads, one answers, one writes."""

    def __init__(
        self,
        stream: Stream,
        services: Services,
        table: Callable[[PeerId], Iterable[bytes]],
        choosing: Choosing,
    ) -> None:
        self._stream = stream
        self._services = services
        self._table = table
        self._choosing = choosing
        self._exchange = Server()
        self._requests: list[Request] = []
        self._arrival = trio.lowlevel.ParkingLot()
        self._unsent: list[Frame] = []
        #: A chunk of the present answer was put.
        self._begun = False
        self._ready = trio.lowlevel.ParkingLot()
        self._room = trio.lowlevel.ParkingLot()

    @property
    def busy(self) -> bool:
        """Is a reply not whole?"""
        return not self._exchange.idle or bool(self._unsent)

    # --- the tasks

    async def read(self, work: trio.CancelScope) -> None:
        """Take in requests; cancel the work when the asker is gone, or sends nonsense."""
        try:
            while data := await self._stream.receive_some():
                self._requests += self._exchange.receive(data)
                self._arrival.unpark_all()
        except TransportError:
            pass  # the asker is gone: the same as an end
        except RemoteProtocolError as error:
            logger.warning("peer %s broke the protocol: %s", self._stream.peer, error)
        work.cancel()

    async def write(self, work: trio.CancelScope) -> None:
        """Send what is ready, all of it at once."""
        try:
            while True:
                while not self._unsent:
                    await self._ready.park()
                frames, self._unsent = self._unsent, []
                if self._room:
                    self._room.unpark_all()
                send = self._exchange.send
                await self._stream.send_all(b"".join(map(send, _merged(frames))))
        except TransportError:
            pass  # the asker is gone
        except (LocalProtocolError, ValueError, TypeError, OverflowError):
            # The peer sees a reset: an answer of this node's that cannot be sent.
            logger.exception("an answer to %s could not be encoded", self._stream.peer)
        work.cancel()

    async def answer_requests(self) -> None:
        """Answer one request after the other, until cancelled."""
        while True:
            while not self._requests:
                await self._arrival.park()
            request = self._requests.pop(0)
            try:
                await self._answer(request)
            except GenerateError as error:
                self._fail(error)
            except Exception:  # the peer sees an error frame, the log the traceback
                logger.exception("a request of %s failed", self._stream.peer)
                self._fail(ProviderUnavailable("an internal error; its log has more"))

    # --- the answers

    async def _answer(self, request: Request) -> None:
        if isinstance(request, Generate | Embed):
            await self._generate(request.request)
        elif isinstance(request, AskBlock):
            block = await self._services.block(request.cid, self._stream.peer, request.proof)
            self._put(Block(block=block))
        elif isinstance(request, AskClaims):
            await self._list(self._services.claims(request.known))
        elif isinstance(request, FindClaims):
            await self._list(self._services.find_claims(request.keys))
        elif isinstance(request, PutClaims):
            self._services.put_claims(request.envelopes, self._stream.peer)
            self._put(End())
        elif isinstance(request, AskTable):
            await self._list(self._table(self._stream.peer))
        elif isinstance(request, AskLoads):
            self._tell_loads(request)

    async def _generate(self, request: Asked) -> None:
        peer = self._stream.peer
        self._choosing.chose(peer)
        if not self._services.may_serve(peer):
            raise Declined("its owner does not let this node use it")
        last: Chunk | None = None
        self._begun = False
        async with self._services.answer(_as_members(request), peer) as answering:
            # The head goes out with what follows it: alone it would tell the asker nothing that it
            # can use, and cost a write.
            self._unsent.append(Head(origin=answering.origin))
            async for chunk in answering.chunks:
                for part in pieces(chunk) if chunk.embeddings else (chunk,):
                    if part.finish_reason is not None:
                        last = part
                    else:
                        self._begun = True
                        await self._put_when_room(Piece(chunk=part))
        if last is None:
            raise StreamInterrupted("the provider's answer ended without its end marker")
        claim = self._services.claim_for(last.cid) if last.cid else None
        last = msgspec.structs.replace(last, origin=None)  # the asker knows whom it asked
        self._put(Done(chunk=last, loads=self._services.loads(), claim=claim))

    def _tell_loads(self, request: AskLoads) -> None:
        asker = self._stream.peer
        if not self._services.may_serve(asker):
            self._put(PresentLoads())
            return
        if request.request:
            place = self._services.place(request.request, asker)
            self._put(PresentLoads(loads=self._services.loads(), place=place))
            return
        rivals = self._choosing.enter(asker, request.model, request.within, trio.current_time())
        self._put(PresentLoads(loads=self._services.loads(), rivals=rivals))

    async def _list(self, items: Iterable[bytes]) -> None:
        for group in _grouped(items):
            await self._put_when_room(Items(items=group))
        self._put(End())

    def _fail(self, error: GenerateError) -> None:
        """Tell the asker; it has the partial text already."""
        frame = error_frame(error, self._services.loads())
        self._put(msgspec.structs.replace(frame, partial="") if self._begun else frame)

    # --- what goes out

    def _put(self, frame: Reply) -> None:
        self._unsent.append(frame)
        if self._ready:
            self._ready.unpark_all()

    async def _put_when_room(self, frame: Reply) -> None:
        self._put(frame)
        while len(self._unsent) > MAX_UNSENT:
            await self._room.park()


def _as_members(request: Asked) -> Asked:
    """The request at the priority that a peer's may have: never that of this node's own."""
    if request.priority == "own":
        return msgspec.structs.replace(request, priority="member")
    return request


def _merged(frames: list[Frame]) -> list[Frame]:
    """The same reply with runs of plain text joined."""
    if len(frames) == 1:
        return frames
    merged: list[Frame] = []
    run: list[Chunk] = []
    for frame in frames:
        if isinstance(frame, Piece):
            run.append(frame.chunk)
            continue
        merged += [Piece(chunk=chunk) for chunk in merge_text(run)]
        run = []
        merged.append(frame)
    merged += [Piece(chunk=chunk) for chunk in merge_text(run)]
    return merged


def _grouped(items: Iterable[bytes]) -> Iterable[tuple[bytes, ...]]:
    group: list[bytes] = []
    size = 0
    for item in items:
        if group and (size + len(item) > MAX_BYTES or len(group) == MAX_ITEMS):
            yield tuple(group)
            group, size = [], 0
        group.append(item)
        size += len(item)
    if group:
        yield tuple(group)
