"""The order of those who wait for a slot."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from promptmesh.providers.base import Priority
from promptmesh.providers.waiting import MOST_OVERTAKEN, PRIORITIES, Line, Place, Times

#: A priority comes, or None: there is a turn.
happenings = st.lists(st.none() | st.sampled_from(PRIORITIES), max_size=200)


def line_of(*priorities: Priority) -> tuple[Line, list[Place]]:
    """A line, and the places in the order in which they came: `id` is their number."""
    line = Line()
    places = [Place("", priority, str(n)) for n, priority in enumerate(priorities)]
    for place in places:
        line.add(place)
    return line, places


def ids(places: Sequence[Place]) -> str:
    return " ".join(place.id for place in places)


def taken(line: Line) -> list[Place]:
    """Those in the line, in their turns."""
    found = []
    while (place := line.take()) is not None:
        found.append(place)
    return found


def test_the_most_urgent_first_and_of_those_the_first_that_came() -> None:
    line, _ = line_of("background", "member", "own", "member", "own", "background")
    assert [line.count(priority) for priority in PRIORITIES] == [2, 4, 6]
    assert ids(taken(line)) == "2 4 1 3 0 5"
    assert line.take() is None
    assert len(line) == 0


def test_one_that_gave_up_has_no_turn() -> None:
    line, places = line_of("own", "own", "member")
    line.discard(places[0])
    line.discard(places[0])
    assert ids(taken(line)) == "1 2"


def test_who_is_last_and_less_urgent() -> None:
    line, places = line_of("own", "member", "background", "member", "background")
    newcomer = Place("", "own")
    for expected in (4, 2, 3, 1):
        last = line.last_behind(newcomer)
        assert last is places[expected]
        line.discard(last)
    assert line.last_behind(newcomer) is None


def test_who_becomes_more_urgent_stands_where_it_would_have_stood() -> None:
    line, _ = line_of("own", "background", "own", "background")
    line.urge("1", "own")
    line.urge("3", "member")
    line.urge("0", "background")  # it is more urgent already
    line.urge("7", "own")
    assert ids(taken(line)) == "0 1 2 3"


@given(happenings)
def test_nobody_is_overtaken_without_end(given: list[Priority | None]) -> None:
    line = Line()
    overtaken: dict[Place, int] = {}
    for priority in given:
        if priority is not None:
            place = Place("", priority)
            line.add(place)
            overtaken[place] = 0
            continue
        taken_now = line.take()
        if taken_now is None:
            continue
        del overtaken[taken_now]
        firsts: dict[int, Place] = {}
        for place in overtaken:
            firsts.setdefault(place.rank, place)
        for place in firsts.values():
            if place.number < taken_now.number:
                overtaken[place] += 1
                # The first of another priority may have its turn before.
                assert overtaken[place] <= MOST_OVERTAKEN + 1


@given(happenings, st.sampled_from(PRIORITIES))
def test_the_order_that_is_told_is_that_of_the_turns(
    given: list[Priority | None], priority: Priority
) -> None:
    line = Line()
    for happening in given:
        if happening is None:
            line.take()
        else:
            line.add(Place("", happening))
    newcomer = Place("", priority)
    told = list(line.order(newcomer))
    line.add(newcomer)
    assert taken(line) == told


def test_without_any_measurement_no_time_is_told() -> None:
    assert Times().wait({Place("", "own"): 0.0}, (), now=1.0) is None
