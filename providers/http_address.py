"""The base URL of a model server, taken apart."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple
from urllib.parse import urlsplit


class Address(NamedTuple):
    """A base URL taken apart. `path` has no slash at its end."""

    scheme: str
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def private(self) -> bool:
        """Is it on this machine or the local network, as far as the name tells?"""
        try:
            address = ipaddress.ip_address(self.host.partition("%")[0])
        except ValueError:
            name = self.host.rstrip(".").lower()
            return "." not in name or name.endswith((".localhost", ".local", ".lan", ".internal"))
        # Also false for 100.64.0.0/10, where overlay networks live.
        return not address.is_global


def parse_base_url(base_url: str) -> Address:
    """Take a base URL apart. Raises `ValueError`, without repeating what might be a password."""
    if re.search(r"[\x00-\x20\x7f]", base_url):
        raise ValueError("a URL has no spaces or control characters")
    try:
        parts = urlsplit(base_url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode()
    except ValueError:
        raise ValueError("the host or port of the URL is not valid") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError("expected a URL such as http://127.0.0.1:8000/v1")
    if "@" in parts.netloc:
        raise ValueError("a URL must not hold a user name or password; give the key separately")
    if parts.query or parts.fragment:
        raise ValueError("a base URL has no `?` and no `#`")
    if not host or port == 0:
        raise ValueError("the host or port of the URL is not valid")
    if not parts.path.isascii():
        raise ValueError("the path of a URL must be ASCII; write other characters as %XX")
    default = 80 if parts.scheme == "http" else 443
    return Address(parts.scheme, host, port or default, parts.path.rstrip("/"))
