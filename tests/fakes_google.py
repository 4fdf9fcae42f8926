"""What answers the `gemini` command where the user is logged in: Google's OAuth server, which it
reaches through a proxy (this one, with a certificate of its own), and Code Assist.

Whatever else it asks for is written down and refused, so that nothing leaves the machine.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio
from certificates import self_signed
from fakes_gemini import USAGE, reply
from fakes_http import (
    NotHttp,
    Received,
    ScriptedServer,
    ServerSide,
    event,
    json_reply,
    streamed,
)
from ports import listener_on_loopback

OAUTH = "oauth2.googleapis.com"
_SCOPE = "https://www.googleapis.com/auth/cloud-platform"


class Google(ScriptedServer):
    """`asked` has what was asked, in order: a method's name, or a host that was refused."""

    def __init__(self, port: int, folder: Path) -> None:
        super().__init__(port)
        self.certificate = self_signed(folder / "google.pem", OAUTH)
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._tls.load_cert_chain(self.certificate)
        self.asked: list[str] = []
        #: The access tokens it has given, and takes.
        self.tokens = ["token 0"]
        self.text = "hello"
        self.model = ""

    def environment(self) -> dict[str, str]:
        """What leads the command here."""
        return {
            "HTTPS_PROXY": self.origin,
            "NODE_EXTRA_CA_CERTS": str(self.certificate),
            "NO_PROXY": "127.0.0.1",
            "CODE_ASSIST_ENDPOINT": self.origin,
        }

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, NotHttp):
            async with stream:
                side = ServerSide(stream, self)
                while received := await side.request_or_end():
                    if received.method != "CONNECT":
                        await side.send(self._code_assist(received))
                    elif received.path != f"{OAUTH}:443":
                        self.asked.append(received.path)
                        await side.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
                    else:
                        await side.send(b"HTTP/1.1 200 OK\r\n\r\n")
                        await self._oauth(trio.SSLStream(stream, self._tls, server_side=True))
                        return

    async def _oauth(self, stream: trio.abc.Stream) -> None:
        side = ServerSide(stream, self)
        while received := await side.request_or_end():
            method = received.path.partition("?")[0].strip("/")
            self.asked.append(method)
            if method == "token":
                self.tokens.append(f"token {len(self.tokens)}")
                told: Any = {"access_token": self.tokens[-1], "expires_in": 3599, "scope": _SCOPE}
                told["token_type"] = "Bearer"
            else:
                told = {"scope": _SCOPE, "expires_in": 3599, "email": "somebody@example.org"}
            await side.send(json_reply(200, told))

    def _code_assist(self, received: Received) -> bytes:
        method = received.path.partition("?")[0].rpartition(":")[2]
        self.asked.append(method)
        if received.headers.get("authorization") != f"Bearer {self.tokens[-1]}":
            return json_reply(401, {"error": {"code": 401, "message": "not this token"}})
        if method == "loadCodeAssist":
            tier = {"id": "free-tier", "name": "for nothing"}
            return json_reply(200, {"currentTier": tier, "cloudaicompanionProject": "project-1"})
        if method == "streamGenerateContent":
            self.model = received.json["model"]
            said = reply(self.text, finish="STOP", usageMetadata=USAGE)
            return streamed(event({"response": said, "traceId": "t"}))
        return json_reply(200, {})


@asynccontextmanager
async def google(folder: Path) -> AsyncIterator[Google]:
    """It, while inside."""
    listener = await listener_on_loopback()
    server = Google(listener.socket.getsockname()[1], folder)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, server.serve, [listener])
        yield server
        nursery.cancel_scope.cancel()
