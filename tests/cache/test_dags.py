"""Paths through blocks, and what blocks link to."""

from __future__ import annotations

from typing import Any

import cbrrr
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.cache import dag_pb, dags
from promptmesh.cache.cid import Codec, cid_bytes, cid_text
from promptmesh.cache.dag_pb import Link, Node
from promptmesh.cache.dags import Found, Path, PathError, parse_path, resolve
from promptmesh.cache.links import link_text, version_0

BLOCKS: dict[bytes, bytes] = {}


def put(value: Any, codec: Codec = "dag-cbor") -> bytes:
    block = dags.encode(codec, value)
    cid = cid_bytes(block, codec)
    BLOCKS[cid] = block
    return cid


async def fetch(cid: bytes) -> bytes:
    return BLOCKS[cid]


RAW = put(b"bytes", "raw")
LEAF = put({"text": "hi", "n": [1, {"deep": None}]})
FILE = cid_bytes(
    block := dag_pb.encode(
        Node((Link(version_0(cid_bytes(b"", "dag-pb")), 1, "x"), Link(RAW, 5, "y")))
    ),
    "dag-pb",
)
BLOCKS[FILE] = block
ROOT = put(
    {
        "leaf": cbrrr.CID(LEAF),
        "list": [cbrrr.CID(RAW), {"again": cbrrr.CID(LEAF)}],
        "file": cbrrr.CID(version_0(FILE)),
        "odd": cbrrr.CID(bytes.fromhex("01550000")),
    },
    "dag-json",
)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("", Found(ROOT, (), dags.decode("dag-json", BLOCKS[ROOT]))),
        ("/list/1", Found(ROOT, ("list", "1"), {"again": cbrrr.CID(LEAF)})),
        ("/leaf/text", Found(LEAF, ("text",), "hi")),
        ("/leaf/n/1/deep", Found(LEAF, ("n", "1", "deep"), None)),
        ("/list/1/again", Found(LEAF, (), {"text": "hi", "n": [1, {"deep": None}]})),
        ("/list/0", Found(RAW, (), b"bytes")),
        ("/file/y", Found(RAW, (), b"bytes")),
        ("/file/Links/1/Tsize", Found(FILE, ("Links", "1", "Tsize"), 5)),
        ("/leaf//n/0/", Found(LEAF, ("n", "0"), 1)),
    ],
)
@pytest.mark.parametrize("start", ["", "/ipfs/", "ipfs://"])
async def test_paths_lead_through_links(start: str, path: str, found: Found) -> None:
    assert await resolve(fetch, parse_path(start + cid_text(ROOT) + path)) == found


@pytest.mark.parametrize(
    "path", ["no", "leaf/text/0", "leaf/n/2", "leaf/n/-1", "leaf/n/01x", "list/0/x", "odd", "odd/x"]
)
async def test_paths_that_lead_nowhere(path: str) -> None:
    with pytest.raises(PathError, match=r"no link named|follow"):
        await resolve(fetch, parse_path(f"{cid_text(ROOT)}/{path}"))


async def test_a_block_that_is_not_what_its_codec_says() -> None:
    cid = cid_bytes(b"\xff", "dag-cbor")
    BLOCKS[cid] = b"\xff"
    with pytest.raises(PathError, match="is not dag-cbor"):
        await resolve(fetch, Path(cid))


@given(st.text(max_size=30) | st.text(max_size=10).map(lambda end: f"/ipfs/{cid_text(ROOT)}/{end}"))
def test_any_text_is_a_path_or_one_kind_of_error(text: str) -> None:
    try:
        path = parse_path(text)
    except PathError:
        return
    assert path.root == ROOT


@pytest.mark.parametrize(
    "text", ["", "/", "/ipfs/", "/ipns/" + cid_text(ROOT), "x" * 5000, cid_text(ROOT) + "/a" * 65]
)
def test_what_is_no_path(text: str) -> None:
    with pytest.raises(PathError, match="path"):
        parse_path(text)


def test_links_come_once_and_in_order() -> None:
    odd = bytes.fromhex("01550000")
    assert dags.links("dag-json", BLOCKS[ROOT]) == [version_0(FILE), LEAF, RAW, odd]
    assert dags.links("dag-pb", BLOCKS[FILE]) == [version_0(cid_bytes(b"", "dag-pb")), RAW]
    assert dags.links("raw", b"anything") == []


def test_links_are_bounded() -> None:
    many: Any = [
        cbrrr.CID(cid_bytes(bytes([n % 256, n // 256]))) for n in range(dags.MAX_LINKS + 1)
    ]
    with pytest.raises(ValueError, match="links"):
        dags.links("dag-cbor", cbrrr.encode_dag_cbor(many))


@pytest.mark.parametrize(
    ("codec", "value"),
    [
        ("raw", "text"),
        ("dag-pb", {}),
        ("dag-cbor", {1: 2}),
        ("dag-cbor", 2**65),
        ("dag-json", {"/": "x"}),
    ],
)
def test_values_that_a_codec_does_not_take(codec: Codec, value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        dags.encode(codec, value)


def test_the_name_of_a_link_in_a_message() -> None:
    assert link_text(version_0(FILE)).startswith("Qm")
