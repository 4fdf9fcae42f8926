"""dag-json: strict both ways, and the same bytes as another implementation."""

from __future__ import annotations

import json
from typing import Any

import cbrrr
import dag_json as oracle
import multiformats
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.cache.cid import cid_bytes
from promptmesh.cache.dag_json import MAX_DEPTH, block_as_json, decode, encode
from promptmesh.cache.links import link_text

CID = cid_bytes(b"x")
V0 = "QmbFMke1KXqnYyBBWxB74N4c5SBnJMVAiMNRcGu6x1AwQH"
#: A hash and a codec that this node does not keep.
GIT = "baf4bcfg2vt2b4dpl6noxqhi6tzdlbe6sppvlhmq"

#: Keys that make no map look like a link.
keys = st.text(max_size=5).filter(lambda key: key != "/")
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.binary(max_size=20).map(lambda block: cbrrr.CID(cid_bytes(block)))
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4)
)


def as_oracle(value: Any) -> Any:
    if isinstance(value, cbrrr.CID):
        return multiformats.CID.decode(value.cid_bytes)
    if isinstance(value, dict):
        return {key: as_oracle(item) for key, item in value.items()}
    return [as_oracle(item) for item in value] if isinstance(value, list) else value


@given(values)
def test_a_value_comes_back(value: Any) -> None:
    encoded = encode(value)
    assert decode(encoded) == value
    assert encode(decode(encoded)) == encoded


@given(values)
def test_the_bytes_are_those_of_another_implementation(value: Any) -> None:
    assert encode(value) == oracle.encode(as_oracle(value))


@given(values)
def test_a_dag_cbor_block_reads_the_same(value: Any) -> None:
    block = cbrrr.encode_dag_cbor(value)
    assert json.loads(encode(value)) == json.loads(json.dumps(block_as_json(block)))


@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,/\\bytesua0123e.- \n').map(str.encode))
def test_strange_bytes_raise_one_kind(data: bytes) -> None:
    try:
        value = decode(data)
    except ValueError:
        return
    assert decode(encode(value)) == value


def test_keys_are_sorted_by_their_bytes() -> None:
    assert encode({"b": 1, "aa": 2, "é": 3, "a": 4}) == '{"a":4,"aa":2,"b":1,"é":3}'.encode()


def test_space_and_order_are_free_to_read() -> None:
    assert decode(b' {"b" : [ 1 , 2.0 ],\n"a": null} ') == {"a": None, "b": [1, 2.0]}


@pytest.mark.parametrize("text", [V0, GIT, link_text(CID)])
def test_links_keep_their_bytes(text: str) -> None:
    link = decode(b'{"/":"%s"}' % text.encode())
    assert isinstance(link, cbrrr.CID)
    assert encode(link) == b'{"/":"%s"}' % text.encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"1 2",
        b"\xff",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"18446744073709551616",
        b"1" * 5000,
        b'{"a":1,"a":2}',
        b'"\\ud800"',
        b'{"\\udc00":1}',
        b'{"/":"nothing"}',
        b'{"/":"%s","a":1}' % V0.encode(),
        b'{"/":{"bytes":"AQ=="}}',
        b'{"/":{"bytes":"AR"}}',
        b'{"/":{"bytes":"A*"}}',
        b'{"/":{"bytes":"AQ","a":1}}',
        b'{"/":{"bytes":"AQ"},"a":1}',
        b"[" * 100_000 + b"]" * 100_000,
        b"[" * (MAX_DEPTH + 1) + b"1" + b"]" * (MAX_DEPTH + 1),
    ],
    ids=lambda data: repr(data[:24]),
)
def test_what_two_readers_could_take_for_two_things(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(data)


@pytest.mark.parametrize(
    "value",
    [cbrrr.CID(b"no CID"), {"/": "x"}, {"/": {"bytes": "AQ"}}, float("nan"), float("inf")],
    ids=repr,
)
def test_what_has_no_dag_json(value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        encode(value)


def test_a_slash_that_is_no_link_is_a_key() -> None:
    assert decode(encode({"/": 5, "a": {"/": {"bytes": 1}}})) == {"/": 5, "a": {"/": {"bytes": 1}}}


def test_depth_is_bounded() -> None:
    value: Any = 1
    for _ in range(MAX_DEPTH):
        value = [value]
    assert decode(encode(value)) == value
    with pytest.raises(ValueError, match="deep"):
        encode([value])
    with pytest.raises(ValueError, match="deep"):
        block_as_json(b"\x81" * 100_000 + b"\x01")
