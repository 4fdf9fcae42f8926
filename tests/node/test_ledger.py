"""The ledger: what is added up, written and bounded."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.node import ledger as ledger_module
from promptmesh.node.api_usage import report_offline, usage_report
from promptmesh.node.ledger import DAY, KEPT_DAYS, OTHERS, WRITE_PERIOD, Counts, Ledger
from promptmesh.node.node_database import NodeDatabase

OWN, BOB = "12D3-own", "12D3-bob"


class Clock:
    """Wall clock that stands still until it is set."""

    def __init__(self, day: int = 20_000) -> None:
        self.day = day

    def __call__(self) -> float:
        return self.day * DAY + 100.0


@pytest.fixture
def database() -> Iterator[NodeDatabase]:
    database = NodeDatabase(None)
    yield database
    database.close()


def total(ledger: Ledger, days: int = 30) -> Counts:
    counts = Counts()
    for _, some in ledger.sums("day", days=days):
        counts.add(some)
    return counts


Events = st.lists(
    st.tuples(
        st.sampled_from(("", BOB)),
        st.sampled_from((OWN, BOB)),
        st.sampled_from(("m", "n")),
        st.integers(0, 1000),
        st.booleans(),
    ),
    max_size=20,
)


@given(Events)
def test_everything_is_counted_once_whenever_it_is_written(
    events: list[tuple[str, str, str, int, bool]],
) -> None:
    database = NodeDatabase(None)
    ledger = Ledger(database, peer=OWN, clock=Clock())
    for asker, peer, model, tokens, write in events:
        counts = Counts(requests=1, prompt_tokens=tokens)
        ledger.add(counts, asker=asker, peer=peer, provider="p", model=model, cache="miss")
        if write:
            ledger.write()
    assert total(ledger).requests == len(events)
    assert total(ledger).prompt_tokens == sum(tokens for *_, tokens, _ in events)
    for by, counts in ledger.sums("asker", "model", days=1):
        same = [e for e in events if (e[0], e[2]) == (by["asker"], by["model"])]
        assert counts.requests == len(same)
        assert counts.prompt_tokens == sum(tokens for *_, tokens, _ in same)
    database.close()


def test_what_was_spent_today_is_known_after_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    for _ in range(2):
        database = NodeDatabase(tmp_path / "node.sqlite")
        ledger = Ledger(database, peer=OWN, clock=clock)
        ledger.add(Counts(money=0.25), asker="", peer=OWN)
        ledger.add(Counts(money=0.5), asker=BOB, peer=OWN)
        ledger.add(Counts(money=8.0), asker="", peer=BOB)  # not of this node's providers
        ledger.write()
        database.close()
    assert (ledger.spent().all, ledger.spent().members) == (1.5, 1.0)
    clock.day += 1
    assert (ledger.spent().all, ledger.spent().members) == (0, 0)


async def test_it_is_written_every_few_seconds(
    database: NodeDatabase, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    ledger = Ledger(database, peer=OWN, clock=Clock())
    nursery.start_soon(ledger.run)
    ledger.add(Counts(requests=1), asker="")
    assert database.rows("SELECT * FROM usage") == []
    await trio.sleep(WRITE_PERIOD + 0.1)
    assert database.rows("SELECT requests FROM usage") == [(1,)]


def test_a_fault_loses_nothing_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = NodeDatabase(tmp_path / "node.sqlite")
    ledger = Ledger(database, peer=OWN, clock=Clock())
    database.rows("PRAGMA query_only = ON")
    for _ in range(3):
        ledger.add(Counts(requests=1), asker="")
        ledger.write()
    assert [record.message for record in caplog.records] == [
        "the ledger cannot be written, and is kept in memory: attempt to write a readonly database"
    ]
    database.rows("PRAGMA query_only = OFF")
    assert total(ledger).requests == 3
    database.close()


def test_a_day_has_a_bounded_number_of_rows(
    database: NodeDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_ROWS", 10)
    ledger = Ledger(database, peer=OWN, clock=Clock())
    for number in range(100):
        who = {"asker": f"peer {number}", "peer": f"other {number}"}
        ledger.add(Counts(requests=1), **who, provider=f"p{number}", model=f"m{number}")
        ledger.add(Counts(money=1.0), asker=f"peer {number}", peer=OWN, model=f"m{number}")
    assert total(ledger).requests == 100
    assert ledger.spent().members == 100
    rows = database.rows("SELECT asker, peer, provider, model FROM usage")
    assert len(rows) == 12
    assert {(OTHERS, OTHERS, OTHERS, OTHERS), (OTHERS, OWN, OTHERS, OTHERS)} < set(rows)
    again = Ledger(database, peer=OWN, clock=Clock())
    again.add(Counts(requests=1), asker="new", peer="new", provider="new", model="new")
    again.write()
    assert len(database.rows("SELECT asker FROM usage")) == 12


def test_names_have_a_bounded_length(database: NodeDatabase) -> None:
    ledger = Ledger(database, peer=OWN, clock=Clock())
    ledger.add(Counts(requests=1), asker="", provider="p" * 5000, model="m" * 5000)
    ledger.write()
    assert database.rows("SELECT length(provider), length(model) FROM usage") == [(200, 200)]


def test_days_that_are_long_gone_are_forgotten(database: NodeDatabase) -> None:
    clock = Clock()
    ledger = Ledger(database, peer=OWN, clock=clock)
    for day in (0, KEPT_DAYS - 1, KEPT_DAYS, KEPT_DAYS + 1):
        clock.day = 20_000 + day
        ledger.add(Counts(requests=1), asker="")
        ledger.write()
    assert [day for (day,) in database.rows("SELECT day FROM usage")] == [
        20_000 + KEPT_DAYS - 1,
        20_000 + KEPT_DAYS,
        20_000 + KEPT_DAYS + 1,
    ]


def test_the_report_says_it_by_day_peer_model_and_cache(database: NodeDatabase) -> None:
    clock = Clock()
    ledger = Ledger(database, peer=OWN, clock=clock)
    one = {"provider": "p", "model": "m", "cache": "miss"}
    ledger.add(Counts(requests=1, prompt_tokens=5), asker="", peer=OWN, **one)
    clock.day += 1
    ledger.add(Counts(requests=1, prompt_tokens=7), asker=BOB, peer=OWN, **one)
    ledger.add(Counts(unfinished=1), asker="")
    report = usage_report(ledger, 2, {OWN: "here", BOB: "bob", "": ""}.__getitem__)
    assert (report["since"], report["until"]) == ("2024-10-04", "2024-10-05")
    assert (report["own"]["prompt_tokens"], report["served"]["prompt_tokens"]) == (5, 7)
    assert report["own"]["unfinished"] == 1
    assert [(r["day"], r["served"], r["requests"]) for r in report["by_day"]] == [
        ("2024-10-04", False, 1),
        ("2024-10-05", False, 0),
        ("2024-10-05", True, 1),
    ]
    assert [(r["asker_node"], r["node"], r["requests"]) for r in report["by_peer"]] == [
        ("", "", 0),
        ("", "here", 1),
        ("bob", "here", 1),
    ]
    assert [(r["provider"], r["model"], r["requests"]) for r in report["by_model"]] == [
        ("", "", 0),
        ("p", "m", 2),
    ]
    assert usage_report(ledger, 1, str)["own"]["requests"] == 0


def test_the_report_of_a_node_that_does_not_run(tmp_path: Path) -> None:
    report = report_offline(tmp_path / "node.sqlite", 30, OWN, "here")
    assert report["own"]["requests"] == 0
    assert report["by_day"] == []
