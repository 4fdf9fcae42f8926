"""Whom to ask for a block, in which order."""

from __future__ import annotations

import math
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from promptmesh.mesh.bitswap_search import HEAD_START, MAX_ASKED, PATIENCE, Ask, Search


def test_one_is_asked_for_the_block_and_the_others_whether_they_have_it() -> None:
    search = Search(0.0)
    assert search.next_asks(["a", "b", "c"], [], 0.0) == [
        Ask("a", have=False),
        Ask("b", have=True),
        Ask("c", have=True),
    ]
    assert search.next_asks(["a", "b", "c"], [], 0.1) == []


def test_who_has_it_is_asked_once_the_first_lacks_it() -> None:
    search = Search(0.0)
    search.next_asks(["a", "b", "c"], [], 0.0)
    search.has("b")
    search.has("c")
    assert search.next_asks(["a", "b", "c"], [], 0.1) == []
    search.lacks("a")
    assert search.next_asks(["a", "b", "c"], [], 0.2) == [Ask("b", have=False)]
    search.lacks("b")  # it lied
    assert search.next_asks(["a", "b", "c"], [], 0.3) == [Ask("c", have=False)]


def test_a_silent_peer_is_given_up_for_the_next() -> None:
    search = Search(0.0)
    search.next_asks(["a", "b"], [], 0.0)
    search.has("b")
    assert search.next_asks(["a", "b"], [], PATIENCE - 0.1) == []
    assert search.next_time(HEAD_START) == PATIENCE
    assert search.next_asks(["a", "b"], [], PATIENCE) == [Ask("b", have=False)]


def test_members_come_after_a_head_start_or_when_foreign_peers_lack_it() -> None:
    search = Search(0.0)
    assert search.next_asks(["kubo"], ["member"], 0.0) == [Ask("kubo", have=False)]
    assert search.next_time(0.0) == HEAD_START
    assert search.next_asks(["kubo"], ["member"], HEAD_START) == [Ask("member", have=True)]

    search = Search(0.0)
    search.next_asks(["kubo"], ["member"], 0.0)
    search.lacks("kubo")
    assert not search.is_hopeless(["kubo", "member"])
    assert search.next_asks(["kubo"], ["member"], 0.1) == [Ask("member", have=False)]
    search.lacks("member")
    assert search.is_hopeless(["kubo", "member"])


def test_without_foreign_peers_members_are_asked_at_once() -> None:
    assert Search(0.0).next_asks([], ["member"], 0.0) == [Ask("member", have=False)]


def test_nobody_there_is_hopeless() -> None:
    assert Search(0.0).is_hopeless([])


def test_one_that_comes_later_is_asked_and_one_that_comes_back_again() -> None:
    search = Search(0.0)
    search.next_asks(["a"], [], 0.0)
    search.lacks("a")
    search.gone("a")
    assert search.next_asks(["b"], [], 0.1) == [Ask("b", have=False)]
    assert search.next_asks(["b", "a"], [], 0.2) == [Ask("a", have=True)]
    assert sorted(search.asked) == ["a", "b"]


def test_a_word_of_a_peer_that_was_not_asked_is_nothing() -> None:
    search = Search(0.0)
    search.has("eve")
    search.lacks("eve")
    search.gone("eve")
    assert search.asked == []


def test_only_so_many_are_asked() -> None:
    search = Search(0.0)
    peers = [f"p{i}" for i in range(2 * MAX_ASKED)]
    assert len(search.next_asks(peers, [], 0.0)) == MAX_ASKED
    for peer in peers:
        search.lacks(peer)
    assert search.next_asks(peers, [], 1.0) == []
    assert search.is_hopeless(peers)


@given(st.integers(0, 2**32), st.integers(0, 6), st.integers(0, 6))
def test_if_anybody_keeps_its_word_the_block_is_found(
    seed: int, foreign: int, members: int
) -> None:
    """Peers lack it, have it, or lie in every way; a search ends, and finds it where it is."""
    rng = Random(seed)
    kinds = [rng.choice(["has", "lacks", "silent", "liar"]) for _ in range(foreign + members)]
    peers = [f"{kind}{i}" for i, kind in enumerate(kinds)]
    search, now = Search(0.0), 0.0
    found = False
    while not found and not search.is_hopeless(peers) and now < 100:
        asks = search.next_asks(peers[:foreign], peers[foreign:], now)
        for peer, have in asks:
            if peer.startswith("lacks"):
                search.lacks(peer)
            elif have and not peer.startswith("silent"):
                search.has(peer)
            elif peer.startswith("has"):
                found = True
        if not asks:
            now = search.next_time(now)
    assert found == ("has" in kinds) or (now == math.inf and "has" not in kinds)
