"""What a Kubo daemon's RPC answers, with the names that it gives the fields."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


class Block(msgspec.Struct):
    Key: str


class Pins(msgspec.Struct):
    Pins: list[str]


class PinList(msgspec.Struct):
    Keys: dict[str, Any]


class Repository(msgspec.Struct):
    NumObjects: int
    RepoSize: int


class Removed(msgspec.Struct):
    Hash: str
    Error: str = ""


class Bootstrap(msgspec.Struct):
    Peers: tuple[str, ...] | None


class Peer(msgspec.Struct):
    Addr: str = ""


class Peers(msgspec.Struct):
    Peers: tuple[Peer, ...] | None


class Identity(msgspec.Struct):
    Addresses: tuple[str, ...] | None


class Strings(msgspec.Struct):
    Strings: tuple[str, ...] | None


class No(msgspec.Struct):
    Message: str


def read(reply: Any, form: type[T]) -> T:
    """A reply of the library as a value. Raises `ValueError`."""
    # js-ipfs writes large numbers as text.
    return msgspec.convert(getattr(reply, "_raw", reply), form, strict=False)


def there(reply: Any, form: type) -> bool:
    read(reply, form)
    return True
