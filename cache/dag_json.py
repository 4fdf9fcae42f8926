"""dag-json: how people, IPFS tools and programs read and write what is in blocks.

Source of the form: https://ipld.io/specs/codecs/dag-json/spec/. Links and bytes are objects whose
only key is `/`; keys are sorted, and there is no space. Values are those of `cbrrr`: links are
`cbrrr.CID`.

Both ways are strict: what JSON leaves open (a key twice, half a surrogate, NaN, an object that is
nearly a link) is refused, since two readers would take it for two different things.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from typing import Any, NoReturn

import cbrrr

from .links import as_link, link_text, parse_link

#: How deep values may be nested. An answer record needs 12.
MAX_DEPTH = 128
#: Integers have 64 bits, as in dag-cbor.
_MIN, _MAX = -(2**63), 2**64 - 1

_TOO_DEEP = f"nested deeper than {MAX_DEPTH}"


def block_as_json(block: bytes) -> Any:
    """A dag-cbor block as a value that JSON can write. Raises `ValueError` for other bytes."""
    return _plain(cbrrr.decode_dag_cbor(block), MAX_DEPTH)


def encode(value: Any) -> bytes:
    """The one dag-json of a value. Raises `ValueError` for one that has none."""
    plain = _plain(value, MAX_DEPTH)
    return json.dumps(
        plain, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
    ).encode()


def decode(data: bytes) -> Any:
    """The value of dag-json, in its one form or with spaces and in another order.

    Raises `ValueError` for anything else.
    """
    try:
        value = json.loads(
            data.decode(), object_pairs_hook=_object, parse_int=_integer, parse_constant=_constant
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check(value, MAX_DEPTH)
    return value


# --- values to JSON -----------------------------------------------------------------------------


def _plain(value: Any, depth: int) -> Any:
    if depth < 0:
        raise ValueError(_TOO_DEEP)
    if isinstance(value, cbrrr.CID):
        return {"/": link_text(value.cid_bytes)}
    if isinstance(value, bytes):
        return {"/": {"bytes": base64.b64encode(value).decode().rstrip("=")}}
    if isinstance(value, dict):
        plain = {key: _plain(item, depth - 1) for key, item in value.items()}
        if _is_reserved(value):
            raise ValueError("a map with the key / that would be read as a link or as bytes")
        return plain
    if isinstance(value, list):
        return [_plain(item, depth - 1) for item in value]
    return value


def _is_reserved(value: dict[str, Any]) -> bool:
    """Is it a map that a reader takes for a link or for bytes?"""
    inner = value.get("/")
    return isinstance(inner, str) or (
        isinstance(inner, dict) and isinstance(inner.get("bytes"), str)
    )


# --- JSON to values -----------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> Any:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    if not _is_reserved(found):
        return found
    inner = found["/"]
    if len(found) > 1 or (isinstance(inner, dict) and len(inner) > 1):
        raise ValueError("an object with the key / that is no link and no bytes")
    return as_link(parse_link(inner)) if isinstance(inner, str) else _bytes(inner["bytes"])


def _bytes(text: str) -> bytes:
    try:
        found = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"bytes that are no base64: {error}") from error
    if base64.b64encode(found).decode().rstrip("=") != text:
        raise ValueError("bytes that are no base64 without padding")
    return found


def _integer(text: str) -> int:
    number = int(text) if len(text) <= 20 else _MAX + 1
    if not _MIN <= number <= _MAX:
        raise ValueError("an integer of more than 64 bits")
    return number


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _check(value: Any, depth: int) -> None:
    """Raises `ValueError` for what Python's reader lets through."""
    if depth < 0:
        raise ValueError(_TOO_DEEP)
    if isinstance(value, dict):
        for key, item in value.items():
            _check(key, depth)
            _check(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth - 1)
    elif isinstance(value, str):
        value.encode()  # half a surrogate raises UnicodeEncodeError, a ValueError
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number too large for 64 bits")
