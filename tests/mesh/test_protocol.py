"""The request protocol: bytes, and their order."""

import math
from collections.abc import Callable
from typing import Any, get_args

import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.mesh.frames import (
    MAX_BLOCK,
    AskBlock,
    AskClaims,
    AskLoads,
    AskTable,
    Block,
    Done,
    End,
    Failed,
    FindClaims,
    Frame,
    Generate,
    Head,
    Items,
    Load,
    Piece,
    PresentLoads,
    PutClaims,
    RemoteProtocolError,
    Request,
    decode_value,
    encode_value,
)
from promptmesh.mesh.protocol import (
    MAX_REPLY,
    MAX_REQUEST,
    TRANSITIONS,
    Asker,
    Exchange,
    LocalProtocolError,
    Server,
    State,
    error_frame,
    frame_error,
    merge_text,
)
from promptmesh.providers.base import (
    Chunk,
    ContentFiltered,
    ContextTooLong,
    DeadlineExceeded,
    GenerateError,
    GenerateRequest,
    Message,
    ModelNotFound,
    Origin,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
    Text,
    Usage,
)
from promptmesh.providers.stream_decoder import MAX_ANSWER

REQUEST = GenerateRequest(
    model="m",
    messages=(Message(role="user", content=(Text(text="héllo"),)),),
    extra={"top_a": [1, {"x": None}]},
    deadline=3.5,
)
GENERATE = Generate(request=REQUEST)
HEAD = Head(origin=Origin(peer="p", provider="echo", model="m"))
PIECE = Piece(chunk=Chunk(text="añ"))
DONE = Done(
    chunk=Chunk(
        finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=2), cid="bafy"
    ),
    loads={"echo": Load(running=1, waiting=0, slots=4)},
    claim=b"claim",
)
FAILED = Failed(code="provider_unavailable", message="busy", retry_after=2.0)
#: One frame of each kind.
FRAMES: list[Frame] = [
    GENERATE,
    AskBlock(cid=b"\x01" * 36),
    AskBlock(cid=b"\x01" * 36, proof=bytes(32)),
    AskClaims(known={"p": (7, ((1, 3), (5, 5)))}),
    FindClaims(keys=(b"k" * 32,)),
    PutClaims(envelopes=(b"one", b"two")),
    AskTable(),
    AskLoads(model="m", within=0.1),
    HEAD,
    PIECE,
    DONE,
    FAILED,
    Block(block=b"data"),
    Items(items=(b"one", b"two")),
    End(),
    PresentLoads(loads={"p": Load(running=1, wait=0.5)}, rivals=3),
]
#: A whole exchange of each kind: what the asker sends, and the reply.
EXCHANGES: list[tuple[Frame, list[Frame]]] = [
    (GENERATE, [HEAD, PIECE, PIECE, DONE]),
    (GENERATE, [HEAD, DONE]),
    (GENERATE, [FAILED]),
    (GENERATE, [HEAD, PIECE, FAILED]),
    (AskBlock(cid=b"c"), [Block(block=None)]),
    (AskBlock(cid=b"c"), [FAILED]),
    (AskLoads(model="m", within=0.1), [PresentLoads(loads={"p": Load(wait=2.5)}, rivals=3)]),
    (AskTable(), [Items(items=(b"a",)), Items(items=(b"b",)), End()]),
    (AskClaims(), [End()]),
    (FindClaims(keys=(b"k" * 32,)), [Items(items=(b"a",)), End()]),
    (PutClaims(envelopes=(b"a",)), [End()]),
    (PutClaims(envelopes=(b"a",)), [FAILED]),
]
#: How to bring a pair of ends into each state.
LEADING_TO: dict[State, list[Frame]] = {
    State.IDLE: [],
    State.AWAIT_HEAD: [GENERATE],
    State.ANSWERING: [GENERATE, HEAD],
    State.AWAIT_BLOCK: [AskBlock(cid=b"c")],
    State.AWAIT_ITEMS: [AskTable()],
    State.AWAIT_END: [PutClaims(envelopes=(b"a",))],
    State.AWAIT_LOADS: [AskLoads()],
}


def pair(state: State = State.IDLE) -> tuple[Asker, Server]:
    asker, server = Asker(), Server()
    for frame in LEADING_TO[state]:
        if is_request(frame):
            server.receive(asker.send(frame))
        else:
            asker.receive(server.send(frame))
    assert asker.state is server.state is state
    return asker, server


def is_request(frame: Frame) -> bool:
    return isinstance(frame, get_args(Request))


@pytest.mark.parametrize("chunked", [1, 7, 10**6])
def test_exchanges_back_to_back_in_pieces_of_any_size(chunked: int) -> None:
    asker, server = Asker(), Server()
    for request, reply in EXCHANGES:
        data = asker.send(request)
        received: list[Any] = []
        for i in range(0, len(data), chunked):
            received += server.receive(data[i : i + chunked])
        assert received == [request]
        data = b"".join(server.send(frame) for frame in reply)
        assert server.idle
        received = []
        for i in range(0, len(data), chunked):
            assert not asker.idle
            received += asker.receive(data[i : i + chunked])
        assert received == reply
        assert asker.idle


@pytest.mark.parametrize("frame", FRAMES, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("state", State)
def test_only_the_transitions_of_the_table_are_taken(state: State, frame: Frame) -> None:
    asker, server = pair(state)
    sender, receiver = (asker, server) if is_request(frame) else (server, asker)
    after = TRANSITIONS.get((state, type(frame)))
    if after is None:
        with pytest.raises(LocalProtocolError):
            sender.send(frame)
        with pytest.raises(RemoteProtocolError):
            receiver.receive(encode_value(frame))
        assert not receiver.idle
        with pytest.raises(RemoteProtocolError):
            receiver.receive(b"")
        for anything in FRAMES:
            with pytest.raises(LocalProtocolError):
                receiver.send(anything)
    else:
        assert receiver.receive(sender.send(frame)) == [frame]
        assert sender.state is receiver.state is after


def test_an_end_sends_only_what_is_its_own() -> None:
    with pytest.raises(LocalProtocolError):
        Server().send(GENERATE)
    asker, _ = pair(State.AWAIT_HEAD)
    with pytest.raises(LocalProtocolError):
        asker.send(HEAD)
    with pytest.raises(RemoteProtocolError):
        Server().receive(encode_value(HEAD))


def test_more_than_a_block_is_cut_off_early() -> None:
    asker, _ = pair(State.AWAIT_BLOCK)
    data = encode_value(Block(block=bytes(10 * 1024 * 1024)))
    pieces = iter(data[start : start + 65536] for start in range(0, len(data), 65536))
    fits = sum(1 for _ in zip(range(33), map(asker.receive, pieces), strict=False))
    assert fits == 33
    with pytest.raises(RemoteProtocolError, match="longer than"):
        asker.receive(next(pieces))
    asker, server = pair(State.AWAIT_BLOCK)
    largest = Block(block=bytes(MAX_BLOCK))
    assert asker.receive(server.send(largest)) == [largest]
    # The next reply may be long again.
    server.receive(asker.send(AskTable()))
    items = Items(items=(bytes(8 * 1024 * 1024),))
    assert asker.receive(server.send(items)) == [items]


def test_a_part_of_the_next_frame_is_not_idle() -> None:
    asker, server = pair(State.AWAIT_BLOCK)
    asker.receive(server.send(Block(block=b"x")) + b"\x81")
    assert not asker.idle


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",  # no such type
        b"\xd6\xff\0\0\0\0",  # a timestamp
        b"\xc7\x00\x05",  # an empty extension
        b"\xdd\xff\xff\xff\xff",  # a huge array
        b"\xdf\xff\xff\xff\xff",  # a huge map
        b"\x91" * 5000,  # very deep
        b"\x81\x01\x02",  # a key that is a number
        b"\xa2\xff\xfe",  # not UTF-8
        b"\x01",
        b"\x80",
        msgpack.packb({"kind": "nonsense"}),
        msgpack.packb({"kind": "generate"}),
        msgpack.packb({"kind": "generate", "request": {"model": 1, "messages": []}}),
        msgpack.packb({"kind": "block", "cid": "dGV4dA=="}),
        msgpack.packb({"kind": "block", "cid": b"x" * 1000}),
        msgpack.packb({"kind": "claims", "known": {"p": "x"}}),
        msgpack.packb({"kind": "find_claims", "keys": []}),
        msgpack.packb({"kind": "find_claims", "keys": [b"k" * 31]}),
        msgpack.packb({"kind": "find_claims", "keys": [b"k" * 32] * 9}),
        msgpack.packb({"kind": "put_claims", "envelopes": []}),
        msgpack.packb({"kind": "put_claims", "envelopes": [b"e"] * 65}),
        msgpack.packb({"kind": "put_claims", "envelopes": [b"e" * 100_000] * 11}),
    ],
)
def test_malformed_requests_are_remote_errors(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Server().receive(data)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "changes",
    [
        {"extra": {"x": deep(70)}},
        {"extra": {"x": b"bytes"}},
        {"extra": {"x": {b"key": 1}}},
        {"tools": [{"name": "t", "parameters": {"x": b"bytes"}}]},
        {"response_format": {"type": "json_schema", "schema": {"x": deep(70)}}},
        {"deadline": math.nan},
        {"deadline": -1.0},
        {"deadline": math.inf},
        {"cache": {"ttl": math.nan}},
    ],
)
def test_what_the_types_let_through_is_refused(changes: dict[str, Any]) -> None:
    request = {"model": "m", "messages": [], **changes}
    with pytest.raises(RemoteProtocolError):
        Server().receive(msgpack.packb({"kind": "generate", "request": request}))
    with pytest.raises(RemoteProtocolError):
        Server().receive(msgspec.msgpack.encode({"kind": "generate", "request": request}))


def test_json_of_a_sane_depth_passes() -> None:
    request = msgspec.structs.replace(REQUEST, extra={"x": deep(50)})
    (frame,) = Server().receive(Asker().send(Generate(request=request)))
    assert frame.request.model == "m"


@pytest.mark.parametrize(
    ("state", "frame"),
    [
        (State.ANSWERING, {"kind": "done", "chunk": {"text": "no finish reason"}}),
        (State.ANSWERING, {"kind": "chunk", "chunk": {"finish_reason": "stop"}}),
        (State.ANSWERING, {"kind": "chunk", "chunk": {"logprobs": [{"x": b"bytes"}]}}),
        (
            State.ANSWERING,
            {"kind": "done", "chunk": {"finish_reason": "stop"}, "loads": {"x": {"slots": 0}}},
        ),
        (State.AWAIT_HEAD, {"kind": "head", "origin": {"provider": "x\r\nset-cookie: a"}}),
        (State.AWAIT_HEAD, {"kind": "head", "origin": {"weights": "x" * 10_000}}),
        (State.AWAIT_HEAD, {"kind": "head", "origin": {"age": math.nan}}),
        (State.AWAIT_HEAD, {"kind": "error", "code": "x", "retry_after": math.nan}),
    ],
)
def test_replies_that_no_honest_peer_sends(state: State, frame: dict[str, Any]) -> None:
    asker, _ = pair(state)
    with pytest.raises(RemoteProtocolError):
        asker.receive(msgspec.msgpack.encode(frame))


def test_unknown_fields_are_ignored() -> None:
    data = msgpack.packb({"kind": "table", "new": 1, "other": {"x": [1]}})
    assert Server().receive(data) == [AskTable()]


def fed_until_refused(end: Exchange, piece: bytes) -> int:
    """Bytes of an unfinished frame that an end takes."""
    for count in range(100 * 10**6 // len(piece)):
        try:
            end.receive(piece)
        except RemoteProtocolError:
            return count * len(piece)
    raise AssertionError("it takes all")


def test_an_endless_object_is_bounded() -> None:
    server = Server()
    server.receive(b"\xdc\x40\x00")  # an array of texts, taken out of the buffer one by one
    piece = b"\xda\x27\x10" + b"x" * 10_000
    assert 10**6 < fed_until_refused(server, piece) <= MAX_REQUEST


def test_a_tower_of_arrays_is_bounded() -> None:
    piece = b"\xdc\x40\x00" + b"\x01" * 16_000  # arrays in arrays, each nearly full
    assert 10**6 < fed_until_refused(Server(), piece) <= MAX_REQUEST


def test_an_endless_string_is_bounded() -> None:
    asker, _ = pair(State.AWAIT_BLOCK)
    asker.receive(b"\x81\xa4kind\xdb\x7f\xff\xff\xff")
    assert 10**6 < fed_until_refused(asker, b"x" * 10**6) < MAX_REPLY + 3 * 10**6


def test_a_frame_just_over_the_limit_is_refused_and_one_under_it_is_not() -> None:
    for size, fits in ((MAX_REPLY - 100, True), (MAX_REPLY, False)):
        asker, server = pair(State.AWAIT_ITEMS)
        data = server.send(Items(items=(bytes(size),)))
        if fits:
            assert len(asker.receive(data)[0].items[0]) == size
        else:
            with pytest.raises(RemoteProtocolError):
                asker.receive(data)


@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_else(data: bytes) -> None:
    for end in (Server(), pair(State.ANSWERING)[0]):
        try:
            end.receive(data)
        except RemoteProtocolError:
            assert not end.idle


json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(
    st.sampled_from(FRAMES),
    st.lists(st.tuples(st.sampled_from(["request", "chunk", "kind", "x"]), json | st.binary())),
    st.sampled_from(State),
)
def test_frames_with_wrong_fields_raise_nothing_else(
    frame: Frame, changes: list[tuple[str, Any]], state: State
) -> None:
    wire = msgspec.msgpack.decode(encode_value(frame)) | dict(changes)
    asker, server = pair(state)
    for end in (asker, server):
        try:
            end.receive(msgspec.msgpack.encode(wire))
        except RemoteProtocolError:
            assert not end.idle


@given(st.sampled_from(EXCHANGES), st.data())
def test_any_split_gives_the_same_frames(
    exchange: tuple[Frame, list[Frame]], data: st.DataObject
) -> None:
    request, reply = exchange
    asker, server = Asker(), Server()
    server.receive(asker.send(request))
    wire = b"".join(server.send(frame) for frame in reply)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=6)))
    received: list[Any] = []
    for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        received += asker.receive(wire[start:end])
    assert received == reply


@given(st.binary(max_size=200))
def test_a_gossiped_value_raises_nothing_else(data: bytes) -> None:
    try:
        decode_value(data, Load, limit=100)
    except RemoteProtocolError:
        pass
    else:
        assert len(data) <= 100


def test_a_gossiped_value_is_exactly_one_value() -> None:
    load = Load(running=3)
    assert decode_value(encode_value(load), Load, limit=100) == load
    with pytest.raises(RemoteProtocolError):
        decode_value(encode_value(load) + b"\xc0", Load, limit=100)
    with pytest.raises(RemoteProtocolError):
        decode_value(encode_value(load)[:-1], Load, limit=100)


@pytest.mark.parametrize(
    "kind",
    [
        GenerateError,
        RequestRejected,
        ContextTooLong,
        ContentFiltered,
        ModelNotFound,
        ProviderUnavailable,
        DeadlineExceeded,
        StreamInterrupted,
    ],
)
def test_errors_cross_the_wire(kind: Callable[..., GenerateError]) -> None:
    error = kind("why", retry_after=1.5, partial="so far", field="model")
    asker, server = pair(State.AWAIT_HEAD)
    (frame,) = asker.receive(server.send(error_frame(error, {"echo": Load()})))
    back = frame_error(frame)
    assert type(back) is kind
    assert (back.message, back.retry_after, back.partial, back.field) == (
        "why",
        1.5,
        "so far",
        "model",
    )
    assert frame.loads == {"echo": Load()}


def test_an_error_of_a_kind_we_do_not_know_means_try_elsewhere() -> None:
    assert type(frame_error(Failed(code="new_in_v9", message="x"))) is ProviderUnavailable


def test_an_error_is_cut_to_a_bounded_length() -> None:
    frame = error_frame(StreamInterrupted("m" * 10**6, partial="p" * 10**7), {})
    assert len(encode_value(frame)) < 2 * 10**6


def test_merging_keeps_the_answer() -> None:
    chunks = [
        Chunk(text="a"),
        Chunk(text="b"),
        Chunk(reasoning="r"),
        Chunk(text="c"),
        Chunk(text="d", logprobs=({"x": 1},)),
        Chunk(text="e"),
        Chunk(text="f"),
        Chunk(finish_reason="stop"),
    ]
    merged = merge_text(chunks)
    assert [c.text for c in merged] == ["ab", "", "c", "d", "ef", ""]
    assert merged[-1].finish_reason == "stop"
    assert merged[3].logprobs == ({"x": 1},)


def test_the_longest_answer_of_a_server_fits_into_one_frame() -> None:
    frame = Piece(chunk=Chunk(text="\U0001f600" * MAX_ANSWER))
    assert len(encode_value(frame)) < MAX_REPLY
