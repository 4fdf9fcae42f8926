"""Sockets that leave from a port which others may leave from too: what hole punching needs.

A port that the system picks while connecting may be that of other connections already, and then no
further socket can be bound to it. So it is picked before.
"""

from __future__ import annotations

import ipaddress
import socket
import sys

import trio


async def connect(
    host: str, port: int, *, local: tuple[str, int] | None = None
) -> trio.SocketStream:
    """A connection, from that local address and port or a port of its own. Raises `OSError`.

    A name is connected to as trio does it, from any port: no `local` with it.
    """
    if not is_ip(host):
        return await trio.open_tcp_stream(host, port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        share_port(made)
        await made.bind(local or ("::" if family == socket.AF_INET6 else "0.0.0.0", 0))
        await made.connect((host, port))
    except BaseException:
        made.close()
        raise
    return trio.SocketStream(made)


def is_ip(host: str) -> bool:
    """Is it an IP address, and no name?"""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def share_port(own: socket.socket | trio.socket.SocketType) -> None:
    """Let this socket, which does not listen, and others have one local address. All must do it."""
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sys.platform != "linux" and hasattr(socket, "SO_REUSEPORT"):
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
