"""JSON-RPC, as vendors' programs speak it. Pure."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

#: What a program is told where it wants to ask its user.
NOBODY = {"code": -32601, "message": "nobody is here to answer"}

T = TypeVar("T")


class WireError(Exception):
    """A message that makes no sense."""


class RpcError(msgspec.Struct, frozen=True):
    """Why a call was refused."""

    message: str = ""
    data: Any = None


class Incoming(msgspec.Struct, frozen=True):
    """What a program sends: an answer, an event, or a question of its own."""

    id: int | str | None = None
    method: str | None = None
    params: msgspec.Raw = msgspec.Raw(b"{}")
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: RpcError | None = None


def read(body: bytes | msgspec.Raw, type_: type[T]) -> T:
    """A message, or a part of one. Raises `WireError`."""
    try:
        return msgspec.json.decode(body, type=type_)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a message that makes no sense: {error}") from None
