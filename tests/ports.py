"""Ports of this machine for tests that must name one before somebody listens there."""

from __future__ import annotations

import os
import socket
from itertools import count

#: Two runs of the tests at once begin at different ones.
_ports = count(os.getpid())


def free_port() -> int:
    """A port of this machine that stays free while nobody listens at it.

    One that the system chooses may be given to somebody else meanwhile, who wants any port. These
    are below the system's range, and each process that runs tests beside others has its own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 20_000 + 1000 * (worker % 10) + next(_ports) % 1000
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
