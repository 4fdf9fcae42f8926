"""Discovery on the local network: what is announced, what is taken, and a network without it."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import trio
import zeroconf
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from promptmesh.mesh import mdns
from promptmesh.mesh.mdns import discover, parse, service_info
from promptmesh.mesh.transport import PeerId

ALICE = "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB"
BOB = "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"
TAG = "0123456789abcdef"
ADDRESSES = [f"/ip4/10.0.0.{n}/tcp/7412/p2p/{ALICE}" for n in range(1, 4)]


def announced(peer: PeerId, addresses: Sequence[str], tag: str) -> dict[bytes, bytes | None]:
    return dict(service_info(peer, addresses, tag).properties)


def test_what_is_announced_is_what_is_taken() -> None:
    assert parse(announced(ALICE, ADDRESSES, TAG), TAG) == (ALICE, ADDRESSES)
    assert parse(announced(ALICE, [], TAG), TAG) == (ALICE, [])
    six = f"/ip6/2001:db8::1/tcp/7412/p2p/{ALICE}"
    named = f"/dns4/node.example/tcp/7412/p2p/{ALICE}"
    assert parse(announced(ALICE, [six, named], TAG), TAG) == (ALICE, [six, named])


def test_a_packet_holds_only_so_many_addresses() -> None:
    many = [f"/ip4/10.0.0.{n}/tcp/7412" for n in range(100)]
    parsed = parse(announced(ALICE, many, TAG), TAG)
    assert parsed is not None
    assert len(parsed[1]) == mdns.MAX_ADDRESSES


@pytest.mark.parametrize(
    "change",
    [
        {b"mesh": b"another"},
        {b"mesh": None},
        {b"id": b""},
        {b"id": b"../../etc/passwd"},
        {b"id": b"a" * 65},
        {b"id": b"\xff\xfe"},
    ],
)
def test_other_meshes_and_nonsense_are_ignored(change: dict[bytes, bytes | None]) -> None:
    assert parse(announced(ALICE, ADDRESSES, TAG) | change, TAG) is None


@pytest.mark.parametrize("address", [b"nonsense", b"/" + b"a" * 200, b"/ip4/1.2.3.4\n/tcp/1", None])
def test_what_is_no_address_is_left_out(address: bytes | None) -> None:
    properties = announced(ALICE, ADDRESSES, TAG) | {b"a1": address}
    assert parse(properties, TAG) == (ALICE, [ADDRESSES[0], ADDRESSES[2]])


@given(st.dictionaries(st.binary(max_size=8), st.none() | st.binary(max_size=80)))
def test_anything_can_be_announced(properties: dict[bytes, bytes | None]) -> None:
    parse(properties | {b"mesh": TAG.encode()}, TAG)


class FakeResponder:
    """Stands for the threads of the library: it hears what the test says, or fails."""

    made: list[FakeResponder]
    failure: Exception | None

    def __init__(self, peer: PeerId, addresses: Sequence[str], tag: str, hear: mdns.Found) -> None:
        self.addresses = addresses
        self.hear = hear
        self.stopped = False
        self.made.append(self)

    def start(self) -> None:
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def responders(monkeypatch: pytest.MonkeyPatch) -> type[FakeResponder]:
    monkeypatch.setattr(mdns, "Responder", FakeResponder)
    monkeypatch.setattr(FakeResponder, "made", [], raising=False)
    monkeypatch.setattr(FakeResponder, "failure", None, raising=False)
    return FakeResponder


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - threads have no trio event
            await trio.sleep(0.001)


async def test_what_a_thread_hears_arrives_in_the_event_loop(
    responders: type[FakeResponder], nursery: trio.Nursery
) -> None:
    found: list[tuple[PeerId, list[str], str]] = []

    def hear(peer: PeerId, addresses: list[str]) -> None:
        found.append((peer, addresses, threading.current_thread().name))

    nursery.start_soon(discover, ALICE, lambda: ADDRESSES, TAG, hear)
    await until(lambda: bool(responders.made))
    (responder,) = responders.made
    await trio.to_thread.run_sync(responder.hear, ALICE, ["ourselves"])
    await trio.to_thread.run_sync(responder.hear, BOB, ["/ip4/10.0.0.9/tcp/1"])
    await until(lambda: bool(found))
    assert found == [(BOB, ["/ip4/10.0.0.9/tcp/1"], threading.main_thread().name)]


async def test_new_addresses_are_announced(
    responders: type[FakeResponder], nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mdns, "REFRESH", 0.001)
    addresses = ["/ip4/10.0.0.1/tcp/1"]
    nursery.start_soon(discover, ALICE, lambda: addresses, TAG, lambda _peer, _at: None)
    await until(lambda: len(responders.made) == 1)
    addresses = ["/ip4/10.0.0.2/tcp/1"]
    await until(lambda: len(responders.made) == 2)
    assert responders.made[0].stopped
    assert responders.made[1].addresses == ("/ip4/10.0.0.2/tcp/1",)


async def test_leaving_says_goodbye(responders: type[FakeResponder]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(discover, ALICE, lambda: ADDRESSES, TAG, lambda _peer, _at: None)
        await until(lambda: bool(responders.made))
        nursery.cancel_scope.cancel()
    assert responders.made[0].stopped


async def test_a_network_without_multicast_is_logged_once_and_tried_again(
    responders: type[FakeResponder],
    nursery: trio.Nursery,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(responders, "failure", OSError("no such device"))
    caplog.set_level(logging.WARNING)
    nursery.start_soon(discover, ALICE, lambda: ADDRESSES, TAG, lambda _peer, _at: None)
    while len(responders.made) < 4:  # noqa: ASYNC110 - threads have no trio event
        await trio.sleep(mdns.RETRY)
    assert [record.getMessage() for record in caplog.records] == [
        "nodes of this network are not found by themselves: no such device"
    ]


@pytest.mark.parametrize("error", [zeroconf.EventLoopBlocked(), zeroconf.NotRunningException()])
def test_a_lookup_that_fails_harms_no_thread(error: zeroconf.Error) -> None:
    class Closing:
        def get_service_info(self, *arguments: Any, **options: Any) -> None:
            raise error

    heard: list[PeerId] = []
    responder = mdns.Responder(ALICE, ADDRESSES, TAG, lambda peer, _at: heard.append(peer))
    added = zeroconf.ServiceStateChange.Added
    responder._changed(cast(Any, Closing()), mdns.SERVICE, f"{BOB}.{mdns.SERVICE}", added)
    assert heard == []


async def test_stopping_waits_for_a_lookup_under_way() -> None:
    """The library's loop ends after the browser: a lookup on a stopped loop never returns."""
    if not await trio.to_thread.run_sync(multicast_works):
        pytest.skip("this machine has no multicast")
    for _ in range(3):
        responders = [
            mdns.Responder(peer, ADDRESSES, TAG, lambda _peer, _at: None) for peer in (ALICE, BOB)
        ]
        for responder in responders:
            await trio.to_thread.run_sync(responder.start)
        for responder in responders:
            await trio.to_thread.run_sync(responder.stop)
            browser = responder._browser
            assert browser is not None
            assert not browser.is_alive()


def multicast_works() -> bool:
    """Does a packet to the group of mDNS come back to this machine?"""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.settimeout(1)
        try:
            own.bind(("", 0))
            group = socket.inet_aton("224.0.0.251") + socket.inet_aton("0.0.0.0")
            own.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            own.sendto(b"is anybody there?", ("224.0.0.251", own.getsockname()[1]))
            return own.recv(100) == b"is anybody there?"
        except OSError:
            return False


async def test_two_nodes_on_one_network_find_each_other(nursery: trio.Nursery) -> None:
    if not await trio.to_thread.run_sync(multicast_works):
        pytest.skip("this machine has no multicast")
    found: dict[str, tuple[PeerId, list[str]]] = {}

    def run(name: str, peer: PeerId, tag: str) -> None:
        def hear(other: PeerId, at: list[str]) -> None:
            found[name] = other, at

        nursery.start_soon(discover, peer, lambda: [f"/ip4/127.0.0.1/tcp/{len(name)}"], tag, hear)

    # Others may run this test on the same network.
    alice, bob, tag = (f"{name}{os.getpid()}" for name in (ALICE, BOB, TAG))
    run("alice", alice, tag)
    run("bob", bob, tag)
    run("stranger", bob + "x", "another mesh")
    await until(lambda: len(found) == 2)
    assert found == {
        "alice": (bob, [f"/ip4/127.0.0.1/tcp/3/p2p/{bob}"]),
        "bob": (alice, [f"/ip4/127.0.0.1/tcp/5/p2p/{alice}"]),
    }
