from collections.abc import Callable
from typing import Any

import cbrrr
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.cache import car, share
from promptmesh.cache.car import CarError
from promptmesh.cache.cid import cid_bytes
from promptmesh.cache.claims import Batch, Entry, seal
from promptmesh.cache.keys import (
    canonical,
    mesh_key,
    namespace_secret,
    namespace_tag,
    request_key,
)
from promptmesh.cache.record_bounds import RecordError
from promptmesh.cache.records import AnswerRecord, EmbeddingRecord, encode
from promptmesh.cache.share import (
    MAX_CLAIMS,
    MAX_REQUEST,
    Checked,
    CheckedClaim,
    Share,
    ShareError,
    check,
)
from promptmesh.mesh.identity import Identity, verify
from promptmesh.providers.base import (
    CacheControl,
    Completion,
    Embedding,
    GenerateRequest,
    Message,
    Text,
)

ALICE, BOB, EVE = (Identity(bytes([number]) * 32) for number in (1, 2, 3))
SWARM_KEY = b"k" * 32
RECORD = AnswerRecord(model="m", completion=Completion(text="Paris", finish_reason="stop"))
ANSWER = encode(RECORD)
LONG = encode(
    AnswerRecord(model="m", completion=Completion(text="abc\n" * 50_000, finish_reason="stop"))
)
REQUEST = GenerateRequest(
    model="m",
    messages=(Message(role="user", content=(Text(text="The capital of France?"),)),),
)
OTHER = cid_bytes(b"other")


def member(name: str) -> bytes:
    return namespace_secret(SWARM_KEY, name)


def foreigner(name: str) -> bytes:
    return namespace_secret(b"x" * 32, name)


def envelope(
    by: Identity = ALICE,
    *,
    request: GenerateRequest = REQUEST,
    cid: bytes = ANSWER.cid,
    more: tuple[Entry, ...] = (),
    held: bool = False,
) -> bytes:
    secret = member(request.cache.namespace)
    entry = Entry(mesh_key(secret, request_key(request)), cid, 50, 1000, 2000, held)
    batch = Batch(namespace=namespace_tag(secret), epoch=1, number=1, entries=(entry, *more))
    return seal(batch, peer=by.peer_id, sign=by.sign)


def made(
    *claims: bytes, request: bytes | None = None, answer: Any = ANSWER, by: Identity = BOB
) -> Share:
    return share.make(answer.blocks, claims, request, peer=by.peer_id, sign=by.sign, now=1500.5)


def checked(data: bytes, secret_of: Callable[[str], bytes | None] = lambda name: None) -> Checked:
    return check(data, verify=verify, secret_of=secret_of)


# --- what it is -----------------------------------------------------------------------------------


def test_the_root_as_anyone_reads_it() -> None:
    claim = envelope()
    made_share = made(claim, request=canonical(REQUEST))
    root = cbrrr.decode_dag_cbor(made_share.blocks[0][1])
    assert isinstance(root, dict)
    signature = root.pop("signature")
    assert root == {
        "v": 1,
        "kind": "promptmesh-share",
        "answer": cbrrr.CID(ANSWER.cid),
        "claims": [cbrrr.CID(cid_bytes(claim))],
        # The CID of the request holds its key.
        "request": cbrrr.CID(b"\x01\x71\x12\x20" + request_key(REQUEST)),
        "peer": BOB.peer_id,
        "made_at": 1500,
    }
    assert isinstance(signature, bytes)
    signed = b"promptmesh-share-1" + cbrrr.encode_dag_cbor(root)
    assert verify(BOB.peer_id, signed, signature)
    assert cid_bytes(made_share.blocks[0][1]) == made_share.cid


def test_a_whole_share_verifies() -> None:
    held = envelope(BOB, held=True)
    found = checked(made(envelope(), held, request=canonical(REQUEST)).car(), member)
    assert found.problems == ()
    assert found.record == RECORD
    assert (found.peer, found.made_at) == (BOB.peer_id, 1500)
    assert found.claims == (
        CheckedClaim(ALICE.peer_id, 1000, 2000, held=False, about_request=True),
        CheckedClaim(BOB.peer_id, 1000, 2000, held=True, about_request=True),
    )
    assert found.request is not None
    assert found.request["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "The capital of France?"}]}
    ]


@pytest.mark.parametrize("secret_of", [foreigner, lambda name: None])
def test_who_is_not_in_the_mesh_has_the_sharers_word(
    secret_of: Callable[[str], bytes | None],
) -> None:
    found = checked(made(envelope(), request=canonical(REQUEST)).car(), secret_of)
    assert found.problems == ()
    assert [claim.about_request for claim in found.claims] == [None]


def test_without_the_request_nothing_tells_the_question() -> None:
    data = made(envelope()).car()
    found = checked(data, member)
    assert (found.problems, found.request) == ((), None)
    assert request_key(REQUEST) not in data
    assert b"France" not in data
    assert member("") not in data


def test_the_namespace_of_the_request_decides_the_secret() -> None:
    named = msgspec.structs.replace(REQUEST, cache=CacheControl(namespace="team"))
    data = made(envelope(request=named), request=canonical(named)).car()
    assert [claim.about_request for claim in checked(data, member).claims] == [True]


def test_a_long_answer_has_its_leaves() -> None:
    found = checked(made(envelope(cid=LONG.cid), answer=LONG).car())
    assert found.problems == ()
    assert isinstance(found.record, AnswerRecord)
    assert len(found.record.completion.text) == 200_000


def test_an_embedding_is_shared_like_an_answer() -> None:
    record = EmbeddingRecord(model="m", embedding=Embedding(vector=bytes(16)))
    embedding = encode(record)
    found = checked(made(envelope(cid=embedding.cid), answer=embedding).car())
    assert (found.problems, found.record) == ((), record)


def test_what_the_claims_tell_of_others_is_counted() -> None:
    more = tuple(
        Entry(bytes([n]) * 32, cid_bytes(b"%d" % n), 1, 1000, 2000, False) for n in range(5)
    )
    assert checked(made(envelope(), envelope(BOB, more=more)).car()).others == 5


def test_an_answer_alone_is_checked_too() -> None:
    for answer in (ANSWER, LONG):
        found = checked(car.write([answer.cid], answer.blocks))
        assert (found.problems, found.peer, found.claims) == ((), "", ())


def test_bounds() -> None:
    with pytest.raises(ShareError, match=f"{MAX_CLAIMS} is the most"):
        made(*[envelope()] * (MAX_CLAIMS + 1))
    with pytest.raises(ShareError, match=f"{MAX_REQUEST} is the most"):
        made(request=bytes(MAX_REQUEST + 1))


# --- what does not verify -------------------------------------------------------------------------


def rebuilt(found: Share, **changes: Any) -> bytes:
    """A share whose root says something else, with the signature as it was."""
    root = cbrrr.decode_dag_cbor(found.blocks[0][1])
    assert isinstance(root, dict)
    plain = {name: value for name, value in {**root, **changes}.items() if value is not None}
    block = cbrrr.encode_dag_cbor(plain)
    return car.write([cid_bytes(block)], [(cid_bytes(block), block), *found.blocks[1:]])


def test_another_signer_and_another_time() -> None:
    whole = made(envelope())
    for changes in ({"peer": EVE.peer_id}, {"made_at": 1}, {"signature": bytes(64)}):
        assert "not signed by" in checked(rebuilt(whole, **changes)).problems[0]


def test_a_request_that_the_sharer_did_not_sign_for() -> None:
    other = canonical(GenerateRequest(model="m", messages=()))
    whole = made(envelope(), request=other)
    mine = made(envelope())
    forged = rebuilt(mine, request=cbrrr.CID(cid_bytes(other)))
    blocks = car.read(forged).blocks | {cid_bytes(other): other}
    data = car.write(car.read(forged).roots, blocks.items())
    assert "not signed by" in checked(data).problems[0]
    # Signed by a sharer that lies: a member sees it, who is not in the mesh cannot.
    assert checked(whole.car(), member).problems == (
        "the claims are about another request: their keys differ",
    )
    assert checked(whole.car()).problems == ()


def test_a_claim_of_another_answer() -> None:
    found = checked(made(envelope(cid=OTHER)).car())
    assert found.problems == (f"a claim of {ALICE.peer_id} is about other answers",)
    assert found.claims == ()


def test_a_claim_that_its_peer_did_not_sign() -> None:
    plain = cbrrr.decode_dag_cbor(envelope())
    assert isinstance(plain, dict)
    forged = cbrrr.encode_dag_cbor({**plain, "peer": EVE.peer_id})
    assert checked(made(forged).car()).problems == (f"a claim is not signed by {EVE.peer_id}",)


def test_a_stray_block() -> None:
    whole = made(envelope())
    stray = (cid_bytes(b"stray", "raw"), b"stray")
    data = car.write([whole.cid], [*whole.blocks, stray])
    assert "belongs to nothing" in checked(data).problems[0]
    data = car.write([ANSWER.cid], [*ANSWER.blocks, stray])
    assert "belongs to nothing" in checked(data).problems[0]


def without(number: int) -> bytes:
    whole = made(envelope(cid=LONG.cid), request=canonical(REQUEST), answer=LONG)
    blocks = [block for i, block in enumerate(whole.blocks) if i != number]
    return car.write([whole.cid], blocks)


@pytest.mark.parametrize("number", range(len(LONG.blocks) + 3))
def test_each_block_is_needed(number: int) -> None:
    with pytest.raises((ShareError, RecordError), match="is missing"):
        checked(without(number))


def test_each_byte_counts() -> None:
    data = made(envelope(), request=canonical(REQUEST)).car()
    for at in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[at] ^= 0x20
        with pytest.raises((CarError, ShareError, RecordError)):
            checked(bytes(damaged))


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"v": None},
        {"more": 1},
        {"claims": None},
        {"claims": [b"x"]},
        {"claims": [cbrrr.CID(ANSWER.cid)] * (MAX_CLAIMS + 1)},
        {"answer": cbrrr.CID(cid_bytes(b"raw", "raw"))},
        {"request": cbrrr.CID(b"\x12\x20" + bytes(32))},
        {"peer": ""},
        {"peer": "x" * 200},
        {"made_at": -1},
        {"made_at": 1.5},
        {"signature": b""},
    ],
)
def test_another_root_is_no_share(changes: dict[str, Any]) -> None:
    with pytest.raises(ShareError, match="share"):
        checked(rebuilt(made(envelope()), **changes))


@pytest.mark.parametrize("claim", [b"", b"\xa0", cbrrr.encode_dag_cbor({"peer": "x"})])
def test_what_is_no_claim(claim: bytes) -> None:
    whole = made()
    link = cbrrr.CID(cid_bytes(claim))
    file = car.read(rebuilt(whole, claims=[link]))
    data = car.write(file.roots, (file.blocks | {cid_bytes(claim): claim}).items())
    with pytest.raises(ShareError, match="claims"):
        checked(data)


@pytest.mark.parametrize(
    "request_block", [b"", b"\xa0", cbrrr.encode_dag_cbor({"v": 2, "kind": "llm-request"}), b"\x80"]
)
def test_what_is_no_request(request_block: bytes) -> None:
    with pytest.raises(ShareError, match="request"):
        checked(made(request=request_block).car())


def test_roots() -> None:
    whole = made()
    for roots in ([], [whole.cid, whole.cid]):
        with pytest.raises(ShareError, match="one root"):
            checked(car.write(roots, whole.blocks))


@given(st.binary(max_size=300))
def test_any_root_is_refused_with_a_sentence(block: bytes) -> None:
    data = car.write([cid_bytes(block)], [(cid_bytes(block), block)])
    with pytest.raises((ShareError, RecordError)) as refused:
        checked(data)
    assert str(refused.value)
