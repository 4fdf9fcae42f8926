"""The gateway and the Kubo RPC of a node as real HTTP, without a daemon, a mesh or a model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import trio

from promptmesh.cache.cid import verify
from promptmesh.mesh.transport import PeerId, TransportError
from promptmesh.node.api_ipfs import IpfsApi
from promptmesh.node.api_kubo_commands import kubo_api
from promptmesh.node.config import load_config
from promptmesh.node.home import Home
from promptmesh.node.http_server import HttpServer, open_listeners
from promptmesh.node.parts import Parts, open_parts
from promptmesh.node.routes import Routes

#: As of a peer that is connected.
PEER = "12D3KooWDMCQbZZvLgHiHntG1KwcHoqHPAxL37KvhgibWqFtpqUY"


@dataclass
class MeshOfBlocks:
    """What others have (`node.reading.Source`)."""

    blocks: dict[bytes, bytes] = field(default_factory=dict)
    asked: list[bytes] = field(default_factory=list)
    #: Whoever asks waits as long as it may.
    silent: bool = False

    async def fetch(self, cid: bytes, *, timeout: float) -> bytes:
        self.asked.append(cid)
        if self.silent:
            await trio.sleep(timeout)
        if cid not in self.blocks:
            raise TransportError("nobody has it")
        assert verify(cid, self.blocks[cid])
        return self.blocks[cid]

    def stored(self, cid: bytes) -> None:
        pass


@dataclass
class FakeSwarm:
    """Connections (`node.api_kubo_node.Swarm`)."""

    addresses: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/7412/p2p/" + PEER,)
    connections: dict[PeerId, str] = field(default_factory=dict)

    async def connect(self, address: str) -> None:
        place, found, peer = address.rpartition("/p2p/")
        if not found:
            raise ValueError("it does not end in /p2p/PEERID")
        if peer != PEER:
            raise TransportError("nobody is there")
        self.connections[peer] = place


@dataclass
class IpfsNode:
    """A node's IPFS side, and a client of it."""

    url: str
    parts: Parts
    others: MeshOfBlocks
    swarm: FakeSwarm
    http: httpx.AsyncClient

    async def rpc(
        self,
        command: str,
        *arguments: str,
        files: list[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> httpx.Response:
        """Call a command. `_` in the name of an option is `-`."""
        query: list[tuple[str, Any]] = [("arg", argument) for argument in arguments]
        query += [(name.replace("_", "-"), str(value)) for name, value in options.items()]
        sent = [("file", ("name", data)) for data in files or []]
        return await self.http.post(
            f"/api/v0/{command}", params=query, files=sent or None, headers=headers
        )

    async def ok(self, command: str, *arguments: str, **options: Any) -> Any:
        """Call a command that gives one JSON value."""
        response = await self.rpc(command, *arguments, **options)
        assert response.status_code == 200, response.text
        return response.json()


@asynccontextmanager
async def ipfs_node(home: Path, config: str = "") -> AsyncIterator[IpfsNode]:
    """A node with that home and `config.toml`."""
    Home(home).make('[local_hf]\nmodel = ""\n' + config)
    settings = load_config(home, environ={})
    others, swarm, routes = MeshOfBlocks(), FakeSwarm(), Routes()
    with open_parts(settings, Home(home), {}) as parts:
        parts.reading.attach(others)
        max_bytes, max_body = settings.cache.max_bytes, settings.limits.max_body
        api = kubo_api(parts, swarm, cache_path=None, max_bytes=max_bytes, max_body=max_body)
        api.add_to(routes)
        routes.add_below("GET", "/ipfs/", IpfsApi(parts.reading).content)
        server = HttpServer(routes)
        listeners = await open_listeners("127.0.0.1", 0)
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, listeners)
            async with httpx.AsyncClient(base_url=url, timeout=60) as http:
                yield IpfsNode(url, parts, others, swarm, http)
            await server.stop(0)
