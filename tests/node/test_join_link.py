"""Join links: whole ones come back, and every way of spoiling one is told apart."""

from __future__ import annotations

import base64
import hashlib
import random

import pytest
from base58 import b58encode
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.node.join_link import MAX_ADDRESSES, PREFIX, JoinLink, decode, encode

KEY = bytes(range(32))
PEER = "12D3KooWGRUQyF9z5ZJxkYbW3pB8xYyK8mJm3bS9Fh1m5W8mTzUu"
ADDRESSES = (f"/ip4/192.168.1.5/tcp/7412/p2p/{PEER}", f"/dns4/alpha.lan/tcp/7412/p2p/{PEER}")
LINK = encode(JoinLink(KEY, ADDRESSES))


def peer_ids() -> st.SearchStrategy[str]:
    """Ids of Ed25519 peers, and older ones by digest."""
    ed25519 = st.binary(min_size=32, max_size=32).map(lambda b: b"\x00\x24\x08\x01\x12\x20" + b)
    digest = st.binary(min_size=32, max_size=32).map(lambda b: b"\x12\x20" + b)
    return (ed25519 | digest).map(lambda raw: b58encode(raw).decode())


def places() -> st.SearchStrategy[str]:
    port = st.integers(1, 65535).map(str)
    ip4 = st.ip_addresses(v=4).map(lambda ip: f"/ip4/{ip}/tcp/")
    # IPv4-mapped ones have two spellings.
    ip6 = st.ip_addresses(v=6, network="2000::/3").map(lambda ip: f"/ip6/{ip}/tcp/")
    dns = st.from_regex(r"/dns[46]?/[a-z]{1,20}\.lan/tcp/", fullmatch=True)
    return st.builds(str.__add__, ip4 | ip6 | dns, port)


@given(
    st.binary(min_size=32, max_size=32),
    st.lists(st.tuples(places(), peer_ids()), min_size=1, max_size=MAX_ADDRESSES),
)
def test_a_link_comes_back_whole(key: bytes, pairs: list[tuple[str, str]]) -> None:
    addresses = tuple(f"{place}/p2p/{peer}" for place, peer in pairs)
    back = decode(encode(JoinLink(key, addresses)))
    assert back.key == key
    assert sorted(back.addresses) == sorted(addresses)
    assert back.peers == {peer for _, peer in pairs}


def test_it_is_short_and_safe_to_paste() -> None:
    link = encode(JoinLink(KEY, ADDRESSES[:1]))
    assert len(link) < 140
    assert link.removeprefix(PREFIX).replace("-", "").replace("_", "").isalnum()


def test_a_circuit_address_travels() -> None:
    relay = "12D3KooWLRPJAA5o6yTpMSsLmeAnX3T5cqDhNpDqYBpQVYbRdQMn"
    address = f"/ip4/192.168.1.5/tcp/7412/p2p/{relay}/p2p-circuit/p2p/{PEER}"
    assert decode(encode(JoinLink(KEY, (address,)))).addresses == (address,)


@pytest.mark.parametrize(
    "pasted",
    [
        f"  {LINK}\n",
        f"<{LINK}>",
        f'"{LINK}"',
        LINK[:60] + "\n   " + LINK[60:],
        LINK.replace("promptmesh", "PromptMesh"),
        LINK + "==",
    ],
)
def test_what_copying_adds_does_no_harm(pasted: str) -> None:
    assert decode(pasted) == JoinLink(KEY, ADDRESSES)


def test_a_cut_link_is_told_as_such() -> None:
    for length in range(len(PREFIX), len(LINK)):
        with pytest.raises(ValueError, match="is cut off"):
            decode(LINK[:length])


def test_how_much_is_missing_is_said() -> None:
    with pytest.raises(ValueError, match=rf"9 of its {len(LINK)} characters are missing"):
        decode(LINK[:-9])


@pytest.mark.parametrize("text", ["", "hello", LINK[1:], "promptmesh://", "https://x/" + LINK])
def test_what_is_no_link_is_told_as_such(text: str) -> None:
    with pytest.raises(ValueError, match="is not a join link"):
        decode(text)


def test_a_link_with_more_behind_it() -> None:
    with pytest.raises(ValueError, match="3 characters too many"):
        decode(LINK + "abc")


def test_much_too_much() -> None:
    with pytest.raises(ValueError, match="much too long"):
        decode(PREFIX + "A" * 100_000)


def test_every_changed_character_is_noticed() -> None:
    rng = random.Random(1)
    # The last one holds bits that mean nothing.
    for position in range(len(PREFIX), len(LINK) - 1):
        other = rng.choice([c for c in "abcXYZ019-_" if c != LINK[position]])
        with pytest.raises(ValueError, match=r"garbled|cut off|too many|version"):
            decode(LINK[:position] + other + LINK[position + 1 :])


@pytest.mark.parametrize("char", ["!", "\u00e9", "/", "."])
def test_a_foreign_character_is_garbled(char: str) -> None:
    with pytest.raises(ValueError, match="garbled"):
        decode(LINK[:50] + char + LINK[51:])


def test_a_later_version() -> None:
    code = base64.urlsafe_b64encode(b"\x02" + b"rest of a later version").decode()
    with pytest.raises(ValueError, match="of version 2, this promptmesh understands version 1"):
        decode(PREFIX + code)


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda b: base64.b64encode(b).decode()))
def test_anything_else_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        decode(PREFIX + text)


@given(st.binary(max_size=150) | st.integers(1, 255).map(lambda n: bytes([n]) + b"\x01\x00" * 50))
def test_a_link_made_wrongly_is_refused(body: bytes) -> None:
    """Its checksum is right, what it holds is not."""
    body = KEY + body
    head = b"\x01" + (len(body) + 4).to_bytes(2, "big") + body
    whole = head + hashlib.sha256(head).digest()[:4]
    text = PREFIX + base64.urlsafe_b64encode(whole).decode().rstrip("=")
    try:
        link = decode(text)
    except ValueError:
        return
    assert set(decode(encode(link)).addresses) == set(link.addresses)


@pytest.mark.parametrize(
    ("key", "addresses", "said"),
    [
        (KEY[:-1], ADDRESSES, "has 32 bytes, not 31"),
        (KEY, (), "1 to 8 addresses"),
        (KEY, ADDRESSES * 5, "1 to 8 addresses"),
        (KEY, ("/ip4/192.168.1.5/tcp/7412",), "/p2p/ with the peer's id is missing"),
        (KEY, ("garbage",), "expected a multiaddr"),
        (KEY, (f"/dns4/{'a' * 300}/tcp/1/p2p/{PEER}",), "too long"),
    ],
)
def test_a_link_that_cannot_be_made(key: bytes, addresses: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        encode(JoinLink(key, addresses))


def test_the_secret_does_not_show() -> None:
    link = JoinLink(b"secret-secret-secret-secret-secr", ADDRESSES)
    assert "secret" not in repr(link)
