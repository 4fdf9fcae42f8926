"""Sets of numbers as ranges: which of a peer's batches are here.

A set is a sorted list of (first, last), both inside, with a gap between any two: mostly one range,
whatever it counts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

Range = tuple[int, int]


def of(numbers: Iterable[int]) -> list[Range]:
    """The set of these numbers, given in ascending order."""
    ranges: list[Range] = []
    for number in numbers:
        if ranges and number <= ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


def contains(ranges: Sequence[Range], number: int) -> bool:
    """Is the number in the set?"""
    i = bisect_right(ranges, number, key=lambda r: r[0])
    return i > 0 and ranges[i - 1][1] >= number


def add(ranges: list[Range], number: int) -> None:
    """Put a number into the set."""
    if contains(ranges, number):
        return
    i = bisect_right(ranges, number, key=lambda r: r[0])
    first = last = number
    if i < len(ranges) and ranges[i][0] == number + 1:
        last = ranges.pop(i)[1]
    if i > 0 and ranges[i - 1][1] == number - 1:
        i -= 1
        first = ranges.pop(i)[0]
    ranges.insert(i, (first, last))


def without(ranges: Sequence[Range], others: Iterable[Range]) -> list[Range]:
    """What is in the set and in none of the other ranges, which may be in any order."""
    left = list(ranges)
    for first, last in sorted(others):
        rest: list[Range] = []
        for low, high in left:
            if last < low or high < first or last < first:
                rest.append((low, high))
                continue
            if low < first:
                rest.append((low, first - 1))
            if last < high:
                rest.append((last + 1, high))
        left = rest
    return left
