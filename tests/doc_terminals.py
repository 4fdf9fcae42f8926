"""Does what a document tells a person to do, and looks at what is shown (tests/doc_shown.py)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import trio
from daemons import NO_TLS, ROOT, clean_environment, until
from doc_blocks import CTRL_C, Command
from doc_shown import Ids
from ports import free_port

#: Seconds for one command; for a node to be ready; to see that one came or went.
COMMAND_S, READY_S, SETTLE_S = 180, 180, 180
#: The home folder of the person in the documents.
WRITTEN_HOME = "/home/ann"
_WRITTEN_PORT = re.compile(r"(?<=[:/])74\d\d\b")
_STAYS = re.compile(r"^scripts/start\b|promptmesh (--home \S+ )?up\b")


class Machine:
    """A machine of a person: a home folder, free ports for those of the document, a shell."""

    def __init__(self, home: Path, *, installed: bool = False) -> None:
        """`installed`: `promptmesh` is a command there, not only in the checkout."""
        self.home = home
        home.mkdir(parents=True)
        self._ports: dict[str, int] = {}
        path = os.environ["PATH"]
        self.environment = clean_environment(
            HOME=str(home),
            PATH=f"{Path(sys.executable).parent}:{path}" if installed else path,
            PROMPTMESH_HOME=str(home / ".local/share/promptmesh"),
            # Where a document says nothing, the defaults, of which other nodes may run here.
            PROMPTMESH_HTTP_LISTEN=f"127.0.0.1:{self._port('7411')}",
            PROMPTMESH_MESH_LISTEN=f"/ip4/127.0.0.1/tcp/{self._port('7412')}",
            PROMPTMESH_MESH_MDNS="0",
            # In a terminal each line comes at once, in one order on both streams.
            PYTHONUNBUFFERED="1",
        )

    def replaced(self, text: str) -> str:
        """The text with free ports."""
        return _WRITTEN_PORT.sub(lambda found: str(self._port(found[0])), text)

    def _port(self, written: str) -> int:
        if written not in self._ports:
            self._ports[written] = free_port()
        return self._ports[written]


@dataclass
class Node:
    """A node that runs in the foreground of a terminal."""

    process: trio.Process
    log: Path

    @property
    def url(self) -> str | None:
        """Where it serves HTTP, once it has said so."""
        said = re.search(r" is up: (http://\S+)/v1 ", self.log.read_text())
        return said[1] if said else None

    async def get(self, path: str) -> httpx.Response:
        """Ask it. Raises `httpx.HTTPError`."""
        url = self.url or "http://not-yet.invalid"
        async with httpx.AsyncClient(base_url=url, timeout=60, verify=NO_TLS) as client:
            return await client.get(path)

    async def is_ready(self) -> bool:
        """Does it have a model that can be asked?"""
        assert self.process.poll() is None, self.log.read_text()
        if self.url is None:
            return False
        return (await self.get("/readyz")).status_code == 200

    async def peers(self) -> tuple[str, set[str]]:
        """Its peer id, and the peers that are connected and were pinged."""
        this, *others = (await self.get("/mesh/v1/peers")).json()
        there = {p["peer"] for p in others if p["state"] == "connected" and p["rtt_ms"] is not None}
        return this["peer"], there


class Person:
    """Types the commands of a document, in several terminals and on two machines."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._machines = {
            "": Machine(folder / "home"),
            "other machine": Machine(folder / "other", installed=True),
        }
        #: The nodes that run, by the terminal they are in.
        self._nodes: dict[str, Node] = {}
        self._ids = Ids()
        self._link = ""

    async def types(self, command: Command) -> None:
        """Do it, and compare what comes with what the document shows."""
        if command.text == CTRL_C:
            await self._interrupt(command)
        elif _STAYS.search(command.text):
            await self._start(command)
        else:
            await self._run(command)

    async def runs_python(self, source: str) -> None:
        """Run a program of the document."""
        machine = self._machines[""]
        await self._finish([sys.executable, "-c", machine.replaced(source)], machine, 0)

    async def close(self) -> None:
        """Leave nothing running."""
        for node in self._nodes.values():
            if node.process.poll() is None:
                os.killpg(node.process.pid, signal.SIGKILL)
            with trio.CancelScope(shield=True), trio.move_on_after(10):
                await node.process.wait()

    def _machine(self, command: Command) -> Machine:
        return self._machines.get(command.place) or self._machines[""]

    def _line(self, command: Command) -> str:
        """What is really typed."""
        text = self._machine(command).replaced(self._ids.replaced(command.text))
        return re.sub(r"\bLINK\b", self._link, text)

    def _compare(self, command: Command, came: str) -> None:
        missing = self._missing(command, came)
        assert missing is None, f"line {command.line}: {command.text}\n\n{missing}\n\n{came}"

    def _missing(self, command: Command, came: str) -> str | None:
        home = str(self._machine(command).home)
        shown = [line.replace(WRITTEN_HOME, home) for line in command.shown]
        return self._ids.missing(shown, came.splitlines())

    async def _run(self, command: Command) -> None:
        # A line of the document that begins so is a failure that it wants to show.
        fails = any(line.startswith("promptmesh: ") for line in command.shown)
        shell = ["bash", "-euo", "pipefail", "-c", self._line(command)]
        came = await self._finish(shell, self._machine(command), int(fails))
        self._link = next(iter(re.findall(r"^promptmesh://\S+$", came, re.MULTILINE)), self._link)
        self._compare(command, came)

    async def _finish(self, program: Sequence[str], machine: Machine, status: int) -> str:
        with trio.fail_after(COMMAND_S):
            done = await trio.run_process(
                program,
                cwd=ROOT,
                env=machine.environment,
                capture_stdout=True,
                stderr=subprocess.STDOUT,
                check=False,
            )
        came = done.stdout.decode()
        assert done.returncode == status, f"{program[-1]}\n\n{came}"
        return came

    async def _start(self, command: Command) -> None:
        """A node, until it is ready and all nodes know each other."""
        log = self._folder / f"line-{command.line}.log"
        with log.open("wb") as file:
            process = await trio.lowlevel.open_process(
                ["bash", "-euc", f"exec {self._line(command)}"],
                cwd=ROOT,
                env=self._machine(command).environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                # A group of its own, as in a terminal, where Ctrl-C reaches all of it.
                start_new_session=True,
            )
        node = self._nodes[command.place] = Node(process, log)
        await until(node.is_ready, f"{command.text} is ready; {log}", READY_S)

        async def all_shown() -> bool:
            return self._missing(command, log.read_text()) is None

        try:
            await until(all_shown, "it says all", SETTLE_S)
        except AssertionError:
            self._compare(command, log.read_text())
        await self._settle(ready=True)

    async def _interrupt(self, command: Command) -> None:
        node = self._nodes.pop(command.place)
        before = len(node.log.read_text())
        os.killpg(node.process.pid, signal.SIGINT)
        with trio.fail_after(COMMAND_S):
            assert await node.process.wait() == 0
        self._compare(command, node.log.read_text()[before:])
        await self._settle(ready=False)

    async def _settle(self, *, ready: bool) -> None:
        """Wait for what a person does not see happen: that the nodes meet, or miss one."""

        async def settled() -> bool:
            nodes = list(self._nodes.values())
            peers = dict([await node.peers() for node in nodes])
            met = all(there == peers.keys() - {peer} for peer, there in peers.items())
            return met and (not ready or all([await node.is_ready() for node in nodes]))

        await until(settled, "the nodes know each other", SETTLE_S)


@asynccontextmanager
async def person(folder: Path) -> AsyncIterator[Person]:
    """Somebody at the terminals; what was started ends with them."""
    somebody = Person(folder)
    try:
        yield somebody
    finally:
        await somebody.close()
