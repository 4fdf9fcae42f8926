"""CIDs as links: any version, codec, hash and base in, the same bytes out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multiformats import CID

from promptmesh.cache import varint
from promptmesh.cache.cid import cid_bytes, parse_cid
from promptmesh.cache.links import link_text, parse_link, stored, version_0

V0 = "QmbFMke1KXqnYyBBWxB74N4c5SBnJMVAiMNRcGu6x1AwQH"
BASES = ["base32", "base32upper", "base58btc", "base64url", "base36", "base16", "base32z"]


@given(st.binary(max_size=20), st.sampled_from(BASES))
def test_all_bases_name_the_same_bytes(block: bytes, base: str) -> None:
    cid = cid_bytes(block, "dag-pb")
    text = str(CID.decode(cid).set(base=base))
    assert parse_link(text) == cid == parse_cid(text)


@given(st.sampled_from(["sha2-512", "sha3-256", "identity"]), st.sampled_from(["git-raw", "json"]))
def test_links_may_be_of_other_hashes_and_codecs(hashing: str, codec: str) -> None:
    theirs = CID("base32", 1, codec, (hashing, b"12345678" * (8 if "512" in hashing else 4)))
    assert parse_link(str(theirs)) == bytes(theirs)
    assert link_text(bytes(theirs)) == str(theirs)
    with pytest.raises(ValueError, match="follow"):
        stored(bytes(theirs))


def test_version_0_is_kept_and_followed() -> None:
    cid = parse_link(V0)
    assert link_text(cid) == V0
    assert stored(cid) == parse_cid(V0)
    assert version_0(stored(cid)) == cid


@given(st.text(max_size=80) | st.text("bafyQmzuk23456", max_size=80))
def test_other_text_raises_one_kind(text: str) -> None:
    try:
        cid = parse_link(text)
    except ValueError:
        return
    assert parse_link(link_text(cid)) == cid


@pytest.mark.parametrize(
    "text",
    [
        "",
        "b",
        "Q" * 46,
        V0[:-1],
        V0 + "1",
        V0.lower(),
        "bafkqaab",
        "B" + "A" * 58,
        " " + V0,
        "z" * 400,
        link_text(cid_bytes(b"")) + "a",
        link_text(cid_bytes(b"")).upper()[:-1] + "u",
    ],
)
def test_what_is_no_cid(text: str) -> None:
    with pytest.raises(ValueError, match="CID"):
        parse_link(text)


@given(st.integers(0, 2**64 - 1), st.binary(max_size=3))
def test_varints_come_back(number: int, behind: bytes) -> None:
    encoded = varint.encode(number)
    assert varint.decode(encoded + behind, 0) == (number, len(encoded))


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x00", b"\xff" * 9 + b"\x02", b"\x80" * 11])
def test_what_is_no_varint(data: bytes) -> None:
    with pytest.raises(ValueError, match="varint"):
        varint.decode(data, 0)
