"""The key of a request: which question is it?

A key is the sha2-256 of the canonical request: a dag-cbor block of everything that decides the
answer, with every field that has its default left out. Two requests have one key exactly if they
mean the same:

- A number counts by its value: 1, 1.0 and 1e0 are one integer, any other is a 64-bit float.
- The order of the keys of an object does not count (dag-cbor sorts them).
- Text counts as it is, byte for byte; so does the order of lists.
- None means "as the provider likes", which differs from any value.
- `extra` counts without what says nothing about the answer (`TRANSPORT`), and the dialect only
  together with it, since it says what those fields mean.
- Answers of different namespaces never mix, so the namespace counts too.

Between peers a key travels as an HMAC under a secret of the namespace, so that nobody outside can
test guessed prompts.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import operator
from collections.abc import Callable
from typing import Any, Literal

import cbrrr
import msgspec

from ..providers.base import (
    TRANSPORT,
    EmbedRequest,
    GenerateRequest,
    Image,
    Input,
    Message,
    ModelRequest,
    RequestRejected,
    ResponseFormat,
    Sampling,
    Text,
    Tool,
    ToolCall,
    ToolChoice,
)
from .cid import DIGEST_SIZE, cid_of, cid_text

KeyForm = Literal["sha256", "cid"]

#: Raised when the canonical form changes: old and new keys then never meet.
VERSION = 1
#: Fields of a request that are part of its key whenever they differ from their default.
KEYED = (
    "model",
    "messages",
    "sampling",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "prefix",
    "begun",
)

#: Keys that are remembered. One is found by the digest of the request's fields as they are, which
#: one call writes down: a question that is asked again mostly comes in the same words, and the
#: canonical form takes five times as long.
MAX_REMEMBERED = 4096
_keys: dict[bytes, bytes] = {}
_keyed = operator.attrgetter(*KEYED, "extra", "dialect")
_encode_fields = msgspec.msgpack.Encoder().encode

_KINDS: tuple[type, ...] = (int, float, dict, list, tuple)
#: The integers of CBOR.
_LEAST, _MOST = -(2**64), 2**64 - 1


def canonical(request: GenerateRequest) -> bytes:
    """The canonical request, in dag-cbor. The model's name must be the resolved one.

    Raises `RequestRejected` for a request that no provider could be sent: nested without end, or
    with values or characters that JSON does not have.
    """
    return _encoded(_request, request)


def canonical_input(request: EmbedRequest, given: Input) -> bytes:
    """The canonical request for the embedding of one input, in dag-cbor. Raises as `canonical`."""
    return _encoded(_embed_request, request, given)


def _encoded(form: Callable[..., dict[str, Any]], *asked: Any) -> bytes:
    try:
        return cbrrr.encode_dag_cbor(form(*asked))
    except RecursionError:
        raise RequestRejected("the request is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise RequestRejected(f"the request is not JSON: {error}") from error


def request_key(request: GenerateRequest) -> bytes:
    """The key of a request, 32 bytes. Raises as `canonical`."""
    try:
        asked = _encode_fields((*_keyed(request), request.cache.namespace))
    except (TypeError, ValueError, OverflowError, RecursionError):
        asked = b""  # only `canonical` knows what this is, or what is wrong with it
    name = hashlib.sha256(asked).digest() if asked else b""
    key = _keys.get(name)
    if key is None:
        key = hashlib.sha256(canonical(request)).digest()
        if name:
            if len(_keys) >= MAX_REMEMBERED:
                _keys.clear()
            _keys[name] = key
    return key


def embed_keys(request: EmbedRequest) -> list[bytes]:
    """The key of each input, 32 bytes. Raises as `canonical`.

    Each input is a question of its own: what else is in the batch has no say in its vector.
    """
    return [hashlib.sha256(canonical_input(request, given)).digest() for given in request.inputs]


def key_text(key: bytes | GenerateRequest, form: KeyForm = "sha256", base: str = "base32") -> str:
    """A key as text: the digest in hex, or the CID of the canonical request in a multibase.

    Raises `ValueError` for an unknown form or base: never another kind of key instead.
    """
    if isinstance(key, GenerateRequest):
        key = request_key(key)
    if len(key) != DIGEST_SIZE:
        raise ValueError(f"a key has {DIGEST_SIZE} bytes and not {len(key)}")
    if form == "sha256":
        return key.hex()
    if form == "cid":
        return cid_text(cid_of(key), base)
    raise ValueError(f"no form of key is named {form!r}")


# --- between peers ------------------------------------------------------------------------------


def namespace_secret(swarm_key: bytes | None, name: str = "") -> bytes:
    """The secret of a namespace, 32 bytes: HKDF-SHA256 of the mesh secret.

    Without a mesh secret the keys are only as secret as their prompts are hard to guess.
    """
    extracted = hmac.digest(b"promptmesh-namespace-1", swarm_key or bytes(32), "sha256")
    return hmac.digest(extracted, name.encode("utf-8", "surrogatepass") + b"\x01", "sha256")


def namespace_tag(secret: bytes) -> bytes:
    """Names a namespace to who knows its secret, and to nobody else: 8 bytes."""
    return hmac.digest(secret, b"promptmesh-tag-1", "sha256")[:8]


def mesh_key(secret: bytes, key: bytes) -> bytes:
    """What a key is called between the peers of a namespace: HMAC-SHA256, 32 bytes."""
    return hmac.digest(secret, key, "sha256")


def block_proof(secret: bytes, cid: bytes, peer: str) -> bytes:
    """Shows that `peer`, which asks for a block, knows the namespace's secret: 32 bytes.

    It holds for that peer and that CID alone, so that who sees one can do nothing with it.
    """
    return hmac.digest(secret, b"promptmesh-block-1" + cid + peer.encode(), "sha256")


# --- the canonical form -------------------------------------------------------------------------


def _defaults(kind: type[msgspec.Struct]) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (
            field.name,
            field.default
            if field.default_factory is msgspec.NODEFAULT
            else field.default_factory(),
        )
        for field in msgspec.structs.fields(kind)
    )


_FIELDS: dict[type, tuple[tuple[str, Any], ...]] = {
    kind: _defaults(kind)
    for kind in (Message, Sampling, Text, Image, Tool, ToolCall, ToolChoice, ResponseFormat)
}
_TAGS: dict[type, str] = {Text: "text", Image: "image"}
_REQUEST = tuple(field for field in _defaults(GenerateRequest) if field[0] in KEYED)


def _request(request: GenerateRequest) -> dict[str, Any]:
    plain: dict[str, Any] = {"v": VERSION, "kind": "llm-request"}
    for name, default in _REQUEST:
        value = getattr(request, name)
        if value is not default and value != default:
            plain[name] = _plain(value)
    return plain | _common(request)


def _embed_request(request: EmbedRequest, given: Input) -> dict[str, Any]:
    plain: dict[str, Any] = {"v": VERSION, "kind": "llm-embed-request", "model": request.model}
    plain["input"] = _plain(given)
    if request.dimensions is not None:
        plain["dimensions"] = request.dimensions
    return plain | _common(request)


def _common(request: ModelRequest) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    extra = {name: value for name, value in request.extra.items() if name not in TRANSPORT}
    if extra:
        plain["extra"] = _plain(extra)
        plain["dialect"] = request.dialect
    if request.cache.namespace:
        plain["namespace"] = request.cache.namespace
    return plain


def _plain(value: Any) -> Any:
    """The value in the types of dag-cbor. Raises `TypeError` for one that JSON does not have."""
    kind = type(value)
    if kind is str or value is None or kind is bool:
        return value
    if kind is tuple or kind is list:
        return [_plain(item) for item in value]
    if kind is dict:
        return {
            name if type(name) is str else str(name): _plain(item) for name, item in value.items()
        }
    fields = _FIELDS.get(kind)
    if fields is not None:
        plain = {}
        for name, default in fields:
            item = getattr(value, name)
            if item is not default and item != default:
                plain[name] = item if type(item) is str else _plain(item)
        tag = _TAGS.get(kind)
        if tag is not None:
            plain["type"] = tag
        return plain
    if kind is int:
        return value if _LEAST <= value <= _MOST else _large(value)
    if kind is float:
        return _number(value)
    return _plain(_exact(value))


def _exact(value: Any) -> Any:
    """A value of a subclass (an enumeration, numpy's floats) as one of the class itself."""
    if isinstance(value, str):
        return str.__str__(value)
    for kind in _KINDS:
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"it holds a {type(value).__name__}")


def _number(value: float) -> int | float | bytes:
    if value.is_integer():
        whole = int(value)
        return whole if _LEAST <= whole <= _MOST else value
    # Bytes, which JSON does not have, are for what CBOR does not have.
    return value if math.isfinite(value) else repr(value).encode()


def _large(value: int) -> float | bytes:
    try:
        near = float(value)
    except OverflowError:
        return hex(value).encode()
    return near if int(near) == value else hex(value).encode()
