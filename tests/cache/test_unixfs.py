"""Files as IPFS blocks: the CIDs that Kubo gives, and reading any part of one again."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptmesh.cache import dag_pb, unixfs
from promptmesh.cache.cid import cid_bytes
from promptmesh.cache.dag_pb import Link, Node, field
from promptmesh.cache.links import link_text, stored
from promptmesh.cache.unixfs import LEAF, MAX_LINKS, NotAFile


def content(size: int) -> bytes:
    return (hashlib.sha256(b"x").digest() * (size // 32 + 1))[:size]


#: Size of `content` -> what `ipfs add` of Kubo 0.22 names it. The last two have two levels.
KUBO = {
    0: "QmbFMke1KXqnYyBBWxB74N4c5SBnJMVAiMNRcGu6x1AwQH",
    1: "QmPbKuJAWyiUSzxHdN2GD4wckHbcS9JLX6RaGWkGMc7ENu",
    1000: "QmeiNMBpLeSRdcDXgetB51FnzbTA4eBkjbEEtFhq9ySsrn",
    LEAF: "Qma6BCRmuWrR41JwQ4ckA4FCHXkvuAMrkowkqGizF6s2Wm",
    LEAF + 1: "QmcghJ1qEMZsVPGMBiULVhW4wusxbMRsWbw5fdLPRD5e73",
    1_000_000: "QmU6TQdrrVeTtESERBkx1qmjA1k64DQQASwSoyx1HUQMuf",
    LEAF * MAX_LINKS: "QmSkKpkMj8on3WYwac1tmNunKjXzPH9zsdf61p4E2icPcc",
    LEAF * MAX_LINKS + 1: "QmeTFnc8BDt5QZ1oPP9mjCZEWHZBfZmQqytKX16vsq2L8h",
    LEAF * (MAX_LINKS + 1) + 5: "QmZQSVx5buUDVHUN89xDNhGH6N3HTwdUVBDdwShawnqmY5",
}


@pytest.mark.parametrize(("size", "cid"), KUBO.items())
def test_the_cids_are_those_of_kubo(size: int, cid: str) -> None:
    *_, root = unixfs.build(content(size), version=0)
    assert link_text(root.cid) == cid
    assert root.content == size


def test_version_1_has_raw_leaves() -> None:
    # `echo hello | ipfs add --cid-version 1`
    (leaf,) = unixfs.build(b"hello\n")
    assert link_text(leaf.cid) == "bafkreicysg23kiwv34eg2d7qweipxwosdo2py4ldv42nbauguluen5v6am"
    (leaf,) = unixfs.build(b"hello\n", version=0, raw_leaves=True)
    assert leaf.cid == cid_bytes(b"hello\n", "raw")
    (leaf,) = unixfs.build(b"hello\n", version=1, raw_leaves=False)
    assert stored(leaf.cid) == leaf.cid != cid_bytes(b"hello\n", "raw")


class Store:
    """Blocks by their CID of version 1."""

    def __init__(self, *blocks: unixfs.Built) -> None:
        self.blocks = {stored(block.cid): block.block for block in blocks}
        self.read = 0

    async def fetch(self, cid: bytes) -> bytes:
        self.read += 1
        return self.blocks[cid]


async def read(store: Store, cid: bytes, offset: int = 0, length: int | None = None) -> bytes:
    return b"".join(
        [piece async for piece in unixfs.read(store.fetch, cid, offset=offset, length=length)]
    )


SMALL_FILE = content(LEAF * 3 + 100)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([0, 1]),
    st.integers(0, len(SMALL_FILE) + 10),
    st.none() | st.integers(0, len(SMALL_FILE) + 10),
)
async def test_any_part_is_read(version: int, offset: int, length: int | None) -> None:
    *_, root = blocks = list(unixfs.build(SMALL_FILE, version=version))
    store = Store(*blocks)
    end = None if length is None else offset + length
    assert await read(store, stored(root.cid), offset, length) == SMALL_FILE[offset:end]
    assert store.read <= 1 + (len(SMALL_FILE[offset:end]) + 2 * LEAF - 2) // LEAF
    assert unixfs.file_size(stored(root.cid), root.block) == len(SMALL_FILE)


async def test_a_file_of_two_levels_is_read_where_it_is_asked_for() -> None:
    data = content(LEAF * MAX_LINKS + 1)
    *_, root = blocks = list(unixfs.build(data))
    store = Store(*blocks)
    assert await read(store, root.cid, LEAF * MAX_LINKS - 1) == data[-2:]
    assert store.read == 5


DIRECTORY = dag_pb.encode(Node(data=field(1, 1)))


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (DIRECTORY, "directory"),
        (dag_pb.encode(Node(data=field(1, 4))), "neither a file"),
        (dag_pb.encode(Node()), "neither a file"),
        (b"\x0a", "not a file"),
        (b"\xff\xff", "not a file"),
        (dag_pb.encode(Node((Link(cid_bytes(b"")),), field(1, 2))), "do not fit"),
        (dag_pb.encode(Node((Link(b"\x01\x02"),), field(1, 2) + field(4, 1))), "not a file"),
    ],
    ids=["directory", "symlink", "empty", "cut", "garbage", "sizes", "link"],
)
async def test_what_is_no_file(block: bytes, says: str) -> None:
    cid = cid_bytes(block, "dag-pb")
    store = Store(unixfs.Built(cid, block, len(block), 0))
    with pytest.raises(NotAFile, match=says):
        await read(store, cid)
    with pytest.raises(NotAFile, match=says):
        unixfs.file_size(cid, block)


async def test_a_file_has_a_bounded_number_of_levels() -> None:
    cid, blocks = cid_bytes(b"x", "raw"), [unixfs.Built(cid_bytes(b"x", "raw"), b"x", 1, 1)]
    for _ in range(unixfs.MAX_LEVELS + 1):
        block = dag_pb.encode(Node((Link(cid, 1),), field(1, 2) + field(3, 1) + field(4, 1)))
        cid = cid_bytes(block, "dag-pb")
        blocks.append(unixfs.Built(cid, block, len(block), 1))
    with pytest.raises(NotAFile, match="levels"):
        await read(Store(*blocks), cid)


@given(
    st.lists(
        st.builds(
            Link,
            st.binary(min_size=1, max_size=40),
            st.none() | st.integers(0, 2**64 - 1),
            st.none() | st.text(max_size=5),
        ),
        max_size=4,
    ).map(tuple),
    st.none() | st.binary(max_size=20),
)
def test_dag_pb_comes_back(links: tuple[Link, ...], data: bytes | None) -> None:
    node = Node(links, data)
    assert dag_pb.decode(dag_pb.encode(node)) == node


@given(st.binary(max_size=60))
def test_strange_blocks_raise_one_kind(block: bytes) -> None:
    try:
        node = dag_pb.decode(block)
    except ValueError:
        return
    assert dag_pb.encode(node) == block
