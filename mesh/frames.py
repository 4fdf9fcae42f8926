"""The frames of the request protocol, and their bytes: MessagePack maps with a `kind`.

What a peer sent is taken apart by `msgpack.Unpacker` with its limits set, then made into typed
values by `msgspec.convert`: its bytes never raise anything but `RemoteProtocolError`, and never
cost unbounded memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar

import msgpack  # type: ignore[import-untyped]
import msgspec

from ..providers.base import Asked, Chunk, EmbedRequest, GenerateRequest, Origin, Value

#: Elements of one array or map.
MAX_ELEMENTS = 16_384
#: How deep the free-form parts of a request or a chunk may nest (JSON schemas, unknown fields).
MAX_DEPTH = 64
#: Ranges of batch numbers that are told of one peer.
MAX_RANGES = 64
#: Characters of a name (of a provider, a model, an engine); bytes of a CID.
MAX_NAME = 512
MAX_CID = 128
#: Bytes of a block: what bitswap allows too. An answer's are smaller.
MAX_BLOCK = 2 * 1024 * 1024
#: Envelopes put at once, and their bytes; keys asked for at once, each of 32 bytes.
MAX_PUT, MAX_PUT_BYTES = 64, 1024 * 1024
MAX_KEYS = 8
#: Bytes of the proof that an asker knows the namespace of a block: an HMAC-SHA256.
MAX_PROOF = 32

T = TypeVar("T")


class RemoteProtocolError(Exception):
    """A peer sent bytes that no honest peer sends."""


# --- frames -------------------------------------------------------------------------------------


class Load(Value, frozen=True, kw_only=True):
    """How busy a provider is: requests running and waiting, and how many run at once.

    `wait` is the seconds until one that comes now would begin, by what its node knows of those that
    are there; None: at once, or it cannot tell.
    """

    running: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    waiting: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    slots: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1
    wait: Annotated[float, msgspec.Meta(ge=0, le=1e9)] | None = None


class Generate(Value, frozen=True, kw_only=True, tag_field="kind", tag="generate"):
    """Answer this request."""

    request: GenerateRequest


class Embed(Value, frozen=True, kw_only=True, tag_field="kind", tag="embed"):
    """Make a vector of each of these texts. The reply is an answer like another."""

    request: EmbedRequest


class AskBlock(Value, frozen=True, kw_only=True, tag_field="kind", tag="block"):
    """Give me the block with this CID (its 36 bytes).

    `proof` shows that I know the namespace of its answer, where that is a named one.
    """

    cid: Annotated[bytes, msgspec.Meta(max_length=MAX_CID)]
    proof: Annotated[bytes, msgspec.Meta(max_length=MAX_PROOF)] = b""


#: The epoch of a peer's batches, and the ranges (first, last) of their numbers.
Known = tuple[int, Annotated[tuple[tuple[int, int], ...], msgspec.Meta(max_length=MAX_RANGES)]]


class AskClaims(Value, frozen=True, kw_only=True, tag_field="kind", tag="claims"):
    """Give me batches of claims that I lack: `known` are those I have, by peer."""

    known: dict[str, Known] = msgspec.field(default_factory=dict)


class PutClaims(Value, frozen=True, kw_only=True, tag_field="kind", tag="put_claims"):
    """Keep these signed batches of mine: you are a home of the keys in them."""

    envelopes: Annotated[tuple[bytes, ...], msgspec.Meta(min_length=1, max_length=MAX_PUT)]


class FindClaims(Value, frozen=True, kw_only=True, tag_field="kind", tag="find_claims"):
    """Give me the batches that claim these keys."""

    keys: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)], ...],
        msgspec.Meta(min_length=1, max_length=MAX_KEYS),
    ]


class AskTable(Value, frozen=True, kw_only=True, tag_field="kind", tag="table"):
    """Give me the adverts you have."""


class AskLoads(Value, frozen=True, kw_only=True, tag_field="kind", tag="probe"):
    """How busy are your providers? I am about to choose who answers with that model.

    `within` is the seconds until I shall have chosen. With a `request` I do not choose: where does
    my request of that id stand, which waits there?
    """

    model: str = ""
    within: float = 0.0
    request: Annotated[str, msgspec.Meta(max_length=MAX_NAME)] = ""


class Head(Value, frozen=True, kw_only=True, tag_field="kind", tag="head"):
    """Who answers."""

    origin: Origin


class Piece(Value, frozen=True, kw_only=True, tag_field="kind", tag="chunk"):
    """A chunk of the answer that is not its last."""

    chunk: Chunk


class Done(Value, frozen=True, kw_only=True, tag_field="kind", tag="done"):
    """The answer is whole. `chunk` is its last one.

    `loads` is how busy this peer's providers are now; `claim` the signed claim of the answer.
    """

    chunk: Chunk
    loads: dict[str, Load] = msgspec.field(default_factory=dict)
    claim: bytes | None = None


class Failed(Value, frozen=True, kw_only=True, tag_field="kind", tag="error"):
    """There is no (whole) answer. The fields are those of a `GenerateError`."""

    code: str
    message: str = ""
    retry_after: float | None = None
    partial: str = ""
    field: str | None = None
    again: bool = False
    loads: dict[str, Load] = msgspec.field(default_factory=dict)


class Block(Value, frozen=True, kw_only=True, tag_field="kind", tag="block"):
    """The block asked for; None if it is not here."""

    block: Annotated[bytes, msgspec.Meta(max_length=MAX_BLOCK)] | None = None


class Items(Value, frozen=True, kw_only=True, tag_field="kind", tag="items"):
    """Some of the adverts or batches asked for."""

    items: tuple[bytes, ...]


class End(Value, frozen=True, kw_only=True, tag_field="kind", tag="end"):
    """There are no more items; or what was put is taken."""


_Number = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class Place(Value, frozen=True, kw_only=True):
    """A request that waits for a slot: it is number `place` of `of`, and begins in `wait` seconds.

    None: that cannot be told.
    """

    place: _Number
    of: _Number
    wait: Annotated[float, msgspec.Meta(ge=0, le=1e9)] | None = None


class PresentLoads(Value, frozen=True, kw_only=True, tag_field="kind", tag="loads"):
    """How busy the providers are that the asker may use.

    `rivals` is how many others have asked this for the same model and may not have chosen yet.
    `place` is that of the asker's request, if it waits.
    """

    loads: dict[str, Load] = msgspec.field(default_factory=dict)
    rivals: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    place: Place | None = None


Request = Generate | Embed | AskBlock | AskClaims | PutClaims | FindClaims | AskTable | AskLoads
Reply = Head | Piece | Done | Failed | Block | Items | End | PresentLoads
Frame = Request | Reply

# --- bytes --------------------------------------------------------------------------------------

_encode: Callable[[Any], bytes] = msgspec.msgpack.Encoder().encode
#: What the two libraries raise for bytes that are not what they should be.
_MALFORMED = (
    ValueError,  # limits, UTF-8, extension types
    msgpack.UnpackException,  # BufferFull, StackError, FormatError
    msgspec.MsgspecError,
    RecursionError,
    OverflowError,
)


def _unpacker(limit: int) -> Any:
    return msgpack.Unpacker(
        raw=False,
        strict_map_key=True,
        # The exact bound is `FrameDecoder`'s; this one may not cut a frame before it.
        max_buffer_size=limit + 1024 * 1024,
        max_str_len=limit,
        max_bin_len=limit,
        max_array_len=MAX_ELEMENTS,
        max_map_len=MAX_ELEMENTS,
        max_ext_len=0,
        ext_hook=_refuse_extension,
    )


def _typed(raw: Any, type_: type[T]) -> T:
    # MessagePack has bytes: a text in their place is not taken for base64.
    return msgspec.convert(raw, type_, builtin_types=(bytes,))


def _refuse_extension(code: int, data: bytes) -> None:
    raise ValueError(f"extension type {code} is not used here")


class FrameDecoder:
    """Takes a stream of bytes apart into frames of the type given."""

    def __init__(self, type_: Any, limit: int) -> None:
        self._type = type_
        #: Bytes of a frame; may be lowered for the frames that come next.
        self.limit = limit
        self._unpacker = _unpacker(limit)
        self._fed = 0
        self._complete = 0

    @property
    def pending(self) -> bool:
        """Is a part of a frame there?"""
        return self._fed > self._complete

    def feed(self, data: bytes) -> list[Any]:
        """The frames that `data` completes. Raises `RemoteProtocolError`."""
        frames: list[Any] = []
        # A piece at a time, so that what is fed never exceeds the unpacker's buffer.
        for start in range(0, len(data), 1024 * 1024):
            piece = data[start : start + 1024 * 1024] if len(data) > 1024 * 1024 else data
            try:
                self._unpacker.feed(piece)
                self._fed += len(piece)
                self._unpack(frames)
            except _MALFORMED as error:
                raise RemoteProtocolError(f"not a frame: {error!r:.300}") from None
            # The unpacker takes the parts of an unfinished object out of its buffer, so its own
            # limit does not bound one endless object.
            if self._fed - self._complete > self.limit:
                raise RemoteProtocolError(f"a frame is longer than {self.limit} bytes")
        return frames

    def _unpack(self, frames: list[Any]) -> None:
        while True:
            try:
                raw = self._unpacker.unpack()
            except msgpack.OutOfData:
                return
            end = self._unpacker.tell()
            if end - self._complete > self.limit:
                raise ValueError(f"longer than {self.limit} bytes")
            self._complete = end
            frame = _typed(raw, self._type)
            _check(frame)
            frames.append(frame)


def decode_value(data: bytes, type_: type[T], *, limit: int) -> T:
    """One value that came whole, as in gossip. Raises `RemoteProtocolError`."""
    if len(data) > limit:
        raise RemoteProtocolError(f"{len(data)} bytes are more than {limit}")
    unpacker = _unpacker(limit)
    try:
        unpacker.feed(data)
        raw = unpacker.unpack()
        if unpacker.tell() != len(data):
            raise ValueError("bytes follow the value")
        return _typed(raw, type_)
    except _MALFORMED as error:
        raise RemoteProtocolError(f"not a {type_.__name__}: {error!r:.300}") from None


def encode_value(value: Value) -> bytes:
    """The bytes of a value, for gossip."""
    return _encode(value)


def _check(frame: Frame) -> None:
    """Refuse what the types let through: depth, bytes inside JSON, a last chunk that is not."""
    if isinstance(frame, Piece | Done):
        if (frame.chunk.finish_reason is None) is isinstance(frame, Done):
            raise ValueError("only the last chunk has a finish_reason")
        if frame.chunk.logprobs:
            _check_plain(frame.chunk.logprobs)
    elif isinstance(frame, Generate | Embed):
        _check_request(frame.request)
    elif isinstance(frame, Failed):
        _check_times((frame.retry_after,))
    elif isinstance(frame, AskLoads):
        _check_times((frame.within,))
    elif isinstance(frame, Head):
        _check_origin(frame.origin)
    elif isinstance(frame, PutClaims) and sum(map(len, frame.envelopes)) > MAX_PUT_BYTES:
        raise ValueError("too many bytes are put at once")


def _check_request(request: Asked) -> None:
    free: list[Any] = [request.extra]
    if isinstance(request, GenerateRequest):
        form = request.response_format
        free += [tool.parameters for tool in request.tools]
        free.append(form.schema if form else None)
    _check_plain(free)
    _check_times((request.deadline, request.cache.ttl, request.cache.max_age))


def _check_origin(origin: Origin) -> None:
    names = (origin.peer, origin.node, origin.provider, origin.model, origin.policy, origin.cid)
    engine = (origin.weights, origin.engine, origin.numerics)
    for name in (*names, *engine):
        # They end in terminals and in HTTP headers.
        if name and (len(name) > MAX_NAME or not name.isprintable()):
            raise ValueError(f"not a name: {name:.40}")
    _check_times((origin.age, origin.ttl))


def _check_plain(value: Any) -> None:
    """JSON has no bytes; and whoever encodes it again may recurse."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                if not all(type(key) is str for key in item):
                    raise ValueError("a key that is not text")
                below.extend(item.values())
            elif isinstance(item, tuple | list):
                below.extend(item)
            elif isinstance(item, bytes):
                raise ValueError("bytes where JSON belongs")
        if not below:
            return
        level = below
    raise ValueError(f"nested deeper than {MAX_DEPTH}")


def _check_times(seconds: Iterable[float | None]) -> None:
    if not all(s is None or (math.isfinite(s) and s >= 0) for s in seconds):
        raise ValueError("a time that is none")
