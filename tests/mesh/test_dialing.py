"""Whom to dial, and when."""

import math
from random import Random
from typing import Any

import pytest
import trio
import trio.testing
from fakes import MemoryNetwork
from fakes_mesh import wait_until
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.mesh.dialing import (
    FORGET,
    FORGET_UNMET,
    FULL_MESH,
    GRACE,
    LONGEST_PAUSE,
    MAX_ADDRESSES,
    MAX_TARGETS,
    Dialing,
    Redials,
    peer_of,
)
from promptmesh.mesh.peers import PeerTable
from promptmesh.mesh.transport import TransportError

#: A test names the clock itself: it works only for who does.
Clock = trio.testing.MockClock


def redials(own: str = "m") -> Redials:
    return Redials(own, Random(1))


def due(table: Redials, now: float, *, connected: Any = (), peers: int = 3) -> list[str]:
    return [target.peer for target in table.due(now, connected, peers)]


def test_the_peer_of_an_address() -> None:
    assert peer_of("/ip4/10.0.0.1/tcp/7412/p2p/12D3KooW") == "12D3KooW"
    assert peer_of("/dns4/x/tcp/1/p2p/RELAY/p2p-circuit/p2p/TARGET") == "TARGET"
    for wrong in ("/ip4/10.0.0.1/tcp/7412", "/p2p/", "", "/ip4/1.1.1.1/p2p/X/tcp/1"):
        with pytest.raises(ValueError, match="PEERID"):
            peer_of(wrong)


def test_the_smaller_id_dials_first() -> None:
    smaller, greater = redials("a"), redials("z")
    for table in (smaller, greater):
        table.found("m", ["/x"], 0.0)
    assert due(smaller, 0.0) == ["m"]
    assert due(greater, GRACE - 0.1) == []
    assert due(greater, GRACE) == ["m"]


def test_bootstrap_is_dialled_by_everybody_at_once() -> None:
    for own in ("a", "z"):
        table = redials(own)
        table.add_bootstrap("/ip4/1.1.1.1/tcp/1/p2p/m", 0.0)
        assert due(table, 0.0) == ["m"]


def test_this_node_and_the_connected_are_not_dialled() -> None:
    table = redials()
    table.found("m", ["/x"], 0.0)
    table.add_bootstrap("/ip4/1.1.1.1/tcp/1/p2p/m", 0.0)
    table.found("z", ["/x"], 0.0)
    assert due(table, 0.0) == ["z"]
    assert due(table, 0.0, connected=["z"]) == []


def test_pauses_double_with_jitter_up_to_a_cap() -> None:
    table, now, pauses = redials(), 0.0, []
    table.found("z", ["/x"], now)
    for _ in range(10):
        assert due(table, now) == ["z"]
        table.failed("z", now)
        after = table.next_time(now)
        pauses.append(after - now)
        assert due(table, after - 0.01) == []
        now = after
    for expected, pause in zip([1, 2, 4, 8, 16, *[LONGEST_PAUSE] * 5], pauses, strict=True):
        assert 0.75 * expected <= pause <= 1.25 * expected
    assert len({p / 30 for p in pauses[5:]}) > 1


def test_a_connection_ends_the_pauses_and_its_loss_begins_anew() -> None:
    table = redials()
    table.found("z", ["/x"], 0.0)
    for now in (0.0, 2.0, 5.0):
        table.failed("z", now)
    assert table.connected("z")
    assert not table.connected("z")
    assert table.next_time(100.0) == math.inf
    table.disconnected("z", 100.0)
    assert due(table, 100.0) == ["z"]


def test_who_leaves_is_not_dialled_until_it_is_back() -> None:
    table = redials()
    table.found("z", ["/x"], 0.0)
    table.connected("z")
    table.left("z", 10.0)
    table.disconnected("z", 10.1)
    assert table.next_time(10.2) == math.inf
    assert due(table, 1e6) == []
    table.found("z", ["/x"], 2e6, advertised=True)
    assert due(table, 2e6) == ["z"]


def test_a_bootstrap_that_leaves_is_looked_for_slowly() -> None:
    table = redials()
    table.add_bootstrap("/ip4/1.1.1.1/tcp/1/p2p/z", 0.0)
    table.connected("z")
    table.left("z", 10.0)
    table.disconnected("z", 10.1)
    assert due(table, 10.0 + LONGEST_PAUSE - 1) == []
    assert due(table, 10.0 + LONGEST_PAUSE) == ["z"]


def test_a_new_address_is_tried_at_once() -> None:
    table = redials()
    table.found("z", ["/old"], 0.0)
    for now in range(5):
        table.failed("z", float(now))
    table.found("z", ["/old"], 5.0)
    assert due(table, 5.0) == []
    table.found("z", ["/new"], 5.0)
    (target,) = table.due(5.0, (), 3)
    assert target.all_addresses == ["/new", "/old"]


def test_above_a_full_mesh_the_merely_advertised_are_not_dialled() -> None:
    table = redials()
    table.found("x", ["/x"], 0.0, advertised=True)
    table.found("y", ["/x"], 0.0)
    table.found("y", ["/x"], 0.0, advertised=True)
    table.add_bootstrap("/ip4/1.1.1.1/tcp/1/p2p/z", 0.0)
    assert due(table, GRACE, peers=FULL_MESH) == ["x", "y", "z"]
    assert due(table, GRACE, peers=FULL_MESH + 1) == ["y", "z"]


def test_what_is_remembered_for_the_next_start() -> None:
    table = redials()
    table.found("met", ["/a", "/b"], 0.0)
    table.found("never met", ["/c"], 0.0)
    table.connected("met")
    table.connected("no address")
    assert table.known() == {"met": ["/a", "/b"]}
    assert table.found("met", ["/new"], 1.0)  # is worth saving
    assert not table.found("met", ["/new"], 2.0)
    assert not table.found("never met", ["/d"], 1.0)


def test_who_is_never_reached_is_forgotten() -> None:
    table = redials()
    table.found("unmet", ["/x"], 0.0)
    table.found("met", ["/x"], 0.0)
    table.connected("met")
    table.add_bootstrap("/ip4/1.1.1.1/tcp/1/p2p/boot", 0.0)
    gone = []
    for now in (0.0, FORGET_UNMET + 1, FORGET + 1):
        for peer in ("unmet", "met", "boot"):
            table.failed(peer, now)
        gone.append([p for p in ("unmet", "met", "boot") if table.get(p) is None])
    assert gone == [[], ["unmet"], ["unmet", "met"]]


def test_what_members_can_make_us_keep_is_bounded() -> None:
    table = redials()
    table.add_bootstrap("/ip4/1.1.1.1/tcp/1/p2p/boot", 0.0)
    for i in range(MAX_TARGETS + 10):
        table.found(f"peer {i}", [f"/{i}/{j}" for j in range(100)], 0.0)
    assert len(table._targets) == MAX_TARGETS
    target = table.get(f"peer {MAX_TARGETS + 9}")
    assert target is not None
    assert len(target.all_addresses) == MAX_ADDRESSES
    assert table.get("boot") is not None


events = st.tuples(
    st.sampled_from(["found", "advertised", "connected", "disconnected", "failed", "left"]),
    st.sampled_from(["a", "z", "m"]),
    st.floats(0.0, 40.0),
)


@given(st.lists(events, max_size=30))
def test_any_sequence_keeps_its_promises(sequence: list[tuple[str, str, float]]) -> None:
    table, now, connected = redials(), 0.0, set[str]()
    for what, peer, pause in sequence:
        now += pause
        match what:
            case "found" | "advertised":
                table.found(peer, ["/x"], now, advertised=what == "advertised")
            case "connected":
                table.connected(peer)
                connected.add(peer)
            case "disconnected":
                table.disconnected(peer, now)
                connected.discard(peer)
            case "failed":
                table.failed(peer, now)
            case "left":
                table.left(peer, now)
        assert not set(due(table, now, connected=connected)) & {*connected, "m"}
        assert table.next_time(now) >= now


# --- over a network


async def test_a_dial_that_fails_says_why_and_is_tried_again(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    network = MemoryNetwork(nursery)
    here, there = network.transport("here"), network.transport("there")
    addresses = there.addresses
    await there.aclose()
    table = PeerTable(here.peer_id)
    saved: list[Any] = []
    dialing = Dialing(here, table, bootstrap=addresses, known={}, save=saved.append, rng=Random(1))
    here.on_connection(lambda peer, up: dialing.connection(peer, up))
    nursery.start_soon(dialing.run)
    await trio.sleep(20)
    state = table.get(there.peer_id)
    assert state is not None
    assert state.state == "unreachable"
    assert "connection refused" in state.reason
    with pytest.raises(TransportError, match="connection refused"):
        await dialing.reach(there.peer_id)
    with pytest.raises(TransportError, match="no address"):
        await dialing.reach("nobody")
    network.transport("there")
    await wait_until(lambda: bool(here.connected()), timeout=LONGEST_PAUSE * 1.3)
    await trio.sleep(10)
    assert saved == [{there.peer_id: list(addresses)}]


async def test_at_most_so_many_dials_at_once(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    network = MemoryNetwork(nursery)
    here = network.transport("here")
    network.cut(here)
    others = [network.transport(f"peer {i}") for i in range(30)]
    known = {other.peer_id: other.addresses for other in others}
    dialing = Dialing(
        here,
        PeerTable(here.peer_id),
        bootstrap=(),
        known=known,
        save=lambda known: None,
        rng=Random(1),
    )
    nursery.start_soon(dialing.run)
    await trio.sleep(1)
    assert dialing._dials.borrowed_tokens == dialing._dials.total_tokens
    network.heal(here)
    await wait_until(lambda: len(here.connected()) == 30)


def test_a_bootstrap_without_a_peer_id_is_refused() -> None:
    class NoTransport:
        peer_id = "m"

    with pytest.raises(ValueError, match="PEERID"):
        Dialing(
            NoTransport(),  # type: ignore[arg-type]
            PeerTable("m"),
            bootstrap=["/ip4/1.1.1.1/tcp/1"],
            known={},
            save=lambda known: None,
            rng=Random(1),
        )
