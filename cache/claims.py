"""Claims: signed statements of a peer that it has the answer to a key.

A batch of claims, in dag-cbor, and the envelope it travels in::

    {"namespace": <8 B>, "epoch": 1795461567043, "number": 17,
     "entries": [[<key, 32 B>, <cid, 36 B>, size, made at, expires at, held], ...]}
    {"batch": <the bytes above>, "peer": "12D3Koo...",
     "signature": <Ed25519 over "promptmesh-claims-1" and those bytes>}

A key is the keyed one (`keys.mesh_key`), sizes are in bytes, times in whole seconds since 1970.
`held` is false where the signer computed the answer, which makes it one to that key; true where it
holds a copy of somebody else's, which adds a source for the bytes and no word on the answer. A
peer numbers its batches from 1 upwards, so that others can see which they lack. A node that
lost its numbers begins a new epoch, which voids what it said in older ones; two batches with one
epoch and one number are a lie, proven by their signatures.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import cbrrr
import msgspec
from msgspec import Meta

from .cid import DIGEST_SIZE, PREFIX
from .database import Database

Sign = Callable[[bytes], bytes]
#: (peer, data, signature) -> did that peer sign these bytes?
Verify = Callable[[str, bytes, bytes], bool]

#: Stands before the signed bytes, so that no other signature of a peer is taken for a claim.
DOMAIN = b"promptmesh-claims-1"
MAX_ENTRIES = 64
#: Bytes of an envelope; 64 entries are 6 KB.
MAX_ENVELOPE = 16 * 1024
#: Seconds that a claim may hold.
MAX_LIFE = 7 * 86400
#: Seconds that another node's clock may be ahead.
MAX_SKEW = 120
#: Numbers left out at each start: a power cut may have taken the last seconds from the file, and to
#: use a number again would be a lie.
SKIPPED = 100_000

_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Number = Annotated[int, Meta(ge=1, le=2**53)]


class ClaimError(ValueError):
    """Not an envelope with claims. The message says why."""


class Entry(NamedTuple):
    """One claim. Times in seconds since 1970."""

    key: Annotated[bytes, Meta(min_length=32, max_length=32)]
    cid: Annotated[bytes, Meta(min_length=36, max_length=36)]
    size: _Number
    #: When the answer was computed, also where the signer only holds it.
    made_at: _Count
    expires_at: _Count
    #: The signer holds it; if not, it computed it.
    held: bool


class Batch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Claims that were signed together."""

    namespace: Annotated[bytes, Meta(min_length=8, max_length=8)]
    epoch: _Number
    number: _Number
    entries: Annotated[tuple[Entry, ...], Meta(min_length=1, max_length=MAX_ENTRIES)]

    @property
    def expires_at(self) -> int:
        """When its last claim ends."""
        return max(entry.expires_at for entry in self.entries)


class _Envelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    batch: bytes
    peer: Annotated[str, Meta(min_length=1, max_length=128)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


@dataclass(frozen=True, slots=True)
class Opened:
    """An envelope that was read; its signature is not checked yet."""

    peer: str
    batch: Batch
    #: The signed bytes of the batch.
    payload: bytes
    signature: bytes

    def signed(self, verify: Verify) -> bool:
        """Did the peer sign it?"""
        return verify(self.peer, DOMAIN + self.payload, self.signature)


def seal(batch: Batch, *, peer: str, sign: Sign) -> bytes:
    """The signed envelope of a batch."""
    entries: Any = [list(entry) for entry in batch.entries]
    payload = cbrrr.encode_dag_cbor(
        {
            "namespace": batch.namespace,
            "epoch": batch.epoch,
            "number": batch.number,
            "entries": entries,
        }
    )
    return cbrrr.encode_dag_cbor(
        {"batch": payload, "peer": peer, "signature": sign(DOMAIN + payload)}
    )


def unseal(envelope: bytes) -> Opened:
    """Read an envelope, whoever it comes from. Raises `ClaimError`."""
    if len(envelope) > MAX_ENVELOPE:
        raise ClaimError(f"an envelope of {len(envelope)} bytes; {MAX_ENVELOPE} is the most")
    try:
        outer = msgspec.convert(cbrrr.decode_dag_cbor(envelope), _Envelope)
        batch = msgspec.convert(cbrrr.decode_dag_cbor(outer.batch), Batch)
    except (ValueError, RecursionError) as error:  # msgspec.ValidationError is a ValueError
        raise ClaimError(f"not an envelope with claims: {error}") from error
    for entry in batch.entries:
        if entry.cid[:-DIGEST_SIZE] not in (PREFIX["dag-cbor"], PREFIX["raw"]):
            raise ClaimError("a claim of something that is not a block of ours")
    return Opened(outer.peer, batch, outer.batch, outer.signature)


class ClaimLog:
    """This node's own batches: numbers them, signs them, and keeps them to be asked for."""

    def __init__(self, database: Database, *, peer: str, sign: Sign) -> None:
        self._database = database
        self._peer = peer
        self._sign = sign
        self._started = False

    def seal(self, entries: Sequence[Entry], *, namespace: bytes, now: float) -> bytes | None:
        """The envelope of a new batch, kept before it is returned.

        `namespace` is its tag (`keys.namespace_tag`). Claims that hold for longer than others
        would believe are cut to that. None if nothing is left of them, or the database failed.
        Raises `ValueError` for more than `MAX_ENTRIES`.
        """
        if len(entries) > MAX_ENTRIES:
            raise ValueError(f"{len(entries)} claims in one batch; {MAX_ENTRIES} is the most")
        live = tuple(entry for entry in map(_credible(now), entries) if entry.expires_at > now)
        if not live:
            return None

        def sealed() -> bytes:
            with self._database.transaction() as connection:
                return self._seal(connection, namespace, live, now)

        return self._database.attempt("sealing claims", sealed, None)

    def live(self, now: float) -> list[tuple[bytes, Entry]]:
        """What this node claims now, each with the tag of its namespace; the newest last."""
        return self._database.attempt("own claims", lambda: self._live(now), [])

    def _live(self, now: float) -> list[tuple[bytes, Entry]]:
        said: dict[tuple[bytes, bytes], tuple[bytes, Entry]] = {}
        for (envelope,) in self._database.rows(_OWN, (self._peer, now)):
            try:
                batch = unseal(envelope).batch
            except ClaimError:  # a damaged row; what it said is not said again
                continue
            for entry in batch.entries:
                if entry.expires_at > now:
                    said[entry.key, entry.cid] = batch.namespace, entry
        return list(said.values())

    def renew(self, now: float) -> list[bytes]:
        """Say all that holds once more, in full batches of a new epoch, which voids the older.

        Batches for home nodes have few claims, each is in several of them, and nobody has all: for
        who repairs what gossip lost they would be many.
        """
        live = self._live_by_namespace(now)

        def renewed() -> list[bytes]:
            with self._database.transaction() as connection:
                begin_epoch(connection, self._peer, int(now * 1000))
                return [
                    self._seal(connection, tag, tuple(entries[first : first + MAX_ENTRIES]), now)
                    for tag, entries in live.items()
                    for first in range(0, len(entries), MAX_ENTRIES)
                ]

        return self._database.attempt("renewing claims", renewed, [])

    def _live_by_namespace(self, now: float) -> dict[bytes, list[Entry]]:
        found: dict[bytes, list[Entry]] = {}
        for tag, entry in self.live(now):
            found.setdefault(tag, []).append(entry)
        return found

    def _seal(
        self, connection: sqlite3.Connection, tag: bytes, entries: tuple[Entry, ...], now: float
    ) -> bytes:
        if not self._started:
            connection.execute("UPDATE numbering SET number = number + ?", (SKIPPED,))
        epoch, number = next_number(connection, now)
        self._started = True
        batch = Batch(namespace=tag, epoch=epoch, number=number, entries=entries)
        envelope = seal(batch, peer=self._peer, sign=self._sign)
        keep_batch(connection, publisher_id(connection, self._peer, epoch), batch, envelope)
        return envelope


def _credible(now: float) -> Callable[[Entry], Entry]:
    """Cuts a claim to what others believe: made by now, for a week at most."""

    def cut(entry: Entry) -> Entry:
        made_at = min(entry.made_at, int(now))
        return entry._replace(made_at=made_at, expires_at=min(entry.expires_at, made_at + MAX_LIFE))

    return cut


#: (peer, now) -> live envelopes of a peer, the newest last.
_OWN = """
    SELECT b.envelope FROM batch AS b JOIN publisher AS p ON p.id = b.publisher
    WHERE p.peer = ? AND b.expires_at > ? ORDER BY b.number"""

# --- in a transaction ---------------------------------------------------------------------------


def next_number(connection: sqlite3.Connection, now: float) -> tuple[int, int]:
    """The epoch and number of this node's next batch; both are used up."""
    found = connection.execute("SELECT epoch, number FROM numbering").fetchone()
    if found is None:
        # A fresh file: the clock has moved on since the one before.
        found = (max(1, int(now * 1000)), 0)
        connection.execute("INSERT INTO numbering VALUES (?, ?)", found)
    connection.execute("UPDATE numbering SET number = number + 1")
    return found[0], found[1] + 1


def begin_epoch(connection: sqlite3.Connection, peer: str, at_least: int) -> None:
    """Number this node's batches anew; the older are gone."""
    found = connection.execute("SELECT epoch FROM numbering").fetchone()
    epoch = max(at_least, found[0] + 1 if found else 1)
    connection.execute("DELETE FROM numbering")
    connection.execute("INSERT INTO numbering VALUES (?, 0)", (epoch,))
    connection.execute("DELETE FROM publisher WHERE peer = ?", (peer,))


def publisher_id(connection: sqlite3.Connection, peer: str, epoch: int) -> int:
    """The row of a peer; what it said in an older epoch is void, and deleted."""
    found = connection.execute("SELECT id, epoch FROM publisher WHERE peer = ?", (peer,)).fetchone()
    if found is not None and found[1] < epoch:
        connection.execute("DELETE FROM publisher WHERE id = ?", (found[0],))
        found = None
    if found is None:
        found = connection.execute(
            "INSERT INTO publisher (peer, epoch) VALUES (?, ?) RETURNING id", (peer, epoch)
        ).fetchone()
    row: int = found[0]
    return row


def keep_batch(
    connection: sqlite3.Connection, publisher: int, batch: Batch, envelope: bytes
) -> None:
    """Keep a batch of that publisher, to be passed on."""
    connection.execute(
        "INSERT INTO batch (publisher, number, expires_at, entries, envelope)"
        " VALUES (?, ?, ?, ?, ?)",
        (publisher, batch.number, batch.expires_at, len(batch.entries), envelope),
    )
