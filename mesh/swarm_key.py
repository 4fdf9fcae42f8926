"""The text of a `swarm.key`: the secret of a private network, in the form of go-libp2p and Kubo."""

from __future__ import annotations

KEY_SIZE = 32

_HEADER = "/key/swarm/psk/1.0.0/"
_CODING = "/base16/"


def parse_swarm_key(text: str) -> bytes:
    """The 32 bytes in a `swarm.key`. Raises `ValueError`, which never shows the key."""
    lines = [line.strip() for line in text.strip().splitlines()]
    if len(lines) != 3 or lines[0] != _HEADER or lines[1] != _CODING:
        raise ValueError(f"a swarm key has three lines: {_HEADER}, {_CODING} and 64 hex digits")
    try:
        key = bytes.fromhex(lines[2])
    except ValueError:
        raise ValueError("the third line of a swarm key is 64 hex digits") from None
    if len(key) != KEY_SIZE:
        raise ValueError(f"a swarm key has {KEY_SIZE} bytes, not {len(key)}")
    return key


def format_swarm_key(key: bytes) -> str:
    """The text of a `swarm.key`, as go-libp2p and Kubo read it."""
    if len(key) != KEY_SIZE:
        raise ValueError(f"a swarm key has {KEY_SIZE} bytes, not {len(key)}")
    return f"{_HEADER}\n{_CODING}\n{key.hex()}\n"
