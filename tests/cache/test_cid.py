import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.bitswap.cid import compute_cid_v1
from multiformats import CID, multibase

from promptmesh.cache.cid import (
    PREFIX,
    Cid,
    Codec,
    cid_bytes,
    cid_of,
    cid_text,
    digests_from,
    parse_cid,
    split,
    verify,
)

CODECS: list[Codec] = list(PREFIX)
ANSWER = "bafyreigdmqpykrgxyaxtlafqpqhzrb7qy2rh75nldvfd4tucqmqqme5yje"
BASES = [base.name for base in multibase.table() if base.name not in ("identity", "base256emoji")]


@pytest.mark.parametrize("codec", CODECS)
@given(block=st.binary(max_size=300))
def test_equals_multiformats_and_libp2p(codec: Codec, block: bytes) -> None:
    cid = cid_bytes(block, codec)
    theirs = CID("base32", 1, codec, ("sha2-256", hashlib.sha256(block).digest()))
    assert cid == bytes(theirs)
    assert cid == compute_cid_v1(block, codec)
    assert cid_text(cid) == str(theirs) == Cid(cid).text
    assert parse_cid(str(theirs)) == cid
    assert split(cid) == (codec, hashlib.sha256(block).digest())
    assert cid_of(hashlib.sha256(block).digest(), codec) == cid


def test_known_cids() -> None:
    assert cid_text(cid_bytes(b"", "raw")) == (
        "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
    )
    # {} in dag-cbor
    assert cid_text(cid_bytes(b"\xa0")) == (
        "bafyreigbtj4x7ip5legnfznufuopl4sg4knzc2cof6duas4b3q2fy6swua"
    )
    assert len(cid_bytes(b"")) == 36
    assert len(cid_bytes(b"", "dag-json")) == 37


@pytest.mark.parametrize("base", BASES)
def test_every_text_base_comes_back(base: str) -> None:
    cid = parse_cid(ANSWER)
    text = cid_text(cid, base)
    assert parse_cid(text) == cid
    assert text == multibase.encode(cid, base)


@pytest.mark.parametrize("base", ["identity", "base256emoji", "base31", "", "sha256"])
def test_unknown_base_is_an_error(base: str) -> None:
    with pytest.raises(ValueError, match="base"):
        cid_text(parse_cid(ANSWER), base)


def test_version_0_becomes_version_1() -> None:
    cid = parse_cid("QmbWqxBEKC3P8tqsKc98xmWNzrzDtRLMiMPL8wBuTGsMnR")
    assert split(cid)[0] == "dag-pb"
    assert cid_text(cid) == "bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "printable"),
        ("\x00\x01\x71\x12\x20" + "a" * 32, "printable"),
        ("b", "not a CID"),
        ("é", "not a CID"),
        (ANSWER[:-1], "not a CID"),
        (ANSWER + "a", "not a CID"),
        (ANSWER + "=", "its usual form"),
        (" " + ANSWER, "not a CID"),
        ("b" + ANSWER[1:].upper(), "its usual form"),
        ("z" + "1" * 100_000, "longer than"),
        ("f01711210" + "00" * 16, "cut"),
        ("f01711220" + "00" * 31, "not a CID"),
        ("f01711340" + "00" * 64, "sha2-512"),
        ("f01001220" + "00" * 32, "identity"),
        ("f02711220" + "00" * 32, "not a CID"),
    ],
)
def test_what_is_no_cid_is_refused_and_said_why(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_cid(text)


@given(st.text(max_size=80))
def test_any_text_gives_a_cid_or_a_value_error(text: str) -> None:
    try:
        split(parse_cid(text))
    except ValueError as error:
        assert type(error) is ValueError  # noqa: PT017


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_verify(block: bytes, other: bytes) -> None:
    for codec in CODECS:
        cid = cid_bytes(block, codec)
        assert verify(cid, block)
        assert verify(cid, other) == (block == other)
        assert not verify(cid[:-1], block)
        assert not verify(cid + b"\0", block)
    assert not verify(other, block)


@given(st.binary(max_size=60))
def test_split_refuses_what_we_do_not_use(cid: bytes) -> None:
    with pytest.raises(ValueError, match="CIDv1"):
        split(cid)


# --- the beginning of a CID -----------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32), st.integers(1, 59), st.binary(min_size=32, max_size=32))
def test_a_beginning_names_exactly_the_digests_whose_cids_begin_so(
    digest: bytes, size: int, other: bytes
) -> None:
    text = cid_text(cid_of(digest))
    least, most = digests_from(text[:size])
    assert least <= digest <= most
    assert (least <= other <= most) is cid_text(cid_of(other)).startswith(text[:size])


@pytest.mark.parametrize(
    "start", ["", "x", "B", "bafk", "bafyrei!", "bafyrei1", "bafyreiz", "Bafyrei", "é", "b" * 400]
)
def test_what_no_cid_of_an_answer_begins_with(start: str) -> None:
    with pytest.raises(ValueError, match="no CID of an answer"):
        digests_from(start)
