"""A share: an answer as it leaves the mesh, with what shows where it is from. Pure.

A CAR file, or a pinned DAG, whose one root says what the share is::

    {"v": 1, "kind": "promptmesh-share", "answer": link, "claims": [link, ...], "request"?: link,
     "peer": "12D3Koo...", "made_at": 1795461567,
     "signature": <Ed25519 over "promptmesh-share-1" and this map without it>}

The answer is the record with its leaves, the claims are envelopes as they are gossiped, and the
request is the canonical one, whose CID holds the plain key. Claims name questions by keys under a
secret of the mesh, so whoever is not in it cannot tell that a claim is about the request. For these
the sharer signs that it is, as one who is in the mesh and could tell: that is its word, with its
name, and nothing secret is given away. Members check the claims themselves.

A share may come from strangers. Nothing in it is taken for more than bytes until it is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import cbrrr
import msgspec
from msgspec import Meta

from . import car
from .blocks import MAX_BLOCK
from .cid import DIGEST_SIZE, PREFIX, cid_bytes, cid_text, split
from .claims import MAX_ENVELOPE, ClaimError, Entry, Opened, Sign, Verify, unseal
from .keys import VERSION, mesh_key, namespace_tag
from .record_bounds import MAX_OUTPUT
from .records import Record, decode, links

#: Stands before the signed bytes, so that no other signature of a peer is taken for a share.
DOMAIN = b"promptmesh-share-1"
#: Claims that a share holds.
MAX_CLAIMS = 16
#: Bytes of a canonical request, which is one block.
MAX_REQUEST = MAX_BLOCK
#: What is read of a share: a root, an answer of a root and 64 leaves, claims and a request.
LIMITS = car.Limits(
    blocks=128,
    block_bytes=MAX_BLOCK,
    bytes=MAX_OUTPUT + MAX_REQUEST + MAX_CLAIMS * MAX_ENVELOPE + 1024 * 1024,
)

_REQUESTS = ("llm-request", "llm-embed-request")
#: The secret of the namespace of that name; None where it is not known.
SecretOf = Callable[[str], bytes | None]


class ShareError(ValueError):
    """Not a share, or nothing that one can be made of. The message says why."""


# --- making -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Share:
    """A share's blocks by CID, its root first."""

    blocks: tuple[tuple[bytes, bytes], ...]

    @property
    def cid(self) -> bytes:
        return self.blocks[0][0]

    def car(self) -> bytes:
        """The CAR file."""
        return car.write([self.cid], self.blocks)


def make(
    answer: Sequence[tuple[bytes, bytes]],
    claims: Iterable[bytes],
    request: bytes | None,
    *,
    peer: str,
    sign: Sign,
    now: float,
) -> Share:
    """A share of an answer (its blocks, the root first), envelopes, and the canonical request.

    Raises `ShareError` for more than a share holds.
    """
    envelopes = list(claims)
    if len(envelopes) > MAX_CLAIMS:
        raise ShareError(f"{len(envelopes)} claims; {MAX_CLAIMS} is the most")
    if request is not None and len(request) > MAX_REQUEST:
        raise ShareError(f"a request of {len(request)} bytes; {MAX_REQUEST} is the most")
    parts = [*answer, *((cid_bytes(envelope), envelope) for envelope in envelopes)]
    if request is not None:
        parts.append((cid_bytes(request), request))
    statement = _Statement(
        answer=cbrrr.CID(answer[0][0]),
        claims=tuple(cbrrr.CID(cid_bytes(envelope)) for envelope in envelopes),
        request=None if request is None else cbrrr.CID(cid_bytes(request)),
        peer=peer,
        made_at=int(now),
    )
    root = _encode(statement, sign(DOMAIN + _encode(statement)))
    # Equal blocks are one.
    return Share(tuple({cid_bytes(root): root, **dict(parts)}.items()))


# --- checking -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CheckedClaim:
    """What a peer claims of the answer. Times in seconds since 1970."""

    peer: str
    #: When the answer was computed.
    made_at: int
    expires_at: int
    #: The peer holds it; if not, it computed it.
    held: bool
    #: Is it about the request of the share? None: that cannot be told here.
    about_request: bool | None


@dataclass(frozen=True, slots=True)
class Checked:
    """What a share holds, and all that is wrong with it."""

    cid: bytes
    answer: bytes
    record: Record
    #: Who made it, and when (s since 1970); empty and None for an answer alone.
    peer: str = ""
    made_at: int | None = None
    #: The canonical request; None: it holds none.
    request: Mapping[str, Any] | None = None
    claims: tuple[CheckedClaim, ...] = ()
    #: How many other answers of the mesh the claims name, as several are signed together.
    others: int = 0
    #: A sentence for each thing that does not verify.
    problems: tuple[str, ...] = ()


def check(data: bytes, *, verify: Verify, secret_of: SecretOf = lambda namespace: None) -> Checked:
    """Check a share, or an answer alone, in a CAR file: each block, the record, each signature.

    `secret_of` is what this machine knows of the mesh. Raises `CarError`, `ShareError` or
    `RecordError` for what is no share at all; what does not verify in one is among its `problems`.
    """
    file = car.read(data, LIMITS)
    if len(file.roots) != 1:
        raise ShareError(f"a share has one root and not {len(file.roots)}")
    cid = file.roots[0]
    root = file.blocks.get(cid)
    if root is None:
        raise ShareError(f"the root {cid_text(cid)} is missing")
    if _kind(root) != "promptmesh-share":
        record = decode(root, file.blocks.get)
        return Checked(cid, cid, record, problems=tuple(_strays(file, {cid, *links(root)})))
    return _checked(cid, root, file, verify, secret_of)


def _checked(
    cid: bytes, root: bytes, file: car.Car, verify: Verify, secret_of: SecretOf
) -> Checked:
    statement, signature = _read(root)
    answer = statement.answer.cid_bytes
    record = decode(_linked(file, answer), file.blocks.get)
    problems = []
    if not verify(statement.peer, DOMAIN + _encode(statement), signature):
        problems.append(f"the share is not signed by {statement.peer}")
    request = None if statement.request is None else statement.request.cid_bytes
    plain = None if request is None else _request(_linked(file, request))
    asked = None if request is None or plain is None else _Asked.of(request, plain, secret_of)
    claims: list[CheckedClaim] = []
    others: set[bytes] = set()
    for link in statement.claims:
        opened = _envelope(_linked(file, link.cid_bytes))
        found = [entry for entry in opened.batch.entries if entry.cid == answer]
        if not opened.signed(verify):
            problems.append(f"a claim is not signed by {opened.peer}")
        if not found:
            problems.append(f"a claim of {opened.peer} is about other answers")
        others |= {entry.cid for entry in opened.batch.entries} - {answer}
        claims += (_claim(opened, entry, asked) for entry in found)
    told = [claim.about_request for claim in claims if claim.about_request is not None]
    if told and not any(told):
        problems.append("the claims are about another request: their keys differ")
    expected = {cid, answer, *links(file.blocks[answer])}
    expected |= {link.cid_bytes for link in statement.claims} | ({request} if request else set())
    problems += _strays(file, expected)
    return Checked(
        cid,
        answer,
        record,
        statement.peer,
        statement.made_at,
        plain,
        tuple(claims),
        len(others),
        tuple(problems),
    )


def linked(root: bytes) -> tuple[bytes, ...]:
    """The CIDs that the root of a share links to. Raises `ShareError`."""
    statement, _ = _read(root)
    found = [statement.answer, *statement.claims]
    return tuple(link.cid_bytes for link in (*found, statement.request) if link is not None)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the request is called in a namespace that this machine knows."""

    tag: bytes
    key: bytes

    @classmethod
    def of(cls, cid: bytes, plain: Mapping[str, Any], secret_of: SecretOf) -> _Asked | None:
        name = plain.get("namespace", "")
        secret = secret_of(name) if isinstance(name, str) else None
        if secret is None:
            return None
        return cls(namespace_tag(secret), mesh_key(secret, split(cid)[1]))


def _claim(opened: Opened, entry: Entry, asked: _Asked | None) -> CheckedClaim:
    # A claim of another mesh or namespace says nothing to who is not in it.
    told = asked is not None and opened.batch.namespace == asked.tag
    about = entry.key == asked.key if told and asked is not None else None
    return CheckedClaim(opened.peer, entry.made_at, entry.expires_at, entry.held, about)


def _strays(file: car.Car, expected: Iterable[bytes]) -> list[str]:
    stray = next(iter(file.blocks.keys() - set(expected)), None)
    return [] if stray is None else [f"the block {cid_text(stray)} belongs to nothing in it"]


def _linked(file: car.Car, cid: bytes) -> bytes:
    block = file.blocks.get(cid)
    if block is None:
        raise ShareError(f"the block {cid_text(cid)} is missing")
    return block


def _envelope(block: bytes) -> Opened:
    try:
        return unseal(block)
    except ClaimError as error:
        raise ShareError(str(error)) from error


def _request(block: bytes) -> Mapping[str, Any]:
    """Raises `ShareError`."""
    try:
        plain = msgspec.convert(cbrrr.decode_dag_cbor(block), dict[str, Any])
    except (ValueError, RecursionError) as error:  # msgspec.ValidationError is a ValueError
        raise ShareError(f"not a request: {error}") from error
    if plain.get("kind") not in _REQUESTS or plain.get("v") != VERSION:
        raise ShareError(f"not a request of version {VERSION}")
    return plain


# --- the root -----------------------------------------------------------------------------------


class _Statement(msgspec.Struct, frozen=True, kw_only=True):
    """What the sharer signs."""

    answer: cbrrr.CID
    claims: Annotated[tuple[cbrrr.CID, ...], Meta(max_length=MAX_CLAIMS)] = ()
    request: cbrrr.CID | None = None
    peer: Annotated[str, Meta(min_length=1, max_length=128)]
    made_at: Annotated[int, Meta(ge=0, le=2**53)]


class _Root(_Statement, frozen=True, kw_only=True, forbid_unknown_fields=True):
    v: Literal[1]
    kind: Literal["promptmesh-share"]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


def _encode(statement: _Statement, signature: bytes | None = None) -> bytes:
    plain: dict[str, Any] = {
        "v": 1,
        "kind": "promptmesh-share",
        "answer": statement.answer,
        "claims": list(statement.claims),
        "peer": statement.peer,
        "made_at": statement.made_at,
    }
    if statement.request is not None:
        plain["request"] = statement.request
    if signature is not None:
        plain["signature"] = signature
    return cbrrr.encode_dag_cbor(plain)


def _kind(root: bytes) -> object:
    try:
        plain = cbrrr.decode_dag_cbor(root)
    except (ValueError, RecursionError):
        return None
    return plain.get("kind") if isinstance(plain, dict) else None


def _read(root: bytes) -> tuple[_Statement, bytes]:
    """The statement and its signature. Raises `ShareError` for anything but what `make` makes."""
    try:
        found = msgspec.convert(cbrrr.decode_dag_cbor(root), _Root)
    except (ValueError, RecursionError) as error:  # msgspec.ValidationError is a ValueError
        raise ShareError(f"not the root of a share: {error}") from error
    for link in (found.answer, *found.claims, *([found.request] if found.request else [])):
        if link.cid_bytes[:-DIGEST_SIZE] != PREFIX["dag-cbor"]:
            raise ShareError("not the root of a share: a link to what is not dag-cbor")
    if _encode(found, found.signature) != root:
        raise ShareError("not the canonical form of a share")
    return found, found.signature
