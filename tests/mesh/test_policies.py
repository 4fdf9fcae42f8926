"""The three policies."""

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.mesh.loads import Busy
from promptmesh.mesh.measure import Speed
from promptmesh.mesh.policies import (
    FEW,
    MAX_DECISIONS,
    MAX_MODELS,
    TRUST_HALF_LIFE,
    Candidate,
    Choice,
    Turns,
    Work,
    best_performance,
    draw,
    expected_times,
    least_loaded,
)
from promptmesh.providers.base import ModelOffer, Policy

NOW = 1000.0
WORK = Work(100, 100)


def candidate(
    peer: str,
    model: str = "m",
    *,
    slots: int = 1,
    others: int = 0,
    in_flight: int = 0,
    **fields: Any,
) -> Candidate:
    fields.setdefault("busy", Busy(others, in_flight, slots))
    fields.setdefault("offer", ModelOffer(id=model))
    return Candidate(peer=peer, node=peer, provider="p", **fields)


def measured(
    ttft: float, rate: float, errors: float = 0.0, at: float = NOW, answers: int = 99
) -> Speed:
    return Speed(ttft=ttft, rate=rate, at=at, answers=answers, errors=errors, failed_at=NOW)


def best(candidates: Sequence[Candidate], tokens: float = 100, rng: Random | None = None) -> str:
    work = Work(tokens, 100)
    expected = expected_times(candidates, work, NOW)
    return best_performance(candidates, expected, rng or Random(1)).peer


# --- round_robin


@given(st.integers(1, 6), st.integers(0, 40), st.randoms(use_true_random=False))
def test_counts_of_a_constant_set_differ_by_at_most_one(size: int, turns: int, rng: Any) -> None:
    robin, everyone = Turns(), [candidate(str(i)) for i in range(size)]
    counts = Counter({c.peer: 0 for c in everyone})
    for _ in range(turns):
        rng.shuffle(everyone)
        counts[robin.take(everyone, rng).candidate.peer] += 1
        assert max(counts.values()) - min(counts.values()) <= 1


def test_one_that_joins_starts_at_the_smallest_count() -> None:
    robin, rng = Turns(), Random(1)
    two = [candidate("a"), candidate("b")]
    for _ in range(100):
        robin.take(two, rng)
    three = [*two, candidate("c")]
    counts = Counter(robin.take(three, rng).candidate.peer for _ in range(30))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_one_that_comes_back_does_not_get_what_it_missed() -> None:
    robin, rng = Turns(), Random(1)
    a, b = candidate("a"), candidate("b")
    robin.take([a, b], rng)
    for _ in range(100):
        robin.take([a], rng)
    counts = Counter(robin.take([a, b], rng).candidate.peer for _ in range(20))
    assert abs(counts["a"] - counts["b"]) <= 1


def test_each_model_has_turns_of_its_own_and_they_are_bounded() -> None:
    robin, rng = Turns(), Random(1)
    shared = candidate("a", "x")
    for _ in range(10):
        robin.take([shared], rng)
    counts = Counter(
        robin.take([candidate("a", "y"), candidate("b", "y")], rng).candidate.peer
        for _ in range(10)
    )
    assert counts == {"a": 5, "b": 5}
    for i in range(MAX_MODELS + 5):
        robin.take([candidate("a", str(i))], rng)
    assert len(robin._models) == MAX_MODELS


# --- least_loaded


def test_the_fewest_requests_for_each_slot() -> None:
    big = candidate("big", slots=8, others=3, in_flight=1)
    small = candidate("small", slots=1, others=1)
    assert least_loaded([small, big], b"key", Random(1)) is big
    big.busy = Busy(3, 6, 8)
    assert least_loaded([small, big], b"key", Random(1)) is small


def test_equal_requests_at_two_nodes_meet_at_one_peer() -> None:
    here = [candidate(str(i)) for i in range(5)]
    there = [candidate(str(i)) for i in reversed(range(5))]
    chosen = []
    for i in range(50):
        key = f"question {i}".encode()
        one = least_loaded(here, key, Random(1)).peer
        assert one == least_loaded(there, key, Random(2)).peer
        chosen.append(one)
    assert len(set(chosen)) == 5  # different questions spread


def test_who_leaves_moves_only_its_own_questions() -> None:
    everyone = [candidate(str(i)) for i in range(5)]
    keys = [f"question {i}".encode() for i in range(50)]
    before = {key: least_loaded(everyone, key, Random(1)).peer for key in keys}
    after = {key: least_loaded(everyone[1:], key, Random(1)).peer for key in keys}
    assert all(after[key] == before[key] for key in keys if before[key] != "0")


def test_without_a_key_ties_go_at_random() -> None:
    everyone = [candidate(str(i)) for i in range(3)]
    rng = Random(1)
    assert len({least_loaded(everyone, b"", rng).peer for _ in range(50)}) == 3


# --- best_performance


def test_the_one_that_would_finish_first() -> None:
    quick_start = candidate("start", speed=measured(0.1, 10))
    quick_rate = candidate("rate", speed=measured(1.0, 100))
    both = [quick_start, quick_rate]
    assert best(both, 5) == "start"
    assert best(both, 500) == "rate"


def test_waiting_counts() -> None:
    fast = candidate("fast", others=4, speed=measured(0.5, 100))
    slow = candidate("slow", speed=measured(1.0, 50))
    assert best([fast, slow]) == "slow"


def test_what_a_node_says_of_its_queue_counts_before_how_many_there_are() -> None:
    short = Busy(others=3, slots=1, told=3, wait=0.5)
    long = Busy(others=1, slots=1, told=1, wait=30.0)
    speed = measured(1.0, 100)
    both = [candidate("short", busy=short, speed=speed), candidate("long", busy=long, speed=speed)]
    assert best(both) == "short"
    # Three of ours went there since it said so.
    both[0].busy = short._replace(in_flight=20)
    assert best(both) == "long"
    # Time has gone by.
    both[1].age = 29.5
    both[0].busy = short._replace(in_flight=2)
    assert best(both) == "long"


def test_what_we_measured_beats_what_is_claimed() -> None:
    boaster = candidate("boaster", said_ttft=0.01, said_rate=900.0, speed=measured(1.0, 30))
    honest = candidate("honest", said_ttft=0.5, said_rate=50.0)
    assert best([boaster, honest]) == "honest"


def test_who_was_slow_once_is_tried_again_after_a_while() -> None:
    improved = candidate("improved", said_ttft=0.1, said_rate=100.0, speed=measured(5.0, 5))
    steady = candidate("steady", speed=measured(0.5, 50))
    assert best([improved, steady]) == "steady"
    improved.speed = measured(5.0, 5, at=NOW - 10 * TRUST_HALF_LIFE)
    assert best([improved, steady]) == "improved"


def test_the_way_to_the_node_counts_where_only_the_node_measured() -> None:
    near = candidate("near", said_ttft=0.1, said_rate=50.0, rtt=0.001)
    far = candidate("far", said_ttft=0.1, said_rate=50.0, rtt=0.5)
    assert best([near, far]) == "near"


def test_an_unmeasured_one_is_tried_once_at_a_time() -> None:
    known = candidate("known", slots=8, speed=measured(0.2, 100))
    new = candidate("new", slots=8)
    assert best([known, new]) == "new"
    new.busy = Busy(0, 1, 8)
    assert best([known, new]) == "known"


def test_an_unmeasured_one_is_not_thought_quick_because_the_answer_is_long() -> None:
    known = candidate("known", slots=8, speed=measured(0.2, 100))
    tried = candidate("tried", slots=8, speed=Speed(tries=1))
    assert best([known, tried], tokens=5000) == "known"


def test_the_optimism_wears_off_where_a_try_measures_nothing() -> None:
    known = candidate("known", slots=8, speed=measured(0.2, 100))
    new = candidate("new", slots=8, speed=Speed(tries=1))
    assert best([known, new]) == "known"


def test_one_that_fails_at_once_is_not_the_fastest() -> None:
    failer = candidate("failer", speed=Speed(errors=0.6, failed_at=NOW, failing=0.001))
    slow = candidate("slow", speed=measured(2.0, 50))
    assert best([failer, slow]) == "slow"
    once_quick = candidate("once quick", speed=measured(0.01, 1000, errors=0.7))
    assert best([once_quick, slow]) == "slow"


def test_one_that_takes_long_to_fail_costs_more() -> None:
    at_once = candidate("at once", speed=measured(1.0, 50, errors=0.3))
    hangs = candidate("hangs", speed=measured(1.0, 50, errors=0.3))
    assert at_once.speed
    assert hangs.speed
    at_once.speed.failing, hangs.speed.failing = 0.01, 60.0
    assert best([hangs, at_once]) == "at once"


def test_a_failure_is_forgiven_with_time() -> None:
    failed = candidate("failed", speed=measured(0.5, 100, errors=0.9))
    slow = candidate("slow", speed=measured(2.0, 50))
    assert best([failed, slow]) == "slow"
    assert failed.speed
    failed.speed.failed_at = NOW - 60.0
    assert best([failed, slow]) == "failed"


def test_who_comes_back_gets_a_growing_share() -> None:
    steady = candidate("steady", slots=8, in_flight=4, speed=measured(1.1, 100))
    back = candidate("back", slots=8, speed=measured(1.0, 100, answers=0))
    assert best([steady, back]) == "back"
    back.busy = Busy(0, 1, 8)
    assert best([steady, back]) == "steady"
    back.speed = measured(1.0, 100, answers=1)
    assert best([steady, back]) == "back"
    back.busy = Busy(0, 2, 8)
    assert best([steady, back]) == "steady"


def test_a_model_in_memory_comes_first_unless_its_queue_is_long() -> None:
    cold = candidate("cold", offer=ModelOffer(id="m", loaded=False), said_ttft=0.1, said_rate=200.0)
    warm = candidate("warm", offer=ModelOffer(id="m", loaded=True), said_ttft=0.2, said_rate=50.0)
    assert best([cold, warm]) == "warm"
    warm.busy = Busy(20, 0, 1)
    assert best([cold, warm]) == "cold"


def test_a_prefix_that_was_seen_is_a_score_and_no_pin() -> None:
    seen = candidate("seen", seen=0.9, speed=measured(3.0, 50))
    other = candidate("other", speed=measured(2.5, 50))
    assert best([seen, other]) == "seen"
    seen.busy = Busy(3, 0, 1)
    assert best([seen, other]) == "other"


def test_who_did_not_answer_a_probe_comes_last() -> None:
    silent = candidate("silent", silent=True, speed=measured(0.1, 100))
    other = candidate("other", speed=measured(2.0, 50))
    assert best([silent, other]) == "other"
    assert best([silent]) == "silent"


def test_equal_ones_share() -> None:
    everyone = [candidate(str(i), speed=measured(1.0, 10)) for i in range(3)]
    rng = Random(1)
    counts = Counter(best(everyone, 10, rng) for _ in range(300))
    assert min(counts.values()) > 60


def test_who_chooses_at_the_same_moment_does_not_choose_the_same() -> None:
    """Nodes with one view of three peers, each told how many looked before it."""
    speeds = {"a": 100.0, "b": 50.0, "c": 50.0}
    chosen = []
    for rivals in range(4):
        everyone = [
            candidate(name, busy=Busy(others=1, slots=1, rivals=rivals), speed=measured(0.1, rate))
            for name, rate in speeds.items()
        ]
        chosen.append(best(everyone))
    assert chosen[0] == "a"
    assert Counter(chosen)["a"] <= 2
    assert len(set(chosen)) > 1


def test_of_many_a_few_are_weighed_the_faster_the_likelier() -> None:
    everyone = [
        candidate(str(i), speed=measured(0.1, 100 if i < 20 else 10)) for i in range(FEW + 32)
    ]
    rng = Random(1)
    drawn = [draw(everyone, WORK, NOW, rng) for _ in range(300)]
    assert all(len({c.peer for c in few}) == FEW for few in drawn)
    counts = Counter(c.peer for few in drawn for c in few)
    assert len(counts) == len(everyone)  # nobody is left out for good
    assert sum(counts[str(i)] for i in range(20)) > 3 * sum(counts[str(i)] for i in range(20, 40))
    few = everyone[:FEW]
    assert draw(few, WORK, NOW, rng) == few


@given(
    st.lists(
        st.builds(
            candidate,
            st.text(max_size=3),
            busy=st.builds(
                Busy,
                others=st.integers(0, 1000),
                in_flight=st.integers(0, 1000),
                slots=st.integers(1, 64),
                told=st.integers(0, 1000),
                wait=st.none() | st.floats(0, 1e9),
                rivals=st.integers(0, 1000),
            ),
            age=st.floats(0, 1e9) | st.just(float("inf")),
            rtt=st.none() | st.floats(0, 100),
            seen=st.floats(0, 1),
            silent=st.booleans(),
            said_rate=st.none() | st.floats(0, 1e9),
            said_ttft=st.none() | st.floats(0, 1e9),
            speed=st.none()
            | st.builds(
                Speed,
                ttft=st.none() | st.floats(0, 1e6),
                rate=st.none() | st.floats(0, 1e6),
                at=st.floats(-1e9, 2 * NOW) | st.just(-float("inf")),
                tries=st.integers(0, 1000),
                answers=st.integers(0, 1000),
                errors=st.floats(0, 1),
                failed_at=st.floats(-1e9, 2 * NOW),
                failing=st.none() | st.floats(0, 1e6),
            ),
        ),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from(["round_robin", "least_loaded", "best_performance"]),
    st.floats(0, 1e6),
)
def test_every_policy_chooses_one_of_the_candidates(
    candidates: list[Candidate], policy: Policy, tokens: float
) -> None:
    work = Work(tokens, tokens)
    choice = Choice(policy, turns=Turns(), key=b"", work=work, rng=Random(1))
    assert choice.take(candidates, NOW) in candidates
    for expected in expected_times(candidates, work, NOW):
        assert 0 <= expected.idle <= expected.total < float("inf")
        assert (expected.first or 0.0) + expected.trouble <= expected.idle + 1e-6


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded", "best_performance"])
def test_the_policy_that_is_named_runs(policy: Policy) -> None:
    busy_but_fast = candidate("fast", others=1, slots=4, speed=measured(0.1, 100))
    idle_but_slow = candidate("slow", slots=4, speed=measured(9.0, 1))
    both = [busy_but_fast, idle_but_slow]
    choice = Choice(policy, turns=Turns(), key=b"k", work=WORK, rng=Random(1))
    chosen = [choice.take(both, NOW).peer for _ in range(4)]
    expected = {"least_loaded": ["slow"] * 4, "best_performance": ["fast"] * 4}
    assert sorted(chosen) == expected.get(policy, ["fast", "fast", "slow", "slow"])
    assert [decision.chosen.peer for decision in choice.decisions] == chosen
    assert all(list(decision.among) == both for decision in choice.decisions)
    first = choice.decisions[0]
    assert bool(first.expected) == (policy == "best_performance")
    assert list(first.turns.values()) == ([0, 0] if policy == "round_robin" else [])


def test_few_decisions_are_kept() -> None:
    choice = Choice("round_robin", turns=Turns(), key=b"", work=WORK, rng=Random(1))
    for _ in range(100):
        choice.take([candidate("a")], NOW)
    assert len(choice.decisions) == MAX_DECISIONS


def test_what_was_drawn_is_chosen_from_once() -> None:
    """The candidates that failed since are not among those left."""
    everyone = [candidate(str(i), speed=measured(1.0, 100)) for i in range(3)]
    choice = Choice("best_performance", turns=Turns(), key=b"", work=WORK, rng=Random(1))
    assert choice.draw(everyone, NOW) == everyone
    chosen = choice.take(everyone, NOW)
    left = [c for c in everyone if c is not chosen]
    assert choice.take(left, NOW) in left
