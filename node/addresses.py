"""Multiaddrs as people write them: checked, taken apart, and made from what a node listens on."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

#: No address of ours comes near this; a longer one is garbage.
MAX_ADDRESS = 512
#: Peer ids are 34 to 42 bytes.
MAX_PEER_ID_BYTES = 64

LISTEN_EXAMPLE = "/ip4/0.0.0.0/tcp/7412"
DIAL_EXAMPLE = "/ip4/192.168.1.5/tcp/7412/p2p/12D3KooW..."


def check_listen(text: str) -> str:
    """An address to listen on: an IP address and a TCP port. Raises `ValueError`."""
    parts = _parts(text, LISTEN_EXAMPLE)
    if len(parts) != 4 or parts[0] not in ("ip4", "ip6") or parts[2] != "tcp":
        raise ValueError(f"expected an address and a TCP port, such as {LISTEN_EXAMPLE}")
    return text


def check_dialable(text: str) -> str:
    """An address to dial, with the peer's id at its end. Raises `ValueError`."""
    parts = _parts(text, DIAL_EXAMPLE)
    if parts[0] not in ("ip4", "ip6", "dns", "dns4", "dns6") or parts[2:3] != ["tcp"]:
        raise ValueError(f"expected an address and a TCP port, such as {DIAL_EXAMPLE}")
    if len(parts) < 6 or parts[-2] != "p2p":
        raise ValueError(f"/p2p/ with the peer's id is missing at its end, as in {DIAL_EXAMPLE}")
    return text


def _parts(text: str, example: str) -> list[str]:
    """What lies between the slashes. Raises `ValueError` for what is no multiaddr."""
    # Imported here: 10 ms that most commands do not need.
    from multiaddr import Multiaddr  # type: ignore[import-untyped]

    if not 1 < len(text) <= MAX_ADDRESS or not text.isascii() or not text.startswith("/"):
        raise ValueError(f"expected a multiaddr such as {example}")
    try:
        Multiaddr(text)
    except ValueError as error:
        # Its message repeats the address, then says what is wrong with it.
        reason = str(error).partition("': ")[2].partition(" (")[0] or "that is none"
        raise ValueError(f"{reason}; expected a multiaddr such as {example}") from None
    return text.removeprefix("/").split("/")


def split_peer(address: str) -> tuple[str, str]:
    """(address without the peer, peer id) of an address that ends in `/p2p/ID`."""
    where, _, peer = address.rpartition("/p2p/")
    return where, peer


def _is_dialable(address: str) -> bool:
    try:
        check_dialable(address)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Does it lead to the machine itself only?"""
    parts = address.split("/")
    if len(parts) < 3 or parts[1] not in ("ip4", "ip6"):
        return False
    return ipaddress.ip_address(parts[2]).is_loopback


def best_for_others(addresses: Iterable[str], limit: int) -> tuple[str, ...]:
    """The ones worth telling others: loopback only where there is nothing else."""
    found = [address for address in dict.fromkeys(addresses) if _is_dialable(address)]
    outside = [address for address in found if not is_loopback(address)]
    return tuple((outside or found)[:limit])


def dialable(listen: Iterable[str], peer: str) -> list[str]:
    """Where others reach a node that listens so; without those whose port is not known yet."""
    found = []
    for address in listen:
        _, family, host, _, port = address.split("/")
        if port == "0":
            continue
        unspecified = ipaddress.ip_address(host).is_unspecified
        hosts = _machine_hosts(family) if unspecified else [host]
        found += [f"/{family}/{each}/tcp/{port}/p2p/{peer}" for each in hosts]
    return found


def _machine_hosts(family: str) -> list[str]:
    """This machine's addresses of a family (`ip4`, `ip6`), as its interfaces have them."""
    import socket

    import psutil  # lists the interfaces; only `invite` without a running node needs it

    wanted = socket.AF_INET if family == "ip4" else socket.AF_INET6
    found = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == wanted
    ]
    # A link-local IPv6 address (`fe80::1%eth0`) means nothing on another machine.
    return [host for host in found if not host.startswith("fe80:")]
