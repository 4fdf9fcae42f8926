"""Ports of this machine for what a test runs in its own process.

One that the system chooses may have been another's a moment ago, whom somebody still looks for
there, and it is anybody's once it is given back. These are below the system's range, each process
that runs tests beside others has its own, and one comes again only after all the others.
"""

from __future__ import annotations

import errno
import os
import socket
from itertools import count

import trio

#: Two runs of the tests at once begin at different ones.
_numbers = count(os.getpid())


def _next() -> int:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return 20_000 + 1000 * (worker % 10) + next(_numbers) % 1000


def free_port() -> int:
    """A port that stays free while nobody listens at it."""
    while True:
        port = _next()
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


async def listener_on_loopback() -> trio.SocketListener:
    """Listens at the next port that is free."""
    while True:
        try:
            (listener,) = await trio.open_tcp_listeners(_next(), host="127.0.0.1")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return listener
