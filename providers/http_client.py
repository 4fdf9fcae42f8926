"""Outbound HTTP/1.1, for asking model servers: what a reply is, and what can go wrong.

`open_client` gives for an `http:` base URL our own pool (`http_pool`), because httpx costs ten
times the CPU, which counts where the server is on the same machine; and for `https:` httpx behind
the same interface (`https_pool`). Neither follows redirects.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

MAX_HEAD = 64 * 1024
#: A hundred thousand streamed tokens with twenty log probabilities each stay below it.
MAX_BODY = 256 * 1024 * 1024
MAX_IDLE = 64
#: Seconds. Servers close an idle connection after 5 to 75 s; a closed one is noticed when taken.
IDLE_LIFETIME = 60.0
#: Seconds that `finish` waits. A server ends the body right after its last event.
FINISH_TIME = 0.1


class HttpFailure(Exception):
    """No whole reply."""


class NotConnected(HttpFailure):
    """No connection was made, so nothing was sent."""


class TimedOut(HttpFailure):
    """The server took longer than its limit, to connect or between two pieces."""


class BrokenReply(HttpFailure):
    """The reply ended too early, was too large, or was not valid."""


def reason_of(error: OSError) -> str:
    """Why, in the system's words: trio wraps the attempts at several addresses of a name."""
    cause = error.__cause__
    if isinstance(cause, ExceptionGroup):
        reasons = dict.fromkeys(reason_of(e) for e in cause.exceptions if isinstance(e, OSError))
        return ", ".join(reasons)
    if isinstance(error, socket.gaierror):
        return "the host name is not known"
    if error.errno == errno.ECONNREFUSED:
        return "connection refused"
    return (error.strerror or str(error)).lower()


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


class HttpReply(Protocol):
    """A reply whose head has arrived. Iterating gives the body as it comes."""

    status: int
    #: By lower-case name; repeated ones are joined by a comma.
    headers: Mapping[str, str]

    async def receive(self) -> bytes:
        """What arrived since, or wait for more; empty at the end. Raises `HttpFailure`."""
        ...

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def finish(self) -> None:
        """Read the little that follows what is known to be the end of the content."""
        ...


class HttpClient(Protocol):
    """Sends requests to one base URL."""

    def request(
        self, method: str, path: str, body: bytes | None = None
    ) -> AbstractAsyncContextManager[HttpReply]:
        """Send a request; `path` is added to the base URL's, a body is JSON.

        Entering waits for the head of the reply, and raises `HttpFailure`. Leaving before the end
        of the body closes the connection, by which the server sees that the client has left.
        """
        ...

    async def aclose(self) -> None:
        """Close the idle connections."""
        ...


#: Headers that the client writes itself.
_OWN_HEADERS = frozenset(
    {"host", "connection", "content-length", "content-type", "transfer-encoding", "accept-encoding"}
)


def open_client(
    base_url: str,
    headers: Mapping[str, str],
    *,
    connect_timeout: float = 5.0,
    read_timeout: float = 600.0,
) -> HttpClient:
    """A client of that base URL, which sends `headers` with every request.

    `read_timeout` (s) is the longest silence of the server. Raises `ValueError`, never with a
    header's value in it.
    """
    # Here, because both import this module.
    from .http_pool import HttpPool
    from .https_pool import HttpsPool

    address = parse_base_url(base_url)
    pool = HttpPool if address.scheme == "http" else HttpsPool
    return pool(
        address,
        checked_headers(headers),
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
    )


def checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The caller's headers beside our own. Raises `ValueError` for what would break the head."""
    found = {"accept": "application/json, text/event-stream", "user-agent": "promptmesh"}
    for name, value in headers.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name) or name.lower() in _OWN_HEADERS:
            raise ValueError(f"the header {name!r} cannot be set")
        if not re.fullmatch(r"[\x20-\x7e\xa0-\xff]*", value):
            raise ValueError(f"the value of the header {name!r} has characters that none may have")
        found[name.lower()] = value
    return found
