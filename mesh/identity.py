"""An Ed25519 identity: a peer id, its signatures, and the check of others'."""

from __future__ import annotations

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

#: A peer id of an Ed25519 key is the identity multihash of its key in libp2p's protobuf form:
#: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
_PREFIX = bytes.fromhex("002408011220")
_KEY_BYTES = 32


class Identity:
    """Who this node is. The seed never leaves it."""

    def __init__(self, seed: bytes) -> None:
        """From 32 secret bytes. Raises `ValueError` for another number."""
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        public = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.peer_id: str = base58.b58encode(_PREFIX + public).decode()

    def sign(self, data: bytes) -> bytes:
        """This node's signature, 64 bytes."""
        return self._key.sign(data)


def is_peer_id(text: str) -> bool:
    """Is that the id of a peer with an Ed25519 identity?"""
    try:
        raw = base58.b58decode(text)
    except ValueError:
        return False
    return len(raw) == len(_PREFIX) + _KEY_BYTES and raw.startswith(_PREFIX)


def verify(peer: str, data: bytes, signature: bytes) -> bool:
    """Did that peer sign these bytes? False for anything malformed."""
    try:
        raw = base58.b58decode(peer)
        if len(raw) != len(_PREFIX) + _KEY_BYTES or not raw.startswith(_PREFIX):
            return False
        Ed25519PublicKey.from_public_bytes(raw[len(_PREFIX) :]).verify(signature, data)
    except (ValueError, InvalidSignature):
        return False
    return True
