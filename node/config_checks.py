"""What texts of the configuration must be: names, addresses, ports."""

from __future__ import annotations

import ipaddress
import re
import socket

from ..cache.kubo_address import endpoint

MAX_NAME = 63


def host_name() -> str:
    """The host's name, made fit to name a node."""
    return re.sub(r"[^\w.-]+", "-", socket.gethostname().partition(".")[0])[:MAX_NAME] or "node"


def check_name(text: str) -> str:
    """A name that fits into PEER-NAME:PROVIDER/MODEL. Raises `ValueError`."""
    if not 0 < len(text) <= MAX_NAME or re.search(r"[\s:/]", text):
        raise ValueError(f"expected 1 to {MAX_NAME} characters without spaces, ':' and '/'")
    return text


def check_trusted(text: str) -> str:
    """`all`, `me`, a peer id or a node's name. Raises `ValueError`."""
    return check_name(text)


def split_host_port(text: str) -> tuple[str, int]:
    """`127.0.0.1:7411` or `[::1]:7411` taken apart. Raises `ValueError`."""
    host, colon, port = text.rpartition(":")
    if not host or not colon or not re.fullmatch(r"\d{1,5}", port) or int(port) > 65535:
        raise ValueError("expected HOST:PORT, such as 127.0.0.1:7411")
    return host.removeprefix("[").removesuffix("]"), int(port)


def check_http_listen(text: str) -> str:
    """An address that only this machine reaches. Raises `ValueError`."""
    host, _ = split_host_port(text)
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise ValueError(
            f"expected an address of this machine such as 127.0.0.1, not {host!r}"
        ) from None
    if not loopback:
        raise ValueError(
            "other machines could reach this address, and whoever reaches it could spend your "
            "models and keys. The HTTP interface listens on 127.0.0.1 or [::1] only; other "
            "machines run a node of their own (`promptmesh invite`)"
        )
    return text


def check_multibase(text: str) -> str:
    """A base that CIDs can be written in. Raises `ValueError`."""
    from ..cache.cid import cid_of, cid_text

    try:
        cid_text(cid_of(bytes(32)), text)
    except ValueError as error:
        raise ValueError(f"expected a multibase such as base58btc: {error}") from None
    return text


def check_port(text: str) -> str:
    """The number of a port. Raises `ValueError`."""
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise ValueError("expected a port from 1 to 65535")
    return text


def check_kubo_api(text: str) -> str:
    """The address of a Kubo's RPC, or nothing. Raises `ValueError`."""
    if text:
        endpoint(text)
    return text
