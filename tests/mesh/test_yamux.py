"""The muxer: two sessions back to back, and peers that do not keep to the protocol."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from promptmesh.mesh import yamux
from promptmesh.mesh.transport import TransportError
from promptmesh.mesh.yamux import MAX_STREAMS, YamuxSession
from promptmesh.mesh.yamux_frames import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    YamuxViolation,
)
from promptmesh.mesh.yamux_stream import (
    FULL_WINDOW,
    INITIAL_WINDOW,
    WINDOW_TIMEOUT,
    YamuxStream,
)


class Sent:
    """Keeps what a session sends, until the test delivers it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.congested = False
        self.low = trio.Event()

    def queue(self, frame: bytes) -> None:
        self.data += frame

    async def wait_low(self) -> None:
        await self.low.wait()

    def take(self) -> bytes:
        data = bytes(self.data)
        self.data.clear()
        return data

    def frames(self) -> list[tuple[int, int, int, int]]:
        """Type, flags, stream and length of each frame; the data is left out."""
        data, found = self.take(), []
        while data:
            _, kind, flags, number, length = struct.unpack("!BBHII", data[:12])
            found.append((kind, flags, number, length))
            data = data[12 + (length if kind == DATA else 0) :]
        return found


class Pair:
    """A client and a server session with a wire between them."""

    def __init__(self) -> None:
        self.from_client, self.from_server = Sent(), Sent()
        self.client = YamuxSession("server", self.from_client, client=True)
        self.server = YamuxSession("client", self.from_server, client=False)

    def deliver(self, *, at_once: int = 1 << 30) -> None:
        """Carry everything over, in pieces of that size."""
        while self.from_client.data or self.from_server.data:
            for sent, session in (
                (self.from_client, self.server),
                (self.from_server, self.client),
            ):
                data = sent.take()
                for start in range(0, len(data), at_once):
                    session.receive(data[start : start + at_once])

    async def stream(self) -> tuple[YamuxStream, YamuxStream]:
        """Both ends of a new stream."""
        near = self.client.open()
        self.deliver()
        return near, await self.server.accept()


def frame(kind: int, flags: int, number: int, length: int, data: bytes = b"") -> bytes:
    return struct.pack("!BBHII", 0, kind, flags, number, length) + data


@pytest.fixture
def pair() -> Pair:
    return Pair()


# --- what the frames are --------------------------------------------------------------------------


async def test_the_frames_of_a_stream(pair: Pair) -> None:
    stream = pair.client.open()
    await stream.send_all(b"hello")
    await stream.send_eof()
    assert pair.from_client.frames() == [
        (WINDOW_UPDATE, SYN, 1, 0),
        (DATA, 0, 1, 5),
        (WINDOW_UPDATE, FIN, 1, 0),
    ]
    assert pair.client.open().number == 3
    assert pair.server.open().number == 2


async def test_a_stream_byte_by_byte(pair: Pair) -> None:
    near = pair.client.open()
    await near.send_all(b"question")
    pair.deliver(at_once=1)
    far = await pair.server.accept()
    assert await far.receive_some() == b"question"
    await far.send_all(b"answer")
    await far.aclose()
    pair.deliver(at_once=1)
    assert await near.receive_some(3) == b"ans"
    assert await near.receive_some() == b"wer"
    assert await near.receive_some() == b""
    await near.aclose()
    pair.deliver(at_once=1)
    assert near.is_over
    assert far.is_over


@given(pieces=st.lists(st.binary(max_size=400), max_size=8), at_once=st.integers(1, 50))
def test_any_bytes_in_any_pieces(pieces: list[bytes], at_once: int) -> None:
    async def main() -> None:
        pair = Pair()
        near, far = await pair.stream()
        for piece in pieces:
            await near.send_all(piece)
        await near.send_eof()
        pair.deliver(at_once=at_once)
        received = b""
        while data := await far.receive_some(7):
            received += data
        assert received == b"".join(pieces)

    trio.run(main)


@given(st.binary(max_size=300))
def test_random_bytes_are_at_worst_a_violation(data: bytes) -> None:
    async def main() -> None:
        session = YamuxSession("peer", Sent(), client=False)
        with suppress(YamuxViolation):
            session.receive(data)

    trio.run(main)


_frames = st.lists(
    st.tuples(
        st.integers(0, 4), st.integers(0, 15), st.integers(0, 5), st.integers(0, 40), st.binary()
    ),
    max_size=20,
)


@given(_frames)
def test_random_frames_are_at_worst_a_violation(
    frames: list[tuple[int, int, int, int, bytes]],
) -> None:
    async def main() -> None:
        session = YamuxSession("peer", Sent(), client=False)
        with suppress(YamuxViolation):
            for kind, flags, number, length, data in frames:
                session.receive(frame(kind, flags, number, length, data[:length]))

    trio.run(main)


# --- windows --------------------------------------------------------------------------------------


async def test_a_window_is_enforced_where_the_frame_arrives(pair: Pair) -> None:
    _, far = await pair.stream()
    pair.server.receive(frame(DATA, 0, 1, INITIAL_WINDOW, bytes(INITIAL_WINDOW)))
    with pytest.raises(YamuxViolation):
        pair.server.receive(frame(DATA, 0, 1, 1))
    assert len(await far.receive_some(FULL_WINDOW)) == INITIAL_WINDOW


async def test_a_frame_larger_than_the_window_is_refused_before_its_bytes(pair: Pair) -> None:
    await pair.stream()
    with pytest.raises(YamuxViolation):
        pair.server.receive(frame(DATA, 0, 1, INITIAL_WINDOW + 1))
    with pytest.raises(YamuxViolation):
        Pair().server.receive(frame(DATA, 0, 7, FULL_WINDOW + 1))


async def test_credit_comes_in_halves_of_a_window(pair: Pair) -> None:
    near, far = await pair.stream()
    for _ in range(100):
        await near.send_all(bytes(1000))
        pair.deliver()
        await far.receive_some()
    assert pair.from_server.frames() == []  # 100 kB: no window updates yet
    await near.send_all(bytes(40_000))
    pair.server.receive(pair.from_client.take())
    await far.receive_some()
    credit = 140_000 + FULL_WINDOW - INITIAL_WINDOW
    assert pair.from_server.frames() == [(WINDOW_UPDATE, 0, 1, credit)]


async def test_few_streams_of_a_connection_have_a_full_window(pair: Pair) -> None:
    grown = 0
    for _ in range(yamux.FULL_WINDOWS + 4):
        near, far = await pair.stream()
        await near.send_all(bytes(INITIAL_WINDOW))
        pair.server.receive(pair.from_client.take())
        await far.receive_some(INITIAL_WINDOW)
        (*_, length) = pair.from_server.frames()[-1]
        grown += length > INITIAL_WINDOW
    assert grown == yamux.FULL_WINDOWS


async def test_sending_waits_for_credit(pair: Pair, nursery: trio.Nursery) -> None:
    near, far = await pair.stream()
    nursery.start_soon(near.send_all, bytes(INITIAL_WINDOW + 10))
    await wait_all_tasks_blocked()
    pair.deliver()
    assert len(await far.receive_some(FULL_WINDOW)) == INITIAL_WINDOW
    pair.deliver()
    await wait_all_tasks_blocked()
    pair.deliver()
    assert len(await far.receive_some()) == 10


async def test_a_peer_that_gives_no_credit_is_given_up(
    pair: Pair, autojump_clock: trio.testing.MockClock
) -> None:
    near, _ = await pair.stream()
    started = trio.current_time()
    with pytest.raises(TransportError, match="took nothing"):
        await near.send_all(bytes(INITIAL_WINDOW + 1))
    assert trio.current_time() - started == pytest.approx(WINDOW_TIMEOUT)
    assert pair.from_client.frames()[-1] == (WINDOW_UPDATE, RST, 1, 0)


async def test_sending_waits_for_a_congested_socket(pair: Pair, nursery: trio.Nursery) -> None:
    near, _ = await pair.stream()
    pair.from_client.congested = True
    nursery.start_soon(near.send_all, b"later")
    await wait_all_tasks_blocked()
    assert pair.from_client.frames() == []
    pair.from_client.congested = False
    pair.from_client.low.set()
    await wait_all_tasks_blocked()
    assert pair.from_client.frames() == [(DATA, 0, 1, 5)]


# --- ends -----------------------------------------------------------------------------------------


async def test_what_came_before_a_reset_can_be_read(pair: Pair) -> None:
    near, far = await pair.stream()
    await near.send_all(b"before")
    await near.reset()
    pair.deliver()
    assert await far.receive_some() == b"before"
    with pytest.raises(TransportError, match="client reset the stream"):
        await far.receive_some()


async def test_finished_streams_are_forgotten(pair: Pair) -> None:
    for _ in range(3 * MAX_STREAMS):
        near, far = await pair.stream()
        await near.aclose()
        await far.aclose()
        pair.deliver()
    for _ in range(3 * MAX_STREAMS):
        near, far = await pair.stream()
        await far.reset()
        pair.deliver()


async def test_only_so_many_streams_at_once(pair: Pair) -> None:
    opened = [pair.client.open() for _ in range(MAX_STREAMS)]
    with pytest.raises(TransportError, match="open already"):
        pair.client.open()
    pair.deliver()
    # A peer that opens one more gets it reset.
    pair.server.receive(frame(WINDOW_UPDATE, SYN, 9999, 0))
    assert pair.from_server.frames() == [(WINDOW_UPDATE, RST, 9999, 0)]
    await opened[0].reset()
    pair.client.open()


async def test_what_arrives_for_a_stream_that_was_reset_is_dropped(pair: Pair) -> None:
    near, far = await pair.stream()
    await far.send_all(bytes(1000))
    await near.reset()
    pair.deliver()
    other, far_other = await pair.stream()
    await far_other.send_all(b"fine")
    pair.deliver()
    assert await other.receive_some() == b"fine"


async def test_data_for_a_stream_that_was_let_go_resets_it(pair: Pair) -> None:
    near, far = await pair.stream()
    await far.aclose()
    pair.deliver()
    assert await near.receive_some() == b""
    await near.send_all(b"more")
    pair.deliver()
    with pytest.raises(TransportError):
        await near.send_all(b"even more")


@pytest.mark.parametrize(
    "offence",
    [
        frame(WINDOW_UPDATE, SYN, 0, 0),
        frame(WINDOW_UPDATE, SYN, 2, 0),  # a server's number
        frame(WINDOW_UPDATE, SYN, 1, 0) * 2,
        b"\x01" + frame(PING, SYN, 0, 0)[1:],
        frame(4, 0, 0, 0),
        frame(WINDOW_UPDATE, SYN | FIN, 1, 0) + frame(DATA, 0, 1, 1),
    ],
)
async def test_violations(pair: Pair, offence: bytes) -> None:
    with pytest.raises(YamuxViolation):
        pair.server.receive(offence)


async def test_a_ping_is_answered(pair: Pair, nursery: trio.Nursery) -> None:
    pair.server.receive(frame(PING, SYN, 0, 77))
    assert pair.from_server.frames() == [(PING, ACK, 0, 77)]
    trips: list[float] = []

    async def ping() -> None:
        trips.append(await pair.client.ping())

    nursery.start_soon(ping)
    nursery.start_soon(ping)
    await wait_all_tasks_blocked()
    pair.client.receive(frame(PING, ACK, 0, 12345))  # of nobody
    await wait_all_tasks_blocked()
    assert trips == []
    pair.deliver()
    await wait_all_tasks_blocked()
    assert len(trips) == 2


@pytest.mark.parametrize(
    "end",
    [
        lambda session: session.receive(frame(GO_AWAY, 0, 0, 0)),
        lambda session: session.close("enough"),
        lambda session: session.end("the connection was lost"),
    ],
)
async def test_the_end_of_a_connection_ends_all(
    pair: Pair, nursery: trio.Nursery, end: Callable[[YamuxSession], None]
) -> None:
    near, _ = await pair.stream()
    failed: list[str] = []

    async def fail(name: str, function: Callable[[], object]) -> None:
        with pytest.raises(TransportError):
            await function()  # type: ignore[misc]
        failed.append(name)

    nursery.start_soon(fail, "receive", near.receive_some)
    nursery.start_soon(fail, "ping", pair.client.ping)
    nursery.start_soon(fail, "accept", pair.client.accept)
    await wait_all_tasks_blocked()
    end(pair.client)
    await wait_all_tasks_blocked()
    assert sorted(failed) == ["accept", "ping", "receive"]
    with pytest.raises(TransportError):
        await near.send_all(b"late")
    with pytest.raises(TransportError):
        pair.client.open()
    with pytest.raises(TransportError):
        await pair.client.ping()
