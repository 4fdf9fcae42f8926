"""Who loses its say, by what, for how long, and what of it survives a restart."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.cache.conduct import BURST, LATE, MAX_KEPT, OFFENCES, RATE, Bucket, Conduct
from promptmesh.cache.database import Database

NOW = 1_000_000.0
DAY = 86400.0


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "cache.sqlite")
    yield database
    database.close()


@pytest.fixture
def conduct(database: Database) -> Conduct:
    return Conduct(database)


def silent(conduct: Conduct, now: float = NOW, peer: str = "p") -> bool:
    return conduct.silence(peer, now) is not None


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50))))
def test_a_bucket_gives_no_more_than_its_rate(taken: list[tuple[float, int]]) -> None:
    bucket, now, admitted = Bucket(BURST, NOW), NOW, 0
    for pause, tokens in taken:
        now += pause
        if bucket.take(tokens, now, rate=RATE, burst=BURST) >= 0:
            admitted += tokens
    assert admitted <= BURST + RATE * (now - NOW) + 1e-6


def test_a_clock_that_goes_back_gives_and_costs_nothing() -> None:
    bucket = Bucket(5, NOW)
    assert bucket.take(1, NOW - 100, rate=1, burst=5) == 4
    assert bucket.take(1, NOW - 99, rate=1, burst=5) == 4


def test_nobody_has_offended_at_first(conduct: Conduct) -> None:
    assert not silent(conduct)
    assert conduct.silenced(NOW) == []
    assert conduct.evidence("p") is None


def test_other_bytes_cost_a_day_at_once(conduct: Conduct) -> None:
    conduct.offended("p", "wrong bytes", NOW)
    assert silent(conduct, NOW + DAY - 1)
    assert not silent(conduct, NOW + DAY)
    assert not silent(conduct, peer="q")


def test_a_lie_costs_everything_and_its_proof_is_kept(conduct: Conduct) -> None:
    conduct.offended("p", "equivocation", NOW, evidence=(b"one", b"other"))
    assert silent(conduct, NOW + 1000 * DAY)
    assert conduct.evidence("p") == (b"one", b"other")
    conduct.offended("p", "wrong bytes", NOW)
    assert silent(conduct, NOW + 1000 * DAY)
    assert conduct.evidence("p") == (b"one", b"other")


def test_some_nonsense_is_borne(conduct: Conduct) -> None:
    for _ in range(10):
        conduct.offended("p", "nonsense", NOW)
    assert not silent(conduct)
    conduct.offended("p", "nonsense", NOW + 60)  # one is forgotten each minute
    assert not silent(conduct, NOW + 60)
    conduct.offended("p", "nonsense", NOW + 60)
    assert silent(conduct, NOW + 60)
    assert not silent(conduct, NOW + 60 + 600)


def test_what_was_evicted_is_milder_than_what_never_comes(conduct: Conduct) -> None:
    for _ in range(4):
        conduct.offended("gone", "undelivered", NOW)
        conduct.offended("late", "undelivered", NOW, weight=LATE)
    assert conduct.silenced(NOW) == ["late"]
    for _ in range(7):
        conduct.offended("gone", "undelivered", NOW)
    assert sorted(conduct.silenced(NOW)) == ["gone", "late"]
    assert OFFENCES["undelivered"].silence < OFFENCES["wrong bytes"].silence


def test_too_many_claims_are_refused_and_far_too_many_a_flood(conduct: Conduct) -> None:
    assert conduct.admits("p", 200, NOW)
    assert not conduct.admits("p", 1, NOW)
    assert conduct.admits("p", 20, NOW + 1.1)
    assert not silent(conduct, NOW + 2)
    refused = 0
    while not silent(conduct, NOW + 2):
        assert not conduct.admits("p", 64, NOW + 2)
        refused += 1
    assert refused == 16
    # After that it begins with nothing to its debit.
    assert conduct.admits("p", 200, NOW + 2 + 600)


def test_a_restart_forgets_only_what_is_over_soon(tmp_path: Path) -> None:
    database = Database(tmp_path / "cache.sqlite")
    before = Conduct(database)
    before.offended("liar", "equivocation", NOW, evidence=(b"one", b"other"))
    before.offended("wrong", "wrong bytes", NOW)
    before.offended("late", "undelivered", NOW, weight=99)
    assert len(before.silenced(NOW)) == 3
    database.close()
    database = Database(tmp_path / "cache.sqlite")
    after = Conduct(database)
    assert sorted(after.silenced(NOW)) == ["liar", "wrong"]
    assert after.silenced(NOW + DAY) == ["liar"]
    assert after.evidence("liar") == (b"one", b"other")
    silence = after.silence("liar", NOW)
    assert silence is not None
    assert silence.until == math.inf
    database.close()


def test_the_log_says_it_once(conduct: Conduct, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            conduct.offended("p", "wrong bytes", NOW)
        silent(conduct, NOW + DAY)
        silent(conduct, NOW + DAY + 1)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "peer p lost its say for 1440 minutes: it sent other bytes than it claimed",
        "peer p has its say again",
    ]


def test_strangers_cannot_fill_the_memory(
    conduct: Conduct, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promptmesh.cache.conduct.MAX_PEERS", 3)
    conduct.offended("liar", "wrong bytes", NOW)
    for number in range(10):
        conduct.admits(f"p{number}", 1, NOW)
    assert len(conduct._peers) == 3
    assert conduct.silenced(NOW) == ["liar"]


def test_what_is_written_down_is_bounded(conduct: Conduct, database: Database) -> None:
    for number in range(MAX_KEPT + 10):
        conduct.offended(f"p{number}", "wrong bytes", NOW)
    assert database.row("SELECT count(*) FROM offence") == (MAX_KEPT,)
    conduct.offended("p1", "equivocation", NOW + 1, evidence=(b"one", b"other"))
    assert database.row("SELECT count(*) FROM offence") == (MAX_KEPT,)
    # What is over makes room.
    conduct.offended("late", "wrong bytes", NOW + DAY)
    rows = database.rows("SELECT peer FROM offence ORDER BY peer")
    assert rows == [("late",), ("p1",)]
    assert conduct.evidence("p1") == (b"one", b"other")


def test_a_failing_database_changes_nothing(database: Database) -> None:
    database.close()
    conduct = Conduct(database)
    conduct.offended("p", "equivocation", NOW, evidence=(b"one", b"other"))
    assert silent(conduct)
    assert conduct.evidence("p") is None
