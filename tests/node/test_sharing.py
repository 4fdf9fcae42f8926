"""Claims go out, others' claims are found, their blocks fetched and verified."""

from __future__ import annotations

import msgspec
import pytest
import trio
import trio.testing
from fakes_sharing import Fault, Member, asking, find, mesh, now

from promptmesh.cache.cid import Cid, cid_bytes, parse_cid
from promptmesh.cache.claims import MAX_ENTRIES, Batch, Entry, seal, unseal
from promptmesh.cache.keys import request_key
from promptmesh.mesh.frames import RemoteProtocolError
from promptmesh.mesh.transport import TransportError
from promptmesh.node.claiming import PATIENCE
from promptmesh.providers.base import Completion

#: Seconds.
YEAR = 365 * 86400.0


async def test_an_answer_is_found_by_the_others(autojump_clock: trio.testing.MockClock) -> None:
    async with mesh("a", "b", "c") as ((a, _), (b, _), (c, _)):
        assert await find(b, asking()) is None
        cid = await a.make(asking(), "hello")
        await trio.sleep(2)
        assert await find(b, asking()) == ("hello", a.peer)
        assert await find(c, asking()) == ("hello", a.peer)
        # It is b's own now: no claim is needed to find it again.
        stored = await b.answers.lookup(request_key(asking()), now=now())
        assert stored is not None
        assert stored.cid_text == cid
        assert await find(c, asking("other")) is None


async def test_two_questions_with_one_answer(autojump_clock: trio.testing.MockClock) -> None:
    async with mesh("a", "b") as ((a, _), (b, _)):
        assert await a.make(asking("1 + 1"), "2") == await a.make(asking("one and one"), "2")
        await trio.sleep(2)
        assert await find(b, asking("1 + 1")) == ("2", a.peer)
        assert await find(b, asking("one and one")) == ("2", a.peer)


async def test_a_long_answer_comes_with_its_leaves(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mesh("a", "b") as ((a, _), (b, network)):
        await a.make(asking(), "x" * 200_000)
        await trio.sleep(2)
        found = await find(b, asking())
        assert found == ("x" * 200_000, a.peer)
        assert len(network.asked) > 2


async def test_namespaces_do_not_mix(autojump_clock: trio.testing.MockClock) -> None:
    async with mesh("a", "b") as ((a, _), (b, _)):
        cid = parse_cid(await a.make(asking(namespace="x"), "hello" * 20_000))
        await trio.sleep(2)
        assert await find(b, asking()) is None
        # Who knows only the CID gets nothing, also from who got it later.
        assert await a.sharing.block(cid, b.peer) is None
        assert await find(b, asking(namespace="x")) == ("hello" * 20_000, a.peer)
        assert await b.sharing.block(cid, a.peer) is None


async def test_what_may_not_leave_is_not_given_to_who_knows_its_cid(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mesh("a", "b") as ((a, _), (b, _)):
        stored = await a.answers.store(
            request_key(asking()),
            Completion(text="secret", finish_reason="stop"),
            model="m",
            now=now(),
            shared=False,
        )
        assert stored is not None
        assert await a.sharing.block(stored.cid.raw, b.peer) is None
        assert await a.sharing.block(cid_bytes(b"nothing", "raw"), b.peer) is None


async def test_what_gossip_loses_is_learnt_by_asking(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mesh("a", "b") as ((a, lossy), (b, _)):
        lossy.lossy = True
        for number in range(150):  # more than a page, as each is a batch of its own
            cid = await a.make(asking(str(number)), f"answer {number}")
            assert a.sharing.claim_for(cid)
        assert await find(b, asking("7")) is None
        await b.sharing.meet(a.peer)
        for number in range(150):
            assert await find(b, asking(str(number))) == (f"answer {number}", a.peer)


async def test_what_gossip_loses_is_repaired_within_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mesh("a", "b") as ((a, lossy), (b, _)):
        lossy.lossy = True
        await a.make(asking(), "hello")
        await trio.sleep(5)
        assert await find(b, asking()) is None
        await trio.sleep(75)
        assert await find(b, asking()) == ("hello", a.peer)


async def test_the_claim_that_comes_with_an_answer_counts_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mesh("a", "b") as ((a, lossy), (b, _)):
        lossy.lossy = True
        await a.make(asking(), "hello")
        stored = await a.answers.lookup(request_key(asking()), now=now())
        assert stored is not None
        claim = a.sharing.claim_for(stored.cid_text)
        assert claim is not None
        b.sharing.take_claim(a.peer, claim, stored.cid_text)
        assert await find(b, asking()) == ("hello", a.peer)
        # It was taken out of what is still to be told.
        assert a.sharing.claim_for(stored.cid_text) is None


@pytest.mark.parametrize("message", [b"", b"\xc1", b"\x91\xa1x", b"\x91\xc4\x01x"])
async def test_nonsense_is_not_passed_on(message: bytes) -> None:
    member = Member("a")
    assert member.sharing.hear("12D3-x", message) is False
    member.database.close()


@pytest.mark.parametrize("ahead", [-20 * YEAR, -3600.0, 3600.0, 70 * YEAR])
async def test_a_wrong_clock_costs_hits_and_nobodys_say(
    ahead: float, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with mesh("a", "b", "c") as ((a, _), (b, _), (c, _)):
        b.ahead = ahead
        for number in range(20):
            await a.make(asking(str(number)), f"answer {number}")
            await b.make(asking(f"b{number}"), f"answer {number}")
            await trio.sleep(2)
        await trio.sleep(300)
        # The two whose clocks are right share as if b were not there, and nobody is a liar.
        assert await find(c, asking("3")) == ("answer 3", a.peer)
        for one in (a, b, c):
            for other in (a, b, c):
                assert one.conduct.silence(other.peer, now() + one.ahead) is None
        if abs(ahead) > 3600:
            assert await find(b, asking("3")) is None
        b.ahead = 0.0
        await a.make(asking("after"), "it was set right")
        await trio.sleep(100)
        assert await find(b, asking("after")) == ("it was set right", a.peer)
        assert await find(b, asking("3")) == ("answer 3", a.peer)
        await b.make(asking("b after"), "hello")
        await trio.sleep(100)
        assert await find(a, asking("b after")) == ("hello", b.peer)
        assert ("are of the future" in caplog.text) == (abs(ahead) > 120)


async def test_alone_it_finds_and_tells_nothing() -> None:
    member = Member("a")
    await member.make(asking(), "hello")
    assert await find(member, asking("x")) is None
    await member.sharing.meet("12D3-x")
    member.database.close()


# --- copies ---------------------------------------------------------------------------------------


async def test_when_its_producer_has_left_a_copy_still_serves(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mesh("a", "b", "c") as ((a, _), (b, _), (c, c_network)):
        await a.make(asking(), "hello")
        await trio.sleep(2)
        assert await find(b, asking()) == ("hello", a.peer)
        await trio.sleep(PATIENCE + 20)  # until b says that it holds a copy
        c_network.gone.add(a.peer)
        assert await find(c, asking()) == ("hello", b.peer)
        stored = await c.answers.lookup(request_key(asking()), now=now())
        assert stored is not None
        assert stored.source == a.peer


async def test_copies_alone_are_no_answer(autojump_clock: trio.testing.MockClock) -> None:
    async with mesh("a", "b", "c") as ((a, a_network), (b, _), (c, _)):
        a_network.lossy = True  # c never hears of a's claim
        cid = await a.make(asking(), "hello")
        await trio.sleep(2)
        await b.sharing.meet(a.peer)
        assert await find(b, asking()) == ("hello", a.peer)
        await trio.sleep(PATIENCE + 20)
        c.index.forget(a.peer)
        (claim,) = c.claims(asking())
        assert (claim.peer, claim.held, claim.cid) == (b.peer, True, parse_cid(cid))
        assert await find(c, asking()) is None


async def test_copies_go_out_in_full_batches(autojump_clock: trio.testing.MockClock) -> None:
    async with mesh("a", "b") as ((a, _), (b, _)):
        for number in range(MAX_ENTRIES):
            await a.make(asking(str(number)), f"answer {number}")
        await trio.sleep(5)
        for number in range(MAX_ENTRIES):
            assert await find(b, asking(str(number))) is not None
            await trio.sleep(0.1)
        await trio.sleep(3)
        (claimed,) = [unseal(envelope).batch for envelope in b.own_batches()]
        assert len(claimed.entries) == MAX_ENTRIES
        assert all(entry.held for entry in claimed.entries)


async def test_where_enough_have_it_no_copy_is_claimed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mesh("a", "b", "c", "d") as ((a, _), (b, _), (c, _), (d, _)):
        for member in (a, b, c):
            await member.make(asking(), "hello")
        await trio.sleep(2)
        assert await find(d, asking()) is not None
        await trio.sleep(PATIENCE + 20)
        assert d.own_batches() == []


# --- faults ---------------------------------------------------------------------------------------


async def test_the_next_source_serves_where_one_does_not(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Whatever a source does instead of giving the block, the other one gives it in time."""
    faults: list[Fault] = [
        b"other bytes",
        bytes(10_000_000),
        None,
        TransportError("the stream broke"),
        RemoteProtocolError("items came out of turn"),
        "never",
    ]
    for fault in faults:
        async with mesh("a", "b", "c") as ((a, _), (b, _), (c, network)):
            for member in (a, b):
                await member.make(asking(), "hello")
            await trio.sleep(2)
            network.faults[a.peer] = fault
            for attempt in range(8):  # the order of sources is random
                started = trio.current_time()
                assert await find(c, asking()) == ("hello", b.peer)
                assert trio.current_time() - started <= 1
                stored = await c.answers.lookup(request_key(asking()), now=now())
                assert stored is not None
                await c.answers.remove(stored.cid.raw)
                if network.asked.count(a.peer):
                    break
                assert attempt < 7


async def test_nobody_delivers_within_the_time_of_a_lookup(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mesh("a", "b", "c", "d", "e") as ((a, _), (b, _), (c, _), (d, _), (e, network)):
        for member in (a, b, c, d):
            await member.make(asking(), "hello")
            network.faults[member.peer] = "never"
        await trio.sleep(2)
        started = trio.current_time()
        assert await find(e, asking()) is None
        assert trio.current_time() - started <= 3.0
        # Nobody is asked for it again at once.
        assert await find(e, asking()) is None
        started = trio.current_time()
        assert await find(e, asking()) is None
        assert trio.current_time() == started
        assert set(network.asked) == set(network.faults)


@pytest.mark.parametrize("fault", [b"other bytes", bytes(10_000_000)])
async def test_other_bytes_cost_a_peer_its_say_at_once(
    autojump_clock: trio.testing.MockClock, fault: bytes
) -> None:
    async with mesh("a", "b") as ((a, _), (b, network)):
        await a.make(asking(), "true")
        await trio.sleep(2)
        network.faults[a.peer] = fault
        assert await find(b, asking()) is None
        silence = b.conduct.silence(a.peer, now())
        assert silence is not None
        assert silence.offence == "wrong bytes"
        # What it claims is not even looked at, also after it behaves.
        network.faults.clear()
        await a.make(asking("more"), "also true")
        await trio.sleep(100)
        assert await find(b, asking("more")) is None
        assert network.asked == [a.peer]


async def test_an_answer_that_was_evicted_costs_little(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mesh("a", "b") as ((a, _), (b, _)):
        for number in range(12):
            cid = await a.make(asking(str(number)), f"answer {number}")
            await a.answers.remove(parse_cid(cid))
        await trio.sleep(2)
        for number in range(10):
            assert await find(b, asking(str(number))) is None
        assert b.conduct.silence(a.peer, now()) is None
        assert await find(b, asking("10")) is None
        assert b.conduct.silence(a.peer, now()) is not None


async def test_who_claims_what_is_no_answer_loses_its_say(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mesh("a", "b") as ((a, _), (b, _)):
        await a.make(asking("other"), "an answer")
        stored = await a.answers.lookup(request_key(asking("other")), now=now())
        assert stored is not None
        nothing = Cid(cid_bytes(b"\xa0"))
        await a.blocks.put(nothing.raw, b"\xa0")
        a.sharing.announce(
            request_key(asking()), asking(), msgspec.structs.replace(stored, cid=nothing)
        )
        await trio.sleep(2)
        assert await find(b, asking()) is None
        assert b.conduct.silence(a.peer, now()) is not None


async def test_an_answer_of_many_blocks_is_computed_instead(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mesh("a", "b") as ((a, _), (b, network)):
        await a.make(asking(), "x" * 1_100_000)
        await a.make(asking("less"), "x" * 900_000)
        await trio.sleep(2)
        assert await find(b, asking()) is None
        assert len(network.asked) == 1
        assert b.conduct.silence(a.peer, now()) is None
        assert await find(b, asking("less")) is not None


def gossip(*envelopes: bytes) -> bytes:
    return msgspec.msgpack.encode(envelopes)


async def test_a_flood_is_dropped_and_its_peer_not_heard(
    autojump_clock: trio.testing.MockClock,
) -> None:
    flooder, member = Member("flooder"), Member("b")
    passed = 0
    for _ in range(200):
        many = [flooder.seal(MAX_ENTRIES) for _ in range(1)]
        passed += member.sharing.hear(flooder.peer, gossip(*many))
        await trio.sleep(1 / 156)  # 10,000 claims a second
    assert passed == 3
    assert member.index.live(now()) == 3 * MAX_ENTRIES
    assert member.conduct.silence(flooder.peer, now()) is not None
    for each in (flooder, member):
        each.database.close()


async def test_bad_signatures_cost_few_checks() -> None:
    forger, member = Member("forger"), Member("b")
    honest = Member("honest")
    for number in range(100):
        entry = Entry(
            number.to_bytes(32, "big"), cid_bytes(b"x"), 1, int(now()), int(now()) + 9, False
        )
        batch = Batch(namespace=bytes(8), epoch=1, number=number + 1, entries=(entry,))
        envelope = seal(batch, peer=forger.peer, sign=lambda data: bytes(64))
        assert not member.sharing.hear(forger.peer, gossip(envelope))
    assert member.checked == 11
    # Nobody can be accused, or spoken for, by another.
    assert not member.sharing.hear(forger.peer, gossip(honest.seal(1)))
    assert member.checked == 11
    assert member.conduct.silenced(now()) == [forger.peer]
    assert member.sharing.hear(honest.peer, gossip(honest.seal(1)))
    for each in (forger, honest, member):
        each.database.close()


async def test_a_lie_is_for_ever_and_its_proof_is_kept(
    autojump_clock: trio.testing.MockClock,
) -> None:
    liar, member, other = Member("liar"), Member("b"), Member("c")
    twin = Member("liar")  # the same identity and clock, another file
    first, second = liar.seal(1), twin.seal(2)
    assert member.sharing.hear(liar.peer, gossip(first))
    assert not member.sharing.hear(liar.peer, gossip(second))
    assert member.conduct.evidence(liar.peer) == (first, second)
    assert member.index.live(now()) == 0
    # A neighbour that heard only one of the two is not to blame for passing it on.
    assert other.sharing.hear(liar.peer, gossip(second))
    assert other.sharing.since(member.index.versions(now())) == []
    await trio.sleep(1000 * 86400)
    assert not member.sharing.hear(liar.peer, gossip(liar.seal(1)))
    for each in (liar, twin, member, other):
        each.database.close()


# --- trust ----------------------------------------------------------------------------------------


async def test_so_many_must_agree(autojump_clock: trio.testing.MockClock) -> None:
    async with mesh("a", "b", "c", "d") as ((a, _), (b, _), (c, _), (d, _)):
        await a.make(asking(), "rare")
        await b.make(asking(), "usual")
        await trio.sleep(2)
        assert await find(d, asking(min_agreement=2)) is None
        await c.make(asking(), "usual")
        await trio.sleep(2)
        found = await d.sharing.find(request_key(asking()), asking(min_agreement=2))
        assert found is not None
        assert found[0].completion.text == "usual"
        key = request_key(asking())
        assert not d.sharing.objection(key, asking(min_agreement=2), found[0])
        objection = d.sharing.objection(key, asking(min_agreement=3), found[0])
        assert objection == "3 trusted nodes must have computed it (min_agreement), and 2 did"
        assert (await find(d, asking(min_agreement=1))) is not None


async def test_only_listed_peers_are_believed(autojump_clock: trio.testing.MockClock) -> None:
    trusted = Member("b").peer
    async with mesh("a", "b", "c", trusted=(trusted,)) as ((a, _), (b, _), (c, _)):
        await a.make(asking(), "of a")
        await trio.sleep(2)
        assert await find(c, asking()) is None
        await b.make(asking(), "of b")
        await trio.sleep(2)
        assert await find(c, asking()) == ("of b", b.peer)


# --- much at once ---------------------------------------------------------------------------------


async def test_what_waits_to_be_told_can_be_asked_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with mesh("a", "b", "c") as ((a, network), (b, _), (c, _)):
        for number in range(1000):
            await a.make(asking(str(number)), f"answer {number}")
        await trio.sleep(5)
        # Gossip keeps to the pace that others believe.
        assert 192 <= b.index.live(now()) <= 192 + 5 * 20
        assert b.conduct.silenced(now()) == []
        # Who asks has all of it, in full batches.
        await c.sharing.meet(a.peer)
        assert c.index.live(now()) == 1000
        assert len(a.own_batches()) == 16
        gossiped = len(network.gossiped)
        await trio.sleep(60)
        assert b.index.live(now()) == 1000
        assert b.conduct.silenced(now()) == []
        assert len(network.gossiped) <= gossiped + 16
