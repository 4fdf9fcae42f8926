"""How busy peers are, and who is about to choose."""

from promptmesh.mesh.backend_id import BackendId
from promptmesh.mesh.frames import Load
from promptmesh.mesh.loads import LONGEST_CHOICE, Choosing, Loads

B = BackendId("peer", "vllm")


def test_our_own_requests_are_not_counted_twice() -> None:
    loads = Loads()
    advertised = Load(running=2, waiting=1, slots=4)
    assert loads.get(B, advertised)[:3] == (3, 0, 4)
    loads.begin(B)
    loads.begin(B)
    assert loads.get(B, advertised)[:3] == (3, 2, 4)
    loads.report(B, Load(running=4, waiting=1, slots=8), 1.0)  # two of them are ours
    assert loads.get(B, advertised)[:3] == (3, 2, 8)
    loads.end(B)
    assert loads.get(B, advertised)[:3] == (3, 1, 8)
    loads.report(B, Load(running=0), 1.0)
    assert loads.get(B, advertised).others == 0


def test_requests_sent_after_the_question_were_not_counted_by_the_peer() -> None:
    loads = Loads()
    loads.begin(B)
    known = loads.in_flight(B)
    loads.begin(B)
    loads.begin(B)
    loads.report(B, Load(running=4, slots=8), 1.0, known=known)  # ours and three of others
    assert loads.get(B, Load()).others == 3
    assert loads.get(B, Load()).all == 6


def test_what_was_said_is_kept_with_its_time() -> None:
    loads = Loads()
    assert loads.told(B) is None
    loads.report(B, Load(running=2, waiting=3, slots=2, wait=7.5), 9.0, rivals=2)
    busy = loads.get(B, Load())
    assert (busy.told, busy.wait, busy.rivals, busy.at) == (5, 7.5, 2, 9.0)
    assert loads.told(B) == 9.0


def test_a_peer_that_is_gone_is_forgotten_but_not_what_is_in_flight() -> None:
    loads = Loads()
    other = BackendId("peer", "other")
    loads.report(B, Load(running=5), 1.0)
    loads.begin(other)
    loads.forget("peer")
    assert loads.get(B, Load())[:3] == (0, 0, 1)
    assert loads.get(other, Load()).in_flight == 1
    loads.end(other)
    assert loads.get(other, Load()).in_flight == 0


def test_whether_any_is_full() -> None:
    loads = Loads()
    loads.begin(B)  # nobody has said how many it takes
    assert not loads.any_full()
    loads.report(B, Load(running=2, slots=2), 1.0)
    assert loads.any_full()
    loads.report(B, Load(running=1, slots=2), 1.0)
    assert not loads.any_full()
    loads.begin(B)
    assert loads.any_full()


# --- others who choose


def test_who_looks_learns_how_many_looked_before_it() -> None:
    choosing = Choosing()
    assert choosing.enter("a", "m", 0.1, 0.0) == 0
    assert choosing.enter("b", "m", 0.1, 0.01) == 1
    assert choosing.enter("a", "m", 0.1, 0.02) == 1  # itself is no rival
    assert choosing.enter("c", "other", 0.1, 0.02) == 0
    choosing.chose("b")  # its request is here, and counted as such
    assert choosing.enter("d", "m", 0.1, 0.03) == 1
    assert choosing.enter("e", "m", 0.1, 9.0) == 0  # the others have chosen long since


def test_nobody_says_for_long_that_it_chooses() -> None:
    choosing = Choosing()
    choosing.enter("a", "m", 1e9, 0.0)
    assert choosing.enter("b", "m", 0.0, LONGEST_CHOICE / 2) == 1
    assert choosing.enter("c", "m", 0.0, LONGEST_CHOICE) == 0
