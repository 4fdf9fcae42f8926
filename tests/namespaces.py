"""Networks of this machine's own: hosts behind routers, as network namespaces of Linux.

Everything is made by the test and gone with it, and no packet leaves. It takes root, `ip` and
`nft`; where they are missing, `why_not` says so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

#: What lies between the routers: addresses that documents use (RFC 5737).
WAN = "203.0.113"
#: A router that keeps a connection's port outside, whatever its destination, lets two hosts meet;
#: one that takes a random port for each destination does not.
Nat = Literal["keeps ports", "random ports"]

#: Where `ip netns` keeps them.
_NAMESPACES = Path("/run/netns")
_MASQUERADE = {"keeps ports": "masquerade", "random ports": "masquerade fully-random"}


def why_not() -> str:
    """Why no networks can be made here; "": they can."""
    missing = [program for program in ("ip", "nft") if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (Debian: iproute2, nftables)"
    if os.geteuid() != 0:
        return "network namespaces take root"
    try:
        with Internet("probe") as probe:
            probe.public("p")
            probe.private("h", "keeps ports")
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"
    return ""


class Internet:
    """Hosts with public addresses, and hosts behind routers of their own."""

    def __init__(self, name: str) -> None:
        self._prefix = f"pm{os.getpid()}{name}"
        self._made: list[str] = []
        self._public = 0
        self._private = 0

    def __enter__(self) -> Internet:
        _sweep()
        try:
            self._namespace("wan")
            self._in("wan", "ip link add bridge0 type bridge")
            self._in("wan", "ip link set bridge0 up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for made in reversed(self._made):  # its links go with it
            subprocess.run(["ip", "netns", "del", made], check=False, capture_output=True)

    def namespace(self, host: str) -> str:
        """The namespace of a host, for `ip netns exec`."""
        return f"{self._prefix}-{host}"

    def public(self, host: str) -> str:
        """Make a host that everybody can reach, and return its address."""
        self._namespace(host)
        self._public += 1
        address = f"{WAN}.{self._public}"
        self._wire(host, "wan", address)
        return address

    def private(self, host: str, nat: Nat) -> str:
        """Make a host behind a router of its own, and return the router's address outside."""
        router = f"{host}-nat"
        outside = self.public(router)
        self._private += 1
        inside = f"10.{self._private}.0"
        self._namespace(host)
        self._pair(host, "eth0", router, "lan")
        self._in(router, f"ip addr add {inside}.1/24 dev lan")
        self._in(host, f"ip addr add {inside}.2/24 dev eth0")
        self._in(host, f"ip route add default via {inside}.1")
        self._in(router, "sysctl -qw net.ipv4.ip_forward=1")
        self._in(router, "nft -f -", _rules(_MASQUERADE[nat]))
        return outside

    def cut(self, host: str) -> None:
        """Let nothing more come to or from a host with a public address."""
        self._in(host, "ip link set wan down")

    def _namespace(self, host: str) -> None:
        name = self.namespace(host)
        _run(["ip", "netns", "add", name])
        self._made.append(name)
        self._in(host, "ip link set lo up")

    def _wire(self, host: str, inner: str, address: str) -> None:
        port = f"p{self._public}"
        self._pair(host, inner, "wan", port)
        self._in("wan", f"ip link set {port} master bridge0")
        self._in(host, f"ip addr add {address}/24 dev {inner}")

    def _pair(self, a: str, at_a: str, b: str, at_b: str) -> None:
        """A cable between two namespaces."""
        other = self.namespace(b)
        self._in(a, f"ip link add {at_a} type veth peer name {at_b} netns {other}")
        self._in(a, f"ip link set {at_a} up")
        self._in(b, f"ip link set {at_b} up")

    def _in(self, host: str, command: str, stdin: str = "") -> None:
        _run(["ip", "netns", "exec", self.namespace(host), *command.split()], stdin)


def _rules(masquerade: str) -> str:
    """A home router: what goes out has the router's address, and nothing comes in unasked."""
    return f"""
        table ip nat {{
            chain post {{
                type nat hook postrouting priority srcnat
                oifname "wan" {masquerade}
            }}
        }}
        table ip filter {{
            chain input {{
                type filter hook input priority filter
                iifname "wan" ct state new drop
            }}
            chain forward {{
                type filter hook forward priority filter
                iifname "wan" ct state new drop
            }}
        }}
    """


def _sweep() -> None:
    """Remove what tests left behind that were killed."""
    for path in _NAMESPACES.glob("pm*"):
        made_by = re.match(r"pm(\d+)", path.name)
        if made_by and not Path(f"/proc/{made_by[1]}").exists():
            subprocess.run(["ip", "netns", "del", path.name], check=False, capture_output=True)


def _run(command: list[str], stdin: str = "") -> None:
    subprocess.run(command, input=stdin, text=True, check=True, capture_output=True, timeout=60)


@contextmanager
def internet(name: str) -> Iterator[Internet]:
    """A network, removed at the end."""
    with Internet(name) as made:
        yield made
