"""The join link: the mesh secret and where its members are, in one line to copy and paste.

`promptmesh://join/` and base64url of: version (1 byte), length of the rest (2 bytes), the swarm key
(32), the number of peers (1) and each peer (its id, the number of its addresses, each address as a
binary multiaddr; all with a length byte before), and the first 4 bytes of the SHA-256 of it all.

The length comes first so that a link whose end was lost in copying is told from a garbled one.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from dataclasses import dataclass, field

from .addresses import MAX_PEER_ID_BYTES, check_dialable, split_peer

PREFIX = "promptmesh://join/"
VERSION = 1
#: A link is for chat windows and terminals; eight addresses are about 300 characters.
MAX_ADDRESSES = 8
MAX_LINK = 4096
_KEY_BYTES = 32
_HEAD_BYTES = 3
_CHECKSUM_BYTES = 4
#: What mail programs, chats and shells put around a link or into it.
_WRAPPING = re.compile(r"[\s<>\"'`]+")

GARBLED = "the join link is garbled: a character of it was changed. Copy it again"


@dataclass(frozen=True)
class JoinLink:
    """What it takes to join: the mesh secret, and addresses with `/p2p/ID` to begin at."""

    key: bytes = field(repr=False)
    addresses: tuple[str, ...]

    @property
    def peers(self) -> frozenset[str]:
        """The ids of the peers it leads to."""
        return frozenset(split_peer(address)[1] for address in self.addresses)


def encode(link: JoinLink) -> str:
    """The link as text. Raises `ValueError` for a wrong key or address, and for too many."""
    if len(link.key) != _KEY_BYTES:
        raise ValueError(f"the mesh secret has {_KEY_BYTES} bytes, not {len(link.key)}")
    if not 1 <= len(link.addresses) <= MAX_ADDRESSES:
        raise ValueError(f"a join link holds 1 to {MAX_ADDRESSES} addresses")
    body = link.key + _encode_peers(link.addresses)
    head = bytes([VERSION]) + (len(body) + _CHECKSUM_BYTES).to_bytes(2, "big")
    whole = head + body + _checksum(head + body)
    return PREFIX + base64.urlsafe_b64encode(whole).decode().rstrip("=")


def decode(text: str) -> JoinLink:
    """The link that was pasted. Raises `ValueError` with a sentence that says how to mend it."""
    whole = _unwrap(text)
    if _checksum(whole[:-_CHECKSUM_BYTES]) != whole[-_CHECKSUM_BYTES:]:
        raise ValueError(GARBLED)
    body = whole[_HEAD_BYTES:-_CHECKSUM_BYTES]
    # From here on only a link that some program made wrongly can fail.
    if len(body) <= _KEY_BYTES:
        raise ValueError("the join link holds no addresses")
    return JoinLink(body[:_KEY_BYTES], _decode_peers(body[_KEY_BYTES:]))


def _unwrap(text: str) -> bytes:
    """The bytes of a whole link of our version."""
    if len(text) > 2 * MAX_LINK:
        raise ValueError("that is much too long for a join link")
    text = _WRAPPING.sub("", text)
    if text[: len(PREFIX)].lower() != PREFIX:
        raise ValueError(f"that is not a join link: one begins with {PREFIX}")
    code = text[len(PREFIX) :].rstrip("=")
    if not re.fullmatch(r"[A-Za-z0-9_-]*", code):
        raise ValueError(GARBLED)
    if len(code) < 4:
        raise ValueError("the join link is cut off right after its beginning. Copy all of it")
    _check_length(code)
    return base64.urlsafe_b64decode(code + "=" * (-len(code) % 4))


def _check_length(code: str) -> None:
    """Is it all there? Raises `ValueError`, also for a version that is not ours."""
    head = base64.urlsafe_b64decode(code[:4])
    if head[0] != VERSION:
        raise ValueError(
            f"the join link is of version {head[0]}, this promptmesh understands version "
            f"{VERSION}: update the older of the two, or copy the link again"
        )
    whole = math.ceil((_HEAD_BYTES + int.from_bytes(head[1:], "big")) * 8 / 6)
    if whole > MAX_LINK:
        raise ValueError(GARBLED)
    if len(code) < whole:
        lost = whole - len(code)
        raise ValueError(
            f"the join link is cut off: {lost} of its {len(PREFIX) + whole} characters are "
            "missing at its end. Copy all of it"
        )
    if len(code) > whole:
        raise ValueError(
            f"{len(code) - whole} characters too many follow the join link. Copy only the link"
        )


def _checksum(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_CHECKSUM_BYTES]


def _encode_peers(addresses: tuple[str, ...]) -> bytes:
    from base58 import b58decode
    from multiaddr import Multiaddr  # type: ignore[import-untyped]

    by_peer: dict[str, list[bytes]] = {}
    for address in addresses:
        where, peer = split_peer(check_dialable(address))
        by_peer.setdefault(peer, []).append(Multiaddr(where).to_bytes())
    out = [bytes([len(by_peer)])]
    for peer, places in by_peer.items():
        out += [_sized(b58decode(peer)), bytes([len(places)]), *map(_sized, places)]
    return b"".join(out)


def _sized(data: bytes) -> bytes:
    if len(data) > 255:
        raise ValueError("an address is too long for a join link")
    return bytes([len(data)]) + data


def _decode_peers(data: bytes) -> tuple[str, ...]:
    from base58 import b58encode
    from multiaddr import Multiaddr

    reader = _Reader(data)
    found = []
    for _ in range(reader.count()):
        peer_id = reader.sized()
        if len(peer_id) > MAX_PEER_ID_BYTES:
            raise ValueError("the join link holds a peer id that is none")
        peer = b58encode(peer_id).decode()
        for _ in range(reader.count()):
            found.append(check_dialable(f"{Multiaddr(reader.sized())}/p2p/{peer}"))
    if not 1 <= len(found) <= MAX_ADDRESSES:
        raise ValueError(f"the join link does not hold 1 to {MAX_ADDRESSES} addresses")
    return tuple(found)


class _Reader:
    """Takes counts and sized pieces from the front. Raises `ValueError` where they end too soon."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def _take(self, size: int) -> bytes:
        if len(self._data) < size:
            raise ValueError("the join link was made wrongly: it ends within an address")
        piece, self._data = self._data[:size], self._data[size:]
        return piece

    def count(self) -> int:
        """How many follow."""
        count = self._take(1)[0]
        if count > MAX_ADDRESSES:
            raise ValueError(f"the join link holds more than {MAX_ADDRESSES} addresses")
        return count

    def sized(self) -> bytes:
        """A piece with its length before it."""
        return self._take(self._take(1)[0])
