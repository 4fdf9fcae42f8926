"""The one guard of blocks: every scope, namespace and asker."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.cache.answer_rows import Reach
from promptmesh.cache.cid import cid_bytes, cid_of, split
from promptmesh.cache.keys import block_proof, namespace_secret
from promptmesh.cache.namespaces import MAX_NAMESPACES, Namespaces
from promptmesh.node.permissions import Permissions

SWARM = b"s" * 32
CID = cid_bytes(b"root")
SHARED = Reach(frozenset({""}))
TEAM = Reach(frozenset({"team", "club"}))
PUT = Reach(put=True)


class Answers:
    """How far every block goes."""

    def __init__(self, reach: Reach) -> None:
        self.of = reach
        self.asked = 0

    async def reach(self, cid: bytes) -> Reach:
        self.asked += 1
        return self.of


def guard(reach: Reach, swarm_key: bytes | None = SWARM) -> Permissions:
    namespaces = Namespaces()
    if swarm_key is not None:
        namespaces.enter(swarm_key)
    return Permissions(answers=Answers(reach), namespaces=namespaces)


def proof(name: str = "team", peer: str = "bob", cid: bytes = CID, key: bytes = SWARM) -> bytes:
    return block_proof(namespace_secret(key, name), cid, peer)


@pytest.mark.parametrize("peer", ["bob", None])
@pytest.mark.parametrize("given_", [b"", proof(), b"x"])
@pytest.mark.parametrize(("reach", "served"), [(SHARED, True), (PUT, True), (Reach(), False)])
async def test_what_is_for_all_and_what_for_nobody(
    reach: Reach, served: bool, given_: bytes, peer: str | None
) -> None:
    assert await guard(reach).may_serve(peer, CID, given_) is served


@pytest.mark.parametrize(
    ("peer", "given_", "served"),
    [
        ("bob", proof(), True),
        ("bob", proof("club"), True),
        ("bob", b"", False),
        ("bob", proof("other"), False),
        ("bob", proof(""), False),
        ("bob", proof(peer="eve"), False),
        ("eve", proof(), False),
        ("bob", proof(cid=cid_bytes(b"other")), False),
        ("bob", proof(cid=cid_of(split(CID)[1], "raw")), False),
        ("bob", proof(key=b"t" * 32), False),
        ("bob", proof()[:31], False),
        (None, proof(peer=""), False),
        (None, proof(), False),
    ],
)
async def test_a_named_namespace_wants_a_proof(
    peer: str | None, given_: bytes, served: bool
) -> None:
    assert await guard(TEAM).may_serve(peer, CID, given_) is served


async def test_without_a_mesh_nothing_proves_anything() -> None:
    none = guard(TEAM, None)
    assert not await none.may_serve(
        "bob", CID, block_proof(namespace_secret(None, "team"), CID, "bob")
    )
    assert await guard(SHARED, None).may_serve("bob", CID)


async def test_the_next_mesh_has_other_secrets() -> None:
    namespaces = Namespaces()
    namespaces.enter(SWARM)
    permissions = Permissions(answers=Answers(TEAM), namespaces=namespaces)
    assert await permissions.may_serve("bob", CID, proof())
    namespaces.enter(b"t" * 32)
    assert not await permissions.may_serve("bob", CID, proof())
    assert await permissions.may_serve("bob", CID, proof(key=b"t" * 32))


async def test_a_peer_whose_permission_is_taken_away_gets_nothing() -> None:
    answers = Answers(SHARED)
    permissions = Permissions(
        answers=answers, namespaces=Namespaces(), may_use_cache=lambda peer: peer != "eve"
    )
    assert not await permissions.may_serve("eve", CID)
    assert answers.asked == 0
    assert await permissions.may_serve("bob", CID)
    assert await permissions.may_serve(None, CID)


@given(st.binary(max_size=64))
async def test_no_other_bytes_are_a_proof(given_: bytes) -> None:
    assert not await guard(TEAM).may_serve("bob", CID, given_)


def test_namespaces_are_remembered_but_not_all_of_them() -> None:
    namespaces = Namespaces()
    assert namespaces.of("") is None
    namespaces.enter(SWARM)
    first = namespaces.of("0")
    assert first is not None
    assert first.secret == namespace_secret(SWARM, "0")
    for number in range(MAX_NAMESPACES + 1):
        assert namespaces.of(str(number)) is not None
    assert len(namespaces._known) <= MAX_NAMESPACES
    assert namespaces.of("0") == first
