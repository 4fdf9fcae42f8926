"""Outbound HTTP for `https:` base URLs, by httpx, which is imported when it is first used."""

from __future__ import annotations

import functools
import importlib
import ssl
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import trio

from .http_address import Address
from .http_reply import (
    IDLE_LIFETIME,
    MAX_BODY,
    MAX_IDLE,
    BrokenReply,
    HttpFailure,
    HttpReply,
    NotConnected,
    TimedOut,
    reason_of,
)


class HttpsPool:
    """The same for an `https:` base URL, by httpx."""

    def __init__(
        self,
        address: Address,
        headers: Mapping[str, str],
        *,
        connect_timeout: float = 5.0,
        read_timeout: float = 600.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.address = address
        self._headers = {**headers, "accept-encoding": "identity"}
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        self._tls = tls
        self._client: Any = None
        # One at a time, so that there is one client.
        self._opening = trio.CapacityLimiter(1)

    def request(self, method: str, path: str, body: bytes | None = None) -> _HttpxReply:
        return _HttpxReply(self, method, f"https://{self.address}{self.address.path}{path}", body)

    async def client(self) -> Any:
        """The `httpx.AsyncClient`, made in a thread: importing and reading certificates blocks."""
        if self._client is None:
            await trio.to_thread.run_sync(self._open, limiter=self._opening)
        return self._client

    def _open(self) -> None:
        if self._client is not None:
            return
        httpx: Any = importlib.import_module("httpx")
        self._client = httpx.AsyncClient(
            headers=self._headers,
            verify=_authorities() if self._tls is None else self._tls,
            timeout=httpx.Timeout(self._read_timeout, connect=self._connect_timeout, pool=None),
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=MAX_IDLE,
                keepalive_expiry=IDLE_LIFETIME,
            ),
            follow_redirects=False,
        )

    async def aclose(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.aclose()

    def failure(self, error: Exception) -> HttpFailure:
        """An error of httpx in our words."""
        kind = type(error).__name__
        if kind == "ConnectTimeout":
            return TimedOut(f"no connection to {self.address} within {self._connect_timeout:g} s")
        if kind == "ConnectError":
            return NotConnected(f"cannot connect to {self.address}: {_reason(error)}")
        if kind in ("ReadTimeout", "WriteTimeout"):
            return TimedOut(f"the server sent nothing for {self._read_timeout:g} s")
        return BrokenReply(f"the connection ended before the reply did ({error or kind})")


@functools.cache
def _authorities() -> ssl.SSLContext:
    """Whom this machine trusts: reading it takes 50 ms, so that all providers share it."""
    httpx: Any = importlib.import_module("httpx")
    context: ssl.SSLContext = httpx.create_ssl_context()
    return context


def _reason(error: BaseException) -> str:
    """Why there is no connection: httpx wraps it several times, and loses the words of TLS."""
    reason = str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"the certificate is not valid: {cause.verify_message}"
        if isinstance(cause, OSError):
            return reason_of(cause)
        reason = str(cause) or reason
        cause = cause.__cause__ or cause.__context__
    return reason or "TLS failed"


class _HttpxReply(HttpReply):
    """One request and its reply by httpx."""

    def __init__(self, pool: HttpsPool, method: str, url: str, body: bytes | None) -> None:
        self._pool = pool
        self._call = method, url, body
        self._size = 0
        self.status = 0
        self.headers: Mapping[str, str] = {}

    async def __aenter__(self) -> Self:
        method, url, body = self._call
        client = await self._pool.client()
        headers = {} if body is None else {"content-type": "application/json"}
        request = client.build_request(method, url, content=body, headers=headers)
        try:
            self._response = await client.send(request, stream=True)
        except Exception as error:  # the caller sees it, as the failure it is
            raise self._pool.failure(error) from None
        self.status = self._response.status_code
        self.headers = self._response.headers
        self._pieces = self._response.aiter_raw()
        self._compressed = self.headers.get("content-encoding", "identity").lower() != "identity"
        return self

    async def receive(self) -> bytes:
        if self._compressed:
            raise BrokenReply("the reply is compressed, which was not asked for")
        try:
            piece: bytes = await anext(self._pieces, b"")
        except Exception as error:  # the caller sees it, as the failure it is
            raise self._pool.failure(error) from None
        self._size += len(piece)
        if self._size > MAX_BODY:
            raise BrokenReply(f"the reply is larger than {MAX_BODY} bytes")
        return piece

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1.0):
            await self._response.aclose()
            # httpx reads through generators within generators, which trio wants to see ended. The
            # closed connection ends them all, from the innermost; closing the outermost would not.
            with suppress(Exception):  # nobody wants to see it: the reply was left
                while await anext(self._pieces, b""):
                    pass
