"""Which handler answers which path, and who may ask at all."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Awaitable, Callable, Collection
from urllib.parse import urlsplit

import msgspec

from .http_server import Request, Responder

Handler = Callable[[Request, Responder], Awaitable[None]]
#: A handler of the paths below a prefix; it gets what follows the prefix.
PathHandler = Callable[[Request, Responder, str], Awaitable[None]]
#: In place of a method: all of them, among which the handler tells.
ANY = "*"


class Routes:
    """A table of exact paths and of prefixes."""

    def __init__(self) -> None:
        self._exact: dict[str, dict[str, Handler]] = {}
        self._below: dict[str, dict[str, PathHandler]] = {}

    def add(self, method: str, path: str, handler: Handler) -> None:
        """Answer that path. GET also answers HEAD, and OPTIONS is answered here."""
        self._exact.setdefault(path, {})[method] = handler

    def add_below(self, method: str, prefix: str, handler: PathHandler) -> None:
        """Answer the paths that begin with the prefix, which ends in a slash."""
        self._below.setdefault(prefix, {})[method] = handler

    async def __call__(self, request: Request, responder: Responder) -> None:
        refusal = foreign(request.headers.get("host", ""), request.headers.get("origin"))
        if refusal is not None:
            await send_problem(responder, 403, refusal)
            return
        method = "GET" if request.method == "HEAD" else request.method
        exact = self._exact.get(request.path)
        if exact is not None:
            handler = exact.get(method) or exact.get(ANY)
            if handler is not None:
                await handler(request, responder)
            else:
                await send_other_method(request, responder, exact)
            return
        for prefix, methods in self._below.items():
            rest = request.path[len(prefix) :]
            if rest and request.path.startswith(prefix):
                below = methods.get(method) or methods.get(ANY)
                if below is not None:
                    await below(request, responder, rest)
                else:
                    await send_other_method(request, responder, methods)
                return
        await self._not_found(request, responder)

    async def _not_found(self, request: Request, responder: Responder) -> None:
        if request.path == "*":  # `OPTIONS *`: does the server answer?
            await responder.send(204, content_type="")
            return
        known = ", ".join(sorted([*self._exact, *(f"{p}..." for p in self._below)]))
        await send_problem(responder, 404, f"there is no {request.path} here; there is {known}")


async def send_other_method(
    request: Request, responder: Responder, methods: Collection[str]
) -> None:
    """What a path that takes these methods says to another one.

    `OPTIONS` is told which they are; to no page is anything allowed (CORS).
    """
    known = {*methods, "OPTIONS"} | ({"HEAD"} if "GET" in methods else set())
    allow = [("allow", ", ".join(sorted(known)))]
    if request.method == "OPTIONS":
        await responder.send(204, content_type="", headers=allow)
    else:
        await send_problem(
            responder, 405, f"{request.path} takes {', '.join(sorted(methods))}", allow
        )


async def send_problem(
    responder: Responder, status: int, message: str, headers: list[tuple[str, str]] | None = None
) -> None:
    """An error that is not an answer's, in the form every dialect's clients can read."""
    body = problem(message)
    await responder.send(status, body, content_type="application/json", headers=headers or [])


def problem(message: str) -> bytes:
    """The body of such an error."""
    return msgspec.json.encode({"error": {"message": message, "type": "invalid_request_error"}})


def foreign(host: str, origin: str | None) -> str | None:
    """Why a request is not from this machine's programs; None if it may be.

    The server listens on loopback, but a web page that a browser here shows can send requests to
    loopback too: under a name of its own that resolves to 127.0.0.1 (DNS rebinding, seen in
    `Host`), or across origins (seen in `Origin`).
    """
    if not _is_loopback(f"//{host}"):
        return f"this node answers to loopback names only, not to Host {host!r}"
    if origin is not None and not _is_loopback(origin):
        return f"pages of {origin!r} may not use this node"
    return None


@functools.lru_cache(maxsize=64)  # they are always the same few, and taking one apart is slow
def _is_loopback(url: str) -> bool:
    try:
        name = urlsplit(url).hostname or ""
    except ValueError:
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
