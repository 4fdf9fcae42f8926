"""Addresses as the network has them: multiaddrs of TCP, and of circuits through a relay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import psutil  # type: ignore[import-untyped, unused-ignore]

from .transport import PeerId

#: Stands between where a relay is and whom it leads to.
CIRCUIT = "/p2p-circuit"


class Place(NamedTuple):
    """Where somebody listens."""

    host: str
    port: int
    #: Who, if the address says so.
    peer: PeerId | None


class Circuit(NamedTuple):
    """The way to a peer through a relay."""

    relay: PeerId
    #: Where the relay is; "": only who is connected to it can use the circuit.
    relay_address: str
    peer: PeerId | None


def parse(address: str) -> Place:
    """`/ip4/1.2.3.4/tcp/7412`, with or without `/p2p/PEERID`. Raises `ValueError`."""
    parts = address.split("/")
    if len(parts) not in (5, 7) or parts[0] or parts[3] != "tcp" or parts[5:6] not in ([], ["p2p"]):
        raise ValueError("not a TCP address")
    if parts[1] not in ("ip4", "ip6", "dns", "dns4", "dns6") or not parts[2]:
        raise ValueError(f"addresses of the kind {parts[1]} are not supported")
    if not parts[4].isdecimal() or int(parts[4]) > 65535:
        raise ValueError(f"{parts[4]} is no port")
    return Place(parts[2], int(parts[4]), parts[6] if len(parts) == 7 else None)


def is_circuit(address: str) -> bool:
    """Does it lead through a relay?"""
    return CIRCUIT in address


def parse_circuit(address: str) -> Circuit:
    """`/ip4/1.2.3.4/tcp/7412/p2p/RELAY/p2p-circuit/p2p/PEERID`. Raises `ValueError`."""
    relay_address, _, rest = address.partition(CIRCUIT)
    where, found, relay = relay_address.rpartition("/p2p/")
    if not found or not relay or (where and parse(relay_address).peer != relay):
        raise ValueError("not an address of a circuit")
    if rest and (not rest.startswith("/p2p/") or "/" in rest[5:]):
        raise ValueError("circuits through two relays are not supported")
    return Circuit(relay, relay_address if where else "", rest[5:] or None)


def directly_first(addresses: Iterable[str]) -> list[str]:
    """The same addresses, those through relays last."""
    return sorted(addresses, key=is_circuit)


def multiaddr(host: str, port: int) -> str:
    """An IP address and a TCP port as a multiaddr."""
    return f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}"


def machine_addresses() -> list[str]:
    """The IP addresses of this machine's network interfaces."""
    return [
        address.address.partition("%")[0]
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family.name in ("AF_INET", "AF_INET6")
    ]


def reachable(bound: Iterable[tuple[str, int]], machine: Sequence[str]) -> list[str]:
    """Where others can dial what is bound to these places, on a machine with those addresses."""
    found: list[str] = []
    for host, port in bound:
        hosts = [host]
        if host in ("0.0.0.0", "::"):
            own = [a for a in machine if (":" in a) == (":" in host) and not _is_link_local(a)]
            hosts = [a for a in own if not _is_loopback(a)] or own
        found += [multiaddr(h, port) for h in hosts]
    return list(dict.fromkeys(found))


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _is_link_local(address: str) -> bool:
    return address.startswith(("169.254.", "fe80:"))
