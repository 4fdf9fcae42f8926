"""The request protocol: which frame may follow which. Bytes in, frames out; no I/O.

A stream carries MessagePack maps back to back, each with a `kind`. The end that opened the stream
asks; the other end answers; then the stream is idle again and may carry the next request::

    generate, embed
                  ->  head, chunk*, done  | error
    block         ->  block               | error
    claims, find_claims, table
                  ->  items*, end         | error
    put_claims    ->  end                 | error
    probe         ->  loads               | error

`TRANSITIONS` is the whole order, for both ends. There is no frame for cancelling: the asker resets
the stream. A stream that ends anywhere but in the idle state was cut.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Any

from ..providers.base import Chunk, GenerateError, ProviderUnavailable
from .frames import (
    MAX_BLOCK,
    AskBlock,
    AskClaims,
    AskLoads,
    AskTable,
    Block,
    Done,
    Embed,
    End,
    Failed,
    FindClaims,
    Frame,
    FrameDecoder,
    Generate,
    Head,
    Items,
    Load,
    Piece,
    PresentLoads,
    PutClaims,
    RemoteProtocolError,
    Reply,
    Request,
    encode_value,
)

#: The libp2p protocol id. A change that old nodes would misread gets a new number.
PROTOCOL = "/promptmesh/1"
#: Bytes of one request: a body as large as HTTP takes, and its frame.
MAX_REQUEST = 33 * 1024 * 1024
#: Bytes of one frame of a reply.
MAX_REPLY = 16 * 1024 * 1024
#: Bytes of one frame of a reply that is a block: the block and what is around it.
MAX_BLOCK_REPLY = MAX_BLOCK + 64 * 1024
#: Characters of an error's message; of the partial text it carries.
MAX_MESSAGE = 4096
MAX_PARTIAL = 1024 * 1024


class LocalProtocolError(Exception):
    """This node was about to break the protocol: a bug."""


class State(Enum):
    """What comes next on a stream."""

    IDLE = auto()
    AWAIT_HEAD = auto()
    ANSWERING = auto()
    AWAIT_BLOCK = auto()
    AWAIT_ITEMS = auto()
    AWAIT_END = auto()
    AWAIT_LOADS = auto()


#: In this state, this frame leads to that state. What is not here is refused at both ends.
TRANSITIONS: dict[tuple[State, type[Frame]], State] = {
    (State.IDLE, Generate): State.AWAIT_HEAD,
    (State.IDLE, Embed): State.AWAIT_HEAD,
    (State.IDLE, AskBlock): State.AWAIT_BLOCK,
    (State.IDLE, AskClaims): State.AWAIT_ITEMS,
    (State.IDLE, FindClaims): State.AWAIT_ITEMS,
    (State.IDLE, AskTable): State.AWAIT_ITEMS,
    (State.IDLE, PutClaims): State.AWAIT_END,
    (State.IDLE, AskLoads): State.AWAIT_LOADS,
    (State.AWAIT_HEAD, Head): State.ANSWERING,
    (State.AWAIT_HEAD, Failed): State.IDLE,
    (State.ANSWERING, Piece): State.ANSWERING,
    (State.ANSWERING, Done): State.IDLE,
    (State.ANSWERING, Failed): State.IDLE,
    (State.AWAIT_BLOCK, Block): State.IDLE,
    (State.AWAIT_BLOCK, Failed): State.IDLE,
    (State.AWAIT_ITEMS, Items): State.AWAIT_ITEMS,
    (State.AWAIT_ITEMS, End): State.IDLE,
    (State.AWAIT_ITEMS, Failed): State.IDLE,
    (State.AWAIT_END, End): State.IDLE,
    (State.AWAIT_END, Failed): State.IDLE,
    (State.AWAIT_LOADS, PresentLoads): State.IDLE,
    (State.AWAIT_LOADS, Failed): State.IDLE,
}


class Exchange:
    """One end of a stream: `Asker` or `Server`."""

    _receives: Any
    _sends: tuple[type[Frame], ...]
    _limit: int

    def __init__(self) -> None:
        self.state = State.IDLE
        self._decoder = FrameDecoder(self._receives, self._limit)
        self._broken = False

    @property
    def idle(self) -> bool:
        """May the next request be sent, with nothing left over from the last one?"""
        return self.state is State.IDLE and not self._broken and not self._decoder.pending

    def send(self, frame: Frame) -> bytes:
        """The bytes to send. Raises `LocalProtocolError` if it is not this frame's turn."""
        if not isinstance(frame, self._sends):
            raise LocalProtocolError(f"{type(frame).__name__} is not sent by this end")
        after = TRANSITIONS.get((self.state, type(frame)))
        if after is None or self._broken:
            raise LocalProtocolError(f"{type(frame).__name__} may not be sent now: {self.state}")
        data = encode_value(frame)
        self.state = after
        return data

    def receive(self, data: bytes) -> list[Any]:
        """The frames that `data` completes, each in its turn.

        Raises `RemoteProtocolError`; after that the stream is of no use.
        """
        if self._broken:
            raise RemoteProtocolError("this stream carried an error before")
        try:
            frames = self._decoder.feed(data)
            for frame in frames:
                after = TRANSITIONS.get((self.state, type(frame)))
                if after is None:
                    kind = type(frame).__name__
                    raise RemoteProtocolError(f"{kind} came out of turn: {self.state}")
                self.state = after
        except RemoteProtocolError:
            self._broken = True
            raise
        return frames


def request_fault(request: Request) -> str:
    """Why this is no request that any peer takes; empty if it is one."""
    try:
        FrameDecoder(Request, MAX_REQUEST).feed(encode_value(request))
    except (RemoteProtocolError, OverflowError, RecursionError) as error:
        return str(error)
    return ""


class Asker(Exchange):
    """The end that opened the stream: sends requests, receives replies."""

    _receives = Reply
    _sends = (Generate, Embed, AskBlock, AskClaims, FindClaims, PutClaims, AskTable, AskLoads)
    _limit = MAX_REPLY

    def send(self, frame: Frame) -> bytes:
        """As `Exchange.send`; what is more than a block is no reply to who asked for one."""
        data = super().send(frame)
        self._decoder.limit = MAX_BLOCK_REPLY if isinstance(frame, AskBlock) else MAX_REPLY
        return data


class Server(Exchange):
    """The end that accepted the stream: receives requests, sends replies."""

    _receives = Request
    _sends = (Head, Piece, Done, Failed, Block, Items, End, PresentLoads)
    _limit = MAX_REQUEST


# --- errors -------------------------------------------------------------------------------------


def _codes(base: type[GenerateError]) -> dict[str, type[GenerateError]]:
    found = {base.code: base}
    for leaf in base.__subclasses__():
        for code, kind in _codes(leaf).items():
            found.setdefault(code, kind)
    return found


_BY_CODE = _codes(GenerateError)


def error_frame(error: GenerateError, loads: dict[str, Load]) -> Failed:
    """How a failure is told to the asker."""
    return Failed(
        code=error.code,
        message=error.message[:MAX_MESSAGE],
        retry_after=error.retry_after,
        partial=error.partial[:MAX_PARTIAL],
        field=error.field,
        again=error.again,
        loads=loads,
    )


def frame_error(frame: Failed) -> GenerateError:
    """The failure that a peer told. A code we do not know means: try elsewhere."""
    return _BY_CODE.get(frame.code, ProviderUnavailable)(
        frame.message[:MAX_MESSAGE] or frame.code[:100],
        retry_after=frame.retry_after,
        partial=frame.partial[:MAX_PARTIAL],
        field=frame.field,
        again=frame.again,
    )


# --- chunks -------------------------------------------------------------------------------------


def is_plain(chunk: Chunk) -> bool:
    """Is it text and nothing else, so that it can be joined to its neighbours?"""
    return (
        chunk.finish_reason is None
        and not chunk.logprobs
        and not chunk.tool_calls
        and not chunk.reasoning
        and not chunk.embeddings
        and chunk.usage is None
        and chunk.cid is None
        and chunk.origin is None
    )


def merge_text(chunks: list[Chunk]) -> list[Chunk]:
    """The same answer with runs of plain text joined."""
    if len(chunks) < 2:
        return chunks
    merged: list[Chunk] = []
    run: list[str] = []
    for chunk in chunks:
        if is_plain(chunk):
            run.append(chunk.text)
            continue
        if run:
            merged.append(Chunk(text="".join(run)))
            run = []
        merged.append(chunk)
    if run:
        merged.append(Chunk(text="".join(run)))
    return merged
