"""Headers stand over the body's fields, and a wrong one is refused."""

from collections.abc import Mapping
from typing import NamedTuple

import pytest

from promptmesh.node.request_headers import forbid_storing, with_headers
from promptmesh.providers.base import CacheControl, GenerateRequest, RequestRejected, TimeLimits


class Http(NamedTuple):
    headers: Mapping[str, str]


BODY = GenerateRequest(
    model="m", messages=(), provider="body", cache=CacheControl(ttl=5, namespace="n")
)


def test_nothing_said_changes_nothing() -> None:
    assert with_headers(BODY, Http({"accept": "*/*"})) is BODY


def test_headers_stand_over_the_body() -> None:
    request = with_headers(
        BODY,
        Http(
            {
                "x-promptmesh-provider": "header",
                "x-promptmesh-policy": "least_loaded",
                "x-promptmesh-priority": "background",
                "x-promptmesh-deadline-s": "2.5",
                "x-promptmesh-cache-scope": "local",
                "x-promptmesh-cache-min-agreement": "2",
            }
        ),
    )
    assert (request.provider, request.policy, request.deadline) == ("header", "least_loaded", 2.5)
    assert request.priority == "background"
    assert request.cache == CacheControl(ttl=5, namespace="n", scope="local", min_agreement=2)


def test_yes_and_no() -> None:
    assert BODY.hedge is None
    for text, hedge in (("true", True), ("1", True), ("False", False), ("0", False)):
        assert with_headers(BODY, Http({"x-promptmesh-hedge": text})).hedge is hedge
    with pytest.raises(RequestRejected, match="'maybe' is not true or false"):
        with_headers(BODY, Http({"x-promptmesh-hedge": "maybe"}))


@pytest.mark.parametrize(
    ("name", "value", "forbidden"),
    [
        ("cache-control", "no-store", True),
        ("cache-control", "max-age=5, No-Store", True),
        ("cache-control", "no-cache", False),
        ("x-promptmesh-cache-mode", "bypass", True),
        ("x-promptmesh-cache-mode", "refresh", False),
        ("accept", "*/*", False),
    ],
)
def test_what_forbids_to_store(name: str, value: str, forbidden: bool) -> None:
    http = Http({name: value})
    assert forbid_storing(http) is forbidden
    assert (with_headers(BODY, http).cache.mode == "bypass") is forbidden


def test_time_limits_stand_over_the_bodys_one_by_one() -> None:
    body = GenerateRequest(model="m", messages=(), limits=TimeLimits(connect=1.0, gap=2.0))
    said = {"x-promptmesh-first-token-s": "300", "x-promptmesh-gap-s": "4"}
    assert with_headers(body, Http(said)).limits == TimeLimits(
        connect=1.0, first_token=300.0, gap=4.0
    )
    assert with_headers(BODY, Http({"x-promptmesh-connect-s": "9"})).limits == TimeLimits(connect=9)
    for wrong in ("0", "-1", "1e9", "soon"):
        with pytest.raises(RequestRejected):
            with_headers(BODY, Http({"x-promptmesh-gap-s": wrong}))


@pytest.mark.parametrize(
    ("value", "mode", "max_age"),
    [
        ("no-store", "bypass", None),
        ("no-cache", "refresh", None),
        ("no-cache, no-store", "bypass", None),
        ("No-Store, no-cache", "bypass", None),
        ("only-if-cached, max-age=60", "only", 60),
        ("max-age=0", "use", 0),
        ("max-age=soon", "use", None),
        ("private", "use", None),
    ],
)
def test_cache_control(value: str, mode: str, max_age: float | None) -> None:
    cache = with_headers(BODY, Http({"cache-control": value})).cache
    assert (cache.mode, cache.max_age) == (mode, max_age)


@pytest.mark.parametrize(
    "headers",
    [
        {"x-promptmesh-cache-min-agreement": "two"},
        {"x-promptmesh-cache-min-agreement": "0"},
        {"x-promptmesh-policy": "best"},
        {"x-promptmesh-privacy": "none"},
        {"x-promptmesh-priority": "first"},
        {"x-promptmesh-deadline-s": "nan"},
        {"x-promptmesh-deadline-s": "-1"},
        {"x-promptmesh-cache-ttl": "inf"},
        {"x-promptmesh-cache-mode": "maybe"},
    ],
)
def test_a_wrong_header_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(RequestRejected):
        with_headers(BODY, Http(headers))
