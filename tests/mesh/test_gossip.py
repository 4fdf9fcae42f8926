"""Adverts and claims by gossip."""

from collections.abc import Callable
from random import Random

import msgspec
import pytest
import trio
import trio.testing
from fakes import MemoryNetwork, MemoryTransport

from promptmesh.mesh.adverts import Advert, ProviderAdvert, open_sealed, seal
from promptmesh.mesh.frames import RemoteProtocolError, encode_value
from promptmesh.mesh.gossip import ADVERTS, CLAIMS, Gossip
from promptmesh.mesh.peers import PeerTable
from promptmesh.providers.base import ModelOffer

#: A test names the clock itself: it works only for who does.
Clock = trio.testing.MockClock


class Speaker:
    """A node that only gossips."""

    def __init__(self, network: MemoryNetwork, name: str, *, epoch: int = 1) -> None:
        self.name = name
        self.transport: MemoryTransport = network.transport(name)
        self.table = PeerTable(self.transport.peer_id)
        self.models: tuple[str, ...] = ("m",)
        self.providers: tuple[ProviderAdvert, ...] = ()
        self.heard: list[Advert] = []
        self.claims: list[tuple[str, bytes]] = []
        self.gossip = Gossip(
            self.transport,
            self.table,
            describe=self._describe,
            epoch=epoch,
            on_advert=self.heard.append,
            on_claims=self._on_claims,
            rng=Random(1),
        )

    def _describe(self) -> Advert:
        models = tuple(ModelOffer(id=model) for model in self.models)
        echo = ProviderAdvert(name="echo", models=models)
        return Advert(node=self.name, providers=self.providers or (echo,))

    def _on_claims(self, peer: str, batch: bytes) -> bool:
        self.claims.append((peer, batch))
        return True


async def two(nursery: trio.Nursery) -> tuple[Speaker, Speaker]:
    network = MemoryNetwork(nursery)
    a, b = Speaker(network, "a"), Speaker(network, "b")
    await a.transport.connect(b.transport.peer_id, b.transport.addresses)
    for speaker in (b, a):  # so that b hears all of a
        await nursery.start(speaker.gossip.run)
    return a, b


async def test_an_advert_says_who_where_and_what(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    a, b = await two(nursery)
    await trio.sleep(1)
    (advert,) = b.heard
    assert (advert.peer, advert.node) == (a.transport.peer_id, "a")
    assert list(advert.addresses) == list(a.transport.addresses)
    assert (advert.epoch, advert.seq, advert.ttl) == (1, 1, 17.5)
    assert [m.id for m in advert.providers[0].models] == ["m"]
    assert [o.peer.node for o in b.table.offers("m")] == ["a"]


async def test_the_largest_advert_fits_into_a_message(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    a, b = await two(nursery)
    a.models = tuple(f"a-vendor-with-a-name/and-its-model-{'x' * 100}-{i}" for i in range(1024))
    a.gossip.changed()
    await trio.sleep(2)
    assert 200 < len(b.heard[-1].providers[0].models) < 1024


async def test_what_an_advert_cannot_hold_is_told_once(
    autojump_clock: Clock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = await two(nursery)
    a.providers = tuple(ProviderAdvert(name=f"p{i}") for i in range(70))
    a.gossip.changed()
    await trio.sleep(60)
    assert [p.name for p in b.heard[-1].providers] == [f"p{i}" for i in range(64)]
    told = "too much for one advert; peers are not told of 6 providers (p64, p65, p66, p67, p68)"
    assert caplog.messages.count(told) == 1


async def test_it_is_renewed_each_period(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    _, b = await two(nursery)
    await trio.sleep(100)
    assert 20 <= len(b.heard) <= 23
    assert [advert.seq for advert in b.heard] == list(range(1, len(b.heard) + 1))


async def test_the_period_grows_with_the_mesh(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    a, b = await two(nursery)
    assert a.gossip.period == 5.0
    for i in range(100):
        a.table.connected(f"peer {i}", "", 0.0)
    assert a.gossip.period == pytest.approx(101 / 2.5, abs=1)
    await trio.sleep(100)
    assert len(b.heard) <= 5
    assert b.heard[-1].ttl == pytest.approx(3.5 * a.gossip.period, abs=1)


async def test_changes_are_told_soon_but_not_more_than_once_a_second(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    a, b = await two(nursery)
    await trio.sleep(2.5)
    a.models = ("new",)
    a.gossip.changed()
    await trio.sleep(0.1)
    assert b.table.offers("new")
    before = len(b.heard)
    for i in range(100):
        a.models = (f"new {i}",)
        a.gossip.changed()
        await trio.sleep(0.1)
    assert 9 <= len(b.heard) - before <= 11
    await trio.sleep(1.1)
    assert b.table.offers("new 99")


async def test_a_goodbye_is_the_last_word(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    a, b = await two(nursery)
    await trio.sleep(1)
    await a.gossip.announce_leaving()
    await trio.sleep(0.1)
    assert b.heard[-1].leaving
    assert b.heard[-1].providers == ()
    assert not b.table.offers("m")
    count = len(b.heard)
    a.gossip.changed()
    await trio.sleep(100)
    assert len(b.heard) == count


async def test_a_goodbye_while_cancelled(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    a, b = await two(nursery)
    with trio.CancelScope() as scope:
        scope.cancel()
        await a.gossip.announce_leaving()
    await trio.sleep(0.1)
    assert b.heard[-1].leaving


async def test_claims_are_handed_on(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    a, b = await two(nursery)
    await a.gossip.announce_claims(b"batch")
    await trio.sleep(0.1)
    assert b.claims == [(a.transport.peer_id, b"batch")]


async def test_what_cannot_be_sealed_is_not_told(
    autojump_clock: Clock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = await two(nursery)
    await trio.sleep(1)
    a.name = "x" * 1000
    a.gossip.changed()
    await trio.sleep(1)
    assert {advert.node for advert in b.heard} == {"a"}
    assert "tells the mesh nothing" in caplog.text


# --- what comes in


def others(advert: Advert, sign: Callable[[bytes], bytes], **changes: object) -> bytes:
    sealed = seal(advert, sign)
    return encode_value(msgspec.structs.replace(sealed, **changes))


async def test_only_the_subject_may_gossip_its_advert(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    a, b = await two(nursery)
    c = Speaker(a.transport.network, "c")
    advert = Advert(peer=c.transport.peer_id, node="c", epoch=1, seq=1, ttl=30.0)
    true = others(advert, c.transport.sign)
    await a.transport.publish(ADVERTS, true)  # a passes c's on as if it were gossip of its own
    await a.transport.publish(ADVERTS, b"\xc1 nonsense")
    await a.transport.publish(CLAIMS, b"not an advert")
    mine = msgspec.structs.replace(advert, peer=a.transport.peer_id, epoch=9)
    await a.transport.publish(ADVERTS, others(mine, c.transport.sign))  # signed by another
    await a.transport.publish(ADVERTS, others(mine, a.transport.sign, age=3.0))
    await trio.sleep(1)
    assert {x.peer for x in b.heard} == {a.transport.peer_id}
    assert b.heard[-1].epoch == 1
    b.gossip.take_relayed(true)  # as a table's item it is welcome
    assert b.heard[-1].node == "c"


async def test_relayed_adverts_must_be_signed_and_carry_their_age(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    a, b = await two(nursery)
    c = Speaker(a.transport.network, "c")
    advert = Advert(peer=c.transport.peer_id, node="c", epoch=1, seq=1, ttl=30.0)
    b.gossip.take_relayed(others(advert, a.transport.sign))
    assert b.table.get(c.transport.peer_id) is None
    b.gossip.take_relayed(others(advert, c.transport.sign, age=29.0))
    state = b.table.get(c.transport.peer_id)
    assert state is not None
    assert state.expires == pytest.approx(trio.current_time() + 1.0)
    with pytest.raises(RemoteProtocolError):
        b.gossip.take_relayed(b"nonsense")


async def test_what_is_relayed_is_ones_own_and_what_one_heard(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    a, b = await two(nursery)
    await trio.sleep(3)
    items = [open_sealed(item) for item in b.gossip.relayed("somebody")]
    assert [advert.node for _, advert in items] == ["b", "a"]
    assert [sealed.age for sealed, _ in items] == [pytest.approx(3.0)] * 2
    c = Speaker(a.transport.network, "c")
    for item in b.gossip.relayed(c.transport.peer_id):
        c.gossip.take_relayed(item)
    assert {advert.node for advert in c.heard} == {"a", "b"}


async def test_a_node_that_meets_its_own_later_advert_outdoes_it(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    a, b = await two(nursery)
    await trio.sleep(1)
    later = Advert(peer=a.transport.peer_id, node="a", epoch=500, seq=3, ttl=30.0)
    forged = others(later, b.transport.sign)
    a.gossip.take_relayed(forged)
    await trio.sleep(2)
    assert b.heard[-1].epoch == 1
    a.gossip.take_relayed(others(later, a.transport.sign))
    await trio.sleep(2)
    assert b.heard[-1].epoch == 501


#: Milliseconds since 1970: what epochs are made of.
IN_2026, IN_2099 = 1_795_000_000_000, 4_070_908_800_000


def own_advert(speaker: Speaker, epoch: int, seq: int, age: float = 0.0) -> bytes:
    """An advert with the speaker's identity that it has not made in this run."""
    advert = Advert(peer=speaker.transport.peer_id, node="a", epoch=epoch, seq=seq, ttl=30.0)
    return others(advert, speaker.transport.sign, age=age)


@pytest.mark.parametrize("seq", [1, 2, 500])
async def test_a_restart_within_one_millisecond(
    autojump_clock: Clock, nursery: trio.Nursery, seq: int
) -> None:
    """The epoch is the same, and the numbers begin again: the others take it for old."""
    a, b = await two(nursery)
    b.gossip.take_relayed(own_advert(a, 1, seq))
    await trio.sleep(2)
    for item in b.gossip.relayed(a.transport.peer_id):
        a.gossip.take_relayed(item)
    a.models = ("new",)
    await trio.sleep(5)
    assert b.table.offers("new")
    assert not a.gossip.twin


async def test_a_clock_that_was_in_2099_harms_nobody(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    a, b = await two(nursery)
    c = Speaker(a.transport.network, "c", epoch=IN_2026)
    await c.transport.connect(b.transport.peer_id, b.transport.addresses)
    await nursery.start(c.gossip.run)
    await trio.sleep(1)
    b.gossip.take_relayed(own_advert(c, IN_2099, 77, age=2.0))
    # What the others say of themselves counts as before, whatever c's clock says.
    a.models = ("new",)
    a.gossip.changed()
    await trio.sleep(2)
    assert b.table.offers("new")
    # c is not heard, as it seems to speak of long ago, until it has asked b for what it knows.
    assert b.table.offers("m") == ()
    for item in b.gossip.relayed(c.transport.peer_id):
        c.gossip.take_relayed(item)
    await trio.sleep(2)
    state = b.table.get(c.transport.peer_id)
    assert state is not None
    assert state.advert is not None
    assert (state.advert.epoch, [o.peer.node for o in b.table.offers("m")]) == (IN_2099 + 1, ["c"])
    await trio.sleep(60)
    assert [o.peer.node for o in b.table.offers("m")] == ["c"]
    assert not c.gossip.twin


async def test_a_twin_is_who_goes_on_speaking_as_this_node(
    autojump_clock: Clock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    a, _ = await two(nursery)
    await trio.sleep(1)
    a.gossip.take_relayed(own_advert(a, 0, 10, age=3.0))
    a.gossip.take_relayed(own_advert(a, 0, 12, age=1.0))  # another peer heard more of its past
    assert not a.gossip.twin
    await trio.sleep(20)
    a.gossip.take_relayed(own_advert(a, 0, 14, age=18.0))  # that was before, too
    a.gossip.take_relayed(own_advert(a, 0, 14, age=1.0))
    a.gossip.take_relayed(own_advert(a, 1, 2, age=1.0))  # its own of this run
    assert not a.gossip.twin
    a.gossip.take_relayed(others(Advert(peer=a.transport.peer_id, seq=16), lambda data: b"forged"))
    assert not a.gossip.twin
    a.gossip.take_relayed(own_advert(a, 0, 16, age=1.0))
    assert a.gossip.twin
    a.gossip.take_relayed(own_advert(a, 0, 18, age=1.0))
    assert caplog.text.count("another node runs with the identity of this one") == 1


async def test_twins_do_not_outdo_each_other_for_ever(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    a, b = await two(nursery)
    await trio.sleep(10)
    for n in range(20):
        a.gossip.take_relayed(own_advert(a, 1000, 10 + n))
        await trio.sleep(2)
    assert a.gossip.twin
    assert {advert.epoch for advert in b.heard} <= {1, 1001}


async def test_others_say_that_there_are_two_of_a_peer(
    autojump_clock: Clock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = await two(nursery)
    await trio.sleep(1)
    for n in range(20):
        await a.transport.publish(ADVERTS, own_advert(a, 0, 100 + n))
        await trio.sleep(1)
    state = b.table.get(a.transport.peer_id)
    assert state is not None
    assert state.twin == pytest.approx(20.0, abs=1.1)
    assert caplog.text.count("two nodes have one identity") == 1
    assert b.table.offers("m")  # who spoke last in the later epoch is who is meant
