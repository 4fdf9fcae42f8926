"""What this node learns of providers."""

import pytest

from promptmesh.mesh.frames import Load
from promptmesh.mesh.measure import (
    ERROR_HALF_LIFE,
    FIRST_PAUSE,
    LONGEST_CHOICE,
    LONGEST_PAUSE,
    LONGEST_ROW,
    MAX_MEASURED,
    BackendId,
    Breaker,
    Choosing,
    Experience,
    Fault,
    Loads,
    Measured,
    Measures,
    Speed,
)

B = BackendId("peer", "vllm")
M = Measured("peer", "vllm", "m")


def test_averages_follow_what_is_seen() -> None:
    speed = Speed()
    speed.first_token(1.0, 5.0)
    assert speed.ttft == 1.0
    for _ in range(30):
        speed.first_token(0.2, 6.0)
    assert speed.ttft == pytest.approx(0.2, abs=0.01)
    speed.finished(101, 2.0, 7.0)
    assert speed.rate == pytest.approx(50.0)
    assert speed.answers == 1


def test_an_answer_in_one_piece_says_nothing_of_the_rate() -> None:
    speed = Speed()
    speed.finished(100, 0.0001, 1.0)
    speed.finished(1, 5.0, 2.0)
    assert speed.rate is None
    assert speed.answers == 2


def test_errors_rise_with_failures_and_fade_with_answers_and_with_time() -> None:
    speed = Speed()
    for _ in range(20):
        speed.failed(0.5, 10.0)
    assert 0.9 < speed.errors_at(10.0) <= 1.0
    assert speed.failing == pytest.approx(0.5)
    long = ERROR_HALF_LIFE * LONGEST_ROW  # the memory of one that fails each time
    assert speed.errors_at(10.0 + long) == pytest.approx(speed.errors_at(10.0) / 2)
    for _ in range(20):
        speed.finished(10, 1.0, 11.0)
    assert speed.errors_at(10.0) < 0.05


def test_a_failure_long_after_another_counts_as_the_first() -> None:
    speed = Speed()
    speed.failed(0.1, 0.0)
    first = speed.errors_at(0.0)
    later = 100 * ERROR_HALF_LIFE
    assert speed.errors_at(ERROR_HALF_LIFE) == pytest.approx(first / 2)
    speed.failed(0.1, later)
    assert speed.errors_at(later) == pytest.approx(first)


def test_lengths_are_known_by_kind_of_request() -> None:
    measures = Measures()
    for _ in range(30):
        measures.add_length("m", 8, "few")
        measures.add_length("m", 800, "many")
    assert measures.length("m", kind="few") == pytest.approx(8)
    assert measures.length("m", kind="many") == pytest.approx(800)
    assert 8 < measures.length("m") < 800
    assert measures.length("m", kind="never seen") == measures.length("m")


def test_what_is_remembered_is_bounded() -> None:
    measures = Measures()
    for i in range(MAX_MEASURED + 5):
        measures.of(Measured("p", "q", str(i))).first_token(1.0, 5.0)
        measures.add_length(str(i), 10)
    assert measures.get(Measured("p", "q", "0")) is None
    assert measures.get(Measured("p", "q", "7")) is not None
    assert measures.length("0") == 200.0
    assert measures.length("7") == 10.0


# --- breakers


def test_one_error_of_the_server_is_forgiven_two_in_a_row_are_not() -> None:
    breaker = Breaker()
    breaker.failed(0.0, "500", at_once=False)
    assert breaker.refuses(0.0) is None
    breaker.succeeded()
    breaker.failed(1.0, "500", at_once=False)
    assert breaker.refuses(1.0) is None
    breaker.failed(2.0, "500", at_once=False)
    wait = breaker.refuses(2.0)
    assert wait is not None
    assert wait > 0


def test_silence_opens_it_at_once_and_one_probe_closes_it() -> None:
    breaker = Breaker()
    breaker.failed(0.0, "timeout", at_once=True)
    assert breaker.refuses(FIRST_PAUSE / 2) == pytest.approx(FIRST_PAUSE / 2)
    assert breaker.refuses(FIRST_PAUSE) is None
    breaker.begin()
    assert breaker.refuses(FIRST_PAUSE) is not None  # only one probe
    breaker.succeeded()
    assert breaker.refuses(FIRST_PAUSE) is None
    breaker.begin()
    assert breaker.refuses(FIRST_PAUSE) is None  # closed: no limit


def test_a_failed_probe_opens_it_for_longer_up_to_a_cap() -> None:
    breaker, now, pauses = Breaker(), 0.0, []
    breaker.failed(now, "x", at_once=True)
    for _ in range(8):
        pause = breaker.refuses(now)
        assert pause is not None
        pauses.append(pause)
        now += pause
        assert breaker.refuses(now) is None
        breaker.begin()
        breaker.failed(now, "x", at_once=False)
    assert pauses[:4] == [1.0, 2.0, 4.0, 8.0]
    assert max(pauses) == LONGEST_PAUSE


def test_failures_of_requests_under_way_when_it_opened_do_not_lengthen_it() -> None:
    breaker = Breaker()
    for _ in range(10):
        breaker.failed(0.0, "x", at_once=True)
    assert breaker.refuses(0.0) == FIRST_PAUSE


def test_an_abandoned_probe_lets_the_next_one_through() -> None:
    breaker = Breaker()
    breaker.failed(0.0, "x", at_once=True)
    breaker.begin()
    breaker.abandoned()
    assert breaker.refuses(FIRST_PAUSE) is None


def test_retry_after_is_honoured_and_bounded() -> None:
    breaker = Breaker()
    breaker.failed(0.0, "429", at_once=False, retry_after=30.0)
    assert breaker.refuses(29.0) == 1.0
    assert breaker.refuses(30.0) is None
    breaker.failed(30.0, "429", at_once=False, retry_after=1e9)
    assert breaker.refuses(30.0) == 3600.0


# --- load


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


# --- all of it


def test_a_lost_node_closes_all_its_providers_and_a_connection_opens_them() -> None:
    seen = Experience()
    seen.begin(M)
    seen.failed(M, Fault.PEER, "reset", 0.0, None, seconds=0.1)
    seen.end(M)
    for provider in ("vllm", "other"):
        assert seen.breakers.refusal(BackendId("peer", provider), 0.5) == (0.5, "reset")
    assert seen.breakers.refusal(BackendId("else", "vllm"), 0.5) is None
    seen.connection("peer", True)
    assert seen.breakers.refusal(B, 0.5) is None


def test_the_requests_own_fault_says_nothing() -> None:
    seen = Experience()
    for _ in range(5):
        seen.begin(M)
        seen.failed(M, Fault.NONE, "bad request", 0.0, None, seconds=0.1)
        seen.end(M)
    assert seen.breakers.refusal(B, 0.0) is None
    speed = seen.measures.get(M)
    assert speed is not None
    assert (speed.errors_at(0.0), speed.answers, speed.tries) == (0.0, 0, 5)


def test_a_provider_that_fails_leaves_the_others_of_its_node_alone() -> None:
    seen = Experience()
    seen.failed(M, Fault.PROVIDER_AT_ONCE, "timeout", 0.0, None, seconds=0.1)
    assert seen.breakers.refusal(B, 0.5) is not None
    assert seen.breakers.refusal(BackendId("peer", "other"), 0.5) is None
    assert seen.breakers.refusal(B, 1.0) is None
    seen.begin(M)  # the probe
    assert seen.breakers.refusal(B, 1.0) is not None
    seen.succeeded(M)
    assert seen.breakers.refusal(B, 1.0) is None


def test_who_came_back_begins_small_again() -> None:
    seen = Experience()
    seen.begin(M)
    seen.measures.of(M).first_token(0.1, 0.0)
    for _ in range(9):
        seen.measures.of(M).finished(10, 1.0, 0.0)
    seen.failed(M, Fault.PROVIDER, "500", 1.0, None, seconds=0.1)
    assert seen.measures.of(M).answers == 9  # once may happen
    seen.failed(M, Fault.PROVIDER, "500", 1.0, None, seconds=0.1)
    assert seen.measures.of(M).answers == 0
    seen.measures.of(M).finished(10, 1.0, 2.0)
    seen.connection("peer", False)
    assert seen.measures.of(M).answers == 0
    assert seen.measures.of(M).ttft == 0.1  # how fast it is, it still is
