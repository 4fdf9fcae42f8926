"""CIDs: CIDv1 with sha2-256; 36 bytes inside the program (37 for dag-json), text at its edges.

The hot path is `hashlib` and a constant prefix; `multiformats`, which is 50 times slower, reads and
writes what people see.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import re
from dataclasses import dataclass
from typing import Literal

Codec = Literal["raw", "dag-cbor", "dag-pb", "dag-json"]

#: Version 1, the codec, sha2-256, 32 bytes: what stands before the digest.
PREFIX: dict[Codec, bytes] = {
    "raw": b"\x01\x55\x12\x20",
    "dag-cbor": b"\x01\x71\x12\x20",
    "dag-pb": b"\x01\x70\x12\x20",
    "dag-json": b"\x01\xa9\x02\x12\x20",
}
#: Bytes of a sha2-256 digest.
DIGEST_SIZE = 32
#: Longest text that is looked at; a CID in base2 is 289 characters.
MAX_TEXT = 300

#: Characters of the usual text of a CID.
_TEXT = 59
_CODECS = {prefix: codec for codec, prefix in PREFIX.items()}


@dataclass(frozen=True, slots=True)
class Cid:
    """A CID in both forms."""

    raw: bytes

    @property
    def text(self) -> str:
        """In base32, the usual form."""
        return cid_text(self.raw)


def cid_bytes(block: bytes, codec: Codec = "dag-cbor") -> bytes:
    """The CID of a block."""
    return PREFIX[codec] + hashlib.sha256(block).digest()


def cid_of(digest: bytes, codec: Codec = "dag-cbor") -> bytes:
    """The CID with that sha2-256 digest."""
    return PREFIX[codec] + digest


def split(cid: bytes) -> tuple[Codec, bytes]:
    """The codec and the digest of a CID. Raises `ValueError` for one we do not use."""
    codec = _CODECS.get(cid[:-DIGEST_SIZE])
    if codec is None:
        raise ValueError(f"not a CIDv1 with sha2-256 and a codec of {', '.join(PREFIX)}")
    return codec, cid[-DIGEST_SIZE:]


def verify(cid: bytes, block: bytes) -> bool:
    """Is this the block that the CID names? False for a CID we do not use."""
    if cid[:-DIGEST_SIZE] not in _CODECS:
        return False
    return hmac.compare_digest(hashlib.sha256(block).digest(), cid[-DIGEST_SIZE:])


def cid_text(cid: bytes, base: str = "base32") -> str:
    """The CID as people write it, in any multibase. Raises `ValueError` for an unknown base."""
    if base == "base32":
        return _base32(cid)
    from multiformats import multibase  # 70 ms to import, and seldom needed

    if base == "identity":
        raise ValueError("the identity base is bytes and not text")
    try:
        return multibase.encode(cid, base)
    except Exception as error:  # the caller of this sees it, as one kind
        raise ValueError(f"no multibase we know is named {base!r}") from error


@functools.lru_cache(maxsize=4096)  # 5 us, and an answer is named again and again
def _base32(cid: bytes) -> str:
    return "b" + base64.b32encode(cid).decode().lower().rstrip("=")


def digests_from(start: str) -> tuple[bytes, bytes]:
    """The least and the greatest digest of the dag-cbor CIDs whose usual text begins so.

    Raises `ValueError` if there is no such CID.
    """
    prefix = PREFIX["dag-cbor"]
    least = most = b""
    if re.fullmatch(f"b[a-z2-7]{{,{_TEXT - 1}}}", start):
        least, most = _filled(start, "a"), _filled(start, "7")
    if not least[: len(prefix)] <= prefix <= most[: len(prefix)]:
        raise ValueError(f"no CID of an answer begins with {start[:MAX_TEXT]!r}")
    return (
        least[len(prefix) :] if least.startswith(prefix) else bytes(DIGEST_SIZE),
        most[len(prefix) :] if most.startswith(prefix) else b"\xff" * DIGEST_SIZE,
    )


def _filled(start: str, fill: str) -> bytes:
    """The bytes of the CID's text with that beginning and else one character."""
    return base64.b32decode(start[1:].ljust(_TEXT - 1, fill).upper() + "======")


def parse_cid(text: str) -> bytes:
    """The CID that a person or a program wrote, in any multibase; a CIDv0 becomes its CIDv1.

    Raises `ValueError` that says what is wrong with it.
    """
    if not text.isprintable() or not text:
        raise ValueError("not a CID: no printable text")
    if len(text) > MAX_TEXT:
        raise ValueError(f"not a CID: longer than {MAX_TEXT} characters")
    from multiformats import CID

    try:
        parsed = CID.decode(text)
        again = parsed.encode()
    except Exception as error:  # seven kinds of it; whoever wrote the text sees which
        raise ValueError(f"not a CID: {text!r} ({_sentence(error)})") from error
    if again != text:
        raise ValueError(f"not a CID: {text!r} (its usual form is {again})")
    if parsed.hashfun.name != "sha2-256" or parsed.codec.name not in PREFIX:
        raise ValueError(
            f"a CID we cannot use: {text!r} ({parsed.codec.name}, {parsed.hashfun.name}; "
            f"needed is sha2-256 with {', '.join(PREFIX)})"
        )
    if len(parsed.raw_digest) != DIGEST_SIZE:
        raise ValueError(f"a CID we cannot use: {text!r} (its digest is cut)")
    return cid_of(parsed.raw_digest, parsed.codec.name)


def _sentence(error: Exception) -> str:
    return str(error).strip("'\" .") or type(error).__name__
