from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from promptmesh.cache import ranges

NUMBERS = st.sets(st.integers(1, 30))


def members(found: list[ranges.Range]) -> set[int]:
    return {number for first, last in found for number in range(first, last + 1)}


@given(NUMBERS)
def test_a_set_as_ranges(numbers: set[int]) -> None:
    found = ranges.of(sorted(numbers))
    assert members(found) == numbers
    for (_, last), (first, _) in pairwise(found):
        assert first > last + 1
    assert {n for n in range(40) if ranges.contains(found, n)} == numbers


@given(st.lists(st.integers(1, 30)))
def test_adding_in_any_order_gives_the_same(numbers: list[int]) -> None:
    found: list[ranges.Range] = []
    for number in numbers:
        ranges.add(found, number)
    assert found == ranges.of(sorted(set(numbers)))


@given(NUMBERS, st.lists(st.tuples(st.integers(-5, 35), st.integers(-5, 35)), max_size=5))
def test_without_whatever_others_say(numbers: set[int], others: list[ranges.Range]) -> None:
    found = ranges.without(ranges.of(sorted(numbers)), others)
    assert members(found) == numbers - members(others)
    assert found == ranges.of(sorted(members(found)))
