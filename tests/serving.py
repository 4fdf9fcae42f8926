"""Routes behind the real HTTP server on loopback, and a client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import trio

from promptmesh.node.http_server import HttpServer, Limits, open_listeners
from promptmesh.node.routes import Routes


@asynccontextmanager
async def serving(routes: Routes) -> AsyncIterator[httpx.AsyncClient]:
    """While inside, they are answered."""
    listeners = await open_listeners("127.0.0.1", 0)
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        await nursery.start(HttpServer(routes, Limits()).serve, listeners)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
        nursery.cancel_scope.cancel()
