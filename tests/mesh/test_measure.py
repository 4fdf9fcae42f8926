"""What this node learns of providers."""

import pytest

from promptmesh.mesh.backend_id import BackendId, Measured
from promptmesh.mesh.measure import (
    ERROR_HALF_LIFE,
    LONGEST_ROW,
    MAX_MEASURED,
    Experience,
    Fault,
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


def test_a_refusal_opens_no_breaker_and_ends_when_it_may_have_been_mended() -> None:
    seen = Experience()

    def refused() -> bool:
        return seen.refusals.refusal(M, 0.5) is not None

    def refuse() -> None:
        for _ in range(5):
            seen.begin(M)
            seen.failed(M, Fault.REFUSED, "401", 0.0, None, seconds=0.1)
            seen.end(M)
        assert refused()

    refuse()
    assert seen.breakers.refusal(B, 0.5) is None
    seen.health(B, ready=True)
    assert refused()  # it was ready all the time
    seen.health(B, ready=False)
    assert refused()
    seen.health(B, ready=True)
    assert not refused()
    refuse()
    seen.connection("peer", True)
    assert not refused()
    refuse()
    seen.begin(M)
    seen.succeeded(M)
    assert not refused()
