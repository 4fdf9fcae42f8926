"""The frames between a node and the process that holds its model.

A frame is four bytes of length, most significant first, and a MessagePack value. The node sends
one `Order` a frame; the worker sends a list of `Event` a frame, so that the tokens of all requests
of one step travel together. Both ends are one installation: there are no versions.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from .base import (
    Embedding,
    EmbedRequest,
    FinishReason,
    GenerateRequest,
    ModelOffer,
    Task,
    ToolCallDelta,
)

_LENGTH = struct.Struct(">I")
#: Longest frame, in bytes: the largest request that the HTTP server takes, twice over.
MAX_FRAME = 64 * 2**20


class Frame(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="kind"):
    """What one end tells the other."""


# --- from the node ------------------------------------------------------------------------------


class Load(Frame, frozen=True, kw_only=True, tag="load"):
    """The first order: which model, and how. The fields are those of `LocalHFSettings`."""

    model: str
    task: Task = "generate"
    device: str
    dtype: str
    threads: int
    max_batch: int
    max_context: int | None = None
    memory: int | float | None = None
    cache_dir: str | None = None


class Generate(Frame, frozen=True, kw_only=True, tag="generate"):
    """Begin an answer. `call` names it in everything that follows."""

    call: int
    request: GenerateRequest


class Embed(Frame, frozen=True, kw_only=True, tag="embed"):
    """Make vectors. They come as pieces, and then the end, as an answer's."""

    call: int
    request: EmbedRequest


class Count(Frame, frozen=True, kw_only=True, tag="count"):
    """How many tokens has the prompt of this request? It is answered by `Counted` or `Failed`."""

    call: int
    request: GenerateRequest


class Cancel(Frame, frozen=True, kw_only=True, tag="cancel"):
    """Nobody wants that answer any more."""

    call: int


Order = Load | Generate | Embed | Count | Cancel


# --- from the worker ----------------------------------------------------------------------------


class Loading(Frame, frozen=True, kw_only=True, tag="loading"):
    """What the worker does before it can answer, such as "loading the weights"."""

    stage: str


class Loaded(Frame, frozen=True, kw_only=True, tag="loaded"):
    """The model can be asked. `about` is a line for the log."""

    offer: ModelOffer
    about: str


class LoadFailed(Frame, frozen=True, kw_only=True, tag="load_failed"):
    """The model cannot be had; the worker ends. `hint` is the next step for a person."""

    reason: str
    hint: str = ""


class Begun(Frame, frozen=True, kw_only=True, tag="begun"):
    """The request is valid, fits, and is in the engine's queue."""

    call: int


class Piece(Frame, frozen=True, kw_only=True, tag="piece"):
    """More of an answer."""

    call: int
    text: str = ""
    logprobs: tuple[dict[str, Any], ...] = ()
    tool_calls: tuple[ToolCallDelta, ...] = ()


class Vectors(Frame, frozen=True, kw_only=True, tag="vectors"):
    """Some of the embeddings, with the places of their inputs."""

    call: int
    places: tuple[int, ...]
    embeddings: tuple[Embedding, ...]


class Finished(Frame, frozen=True, kw_only=True, tag="finished"):
    """An answer is complete. Token counts are the engine's own."""

    call: int
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


class Failed(Frame, frozen=True, kw_only=True, tag="failed"):
    """An answer could not be given, or not to its end. `code` names a `GenerateError`."""

    call: int
    code: str
    message: str
    field: str | None = None
    retry_after: float | None = None


class Counted(Frame, frozen=True, kw_only=True, tag="counted"):
    """The tokens of a prompt."""

    call: int
    tokens: int


class Counters(Frame, frozen=True, kw_only=True, tag="counters"):
    """What the worker has done since it started.

    `tokens` counts each token the model made, also those that nobody waited for any more.
    """

    requests: int = 0
    active: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    tokens: int = 0


Event = (
    Loading | Loaded | LoadFailed | Begun | Piece | Vectors | Finished | Failed | Counted | Counters
)


# --- bytes --------------------------------------------------------------------------------------


class FrameError(ValueError):
    """A frame is longer than `MAX_FRAME`, or is not what it must be."""


_encoder = msgspec.msgpack.Encoder()
_order_decoder = msgspec.msgpack.Decoder(Order)
_events_decoder = msgspec.msgpack.Decoder(tuple[Event, ...])


def encode(value: Order | list[Event]) -> bytes:
    """A frame. Raises `FrameError` where the value is too long or has no MessagePack form."""
    try:
        body = _encoder.encode(value)
    except (OverflowError, ValueError, TypeError) as error:  # an integer of more than 64 bits
        raise FrameError(str(error)) from error
    if len(body) > MAX_FRAME:
        raise FrameError(f"{len(body)} bytes are more than {MAX_FRAME}")
    return _LENGTH.pack(len(body)) + body


def decode_order(body: bytes) -> Order:
    """The order in a frame's body. Raises `FrameError`."""
    try:
        order: Order = _order_decoder.decode(body)
        return order
    except msgspec.MsgspecError as error:
        raise FrameError(str(error)) from error


def decode_events(body: bytes) -> tuple[Event, ...]:
    """The events in a frame's body. Raises `FrameError`."""
    try:
        return _events_decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise FrameError(str(error)) from error


class FrameBuffer:
    """Bytes in, bodies of whole frames out."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take what was read and give what is complete. Raises `FrameError` for a length that no
        frame may have."""
        self._data += data
        while len(self._data) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data)
            if length > MAX_FRAME:
                raise FrameError(f"a frame of {length} bytes is announced")
            end = _LENGTH.size + length
            if len(self._data) < end:
                return
            body = bytes(self._data[_LENGTH.size : end])
            del self._data[:end]
            yield body
