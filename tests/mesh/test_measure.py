"""What this node learns of providers."""

import pytest

from promptmesh.mesh.frames import Load
from promptmesh.mesh.measure import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    MAX_MEASURED,
    BackendId,
    Breaker,
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
    speed.first_token(1.0)
    assert speed.ttft == 1.0
    for _ in range(30):
        speed.first_token(0.2)
    assert speed.ttft == pytest.approx(0.2, abs=0.01)
    speed.finished(101, 2.0)
    assert speed.rate == pytest.approx(50.0)
    assert speed.answers == 1


def test_an_answer_in_one_piece_says_nothing_of_the_rate() -> None:
    speed = Speed()
    speed.finished(100, 0.0001)
    speed.finished(1, 5.0)
    assert speed.rate is None
    assert speed.answers == 2


def test_errors_rise_with_failures_and_fade_with_answers() -> None:
    speed = Speed()
    for _ in range(20):
        speed.failed()
    assert 0.9 < speed.errors <= 1.0
    for _ in range(20):
        speed.finished(10, 1.0)
    assert speed.errors < 0.05


def test_what_is_remembered_is_bounded() -> None:
    measures = Measures()
    for i in range(MAX_MEASURED + 5):
        measures.of(Measured("p", "q", str(i))).first_token(1.0)
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
    assert loads.get(B, advertised) == (3, 0, 4)
    loads.begin(B)
    loads.begin(B)
    assert loads.get(B, advertised) == (3, 2, 4)
    loads.report(B, Load(running=4, waiting=1, slots=8))  # two of them are ours
    assert loads.get(B, advertised) == (3, 2, 8)
    loads.end(B)
    assert loads.get(B, advertised) == (3, 1, 8)
    loads.report(B, Load(running=0))
    assert loads.get(B, advertised).others == 0


def test_a_peer_that_is_gone_is_forgotten_but_not_what_is_in_flight() -> None:
    loads = Loads()
    other = BackendId("peer", "other")
    loads.report(B, Load(running=5))
    loads.begin(other)
    loads.forget("peer")
    assert loads.get(B, Load()) == (0, 0, 1)
    assert loads.get(other, Load()).in_flight == 1
    loads.end(other)
    assert loads.get(other, Load()).in_flight == 0


# --- all of it


def test_a_lost_node_closes_all_its_providers_and_a_connection_opens_them() -> None:
    seen = Experience()
    seen.begin(M)
    seen.failed(M, Fault.PEER, "reset", 0.0, None)
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
        seen.failed(M, Fault.NONE, "bad request", 0.0, None)
        seen.end(M)
    assert seen.breakers.refusal(B, 0.0) is None
    assert seen.measures.get(M) is None


def test_a_provider_that_fails_leaves_the_others_of_its_node_alone() -> None:
    seen = Experience()
    seen.failed(M, Fault.PROVIDER_AT_ONCE, "timeout", 0.0, None)
    assert seen.breakers.refusal(B, 0.5) is not None
    assert seen.breakers.refusal(BackendId("peer", "other"), 0.5) is None
    assert seen.breakers.refusal(B, 1.0) is None
    seen.begin(M)  # the probe
    assert seen.breakers.refusal(B, 1.0) is not None
    seen.succeeded(M)
    assert seen.breakers.refusal(B, 1.0) is None
