from pathlib import Path
from typing import Any

import cbrrr
import dag_cbor
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.cache.cid import cid_bytes
from promptmesh.cache.claims import (
    DOMAIN,
    MAX_ENTRIES,
    MAX_ENVELOPE,
    MAX_LIFE,
    SKIPPED,
    Batch,
    ClaimError,
    ClaimLog,
    Entry,
    seal,
    unseal,
)
from promptmesh.cache.database import Database

NOW = 1_000_000
KEY = Ed25519PrivateKey.from_private_bytes(b"s" * 32)


def entry(number: int = 1, **more: Any) -> Entry:
    plain = Entry(
        key=number.to_bytes(32, "big"),
        cid=cid_bytes(str(number).encode()),
        size=100 + number,
        made_at=NOW,
        expires_at=NOW + 1000,
        held=False,
    )
    return plain._replace(**more)


BATCH = Batch(namespace=b"n" * 8, epoch=5, number=7, entries=(entry(1), entry(2)))
ENVELOPE = seal(BATCH, peer="me", sign=KEY.sign)


def verify(peer: str, data: bytes, signature: bytes) -> bool:
    return peer == "me" and KEY.sign(data) == signature


# --- the envelope -------------------------------------------------------------------------------


def test_the_bytes_as_anyone_reads_them() -> None:
    outer = dag_cbor.decode(ENVELOPE)
    assert isinstance(outer, dict)
    assert set(outer) == {"batch", "peer", "signature"}
    payload = outer["batch"]
    assert isinstance(payload, bytes)
    assert outer["signature"] == KEY.sign(b"promptmesh-claims-1" + payload)
    assert dag_cbor.decode(payload) == {
        "namespace": b"n" * 8,
        "epoch": 5,
        "number": 7,
        "entries": [list(e) for e in BATCH.entries],
    }


def test_comes_back_and_its_signature_holds_for_its_bytes_only() -> None:
    opened = unseal(ENVELOPE)
    assert (opened.peer, opened.batch) == ("me", BATCH)
    assert opened.batch.expires_at == NOW + 1000
    assert opened.signed(verify)
    other = seal(msgspec.structs.replace(BATCH, number=8), peer="me", sign=KEY.sign)
    forged = cbrrr.encode_dag_cbor(
        {"batch": unseal(other).payload, "peer": "me", "signature": opened.signature}
    )
    assert not unseal(forged).signed(verify)
    bare = seal(BATCH, peer="me", sign=lambda data: KEY.sign(data.removeprefix(DOMAIN)))
    assert not unseal(bare).signed(verify)
    assert not unseal(seal(BATCH, peer="you", sign=KEY.sign)).signed(verify)


def test_a_full_envelope_is_small() -> None:
    full = msgspec.structs.replace(BATCH, entries=tuple(entry(n) for n in range(MAX_ENTRIES)))
    envelope = seal(full, peer="12D3Koo" + "W" * 45, sign=KEY.sign)
    assert unseal(envelope).batch == full
    assert len(envelope) < 100 * MAX_ENTRIES < MAX_ENVELOPE


FIELDS: dict[str, Any] = {
    "namespace": b"n" * 8,
    "epoch": 5,
    "number": 7,
    "entries": [list(entry(1))],
}


def payload(**changed: Any) -> bytes:
    fields = {**FIELDS, **changed}
    return cbrrr.encode_dag_cbor({name: v for name, v in fields.items() if v is not ...})


def envelope(batch: Any = None, **changed: Any) -> bytes:
    fields = {
        "batch": payload() if batch is None else batch,
        "peer": "me",
        "signature": bytes(64),
        **changed,
    }
    return cbrrr.encode_dag_cbor({name: v for name, v in fields.items() if v is not ...})


def of_entry(**changed: Any) -> bytes:
    return envelope(payload(entries=[list(entry(1)._replace(**changed))]))


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def test_the_unchanged_one_is_an_envelope() -> None:
    assert unseal(envelope()).batch.entries == (entry(1),)
    raw = cid_bytes(b"leaf", "raw")
    assert unseal(of_entry(cid=raw)).batch.entries[0].cid == raw


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xa0",
        b"\x80",
        cbrrr.encode_dag_cbor(nested(8000)),
        envelope() + b"\0",
        envelope(b""),
        envelope("text"),
        envelope(payload() + b"\0"),
        envelope(more=1),
        envelope(peer=...),
        envelope(peer=""),
        envelope(peer="p" * 129),
        envelope(peer=b"me"),
        envelope(signature=...),
        envelope(signature=bytes(63)),
        envelope(signature=bytes(65)),
        *(envelope(payload(**{name: ...})) for name in FIELDS),
        envelope(payload(more=1)),
        envelope(payload(namespace=bytes(7))),
        envelope(payload(namespace="n" * 8)),
        envelope(payload(epoch=0)),
        envelope(payload(epoch=2**54)),
        envelope(payload(number=0)),
        envelope(payload(number=-1)),
        envelope(payload(number=1.0)),
        envelope(payload(number=True)),
        envelope(payload(entries=[])),
        envelope(payload(entries=[1])),
        envelope(payload(entries=[list(entry(1))[:5]])),
        envelope(payload(entries=[[*entry(1), 1]])),
        envelope(payload(entries=[list(entry(n)) for n in range(MAX_ENTRIES + 1)])),
        envelope(payload(entries=nested(8000))),
        of_entry(key=bytes(31)),
        of_entry(key="k" * 32),
        of_entry(cid=bytes(36)),
        of_entry(cid=cid_bytes(b"x", "dag-pb")),
        of_entry(cid=cid_bytes(b"x")[:-1]),
        of_entry(cid=cid_bytes(b"x", "dag-json")),
        of_entry(size=0),
        of_entry(size=2**60),
        of_entry(made_at=-1),
        of_entry(made_at=1.5),
        of_entry(expires_at=None),
        of_entry(expires_at=2**63),
        of_entry(held=1),
        of_entry(held=None),
        bytes(MAX_ENVELOPE + 1),
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(ClaimError):
        unseal(data)


@given(st.integers(0, 2000), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_not_signed(at: int, byte: int) -> None:
    at %= len(ENVELOPE)
    changed = ENVELOPE[:at] + bytes([byte]) + ENVELOPE[at + 1 :]
    try:
        opened = unseal(changed)
    except ClaimError:
        return
    assert opened.signed(verify) == (changed == ENVELOPE)


@given(st.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    with pytest.raises(ClaimError):
        unseal(data)


# --- this node's own ----------------------------------------------------------------------------


def log(database: Database) -> ClaimLog:
    return ClaimLog(database, peer="me", sign=KEY.sign)


def numbers(*envelopes: bytes | None) -> list[tuple[int, int]]:
    batches = [unseal(envelope).batch for envelope in envelopes if envelope is not None]
    return [(batch.epoch, batch.number) for batch in batches]


def test_numbers_go_on_when_the_node_starts_again(tmp_path: Path) -> None:
    found: list[tuple[int, int]] = []
    for start in range(3):
        database = Database(tmp_path / "cache.sqlite")
        own = log(database)
        for _ in range(2):
            found += numbers(own.seal([entry()], namespace=b"n" * 8, now=NOW + start))
        database.close()
    # With a gap: the last of the run before may be gone, though others have them.
    starts = (0, SKIPPED + 2, 2 * SKIPPED + 4)
    assert found == [(NOW * 1000, start + number) for start in starts for number in (1, 2)]


def test_a_fresh_file_begins_a_later_epoch() -> None:
    epochs = set()
    for second in range(3):
        database = Database(None)
        later = NOW + second * 0.01
        epochs |= set(numbers(log(database).seal([entry()], namespace=b"n" * 8, now=later)))
        database.close()
    assert len(epochs) == 3


def test_what_is_signed_is_what_was_claimed() -> None:
    database = Database(None)
    sealed = log(database).seal([entry(1), entry(2)], namespace=b"t" * 8, now=NOW)
    assert sealed is not None
    opened = unseal(sealed)
    assert opened.signed(verify)
    assert opened.batch.entries == (entry(1), entry(2))
    assert (opened.peer, opened.batch.namespace) == ("me", b"t" * 8)
    assert database.row("SELECT envelope FROM batch") == (sealed,)


def test_claims_are_cut_to_what_others_believe() -> None:
    own = log(Database(None))
    far = entry(1, expires_at=NOW + MAX_LIFE * 9)
    future = entry(2, made_at=NOW + 500)
    over = entry(3, expires_at=NOW)
    long_ago = entry(4, made_at=NOW - MAX_LIFE, expires_at=NOW + 9)
    sealed = own.seal([far, future, over, long_ago], namespace=b"n" * 8, now=NOW)
    assert sealed is not None
    assert unseal(sealed).batch.entries == (
        far._replace(expires_at=NOW + MAX_LIFE),
        future._replace(made_at=NOW),
    )
    assert own.seal([over, long_ago], namespace=b"n" * 8, now=NOW) is None
    assert own.seal([], namespace=b"n" * 8, now=NOW) is None
    again = own.seal([entry()], namespace=b"n" * 8, now=NOW)
    assert numbers(sealed, again) == [(NOW * 1000, 1), (NOW * 1000, 2)]


def test_too_many_at_once() -> None:
    many = [entry(n) for n in range(MAX_ENTRIES + 1)]
    with pytest.raises(ValueError, match="is the most"):
        log(Database(None)).seal(many, namespace=b"n" * 8, now=NOW)


def test_a_failing_database_signs_nothing() -> None:
    database = Database(None)
    database.close()
    assert log(database).seal([entry()], namespace=b"n" * 8, now=NOW) is None


def test_a_signer_that_fails_uses_up_no_number() -> None:
    database = Database(None)

    def sign(data: bytes) -> bytes:
        raise RuntimeError("no key")

    with pytest.raises(RuntimeError):
        ClaimLog(database, peer="me", sign=sign).seal([entry()], namespace=b"n" * 8, now=NOW)
    sealed = log(database).seal([entry()], namespace=b"n" * 8, now=NOW)
    assert numbers(sealed) == [(NOW * 1000, 1)]


# --- saying it again ----------------------------------------------------------------------------


def test_what_holds_is_said_once_more_in_a_new_epoch() -> None:
    database = Database(None)
    own = log(database)
    other = b"o" * 8
    for number in range(100):
        own.seal([entry(number)], namespace=b"n" * 8, now=NOW)
    own.seal([entry(100), entry(101, expires_at=NOW + 5)], namespace=other, now=NOW)
    own.seal([entry(3, expires_at=NOW + 2000)], namespace=b"n" * 8, now=NOW)
    live = own.live(NOW + 5)
    assert len(live) == 101
    assert live[-1] == (other, entry(100))
    assert (b"n" * 8, entry(3, expires_at=NOW + 2000)) in live
    renewed = [unseal(envelope) for envelope in own.renew(NOW + 5)]
    assert all(opened.signed(verify) for opened in renewed)
    assert [len(opened.batch.entries) for opened in renewed] == [64, 36, 1]
    assert [opened.batch.number for opened in renewed] == [1, 2, 3]
    (epoch,) = {opened.batch.epoch for opened in renewed}
    assert epoch > NOW * 1000
    assert sorted(own.live(NOW + 5)) == sorted(live)
    assert database.row("SELECT count(*) FROM batch") == (3,)
    # Again, with a clock that stands: the epoch still rises.
    assert unseal(own.renew(NOW + 5)[0]).batch.epoch == epoch + 1


def test_a_damaged_batch_is_not_said_again() -> None:
    database = Database(None)
    own = log(database)
    for number in (1, 2):
        own.seal([entry(number)], namespace=b"n" * 8, now=NOW)
    database.rows("UPDATE batch SET envelope = x'00' WHERE number = 1")
    assert own.live(NOW) == [(b"n" * 8, entry(2))]
    database.close()
    assert own.live(NOW) == []
    assert own.renew(NOW) == []
