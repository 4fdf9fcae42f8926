"""Where a Kubo daemon's RPC is, and which addresses are of a private network: pure."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple
from urllib.parse import urlsplit

#: How the address of an RPC is written: as in Kubo's own configuration (`Addresses.API`).
EXAMPLE = "/ip4/127.0.0.1/tcp/5001"

_MULTIADDR = re.compile(
    "/(?P<kind>ip4|ip6|dns|dns4|dns6)/(?P<host>[^/]+)/tcp/(?P<port>[0-9]{1,5})(/(?P<scheme>https?))?"
)


class Endpoint(NamedTuple):
    """The RPC of a daemon, for the two clients that speak to it."""

    multiaddr: str
    url: str


def endpoint(text: str) -> Endpoint:
    """The RPC at a multiaddr, or at an `http://` or `https://` URL. Raises `ValueError`."""
    try:
        kind, host, port, scheme = _of_url(text) if "://" in text else _of_multiaddr(text)
    except ValueError:
        raise ValueError(f"expected {EXAMPLE} or http://127.0.0.1:5001") from None
    netloc = f"[{host}]:{port}" if kind == "ip6" else f"{host}:{port}"
    return Endpoint(f"/{kind}/{host}/tcp/{port}/{scheme}", f"{scheme}://{netloc}")


def is_private(multiaddr: str) -> bool:
    """Is this surely the address of a private network or of this machine?

    False for a name, and for a relay, behind which anything may be.
    """
    parts = multiaddr.split("/")
    if len(parts) < 3 or parts[0] or parts[1] not in ("ip4", "ip6") or "p2p-circuit" in parts:
        return False
    try:
        address = ipaddress.ip_address(parts[2].partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    # 100.64.0.0/10, which VPNs use, is neither global nor private.
    return not (address.is_global or address.is_unspecified or address.is_multicast)


def _of_url(text: str) -> tuple[str, str, int, str]:
    url = urlsplit(text)
    port = url.port if url.port is not None else {"http": 80, "https": 443}.get(url.scheme, 0)
    extra = "@" in url.netloc or url.path not in ("", "/") or url.query or url.fragment
    if url.scheme not in ("http", "https") or not url.hostname or extra:
        raise ValueError(text)
    return (*_host(url.hostname), port, url.scheme)


def _of_multiaddr(text: str) -> tuple[str, str, int, str]:
    match = _MULTIADDR.fullmatch(text)
    if match is None or int(match["port"]) > 65535:
        raise ValueError(text)
    kind, host = _host(match["host"])
    if kind != match["kind"] and not (kind == "dns" and match["kind"].startswith("dns")):
        raise ValueError(text)
    return match["kind"], host, int(match["port"]), match["scheme"] or "http"


def _host(name: str) -> tuple[str, str]:
    """What kind of name it is, and the name. Raises `ValueError`."""
    try:
        return f"ip{ipaddress.ip_address(name).version}", name
    except ValueError:
        if not re.fullmatch("[A-Za-z0-9._-]+", name):
            raise
        return "dns", name
