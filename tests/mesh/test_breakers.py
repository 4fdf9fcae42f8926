"""Who failed is left alone for a while."""

import pytest

from promptmesh.mesh.backend_id import Measured
from promptmesh.mesh.breakers import (
    FIRST_PAUSE,
    FIRST_REST,
    LONGEST_PAUSE,
    LONGEST_REST,
    MAX_BREAKERS,
    Breaker,
    Refusal,
    Refusals,
)


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


# --- refusals


def test_what_is_refused_is_asked_ever_less_one_at_a_time() -> None:
    refusal, now, pauses = Refusal(), 0.0, []
    for _ in range(9):
        refusal.refused(now, "401")
        refusal.refused(now, "401")  # one that was under way
        pause = refusal.refuses(now)
        assert pause is not None
        pauses.append(pause)
        now += pause
        assert refusal.refuses(now) is None
        refusal.begin()
        assert refusal.refuses(now) is not None
    assert pauses[:3] == [FIRST_REST, 2 * FIRST_REST, 4 * FIRST_REST]
    assert pauses[-1] == LONGEST_REST
    refusal.succeeded()
    assert refusal.refuses(now) is None
    refusal.refused(now, "429", retry_after=7.0)
    assert refusal.refuses(now) == pytest.approx(7.0)


def test_refusals_are_of_a_model_and_forgotten_by_provider_by_node_and_by_number() -> None:
    refusals = Refusals()
    asked = [Measured("p", "x", "m"), Measured("p", "y", "m"), Measured("q", "x", "m")]
    for what in asked:
        refusals.of(what).refused(0.0, "no such model")
        assert refusals.refusal(what, 1.0) == (FIRST_REST - 1.0, "no such model")
    assert refusals.refusal(Measured("p", "x", "other"), 0.0) is None
    refusals.forget("p", "x")
    assert [refusals.refusal(what, 1.0) is None for what in asked] == [True, False, False]
    refusals.forget("p")
    assert [refusals.refusal(what, 1.0) is None for what in asked] == [True, True, False]
    for number in range(MAX_BREAKERS):
        refusals.of(Measured("q", "x", str(number)))
    assert refusals.get(asked[2]) is None
