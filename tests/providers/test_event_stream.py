"""Server-sent events, cut anywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.providers.event_stream import EventStream, EventTooLong

STREAM = (
    b": OPENROUTER PROCESSING\n\n"
    b"data: one\n\n"
    b"data:two\r\n\r\n"
    b"id: 7\nretry: 10\ndata: three\ndata:\ndata: four\n\n"
    b"event: error\ndata: five\n\n"
    b"data: six \xc3\xa9\r\n: comment\r\n\r\n"
    b"event: nothing\n\n"
    b"\n\n\n"
    b"data:  seven\n\n"
    b"data\n\n"
)
EVENTS = [
    ("", b"one"),
    ("", b"two"),
    ("", b"three\n\nfour"),
    ("error", b"five"),
    ("", b"six \xc3\xa9"),
    ("", b" seven"),
]


def read(*pieces: bytes) -> list[tuple[str, bytes]]:
    stream = EventStream()
    events = [event for piece in pieces for event in stream.feed(piece)]
    return events + stream.end()


def test_events() -> None:
    assert read(STREAM) == EVENTS


def test_events_come_with_their_last_byte() -> None:
    stream = EventStream()
    assert stream.feed(b"data: one\n") == []
    assert stream.feed(b"\ndata: two") == [("", b"one")]
    assert stream.feed(b"\n\n") == [("", b"two")]


@pytest.mark.parametrize("cut", range(len(STREAM) + 1))
def test_cut_anywhere(cut: int) -> None:
    assert read(STREAM[:cut], STREAM[cut:]) == EVENTS


def test_byte_by_byte() -> None:
    assert read(*(STREAM[i : i + 1] for i in range(len(STREAM)))) == EVENTS


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\r"])
def test_last_event_without_its_blank_line(end: bytes) -> None:
    assert read(b"data: one\n\ndata: [DONE]" + end) == [("", b"one"), ("", b"[DONE]")]


def test_event_too_long_in_one_line() -> None:
    stream = EventStream(max_event=100)
    assert stream.feed(b"data: " + b"a" * 80) == []
    with pytest.raises(EventTooLong, match="longer than 100 bytes"):
        stream.feed(b"a" * 20)


def test_event_too_long_in_many_lines() -> None:
    stream = EventStream(max_event=100)
    assert stream.feed(b"data: aaaaaaaaa\n" * 10) == []
    with pytest.raises(EventTooLong):
        stream.feed(b"data: aaaaaaaaa\n" * 2)


def test_many_short_events_are_not_one_long_one() -> None:
    stream = EventStream(max_event=100)
    for _ in range(20):
        assert stream.feed(b"data: aaaaaaaaaaaaaaaaaaaa\n\n") == [("", b"a" * 20)]
    assert stream.feed(b": a comment of twenty\n" * 4) == []


@given(st.lists(st.binary(max_size=30), max_size=20))
def test_random_bytes(pieces: list[bytes]) -> None:
    assert read(*pieces) == read(b"".join(pieces))
