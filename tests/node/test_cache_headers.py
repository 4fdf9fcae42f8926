"""`Age`, `ETag` and `Cache-Status`, read by a parser of structured fields (RFC 8941)."""

from typing import Any

import http_sf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.cache.keys import key_text
from promptmesh.node.cache_headers import cache_headers
from promptmesh.providers.base import Origin

CID = "bafyreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"


def status(headers: list[tuple[str, str]]) -> dict[str, Any]:
    """The parameters of `Cache-Status`, which must be a list of one token."""
    members: Any = http_sf.parse(dict(headers)["cache-status"].encode(), tltype="list")
    ((name, parameters),) = members
    assert isinstance(name, http_sf.Token)
    assert str(name) == "promptmesh"
    return {
        key: str(value) if isinstance(value, http_sf.Token) else value
        for key, value in parameters.items()
    }


@pytest.mark.parametrize(
    ("origin", "more", "expected"),
    [
        (
            Origin(cache="hit-local", cid=CID, age=3.9, ttl=29.9),
            {},
            {"hit": True, "ttl": 29, "key": "ab"},
        ),
        (
            Origin(cache="hit-mesh", cid=CID, age=0.0, ttl=0.0),
            {},
            {"hit": True, "ttl": 0, "key": "ab", "detail": "mesh"},
        ),
        (Origin(cache="miss"), {}, {"fwd": "miss", "key": "ab"}),
        (Origin(cache="miss"), {"cid": CID}, {"fwd": "miss", "stored": True, "key": "ab"}),
        (
            Origin(cache="miss"),
            {"cid": CID, "refresh": True},
            {"fwd": "request", "stored": True, "key": "ab"},
        ),
        (
            Origin(cache="coalesced"),
            {"cid": CID},
            {"fwd": "miss", "collapsed": True, "stored": True, "key": "ab"},
        ),
        (Origin(cache="bypass"), {}, {"fwd": "bypass"}),
    ],
)
def test_cache_status(origin: Origin, more: dict[str, Any], expected: dict[str, Any]) -> None:
    assert status(cache_headers(origin, "ab", **more)) == expected


def test_age_and_etag_are_there_where_they_are_known() -> None:
    headers = dict(cache_headers(Origin(cache="hit-local", cid=CID, age=3.9, ttl=1.0), "ab"))
    assert (headers["age"], headers["etag"]) == ("3", f'"{CID}"')
    assert sorted(dict(cache_headers(Origin(), "ab"))) == ["cache-status"]
    assert dict(cache_headers(Origin(), "ab", cid=CID))["etag"] == f'"{CID}"'


@given(
    st.binary(min_size=32, max_size=32),
    st.sampled_from(["base2", "base16", "base32", "base32z", "base36", "base58btc", "base64",
                     "base64url", "base64pad", "proquint"]),
    st.floats(0, 1e9),
)  # fmt: skip
def test_keys_in_every_form_can_be_read(key: bytes, base: str, ttl: float) -> None:
    origin = Origin(cache="hit-local", cid=CID, ttl=ttl)
    for written in (key_text(key), key_text(key, "cid", base)):
        assert status(cache_headers(origin, written))["key"] == written
