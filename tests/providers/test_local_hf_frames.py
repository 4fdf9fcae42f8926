"""The frames between a node and the process of its model."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.providers.base import GenerateRequest, Image, Message, ModelOffer, Sampling, Text
from promptmesh.providers.hf_frames import (
    MAX_FRAME,
    Begun,
    Cancel,
    Count,
    Counted,
    Counters,
    Event,
    Failed,
    Finished,
    FrameBuffer,
    FrameError,
    Generate,
    Load,
    Loaded,
    LoadFailed,
    Loading,
    Order,
    Piece,
    decode_events,
    decode_order,
    encode,
)
from promptmesh.providers.hf_outbox import Outbox, merged

REQUEST = GenerateRequest(
    model="m",
    messages=(
        Message(role="user", content=(Text(text="naïve 🌍"), Image(url="data:image/png;base64,A"))),
    ),
    sampling=Sampling(temperature=0.5, stop=("x",), seed=2**60, logit_bias={"3": -1.5}),
)
ORDERS: list[Order] = [
    Load(model="m", device="auto", dtype="auto", threads=2, max_batch=4, memory=0.5),
    Generate(call=1, request=REQUEST),
    Count(call=2, request=REQUEST),
    Cancel(call=1),
]
EVENTS: list[Event] = [
    Loading(stage="reading"),
    Loaded(offer=ModelOffer(id="m", context_length=8), about="m"),
    LoadFailed(reason="no", hint="yes"),
    Begun(call=1),
    Piece(call=1, text="é", logprobs=({"token": "é", "logprob": -0.5, "bytes": None},)),
    Finished(call=1, reason="stop", prompt_tokens=3, completion_tokens=4),
    Failed(call=2, code="context_too_long", message="no", field="messages"),
    Counted(call=3, tokens=12),
    Counters(requests=2, tokens=9),
]


def test_orders_come_out_byte_by_byte_as_they_went_in() -> None:
    data = b"".join(encode(order) for order in ORDERS)
    buffer = FrameBuffer()
    bodies = [body for byte in data for body in buffer.feed(bytes((byte,)))]
    assert [decode_order(body) for body in bodies] == ORDERS


def test_events_travel_together() -> None:
    (body,) = FrameBuffer().feed(encode(EVENTS))
    assert list(decode_events(body)) == EVENTS


@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_frame_errors(data: bytes) -> None:
    try:
        for body in FrameBuffer().feed(data):
            decode_events(body)
    except FrameError:
        pass
    with pytest.raises(FrameError):
        decode_order(b"\xc1" + data)


def test_a_frame_that_is_too_long_is_refused_before_it_comes() -> None:
    buffer = FrameBuffer()
    with pytest.raises(FrameError, match="announced"):
        list(buffer.feed(struct.pack(">I", MAX_FRAME + 1)))


def test_what_has_no_frame_is_refused() -> None:
    too_large = GenerateRequest(model="m", messages=(), sampling=Sampling(seed=2**70))
    with pytest.raises(FrameError):
        encode(Generate(call=1, request=too_large))
    too_long = GenerateRequest(model="m" * (MAX_FRAME + 1), messages=())
    with pytest.raises(FrameError, match="more than"):
        encode(Generate(call=1, request=too_long))


def test_ready_pieces_of_an_answer_are_joined_and_keep_their_place() -> None:
    done = Finished(call=1, reason="stop", prompt_tokens=1, completion_tokens=2)
    assert merged(
        [
            Begun(call=1),
            Piece(call=1, text="a", logprobs=({"n": 1},)),
            Piece(call=2, text="x"),
            Piece(call=1, text="b", logprobs=({"n": 2},)),
            done,
            Piece(call=2, text="y"),
        ]
    ) == [
        Begun(call=1),
        Piece(call=1, text="ab", logprobs=({"n": 1}, {"n": 2})),
        Piece(call=2, text="xy"),
        done,
    ]


def test_the_outbox_writes_all_and_its_counters_in_frames() -> None:
    reading, writing = os.pipe()
    outbox = Outbox(writing, lambda: Counters(requests=3))
    for number in range(50):
        outbox.put(Piece(call=number, text="t"))
    outbox.close()
    os.close(writing)
    with open(reading, "rb") as file:
        bodies = list(FrameBuffer().feed(file.read()))
    events = [event for body in bodies for event in decode_events(body)]
    pieces = [event for event in events if isinstance(event, Piece)]
    assert pieces == [Piece(call=number, text="t") for number in range(50)]
    # Told once, as they did not change.
    assert events.count(Counters(requests=3)) == 1
