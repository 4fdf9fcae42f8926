"""A subset of the Kubo RPC, `POST /api/v0/*`: what IPFS clients need for blocks, dags and files.

Which command does what is in `api_kubo_blocks`, `api_kubo_dags`, `api_kubo_files`, `api_kubo_pins`
and `api_kubo_node`; what a call is in `api_kubo_call`. Here is who may call, and how long it takes.

Any page that a browser on this machine shows can send a POST to a loopback port, and these commands
change things. As Kubo does, a request is refused whose `Origin` or `Referer` is not this very
server, and one that comes from a browser and says neither.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from urllib.parse import urlsplit

import trio

from .api_kubo_call import Call, Command, Failed, Reader, Refused, seconds
from .http_server import Request, Responder
from .routes import ANY, Routes, foreign

logger = logging.getLogger(__name__)

PREFIX = "/api/v0/"

_TEXT = "text/plain; charset=utf-8"
_NOSNIFF = [("X-Content-Type-Options", "nosniff")]
_PORTS = {"http": 80, "https": 443}


class KuboApi:
    """The handlers of `/api/v0/*`."""

    def __init__(self, reader: Reader, commands: Mapping[str, Command]) -> None:
        self._reader = reader
        self._commands = commands

    def add_to(self, routes: Routes) -> None:
        """Answer what is below `/api/v0/`."""
        routes.add_below(ANY, PREFIX, self.call)

    async def call(self, request: Request, responder: Responder, name: str) -> None:
        """`POST /api/v0/NAME`."""
        if request.method != "POST":
            await _other_method(request, responder)
            return
        if not _is_program(request):
            await _say(responder, 403, "403 - Forbidden")
            return
        command = self._commands.get(name)
        if command is None:
            await _say(responder, 404, "404 page not found")
            return
        call = Call(request, responder, self._reader)
        try:
            if call.text("timeout"):
                call.timeout = call.patience = seconds(call.text("timeout"))
            with trio.fail_after(call.timeout):
                await command(call)
        except Refused as error:
            await _say(responder, 400, str(error))
        except trio.TooSlowError:
            await _fail(call, name, "context deadline exceeded")
        except Failed as error:
            await _fail(call, name, str(error))


async def _other_method(request: Request, responder: Responder) -> None:
    allow = [("Allow", "OPTIONS, POST")]
    if request.method == "OPTIONS":  # no page is allowed anything
        await responder.send(204, headers=allow, content_type="")
    else:
        await _say(responder, 405, "405 - Method Not Allowed", allow)


async def _fail(call: Call, name: str, message: str) -> None:
    if call.responder.started:
        # The answer stays without its end, and so the connection is cut: the client sees it.
        logger.warning("the answer to %s was cut: %s", name, message)
        return
    await call.fail(message)


async def _say(
    responder: Responder, status: int, text: str, headers: list[tuple[str, str]] | None = None
) -> None:
    """As Go's own server says what is wrong."""
    body = text.encode(errors="replace") + b"\n"
    all_headers = [*_NOSNIFF, *(headers or [])]
    await responder.send(status, body, content_type=_TEXT, headers=all_headers)


def _is_program(request: Request) -> bool:
    """Does it come from a program rather than from a page in a browser?"""
    headers = request.headers
    said = [headers[name] for name in ("origin", "referer") if headers.get(name)]
    if said:
        return all(_is_here(url, headers.get("host", "")) for url in said)
    agent = headers.get("user-agent", "")
    # Electron's renderer says neither, and is a program.
    return not agent.startswith("Mozilla") or "Electron" in agent


def _is_here(url: str, host: str) -> bool:
    """Is it a page of this very server: a loopback name, and the port that was asked?"""
    try:
        page, server = urlsplit(url), urlsplit(f"http://{host}")
        port = page.port or _PORTS.get(page.scheme)
        return foreign(page.netloc, None) is None and port == (server.port or 80)
    except ValueError:
        return False
