"""The three policies."""

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.mesh.measure import Speed
from promptmesh.mesh.policies import (
    FEW,
    MAX_MODELS,
    Candidate,
    Turns,
    best_performance,
    choose,
    expected_times,
    least_loaded,
)
from promptmesh.providers.base import ModelOffer, Policy


def candidate(peer: str, model: str = "m", **fields: Any) -> Candidate:
    return Candidate(peer=peer, node=peer, provider="p", offer=ModelOffer(id=model), **fields)


def measured(ttft: float, rate: float, errors: float = 0.0) -> Speed:
    return Speed(ttft=ttft, rate=rate, answers=5, errors=errors)


# --- round_robin


@given(st.integers(1, 6), st.integers(0, 40), st.randoms(use_true_random=False))
def test_counts_of_a_constant_set_differ_by_at_most_one(size: int, turns: int, rng: Any) -> None:
    robin, everyone = Turns(), [candidate(str(i)) for i in range(size)]
    counts = Counter({c.peer: 0 for c in everyone})
    for _ in range(turns):
        rng.shuffle(everyone)
        counts[robin.take(everyone, rng).peer] += 1
        assert max(counts.values()) - min(counts.values()) <= 1


def test_one_that_joins_starts_at_the_smallest_count() -> None:
    robin, rng = Turns(), Random(1)
    two = [candidate("a"), candidate("b")]
    for _ in range(100):
        robin.take(two, rng)
    three = [*two, candidate("c")]
    counts = Counter(robin.take(three, rng).peer for _ in range(30))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_one_that_comes_back_does_not_get_what_it_missed() -> None:
    robin, rng = Turns(), Random(1)
    a, b = candidate("a"), candidate("b")
    robin.take([a, b], rng)
    for _ in range(100):
        robin.take([a], rng)
    counts = Counter(robin.take([a, b], rng).peer for _ in range(20))
    assert abs(counts["a"] - counts["b"]) <= 1


def test_each_model_has_turns_of_its_own_and_they_are_bounded() -> None:
    robin, rng = Turns(), Random(1)
    shared = candidate("a", "x")
    for _ in range(10):
        robin.take([shared], rng)
    counts = Counter(
        robin.take([candidate("a", "y"), candidate("b", "y")], rng).peer for _ in range(10)
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
    big.in_flight = 6
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
    assert best_performance(both, 5, Random(1)) is quick_start
    assert best_performance(both, 500, Random(1)) is quick_rate


def test_waiting_counts() -> None:
    fast = candidate("fast", slots=1, others=4, speed=measured(0.5, 100))
    slow = candidate("slow", slots=1, speed=measured(1.0, 50))
    assert best_performance([fast, slow], 100, Random(1)) is slow


def test_what_we_measured_beats_what_is_claimed() -> None:
    boaster = candidate("boaster", said_ttft=0.01, said_rate=900.0, speed=measured(1.0, 30))
    honest = candidate("honest", said_ttft=0.5, said_rate=50.0)
    assert best_performance([boaster, honest], 100, Random(1)) is honest


def test_an_unmeasured_one_is_tried_once_at_a_time() -> None:
    known = candidate("known", slots=8, speed=measured(0.2, 100))
    new = candidate("new", slots=8)
    assert best_performance([known, new], 100, Random(1)) is new
    new.in_flight = 1
    assert best_performance([known, new], 100, Random(1)) is known


def test_one_that_fails_at_once_is_not_the_fastest() -> None:
    failer = candidate("failer", speed=Speed(errors=0.6))
    slow = candidate("slow", speed=measured(2.0, 50))
    assert best_performance([failer, slow], 100, Random(1)) is slow
    once_quick = candidate("once quick", speed=measured(0.01, 1000, errors=0.6))
    assert best_performance([once_quick, slow], 100, Random(1)) is slow


def test_equal_ones_share() -> None:
    everyone = [candidate(str(i), speed=measured(1.0, 10)) for i in range(3)]
    rng = Random(1)
    counts = Counter(best_performance(everyone, 10, rng).peer for _ in range(300))
    assert min(counts.values()) > 60


def test_of_many_two_are_weighed() -> None:
    everyone = [candidate(str(i), speed=measured(1.0 + i, 10)) for i in range(FEW + 2)]
    rng = Random(1)
    chosen = {best_performance(everyone, 10, rng).peer for _ in range(200)}
    assert len(chosen) == FEW + 1  # all but the slowest
    few = everyone[:FEW]
    assert {best_performance(few, 10, rng).peer for _ in range(50)} == {"0"}


@given(
    st.lists(
        st.builds(
            candidate,
            st.text(max_size=3),
            slots=st.integers(1, 64),
            others=st.integers(0, 1000),
            in_flight=st.integers(0, 1000),
            said_rate=st.none() | st.floats(0, 1e9),
            said_ttft=st.none() | st.floats(0, 1e9),
            speed=st.none()
            | st.builds(
                Speed,
                ttft=st.none() | st.floats(0, 1e6),
                rate=st.none() | st.floats(0, 1e6),
                errors=st.floats(0, 1),
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
    chosen = choose(policy, candidates, turns=Turns(), key=b"", tokens=tokens, rng=Random(1))
    assert chosen in candidates
    assert all(time >= 0 for time in expected_times(candidates, tokens))


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded", "best_performance"])
def test_the_policy_that_is_named_runs(policy: Policy) -> None:
    busy_but_fast = candidate("fast", others=1, slots=4, speed=measured(0.1, 100))
    idle_but_slow = candidate("slow", slots=4, speed=measured(9.0, 1))
    both = [busy_but_fast, idle_but_slow]
    turns, rng = Turns(), Random(1)
    chosen = [
        choose(policy, both, turns=turns, key=b"k", tokens=100, rng=rng).peer for _ in range(4)
    ]
    expected = {"least_loaded": ["slow"] * 4, "best_performance": ["fast"] * 4}
    assert sorted(chosen) == expected.get(policy, ["fast", "fast", "slow", "slow"])
