from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptmesh.cache import claim_index, claim_rows
from promptmesh.cache.cid import cid_bytes
from promptmesh.cache.claim_index import ClaimIndex
from promptmesh.cache.claim_rows import Claim, Version
from promptmesh.cache.claims import MAX_LIFE, MAX_SKEW, Batch, ClaimLog, Entry, seal, unseal
from promptmesh.cache.conduct import Conduct
from promptmesh.cache.database import Database

NOW = 1_000_000
TAG = b"n" * 8


def sign_as(peer: str) -> Any:
    """A signature that only this module can make: enough where nobody forges."""
    return lambda data: (peer.encode() + data[-40:]).ljust(64, b".")[:64]


def verify(peer: str, data: bytes, signature: bytes) -> bool:
    return bool(signature == sign_as(peer)(data))


def entry(key: int = 1, answer: str = "a", **more: Any) -> Entry:
    plain = Entry(
        key=key.to_bytes(32, "big"),
        cid=cid_bytes(answer.encode()),
        size=9,
        made_at=NOW,
        expires_at=NOW + 1000,
        held=False,
    )
    return plain._replace(**more)


def envelope(
    peer: str = "p", number: int = 1, *entries: Entry, epoch: int = 5, signer: str | None = None
) -> bytes:
    batch = Batch(namespace=TAG, epoch=epoch, number=number, entries=entries or (entry(),))
    return seal(batch, peer=peer, sign=sign_as(signer or peer))


KEY = entry().key


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "cache.sqlite")
    yield database
    database.close()


@pytest.fixture
def index(database: Database) -> ClaimIndex:
    return ClaimIndex(database, peer="me", verify=verify)


def status(index: ClaimIndex, data: bytes, now: float = NOW) -> str:
    return index.ingest(data, now).status


# --- taking and asking --------------------------------------------------------------------------


def test_a_claim_is_found_until_it_is_over(index: ClaimIndex) -> None:
    assert index.lookup(KEY, NOW) == []
    taken = index.ingest(envelope("p", 1, entry(1), entry(2, "b")), NOW)
    assert (taken.status, taken.peer, taken.claims) == ("new", "p", 2)
    claim = Claim("p", entry().cid, 9, NOW, NOW + 1000, False)
    assert index.lookup(KEY, NOW + 999) == [claim]
    assert index.lookup(KEY, NOW + 1000) == []
    assert index.lookup(bytes(32), NOW) == []
    assert (index.live(NOW), index.live(NOW + 1000)) == (2, 0)


def test_taking_it_again_changes_nothing(index: ClaimIndex) -> None:
    assert status(index, envelope()) == "new"
    assert status(index, envelope()) == "known"
    assert len(index.lookup(KEY, NOW)) == 1


def test_of_two_claims_the_longer_holds(index: ClaimIndex) -> None:
    index.ingest(envelope("p", 1, entry(expires_at=NOW + 50)), NOW)
    index.ingest(envelope("p", 2, entry(expires_at=NOW + 90, size=7)), NOW)
    index.ingest(envelope("p", 3, entry(expires_at=NOW + 70)), NOW)
    assert index.lookup(KEY, NOW) == [Claim("p", entry().cid, 7, NOW, NOW + 90, False)]


def test_claims_outlive_the_process(tmp_path: Path) -> None:
    database = Database(tmp_path / "cache.sqlite")
    ClaimIndex(database, peer="me", verify=verify).ingest(envelope(), NOW)
    database.close()
    database = Database(tmp_path / "cache.sqlite")
    index = ClaimIndex(database, peer="me", verify=verify)
    assert len(index.lookup(KEY, NOW)) == 1
    assert index.versions(NOW) == {"p": Version(5, ((1, 1),))}
    assert status(index, envelope()) == "known"
    database.close()


# --- what is not taken --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"junk", "not an envelope"),
        (envelope(signer="q"), "not signed"),
        (envelope("p", 1, entry(), entry(2, expires_at=NOW + MAX_LIFE + 1)), "too long"),
        (envelope("p", 1, entry(), entry(2, expires_at=NOW)), "not at all"),
        (envelope("p", 1, entry(), entry(2, made_at=NOW - 50, expires_at=NOW - 60)), "not at all"),
    ],
)
def test_what_is_wrong_is_refused(index: ClaimIndex, data: bytes, why: str) -> None:
    refused = index.ingest(data, NOW)
    assert refused.status == "refused"
    assert why in refused.reason
    assert index.versions(NOW) == {}
    assert index.live(NOW) == 0


def test_what_is_of_the_future_waits_for_its_time(index: ClaimIndex) -> None:
    """One of the clocks is wrong; when it is set right, the batch is taken."""
    data = envelope("p", 1, entry(1), entry(2, made_at=NOW + MAX_SKEW + 1))
    early = index.ingest(data, NOW)
    assert (early.status, index.versions(NOW), index.live(NOW)) == ("early", {}, 0)
    assert "future" in early.reason
    assert index.ingest(data, NOW + 1).status == "new"


def test_times_at_the_limit(index: ClaimIndex) -> None:
    early = NOW + MAX_SKEW
    limit = entry(made_at=early, expires_at=early + MAX_LIFE)
    assert status(index, envelope("p", 1, limit)) == "new"


def test_what_is_over_is_stale_and_the_rest_of_a_batch_is_taken(index: ClaimIndex) -> None:
    over = entry(1, made_at=NOW - 100, expires_at=NOW)
    assert status(index, envelope("p", 1, over)) == "stale"
    taken = index.ingest(envelope("p", 2, over, entry(2)), NOW)
    assert (taken.status, taken.claims) == ("new", 1)
    assert index.lookup(KEY, NOW) == []


def test_two_batches_with_one_number_are_a_lie(index: ClaimIndex) -> None:
    first, second = envelope("p", 1, entry(1, "a")), envelope("p", 1, entry(1, "b"))
    index.ingest(first, NOW)
    lie = index.ingest(second, NOW)
    assert (lie.status, lie.peer, lie.evidence) == ("equivocation", "p", (first, second))
    assert lie.evidence is not None
    assert all(unseal(data).signed(verify) for data in lie.evidence)
    assert [claim.cid for claim in index.lookup(KEY, NOW)] == [entry().cid]
    # Nobody can be accused by others.
    assert status(index, envelope("p", 1, entry(1, "c"), signer="q")) == "refused"


@pytest.mark.parametrize("damage", [b"junk", envelope("p", 1, entry(1, "z"), signer="q")])
def test_a_damaged_file_is_no_proof_of_a_lie(
    index: ClaimIndex, database: Database, damage: bytes
) -> None:
    index.ingest(envelope(), NOW)
    database.rows("UPDATE batch SET envelope = ?", (damage,))
    assert status(index, envelope()) in {"full", "refused"}


def test_a_new_epoch_voids_the_older(index: ClaimIndex) -> None:
    index.ingest(envelope("p", 1, entry(1)), NOW)
    index.ingest(envelope("p", 2, entry(2)), NOW)
    assert status(index, envelope("p", 1, entry(3), epoch=6)) == "new"
    assert index.lookup(KEY, NOW) == []
    assert index.live(NOW) == 1
    assert index.versions(NOW) == {"p": Version(6, ((1, 1),))}
    assert status(index, envelope("p", 3, entry(1))) == "stale"
    assert status(index, envelope("p", 1, entry(3), epoch=6)) == "known"
    assert status(index, envelope("p", 2, entry(4), epoch=6)) == "new"


def test_of_a_peer_the_newest_are_kept(
    index: ClaimIndex, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_index, "MAX_CLAIMS", 5)
    assert status(index, envelope("p", 2, entry(1), entry(2))) == "new"
    assert status(index, envelope("p", 3, entry(2, expires_at=NOW + 2000), entry(3))) == "new"
    assert status(index, envelope("q", 1, entry(1), entry(2), entry(3))) == "new"
    assert status(index, envelope("p", 4, entry(4), entry(5))) == "new"
    # Batch 2 made room; what batch 3 says again stays.
    assert [claim.peer for claim in index.lookup(entry(1).key, NOW)] == ["q"]
    assert [claim.peer for claim in index.lookup(entry(2).key, NOW)] == ["p", "q"]
    assert status(index, envelope("p", 1, entry(9), entry(8))) == "full"
    # Neither is asked for again.
    assert index.versions(NOW)["p"] == Version(5, ((1, 4),))
    assert index.live(NOW) == 4 + 3
    assert database.row("SELECT count(*) FROM batch") == (3,)


async def test_room_comes_back_when_claims_are_over(
    index: ClaimIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_index, "MAX_CLAIMS", 2)
    index.ingest(envelope("p", 8, entry(1, expires_at=NOW + 5)), NOW)
    index.ingest(envelope("p", 9, entry(2)), NOW)
    assert status(index, envelope("p", 3, entry(3))) == "full"
    assert await index.expire(NOW + 5) == 2
    assert status(index, envelope("p", 3, entry(3)), NOW + 5) == "new"


async def test_all_together_are_bounded(index: ClaimIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim_index, "MAX_ALL_CLAIMS", 3)
    assert status(index, envelope("p", 1, entry(1), entry(2))) == "new"
    assert status(index, envelope("q", 1, entry(1), entry(2))) == "full"
    assert status(index, envelope("q", 2, entry(1, expires_at=NOW + 5))) == "new"
    assert status(index, envelope("p", 2)) == "full"
    # A new epoch of p, and what is over, make room.
    assert status(index, envelope("p", 1, epoch=6)) == "full"
    assert await index.expire(NOW + 5) == 2
    assert status(index, envelope("p", 1, epoch=6)) == "new"
    assert status(index, envelope("q", 3, entry(3), entry(4))) == "new"


def test_of_a_key_each_peer_has_a_few_words(index: ClaimIndex) -> None:
    many = [entry(1, f"answer {n}", made_at=NOW - n) for n in range(20)]
    index.ingest(envelope("p", 1, *many), NOW)
    index.ingest(envelope("q", 1, entry(1, "rare")), NOW)
    found = index.lookup(KEY, NOW)
    assert [claim.made_at for claim in found if claim.peer == "p"] == [
        NOW,
        NOW - 1,
        NOW - 2,
        NOW - 3,
    ]
    assert [claim.peer for claim in found].count("q") == 1


def test_who_computed_it_says_no_less_by_holding_it(index: ClaimIndex) -> None:
    held, longer = entry(held=True), entry(held=True, expires_at=NOW + 5000)
    index.ingest(envelope("p", 1, held), NOW)
    assert [claim.held for claim in index.lookup(KEY, NOW)] == [True]
    index.ingest(envelope("p", 2, entry(expires_at=NOW + 10)), NOW)
    index.ingest(envelope("p", 3, longer), NOW)
    (claim,) = index.lookup(KEY, NOW)
    assert (claim.held, claim.expires_at) == (False, NOW + 10)
    index.ingest(envelope("q", 1, held), NOW)
    assert index.sources(KEY, held.cid, NOW) == 2
    assert index.sources(KEY, entry(1, "b").cid, NOW) == 0


def test_the_envelopes_of_a_key(index: ClaimIndex) -> None:
    said = [envelope("p", 1, entry(1), entry(2)), envelope("q", 1, entry(1, held=True))]
    for data in said:
        index.ingest(data, NOW)
    assert index.envelopes(KEY, 8, NOW) == said
    assert index.envelopes(KEY, 1, NOW) == said[:1]
    assert index.envelopes(entry(2).key, 8, NOW) == said[:1]
    assert index.envelopes(bytes(32), 8, NOW) == []


# --- what is told unasked -----------------------------------------------------------------------


def test_what_each_peer_signed_of_an_answer(index: ClaimIndex, database: Database) -> None:
    alone, crowded = envelope("p", 1), envelope("p", 2, entry(), entry(2, "b"))
    held, computed = envelope("q", 1, entry(held=True)), envelope("q", 2, entry(2), entry())
    other = envelope("r", 1, entry(answer="b"))
    for data in (crowded, alone, held, computed, other):
        index.ingest(data, NOW)
    log = ClaimLog(database, peer="me", sign=sign_as("me"))
    own = log.seal([entry()], namespace=TAG, now=NOW)
    log.seal([entry(2)], namespace=TAG, now=NOW)
    found = index.statements(KEY, entry().cid, NOW)
    assert set(found[:2]) <= {own, alone, crowded}
    assert {unseal(each).peer for each in found} == {"me", "p", "q"}
    assert (own in found, computed in found) == (True, True)
    assert index.statements(KEY, entry().cid, NOW + 1000) == []
    assert index.statements(KEY, cid_bytes(b"c"), NOW) == []


class Counted:
    """Counts the signatures that are checked."""

    def __init__(self) -> None:
        self.checked = 0

    def __call__(self, peer: str, data: bytes, signature: bytes) -> bool:
        self.checked += 1
        return verify(peer, data, signature)


def flooded(number: int, claims: int = 64, **more: Any) -> bytes:
    return envelope("p", number, *(entry(number * 100 + n) for n in range(claims)), **more)


def test_a_flood_costs_a_bounded_work_and_the_peer_its_say(database: Database) -> None:
    counted, conduct = Counted(), Conduct(database)
    index = ClaimIndex(database, peer="me", verify=counted, conduct=conduct)
    status: Counter[str] = Counter()
    for number in range(1, 1501):  # 96,000 claims in 10 s
        now = NOW + number / 150
        status[index.ingest(flooded(number), now, told_by="p").status] += 1
    assert status["new"] == counted.checked == 3
    assert status["fast"] < 20
    assert status["silenced"] > 1450
    assert conduct.silence("p", NOW + 10) is not None
    assert database.row("SELECT count(*) FROM claim") == (192,)
    # What others bring of it is not taken either, nor is it asked of them or given to them.
    assert index.ingest(flooded(2000), NOW + 10).status == "silenced"
    assert index.versions(NOW + 10)["p"].epoch > 2**52
    assert index.since({}, now=NOW + 10) == []
    assert counted.checked == 3
    # It is heard again after that, and what it had said is still here.
    assert index.ingest(flooded(2001), NOW + 700, told_by="p").status == "new"
    assert index.versions(NOW + 700)["p"] == Version(5, ((1, 3), (2001, 2001)))


def test_who_keeps_to_the_rate_is_heard_for_ever(index: ClaimIndex) -> None:
    for number in range(1, 41):
        now = NOW + number * 3.2
        assert index.ingest(flooded(number), now, told_by="p").status == "new"
    assert index.live(NOW) == 40 * 64


def test_what_a_neighbour_is_asked_for_is_not_limited(index: ClaimIndex) -> None:
    for number in range(1, 41):
        assert index.ingest(flooded(number), NOW).status == "new"


def test_claims_of_others_are_not_told_unasked(database: Database) -> None:
    counted = Counted()
    index = ClaimIndex(database, peer="me", verify=counted)
    assert index.ingest(envelope("q"), NOW, told_by="p").status == "refused"
    assert counted.checked == 0
    assert index.ingest(envelope("p"), NOW, told_by="p").status == "new"


def test_peers_are_bounded(index: ClaimIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim_index, "MAX_PEERS", 2)
    assert [status(index, envelope(peer)) for peer in "pqr"] == ["new", "new", "full"]
    assert status(index, envelope("p", 2)) == "new"


# --- forgetting ---------------------------------------------------------------------------------


def test_forget(index: ClaimIndex) -> None:
    index.ingest(envelope("p"), NOW)
    index.ingest(envelope("q"), NOW)
    index.forget("p")
    assert [claim.peer for claim in index.lookup(KEY, NOW)] == ["q"]
    assert set(index.versions(NOW)) == {"q"}
    assert status(index, envelope("p")) == "new"


async def test_what_is_over_goes(index: ClaimIndex, database: Database) -> None:
    for number in range(1, 41):
        life = 10 if number % 2 else 20
        entries = [entry(number * 100 + i, expires_at=NOW + life) for i in range(20)]
        index.ingest(envelope("p", number, *entries), NOW)
    assert await index.expire(NOW + 9) == 0
    assert await index.expire(NOW + 10) == 20 * 21
    assert database.row("SELECT count(*) FROM claim") == (400,)
    assert database.row("SELECT count(*) FROM batch") == (20,)
    assert await index.expire(NOW + 20) == 20 * 21
    for table in ("claim", "batch", "publisher"):
        assert database.row(f"SELECT count(*) FROM {table}") == (0,)
    assert index.versions(NOW) == {}


# --- repair -------------------------------------------------------------------------------------


def test_versions_tell_the_gaps(index: ClaimIndex) -> None:
    for number in (1, 2, 5, 4, 9):
        index.ingest(envelope("p", number, entry(number)), NOW)
    assert index.versions(NOW) == {"p": Version(5, ((1, 2), (4, 5), (9, 9)))}


def test_since_gives_what_is_lacking_the_newest_first(index: ClaimIndex) -> None:
    sent = {n: envelope("p", n, entry(n)) for n in range(1, 8)}
    for data in sent.values():
        index.ingest(data, NOW)
    assert index.since({}, now=NOW) == [sent[n] for n in range(7, 0, -1)]
    assert index.since({"p": (5, [(1, 2), (4, 5)])}, now=NOW) == [sent[7], sent[6], sent[3]]
    assert index.since({"p": (5, [(1, 7)])}, now=NOW) == []
    assert index.since({"p": (4, [(1, 7)])}, now=NOW) == [sent[n] for n in range(7, 0, -1)]
    assert index.since({"p": (6, [])}, now=NOW) == []
    assert index.since({"p": (5, [(9, 3), (-4, 10**30), (2, 1)])}, now=NOW) == []
    assert index.since({}, limit=2, now=NOW) == [sent[7], sent[6]]
    assert index.since({}, now=NOW, max_bytes=len(sent[1]) * 3) == [sent[7], sent[6], sent[5]]
    assert index.since({}, now=NOW + 1000) == []


def test_a_page_has_some_of_everybody(index: ClaimIndex) -> None:
    for peer in "pqrs":
        for number in range(1, 21):
            index.ingest(envelope(peer, number, entry(number)), NOW)
    page = [unseal(data).peer for data in index.since({}, limit=8, now=NOW)]
    assert {peer: page.count(peer) for peer in "pqrs"} == dict.fromkeys("pqrs", 2)


def member(name: str) -> tuple[ClaimIndex, ClaimLog]:
    database = Database(None)
    index = ClaimIndex(database, peer=name, verify=verify)
    return index, ClaimLog(database, peer=name, sign=sign_as(name))


def repair(here: ClaimIndex, there: ClaimIndex, limit: int) -> int:
    """Page through what `there` has until nothing new comes; how many pages that took."""
    for pages in range(1, 1000):
        page = there.since(here.versions(NOW), limit, now=NOW)
        became = {here.ingest(data, NOW).status for data in page}
        if "new" not in became:
            return pages
    raise AssertionError("it never ends")


def test_a_late_joiner_pages_through() -> None:
    old, log = member("old")
    for number in range(50):
        log.seal([entry(number)], namespace=TAG, now=NOW)
        old.ingest(envelope("p", number + 1, entry(1000 + number)), NOW)
    late, _ = member("late")
    assert repair(late, old, 16) == 8
    assert late.live(NOW) == 100
    assert [claim.peer for claim in late.lookup(entry(3).key, NOW)] == ["old"]
    assert late.versions(NOW) == old.versions(NOW)
    assert repair(late, old, 16) == 1
    # And what it learnt it passes on.
    later, _ = member("later")
    repair(later, late, 16)
    assert later.versions(NOW) == old.versions(NOW)


def test_a_thousand_publishers_in_bounded_pages() -> None:
    old, _ = member("old")
    full = [entry(number) for number in range(64)]
    for publisher in range(1000):
        for number in (1, 2, 7):
            claims = full if publisher % 10 == 0 else [entry(publisher)]
            old.ingest(envelope(f"p{publisher}", number, *claims), NOW)
    late, _ = member("late")
    pages = 0
    while page := old.since(late.versions(NOW), now=NOW):
        assert len(page) <= 64
        assert sum(map(len, page)) <= 256 * 1024
        assert {late.ingest(data, NOW).status for data in page} == {"new"}
        pages += 1
    assert pages < 60
    assert late.versions(NOW) == old.versions(NOW)
    assert late.versions(NOW)["p7"] == Version(5, ((1, 2), (7, 7)))


def test_a_publisher_that_starts_again_is_followed(tmp_path: Path) -> None:
    """Its numbers go on with a gap, and nothing of it is asked for again and again."""
    here, _ = member("here")
    for start in range(3):
        database = Database(tmp_path / "cache.sqlite")
        there = ClaimIndex(database, peer="p", verify=verify)
        log = ClaimLog(database, peer="p", sign=sign_as("p"))
        for number in range(5):
            log.seal([entry(start * 10 + number)], namespace=TAG, now=NOW)
        assert repair(here, there, 64) == 2
        assert here.live(NOW) == 5 * (start + 1)
        assert repair(here, there, 64) == 1
        database.close()


@settings(max_examples=30)
@given(st.randoms(use_true_random=False))
def test_whatever_gossip_loses_repair_brings(random: Random) -> None:
    members = {name: member(name) for name in "abc"}
    for _ in range(12):
        name = random.choice("abc")
        sealed = members[name][1].seal([entry(random.randrange(5))], namespace=TAG, now=NOW)
        assert sealed is not None
        for index, _ in members.values():
            for _ in range(random.randrange(3)):
                assert index.ingest(sealed, NOW).status in ("new", "known", "own")
    for _ in range(2):
        for name in "abc":
            for other in "abc":
                repair(members[name][0], members[other][0], random.randrange(1, 9))
    versions = [index.versions(NOW) for index, _ in members.values()]
    assert versions[0] == versions[1] == versions[2]


def test_many_gaps_are_told_in_part(index: ClaimIndex) -> None:
    for number in range(1, 101, 2):
        index.ingest(envelope("p", number, entry(number)), NOW)
    numbers = index.versions(NOW)["p"].numbers
    assert numbers == tuple((n, n) for n in range(101 - 2 * claim_rows.MAX_RANGES, 101, 2))


# --- this node's own ----------------------------------------------------------------------------


def test_own_batches_are_told_and_given_but_are_no_claims_of_others() -> None:
    index, log = member("me")
    sealed = [log.seal([entry(n)], namespace=TAG, now=NOW) for n in (1, 2, 3)]
    assert index.versions(NOW) == {"me": Version(NOW * 1000, ((1, 3),))}
    assert index.since({}, now=NOW) == sealed[::-1]
    assert index.lookup(KEY, NOW) == []
    assert sealed[0] is not None
    assert status(index, sealed[0]) == "own"
    assert index.live(NOW) == 0


@pytest.mark.parametrize("clock", [NOW - 5000, NOW])
def test_a_node_that_lost_its_numbers_goes_past_them(clock: int) -> None:
    """Its file is gone and its clock stands where it stood, or before."""
    _, log = member("me")
    neighbour, _ = member("q")
    for n in range(3):
        sealed = log.seal([entry(n)], namespace=TAG, now=NOW)
        assert sealed is not None
        neighbour.ingest(sealed, NOW)
    again, log = member("me")
    first = log.seal([entry(8)], namespace=TAG, now=clock)
    repair(again, neighbour, 16)
    second = log.seal([entry(9)], namespace=TAG, now=NOW)
    assert first is not None
    assert second is not None
    assert unseal(second).batch.epoch > NOW * 1000
    assert neighbour.ingest(second, NOW).status == "new"
    assert neighbour.versions(NOW)["me"].numbers == ((1, 1),)
    assert again.versions(NOW)["me"].numbers == ((1, 1),)


def test_a_stranger_cannot_use_up_its_numbers() -> None:
    index, log = member("me")
    assert status(index, envelope("me", 1, epoch=2**52, signer="q")) == "own"
    sealed = log.seal([entry()], namespace=TAG, now=NOW)
    assert sealed is not None
    assert unseal(sealed).batch.epoch == NOW * 1000


# --- when it fails ------------------------------------------------------------------------------


async def test_a_failing_database_is_a_miss(index: ClaimIndex, database: Database) -> None:
    index.ingest(envelope(), NOW)
    database.close()
    assert index.lookup(KEY, NOW) == []
    assert index.live(NOW) == 0
    assert index.ingest(envelope("p", 2), NOW).reason == "the cache failed"
    assert index.versions(NOW) == {}
    assert index.since({}, now=NOW) == []
    assert await index.expire(NOW) == 0
    index.forget("p")


def test_after_a_damaged_file_it_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promptmesh.cache.database.CHECKED_SIZE", 0)
    path = tmp_path / "cache.sqlite"
    database = Database(path)
    index = ClaimIndex(database, peer="me", verify=verify)
    for number in range(1, 100):
        index.ingest(envelope("p", number, *(entry(n) for n in range(40))), NOW)
    database.close()
    database = Database(path)
    index = ClaimIndex(database, peer="me", verify=verify)
    assert index.versions(NOW) == {"p": Version(5, ((1, 99),))}
    with path.open("r+b") as file:
        for offset in range(8192, path.stat().st_size, 8192):
            file.seek(offset)
            file.write(b"\xff" * 100)
    database.rows("PRAGMA shrink_memory")
    assert index.since({}, limit=200, now=NOW) == []
    assert database.generation == 1
    assert index.versions(NOW) == {}
    assert status(index, envelope()) == "new"
    assert index.versions(NOW) == {"p": Version(5, ((1, 1),))}
    assert len(index.lookup(KEY, NOW)) == 1
    database.close()


@given(st.binary(max_size=400))
def test_strangers_raise_nothing(data: bytes) -> None:
    index, _ = member("me")
    assert status(index, data) == "refused"
