"""Can this node be dialled? Asked of real hosts on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from hosts import SOON, host, meet, port_of, until
from libp2p.peer.id import ID

from promptmesh.mesh import reachability
from promptmesh.mesh.frames import RemoteProtocolError, decode_value, encode_value
from promptmesh.mesh.host import Libp2pTransport
from promptmesh.mesh.link import Link
from promptmesh.mesh.reachability import DIAL_BACK, Finding, Question, Reachability, ask
from promptmesh.mesh.transport import Stream, TransportError

HERE = ["/ip4/10.0.0.5/tcp/7412"]
REACHED = Finding(outcome="reached", address=HERE[0])
FORWARDED = Finding(outcome="reached", address="/ip4/203.0.113.5/tcp/7412")
FAILED = Finding(outcome="failed")
REFUSED = Finding()


def link(a: Libp2pTransport, b: Libp2pTransport) -> Link:
    return a.network.link(ID.from_base58(b.peer_id))


async def answer_to(stream: Stream, data: bytes) -> bytes:
    await stream.send_all(data)
    return await stream.receive_some()


@asynccontextmanager
async def knocked() -> AsyncIterator[tuple[int, list[bytes]]]:
    """A port at which nobody of the mesh listens, and what was said to it."""
    said: list[bytes] = []

    async def hear(stream: trio.SocketStream) -> None:
        said.append(await stream.receive_some())
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, hear, [listener])
        yield listener.socket.getsockname()[1], said
        nursery.cancel_scope.cancel()


# --- concluding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("findings", "state", "outside"),
    [
        ([], "unknown", ()),
        ([REFUSED], "unknown", ()),
        ([REACHED], "reachable", ()),
        ([REACHED, REFUSED], "reachable", ()),
        ([FAILED], "unreachable", ()),
        ([REACHED, FAILED], "unreachable", ()),  # from the same house, and from outside
        ([FORWARDED, REACHED], "reachable", (FORWARDED.address,)),
    ],
)
def test_what_is_concluded(findings: list[Finding], state: str, outside: tuple[str, ...]) -> None:
    known = Reachability()
    by_peer = {str(number): finding for number, finding in enumerate(findings)}
    changed = known.conclude(by_peer, HERE)
    assert (known.state, known.outside) == (state, outside)
    assert changed == (state != "unknown")
    assert not known.conclude(by_peer, HERE)


def test_silence_changes_nothing() -> None:
    known = Reachability()
    known.conclude({"a": FORWARDED}, HERE)
    assert not known.conclude({"a": REFUSED}, HERE)
    assert (known.state, known.outside) == ("reachable", (FORWARDED.address,))


# --- asking ---------------------------------------------------------------------------------------


async def test_a_member_dials_anew_and_keeps_no_connection() -> None:
    async with host("a") as a, host("b") as b:
        await meet(a, b)
        finding = await ask(link(a, b), [port_of(a)])
        assert finding == Finding(outcome="reached", address=f"/ip4/127.0.0.1/tcp/{port_of(a)}")
        assert len(a.network.connections[ID.from_base58(b.peer_id)]) == 1
        assert len(b.network.connections[ID.from_base58(a.peer_id)]) == 1


async def test_another_peer_at_the_port_is_not_the_asker() -> None:
    async with host("a") as a, host("b") as b, host("c") as c:
        await meet(a, b)
        assert await ask(link(a, b), [port_of(c)]) == FAILED


async def test_a_closed_port_is_not_reached() -> None:
    async with host("a") as a, host("b") as b:
        await meet(a, b)
        assert await ask(link(a, b), [1]) == FAILED


async def test_few_ports_are_tried_and_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    async with host("a") as a, host("b") as b, knocked() as (port, said):
        await meet(a, b)
        assert await ask(link(a, b), [1, 2, port]) == FAILED
        assert await ask(link(a, b), [port]) == REFUSED
        assert said == []
        monkeypatch.setattr(reachability, "QUESTION_PAUSE", 0.0)
        assert await ask(link(a, b), [port]) == FAILED
        assert len(said) == 1


async def test_few_questions_are_answered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachability, "MAX_AT_ONCE", 0)
    async with host("a") as a, host("b") as b:
        await meet(a, b)
        assert await ask(link(a, b), [port_of(a)]) == REFUSED


async def test_nobody_is_dialled_for_who_is_behind_a_relay() -> None:
    async with (
        host("r", offers=True) as r,
        host("a", listens=False) as a,
        host("b", listens=False) as b,
    ):
        await meet(a, r)
        await until(lambda: len(a.addresses) == 1)
        await b.connect(a.peer_id, a.addresses)
        assert await ask(link(b, a), [port_of(r)]) == REFUSED


async def test_nonsense_resets_the_stream() -> None:
    async with host("a") as a, host("b") as b:
        await meet(a, b)
        for data in (b"\x01\xc1", b"\x03\x91\xa1x", b"\xff\xff\xff\x7f"):
            stream = await a.open_stream(b.peer_id, DIAL_BACK)
            with trio.fail_after(SOON), pytest.raises(TransportError, match="reset"):
                await answer_to(stream, data)


@pytest.mark.parametrize("ports", [(0,), (65536,), (-1,), tuple(range(1, 20))])
def test_ports_are_bounded(ports: tuple[int, ...]) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_value(encode_value(Question(ports=ports)), Question, limit=1000)
