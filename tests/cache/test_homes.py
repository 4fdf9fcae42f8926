"""Homes by rendezvous hash, and when they are needed."""

from collections import Counter
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from promptmesh.cache.homes import COUNT, MAX_GOSSIPED, SETTLED, Size, homes, homes_after

MEMBERS = [f"12D3KooW{number:04}" for number in range(200)]
KEYS = [Random(number).randbytes(32) for number in range(2000)]


def test_known_homes() -> None:
    """They are the same on every machine: whoever finds others asks the wrong nodes."""
    assert homes(bytes(32), MEMBERS) == ("12D3KooW0004", "12D3KooW0071", "12D3KooW0072")


def test_everybody_finds_the_same_whatever_the_order() -> None:
    shuffled = Random(1).sample(MEMBERS, len(MEMBERS))
    assert all(homes(key, MEMBERS) == homes(key, shuffled) for key in KEYS[:100])


def test_where_there_are_few_all_are_homes() -> None:
    assert homes(KEYS[0], []) == ()
    assert sorted(homes(KEYS[0], MEMBERS[:2])) == MEMBERS[:2]


def test_each_has_its_share() -> None:
    load = Counter(home for key in KEYS for home in homes(key, MEMBERS))
    fair = len(KEYS) * COUNT / len(MEMBERS)
    assert len(load) == len(MEMBERS)
    assert max(load.values()) < 2 * fair
    assert min(load.values()) > fair / 2.5


def test_who_joins_takes_its_share_and_nothing_else_moves() -> None:
    moved = 0
    for key in KEYS:
        before, after = homes(key, MEMBERS), homes(key, [*MEMBERS, "new"])
        if before != after:
            moved += 1
            assert "new" in after
            assert [home for home in after if home != "new"] == list(before[: COUNT - 1])
    fair = len(KEYS) * COUNT / (len(MEMBERS) + 1)
    assert fair / 2 < moved < fair * 2


def test_who_leaves_is_replaced_by_the_next() -> None:
    for key in KEYS[:300]:
        before = homes(key, MEMBERS)
        after = homes(key, [m for m in MEMBERS if m != before[0]])
        assert after[: COUNT - 1] == before[1:]


@settings(max_examples=50)
@given(st.sets(st.sampled_from(MEMBERS)), st.sets(st.sampled_from(MEMBERS)), st.binary(max_size=32))
def test_from_before_is_the_same_as_from_scratch(
    before: set[str], after: set[str], key: bytes
) -> None:
    known = homes(key, before)
    assert homes_after(key, known, after, after - before) == homes(key, after)


def test_above_the_limit_at_once_and_below_it_after_a_while() -> None:
    size = Size()
    assert not size.observe(MAX_GOSSIPED, 0)
    assert size.observe(MAX_GOSSIPED + 1, 1)
    assert size.observe(MAX_GOSSIPED, 2)
    assert size.observe(MAX_GOSSIPED, 2 + SETTLED - 1)
    assert size.observe(MAX_GOSSIPED + 1, 2 + SETTLED)  # it was a short dip
    assert size.observe(10, 100)
    assert size.observe(10, 100 + SETTLED - 1)
    assert not size.observe(10, 100 + SETTLED)
    assert not size.observe(MAX_GOSSIPED, 300)
