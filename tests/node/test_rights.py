"""What each peer may: every change, its trace in the file, and which peer is meant."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import serving

from promptmesh.mesh.peers import PeerTable
from promptmesh.node.api_rights import Change, RightsApi, apply, change_offline, rights_fields
from promptmesh.node.node_database import DatabaseError, NodeDatabase
from promptmesh.node.rights import RIGHTS, Right, Rights, UnknownPeer, find_peer, unstored
from promptmesh.node.routes import Routes
from promptmesh.providers.base import CacheControl, CacheOnlyMiss, GenerateRequest

OWN, BOB, EVE = "12D3KooWown", "12D3KooWbob", "12D3KooWeve"


@pytest.fixture
def database() -> Iterator[NodeDatabase]:
    database = NodeDatabase(None)
    yield database
    database.close()


def test_everybody_may_everything_at_first(database: NodeDatabase) -> None:
    rights = Rights(database)
    assert all(rights.may(BOB, right) for right in RIGHTS)
    assert rights.may_connect(BOB)
    assert rights.why_not_ask(BOB) == ""
    assert not rights.restricted()


def test_one_right_is_taken_and_no_other(database: NodeDatabase) -> None:
    rights = Rights(database)
    assert str(rights.deny(BOB, ["serve"])) == "denied: serve"
    assert not rights.may_serve(BOB)
    assert rights.may_serve(EVE)
    assert rights.may_cache(BOB)
    assert rights.may_connect(BOB)
    assert rights.why_not_ask(BOB) == ""
    rights.deny(BOB, ["ask"])
    assert "may not be asked" in rights.why_not_ask(BOB)
    rights.allow(BOB, ["serve"])
    assert rights.may_serve(BOB)
    assert rights.why_not_ask(BOB)


def test_a_block_takes_all_and_any_right_given_back_ends_it(database: NodeDatabase) -> None:
    rights = Rights(database)
    assert str(rights.block(BOB)) == "blocked"
    assert not any(rights.may(BOB, right) for right in RIGHTS)
    assert not rights.may_connect(BOB)
    assert "is blocked" in rights.why_not_ask(BOB)
    rights.deny(BOB, ["ask"])
    assert not rights.may_connect(BOB)
    rights.allow(BOB, ["cache"])
    assert rights.may_connect(BOB)
    assert [right for right in RIGHTS if rights.may(BOB, right)] == ["cache"]


Changes = st.lists(
    st.tuples(
        st.sampled_from(("allow", "deny", "block")),
        st.sampled_from((BOB, EVE)),
        st.sets(st.sampled_from(RIGHTS), min_size=1),
    ),
    max_size=12,
)


@given(Changes)
def test_the_file_says_what_memory_says(changes: list[tuple[str, str, set[Right]]]) -> None:
    database = NodeDatabase(None)
    rights = Rights(database)
    for action, peer, some in changes:
        if action == "block":
            rights.block(peer, node="n")
        elif action == "deny":
            rights.deny(peer, some, node="n")
        else:
            rights.allow(peer, some)
        again = Rights(database)
        assert again.restricted() == rights.restricted()
        assert all(r.denied for r in again.restricted().values())
    database.close()


def test_nothing_has_changed_where_it_cannot_be_written(database: NodeDatabase) -> None:
    rights = Rights(database)
    rights.deny(BOB, ["ask"])
    database.close()
    with pytest.raises(DatabaseError):
        rights.allow(BOB)
    with pytest.raises(DatabaseError):
        rights.block(EVE)
    assert rights.why_not_ask(BOB)
    assert rights.may_connect(EVE)


# --- which peer is meant --------------------------------------------------------------------------

NAMES = {OWN: "here", BOB: "bob", EVE: "twin", "12D3KooWbib": "twin", "12D3KooWx": ""}


@pytest.mark.parametrize(
    ("text", "peer"),
    [("bob", BOB), (BOB, BOB), ("12D3KooWbo", BOB), ("eve", EVE), ("…eve", EVE), (EVE, EVE)],
)
def test_a_name_an_id_or_a_part_of_it(text: str, peer: str) -> None:
    assert find_peer(text, NAMES, own=OWN, is_id=False) == peer


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("twin", "any of 2 peers: .*; say the id"),
        ("12D3KooWb", "any of 2 peers"),
        ("here", "this node itself"),
        (OWN, "this node itself"),
        ("nobody", "no peer is known as 'nobody'; there are bob, here, twin"),
        ("", "no peer is known"),
        ("…", "no peer is known"),
    ],
)
def test_who_is_not_meant_clearly(text: str, why: str) -> None:
    with pytest.raises(UnknownPeer, match=why):
        find_peer(text, NAMES, own=OWN, is_id=False)


def test_a_whole_id_need_not_be_known() -> None:
    assert find_peer("12D3KooWnew", NAMES, own=OWN, is_id=True) == "12D3KooWnew"


def test_a_name_that_is_another_peers_id_does_not_stand_for_it() -> None:
    assert find_peer(BOB, NAMES | {EVE: BOB}, own=OWN, is_id=False) == BOB


def test_a_change_says_whom_it_was_about(database: NodeDatabase) -> None:
    rights = Rights(database)
    done = apply(rights, "deny", "bob", Change(("ask",)), {BOB: "bob"}, (OWN, "here"))
    assert done == {"peer": BOB, "node": "bob", "denied": ["ask"], "blocked": False}
    # Gone from the table, it is still known by the name that it had.
    done = apply(rights, "block", "bob", Change(), {}, (OWN, "here"))
    assert done == {"peer": BOB, "node": "bob", "denied": list(RIGHTS), "blocked": True}
    assert rights_fields(rights.of(BOB)) == {"denied": list(RIGHTS), "blocked": True}
    assert apply(rights, "allow", "bob", Change(), {}, (OWN, "here"))["denied"] == []


def test_a_change_of_a_node_that_does_not_run_is_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "node.sqlite"
    change_offline(path, "block", BOB, RIGHTS, {BOB: ""}, (OWN, "here"))
    database = NodeDatabase(path)
    assert not Rights(database).may_connect(BOB)
    database.close()


def test_who_may_not_read_gets_no_stored_answer() -> None:
    request = GenerateRequest(model="m", messages=())
    assert unstored(request).cache.mode == "refresh"
    for mode in ("refresh", "bypass"):
        as_it_is = GenerateRequest(model="m", messages=(), cache=CacheControl(mode=mode))
        assert unstored(as_it_is) is as_it_is
    with pytest.raises(CacheOnlyMiss, match="does not let this node read"):
        unstored(GenerateRequest(model="m", messages=(), cache=CacheControl(mode="only")))


async def test_what_another_method_is_told(database: NodeDatabase) -> None:
    async def changed(peer: str) -> None:
        raise AssertionError("nothing was asked for")

    routes = Routes()
    api = RightsApi(Rights(database), peer=OWN, node="here", peers=PeerTable(OWN), changed=changed)
    api.add_to(routes)
    async with serving(routes) as client:
        for method, status in (("GET", 405), ("OPTIONS", 204)):
            answer = await client.request(method, f"/mesh/v1/peers/{BOB}/deny")
            assert (answer.status_code, answer.headers["allow"]) == (status, "OPTIONS, POST")
            assert (await client.request(method, f"/mesh/v1/peers/{BOB}")).status_code == 404
