"""dag-cbor blocks as dag-json, the form in which people and IPFS tools read them.

Source of the form: https://ipld.io/specs/codecs/dag-json/spec/ (bytes and links are objects whose
only key is `/`).
"""

from __future__ import annotations

import base64
from typing import Any

import cbrrr

from .cid import cid_text


def block_as_json(block: bytes) -> Any:
    """A dag-cbor block as a value that JSON can write. Raises `ValueError` for other bytes."""
    try:
        return _plain(cbrrr.decode_dag_cbor(block))
    except RecursionError:
        raise ValueError("nested too deep") from None


def _plain(value: Any) -> Any:
    if isinstance(value, cbrrr.CID):
        return {"/": cid_text(value.cid_bytes)}
    if isinstance(value, bytes):
        return {"/": {"bytes": base64.b64encode(value).decode().rstrip("=")}}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
