"""Outbound HTTP/1.1, for asking model servers.

`open_client` gives for an `http:` base URL our own pool (`http_pool`), because httpx costs ten
times the CPU, which counts where the server is on the same machine; and for `https:` httpx behind
the same interface (`https_pool`). Neither follows redirects.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from .http_address import parse_base_url
from .http_pool import HttpPool
from .http_reply import HttpReply
from .https_pool import HttpsPool


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
