"""Whose claims count, in which order, and how many must agree."""

import functools
from collections.abc import Iterable, Iterator

import pytest

from promptmesh.cache.claim_rows import Claim
from promptmesh.cache.conduct import Conduct
from promptmesh.cache.database import Database
from promptmesh.cache.trust import Trust

NOW = 1_000_000


@pytest.fixture
def conduct() -> Iterator[Conduct]:
    database = Database(None)
    yield Conduct(database)
    database.close()


def claim(peer: str, cid: str = "x", *, age: int = 0, held: bool = False) -> Claim:
    return Claim(peer, cid.encode(), 9, NOW - age, NOW + 100, held)


def order(trust: Trust, *claims: Claim, wanted: int | None = None) -> list[str]:
    return [a.cid.decode() for a in trust.alternatives(claims, NOW, wanted=wanted)]


def test_the_most_claimed_comes_first_then_the_newest(conduct: Conduct) -> None:
    trust = Trust(conduct, own="me")
    claims = [
        claim("p", "rare", age=5),
        claim("q", "usual", age=7),
        claim("r", "usual", age=8),
        claim("s", "new", age=1),
    ]
    assert order(trust, *claims) == ["usual", "new", "rare"]
    assert order(trust, *reversed(claims)) == ["usual", "new", "rare"]
    assert order(trust) == []


def test_a_holder_is_a_source_and_no_word_on_the_answer(conduct: Conduct) -> None:
    trust = Trust(conduct, own="me")
    claims = [claim("h", "x", held=True), claim("p", "x", age=3)]
    claims += [claim(f"h{n}", "copies", held=True) for n in range(9)]
    (found,) = trust.alternatives(claims, NOW)
    assert (found.cid, found.producers, found.sources) == (b"x", ("p",), ("p", "h"))
    assert (found.made_at, found.expires_at) == (NOW - 3, NOW + 100)
    assert order(trust, *claims, wanted=2) == []


def test_agreement_counts_different_producers(conduct: Conduct) -> None:
    trust = Trust(conduct, own="me", min_agreement=2)
    claims = [claim("p", "x"), claim("p", "y"), claim("q", "y"), claim("r", "z")]
    assert order(trust, *claims) == ["y"]
    assert order(trust, *claims, wanted=1) == ["y", "x", "z"]
    assert order(trust, *claims, wanted=3) == []


def test_listed_peers_by_id_or_name(conduct: Conduct) -> None:
    names = {"p": "alpha", "q": "beta"}
    trust = Trust(conduct, own="me", trusted=("alpha", "r"), name_of=lambda p: names.get(p, ""))
    claims = [claim("q", "x"), claim("s", "x"), claim("p", "y"), claim("r", "z", age=1)]
    assert order(trust, *claims) == ["y", "z"]
    assert trust.doubt("p", NOW) == trust.doubt("r", NOW) == trust.doubt("me", NOW) == ""
    assert "trusted peers" in trust.doubt("q", NOW)
    # Whoever is not trusted may still bring the bytes: they are checked.
    (found,) = trust.alternatives([claim("p"), claim("q", held=True)], NOW)
    assert found.sources == ("p", "q")


@pytest.mark.parametrize("trusted", [("me",), ()])
def test_only_me(conduct: Conduct, trusted: tuple[str, ...]) -> None:
    trust = Trust(conduct, own="me", trusted=trusted)
    assert order(trust, claim("p")) == []
    assert "only this node" in trust.doubt("p", NOW)
    assert not uses(trust, "p")
    assert uses(trust, "me")


def test_who_lost_its_say_counts_for_nothing(conduct: Conduct) -> None:
    trust = Trust(conduct, own="me")
    conduct.offended("p", "wrong bytes", NOW)
    assert order(trust, claim("p", "x"), claim("q", "y"), claim("p", "y")) == ["y"]
    (found,) = trust.alternatives([claim("q"), claim("p", held=True)], NOW)
    assert found.sources == ("q",)
    assert trust.doubt("p", NOW).startswith("it sent other bytes than it claimed; no say until")
    conduct.offended("p", "equivocation", NOW, evidence=(b"", b""))
    assert trust.doubt("p", NOW).endswith("no say for good")


def uses(
    trust: Trust, source: str, claims: Iterable[Claim] = (), wanted: int | None = None
) -> bool:
    return not trust.objection(source, lambda: claims, NOW, wanted=wanted)


def test_what_lies_here_is_used_by_the_same_rule(conduct: Conduct) -> None:
    trust = Trust(conduct, own="me")
    assert uses(trust, "p")
    assert not uses(trust, "p", wanted=2)
    assert not uses(trust, "p", [claim("p"), claim("q", held=True)], wanted=2)
    assert not uses(trust, "p", [claim("q")], wanted=2)
    assert uses(trust, "p", [claim("p"), claim("q")], wanted=2)
    assert uses(trust, "me", wanted=9)
    conduct.offended("p", "wrong bytes", NOW)
    assert not uses(trust, "p")
    assert uses(trust, "p", [claim("q")])


def test_why_it_is_not_used(conduct: Conduct) -> None:
    trust = Trust(conduct, own="me", trusted=("q",))
    for claims, wanted, why in (
        ([], None, "it is not among the trusted peers (cache.trust)"),
        ([claim("q")], 2, "2 trusted nodes must have computed it (min_agreement), and 1 did"),
        ([claim("q")], 1, ""),
    ):
        assert trust.objection("p", functools.partial(list, claims), NOW, wanted=wanted) == why


def test_nothing_is_looked_up_where_it_is_clear(conduct: Conduct) -> None:
    def never() -> Iterable[Claim]:
        raise AssertionError("it was looked up")

    trust = Trust(conduct, own="me")
    assert not trust.objection("p", never, NOW, wanted=None)
    assert not trust.objection("me", never, NOW, wanted=5)


def test_who_may_not_share_counts_for_nothing_and_gives_nothing(conduct: Conduct) -> None:
    trust = Trust(conduct, own="me", allowed=lambda peer: peer != "p")
    claims = [claim("p", "x"), claim("q", "x"), claim("p", "y")]
    (found,) = trust.alternatives(claims, NOW)
    assert (found.producers, found.sources) == (("q",), ("q",))
    assert "may not share" in trust.doubt("p", NOW)
    assert "may not share" in trust.objection("p", lambda: (), NOW, wanted=None)
