"""The peer table, as sequences of what is heard at chosen times."""

from typing import Any

import msgspec
import pytest

from promptmesh.mesh.adverts import (
    Advert,
    ProviderAdvert,
    open_sealed,
    seal,
)
from promptmesh.mesh.frames import encode_value
from promptmesh.mesh.peers import LATE, LINGER, MAX_PEERS, MEMORY, TWIN_SHOWN, PeerTable
from promptmesh.providers.base import ModelOffer


def sign(data: bytes) -> bytes:
    return b"signed:" + bytes([sum(data) % 256])


def verify(peer: str, data: bytes, signature: bytes) -> bool:
    return signature == sign(data)


def offering(peer: str, *models: str, **fields: Any) -> Advert:
    provider = ProviderAdvert(name="echo", models=tuple(ModelOffer(id=m) for m in models))
    plain = Advert(peer=peer, node=peer.upper(), epoch=1, seq=1, ttl=20.0, providers=(provider,))
    return msgspec.structs.replace(plain, **fields)


def observe(table: PeerTable, advert: Advert, now: float, age: float = 0.0) -> bool:
    return table.observe(advert, seal(advert, sign), now, age)


def asked(table: PeerTable, model: str) -> list[str]:
    return [offered.peer.peer for offered in table.offers(model)]


def test_an_advert_lives_for_its_ttl_from_when_it_came() -> None:
    table = PeerTable("me")
    assert observe(table, offering("b", "m"), 100.0)
    assert asked(table, "m") == ["b"]
    assert table.expire(119.9) == []
    assert table.expire(120.0) == ["b"]
    assert asked(table, "m") == []
    assert len(table) == 0


def test_a_relayed_advert_is_as_old_as_the_relay_says() -> None:
    table = PeerTable("me")
    assert observe(table, offering("b"), 100.0, age=15.0)
    assert table.expire(104.9) == []
    assert table.expire(105.0) == ["b"]
    assert not observe(table, offering("c"), 100.0, age=20.0)


def test_what_is_not_newer_is_dropped() -> None:
    table = PeerTable("me")
    assert observe(table, offering("b", "new", epoch=2, seq=5), 100.0)
    for epoch, seq in [(2, 5), (2, 4), (1, 9)]:
        assert not observe(table, offering("b", "old", epoch=epoch, seq=seq), 101.0)
    assert asked(table, "new") == ["b"]
    assert observe(table, offering("b", "newest", epoch=3, seq=1), 102.0)
    assert asked(table, "new") == []
    assert asked(table, "newest") == ["b"]


def test_hearing_the_same_again_does_not_refresh_it() -> None:
    table = PeerTable("me")
    advert = offering("b")
    observe(table, advert, 100.0)
    assert not observe(table, advert, 119.0)
    assert table.expire(121.0) == ["b"]


def test_a_ghost_does_not_return_by_gossip() -> None:
    table = PeerTable("me")
    advert = offering("b", "m")
    observe(table, advert, 100.0)
    table.expire(120.0)
    assert not observe(table, advert, 121.0)
    assert asked(table, "m") == []
    table.expire(100.0 + MEMORY)
    assert observe(table, advert, 100.0 + MEMORY)  # forgotten: bounded memory


def test_who_leaves_is_gone_at_once_and_stays_gone() -> None:
    table = PeerTable("me")
    observe(table, offering("b", "m", seq=3), 100.0)
    assert observe(table, Advert(peer="b", epoch=1, seq=4, leaving=True), 101.0)
    assert asked(table, "m") == []
    assert table.get("b") is None
    assert not observe(table, offering("b", "m", seq=3), 102.0)
    assert observe(table, offering("b", "m", epoch=2), 103.0)  # it was started again
    assert asked(table, "m") == ["b"]


def test_who_leaves_while_connected_is_gone_with_the_connection() -> None:
    table = PeerTable("me")
    table.connected("b", "/ip4/1.2.3.4/tcp/1", 100.0)
    observe(table, offering("b", "m"), 100.0)
    observe(table, Advert(peer="b", epoch=1, seq=2, leaving=True), 101.0)
    assert asked(table, "m") == []
    table.disconnected("b", "the connection was lost", 102.0)
    assert table.get("b") is None


def test_a_wrong_clock_in_the_ttl_is_bounded() -> None:
    table = PeerTable("me")
    observe(table, offering("b", ttl=1e9), 0.0)
    observe(table, offering("c", ttl=0.0), 0.0)
    assert table.expire(4.9) == []
    assert table.expire(5.0) == ["c"]
    assert table.expire(600.0) == ["b"]


def test_own_adverts_and_those_of_another_version_are_no_news() -> None:
    table = PeerTable("me")
    assert not observe(table, offering("me"), 0.0)
    assert not observe(table, offering(""), 0.0)
    assert not observe(table, offering("b", v=2), 0.0)


def test_states() -> None:
    table = PeerTable("me")
    observe(table, offering("b"), 0.0)
    peer = table.get("b")
    assert peer is not None
    assert (peer.state, peer.node) == ("known", "B")
    table.unreachable("b", "connection refused", 1.0)
    assert (peer.state, peer.reason) == ("unreachable", "connection refused")
    table.connected("b", "/ip4/1.2.3.4/tcp/1", 2.0)
    assert (peer.state, peer.reason, peer.since) == ("connected", "", 2.0)
    table.answered("b", 0.1)
    table.answered("b", 0.2)
    assert peer.rtt == pytest.approx(0.12)
    table.unreachable("b", "a second dial failed", 3.0)
    assert peer.state == "connected"
    table.disconnected("b", "it did not answer", 4.0)
    assert (peer.state, peer.reason, peer.rtt) == ("unreachable", "it did not answer", None)


def test_an_unreachable_peer_is_shown_for_a_while_after_the_last_try() -> None:
    table = PeerTable("me")
    table.unreachable("b", "refused", 0.0)
    table.unreachable("b", "refused", 100.0)
    assert table.expire(100.0 + LINGER - 1) == []
    assert table.expire(100.0 + LINGER) == ["b"]


def test_a_connected_peer_stays_when_its_advert_ends() -> None:
    table = PeerTable("me")
    table.connected("b", "", 0.0)
    observe(table, offering("b", "m"), 0.0)
    assert table.expire(1000.0) == []
    assert table.offers("m") == ()
    peer = table.get("b")
    assert peer is not None
    assert peer.providers == ()


def test_the_advert_of_a_lost_peer_has_time_for_two_more() -> None:
    table = PeerTable("me")
    table.connected("b", "", 100.0)
    observe(table, offering("b", "m", ttl=17.5), 100.0)
    table.disconnected("b", "it did not answer", 101.0)
    table.expire(110.9)
    assert asked(table, "m") == ["b"]
    table.expire(111.0)
    assert asked(table, "m") == []
    peer = table.get("b")
    assert peer is not None
    assert (peer.state, peer.reason) == ("unreachable", "it did not answer")  # still shown
    assert (peer.node, peer.providers, table.name_of("b")) == ("B", (), "")
    # Others still hear it: this node alone has lost it.
    assert observe(table, offering("b", "m", ttl=17.5, seq=2), 112.0)
    table.expire(129.0)
    assert asked(table, "m") == ["b"]
    # What is over soon anyhow does not live on.
    table.connected("b", "", 129.0)
    table.disconnected("b", "again", 129.1)
    table.expire(129.5)
    assert asked(table, "m") == []


def test_who_goes_on_in_an_older_epoch_is_two() -> None:
    table = PeerTable("me")
    assert not table.is_twin(offering("b"), 0.0)
    observe(table, offering("b", epoch=1, seq=7), 0.0)
    observe(table, offering("b", epoch=2, seq=1), 10.0)
    assert not table.is_twin(offering("b", epoch=1, seq=8), 10.0 + LATE)  # it was under way
    observe(table, offering("b", epoch=2, seq=2), 20.0)
    assert not table.is_twin(offering("b", epoch=1, seq=7), 30.0)  # heard before
    assert not table.is_twin(offering("b", epoch=2, seq=1), 30.0)
    assert not table.is_twin(offering("b", epoch=3, seq=1), 30.0)
    assert table.is_twin(offering("b", epoch=1, seq=8), 30.0)
    assert table.twin("b", 30.0)
    assert not table.twin("b", 35.0)  # said already
    assert table.twin("b", 36.0 + TWIN_SHOWN)
    assert not table.twin("unknown", 30.0)


def test_what_is_relayed_carries_its_age_and_the_askers_own_last_advert() -> None:
    table = PeerTable("me")
    old = offering("b", epoch=9)
    observe(table, old, 100.0, age=2.0)
    observe(table, offering("c"), 100.0)
    table.expire(118.0)  # b has ended: a ghost is not told, but to itself
    assert [s.age for s in table.relayed("x", 119.0)] == [19.0]
    told = table.relayed("b", 119.0)
    assert [s.age for s in told] == [19.0, 21.0]
    assert [open_sealed(encode_value(s))[1].peer for s in told] == ["c", "b"]


def test_a_full_table_drops_who_is_not_connected() -> None:
    table = PeerTable("me")
    table.connected("p0", "", 0.0)
    for i in range(MAX_PEERS + 10):
        assert observe(table, offering(f"p{i}"), 0.0)
    assert len(table) == MAX_PEERS
    assert table.get("p0") is not None
    assert table.get("p1") is None
    for i in range(MAX_PEERS):
        table.connected(f"q{i}", "", 0.0)
    assert not observe(table, offering("one more"), 0.0)


def test_the_version_rises_with_each_change_of_what_can_be_asked() -> None:
    table = PeerTable("me")
    versions = [table.version]
    observe(table, offering("b"), 0.0)
    versions.append(table.version)
    table.unreachable("b", "refused", 1.0)
    versions.append(table.version)
    table.expire(20.0)
    versions.append(table.version)
    assert versions == sorted(set(versions))
    observe(table, offering("b"), 21.0)  # no news
    assert table.version == versions[-1]
