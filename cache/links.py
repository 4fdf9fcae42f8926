"""Links: CIDs inside of blocks, which may have any version, codec and hash.

What this node keeps is a smaller set (`cid`): a link to something else is passed on as it is, and
only following it fails.
"""

from __future__ import annotations

import base64
import binascii

import base58
import cbrrr

from . import varint
from .cid import DIGEST_SIZE, MAX_TEXT, PREFIX, cid_text, split

#: What a CIDv0 begins with: sha2-256, 32 bytes. Its codec is dag-pb.
V0 = b"\x12\x20"
_V0_SIZE = len(V0) + DIGEST_SIZE


def link_text(cid: bytes) -> str:
    """A CID as people write it: base58 for version 0, else base32.

    Raises `ValueError` for bytes that are no CID.
    """
    if _is_v0(cid):
        return base58.b58encode(cid).decode()
    if not _is_sound(cid):
        raise ValueError("a link that is no CID")
    return cid_text(cid)


def parse_link(text: str) -> bytes:
    """The bytes of a CID in any multibase. Raises `ValueError` that says what is wrong with it."""
    if not text.isascii() or not text.isprintable() or not 2 <= len(text) <= MAX_TEXT:
        raise ValueError("not a CID: its text is empty, too long, or not printable")
    cid = _decoded(text)
    if not _is_sound(cid):
        raise ValueError(f"not a CID: {text!r}")
    return cid


def stored(cid: bytes) -> bytes:
    """The same block's CID as this node keeps it (version 1).

    Raises `ValueError` for a codec or hash that it does not keep.
    """
    cid = PREFIX["dag-pb"] + cid[len(V0) :] if _is_v0(cid) else cid
    try:
        split(cid)
    except ValueError as error:
        raise ValueError(f"a link we cannot follow: {cid_text(cid)} is {error}") from error
    return cid


def version_0(cid: bytes) -> bytes:
    """The CIDv0 of a dag-pb block, from its CIDv1."""
    return V0 + split(cid)[1]


def as_link(cid: bytes) -> cbrrr.CID:
    """A link, as it stands in a decoded value."""
    return cbrrr.CID(cid)


def _is_v0(cid: bytes) -> bool:
    return len(cid) == _V0_SIZE and cid.startswith(V0)


def _is_sound(cid: bytes) -> bool:
    """Is it a CIDv0, or version, codec, hash, length and that many bytes?"""
    if _is_v0(cid):
        return True
    try:
        version, at = varint.decode(cid, 0)
        _codec, at = varint.decode(cid, at)
        _hash, at = varint.decode(cid, at)
        size, at = varint.decode(cid, at)
    except ValueError:
        return False
    return version == 1 and size == len(cid) - at


def _decoded(text: str) -> bytes:
    """Raises `ValueError`. The two usual bases go the short way: a block may hold many of them."""
    if text.startswith("Qm"):
        cid = base58.b58decode(text)
        if _is_v0(cid):
            return cid
    elif text.startswith("b"):
        try:
            cid = base64.b32decode(text[1:].upper() + "=" * (-len(text[1:]) % 8))
        except binascii.Error as error:
            raise ValueError(f"not a CID: {text!r} ({error})") from error
        if cid_text(cid) == text:
            return cid
    else:
        from multiformats import multibase  # 70 ms to import, and seldom needed

        try:
            base, cid = multibase.decode_raw(text)
            if base.encode(cid) == text:
                return cid
        except Exception as error:  # several kinds of it; whoever wrote the text sees which
            raise ValueError(f"not a CID: {text!r} ({error})") from error
    raise ValueError(f"not a CID: {text!r}")
