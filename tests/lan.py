"""A network of machines for tests: network namespaces on a switch, whose cables can be pulled.

A machine that is cut off loses its packets without a word, as by a pulled cable: no connection is
refused or reset, which a proxy or a closed socket cannot imitate. Each namespace lives as long as a
process that reads from a pipe of ours, so nothing stays behind, however the test ends.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cache

import trio

CLONE_NEWNET = 0x40000000


@cache
def why_no_lan() -> str:
    """Why this process may make no network namespaces; empty if it may."""
    for program in ("unshare", "nsenter", "ip"):
        if shutil.which(program) is None:
            return f"there is no program `{program}`"
    tried = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "lan", "type", "bridge"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    return tried.stderr.decode().strip()


class Machine:
    """A network namespace with one address."""

    def __init__(self, name: str, address: str, holder: trio.Process) -> None:
        self.name = name
        self.address = address
        self.pid = holder.pid
        self._holder = holder

    def command(self, *command: str) -> list[str]:
        """The command that runs this one there, as the same process."""
        return ["nsenter", "--target", str(self.pid), "--net", "--", *command]

    async def connect(self, host: str, port: int) -> trio.SocketStream:
        """A connection from there."""
        connection = self._socket()
        try:
            await connection.connect((host, port))
        except BaseException:
            connection.close()
            raise
        return trio.SocketStream(connection)

    async def listen(self, port: int) -> trio.SocketListener:
        """Accept connections there."""
        listener = self._socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await listener.bind((self.address, port))
        listener.listen()
        return trio.SocketListener(listener)

    def _socket(self) -> trio.socket.SocketType:
        with self._inside():
            return trio.socket.from_stdlib_socket(socket.socket())

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """This thread is there. A socket that it makes stays there."""
        with open("/proc/thread-self/ns/net", "rb") as here:
            with open(f"/proc/{self.pid}/ns/net", "rb") as there:
                _set_namespace(there.fileno())
            try:
                yield
            finally:
                _set_namespace(here.fileno())


class Lan:
    """Machines on a switch, each with a cable to it. `lan` makes it."""

    def __init__(self, switch: Machine, machines: dict[str, Machine]) -> None:
        self.machines = machines
        self._switch = switch

    async def cut(self, names: Iterable[str]) -> None:
        """Pull these machines' cables."""
        await self._ip(f"link set {self._port(name)} nomaster" for name in names)

    async def split(self, names: Iterable[str]) -> None:
        """Put these machines on another switch: they reach one another, and nobody else."""
        await self._ip(f"link set {self._port(name)} master apart" for name in names)

    async def join(self, names: Iterable[str]) -> None:
        """Put their cables back."""
        await self._ip(f"link set {self._port(name)} master lan" for name in names)

    def _port(self, name: str) -> str:
        return f"port{list(self.machines).index(name)}"

    async def _ip(self, lines: Iterable[str]) -> None:
        await _ip(self._switch, lines)


@asynccontextmanager
async def lan(names: Iterable[str]) -> AsyncIterator[Lan]:
    """A switch and a machine of each name: 10.77.0.1, 10.77.0.2 and so on."""
    holders: list[trio.Process] = []
    try:
        switch = Machine("switch", "", await _hold(holders))
        machines = {}
        for number, name in enumerate(names, start=1):
            machines[name] = Machine(name, f"10.77.0.{number}", await _hold(holders))
        await _wire(switch, machines)
        yield Lan(switch, machines)
    finally:
        with trio.CancelScope(shield=True):
            for holder in holders:
                holder.kill()
                await holder.wait()


async def _hold(holders: list[trio.Process]) -> trio.Process:
    """Begin a namespace, which ends with its process."""
    holder = await trio.lowlevel.open_process(
        ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    holders.append(holder)
    assert holder.stdin is not None
    assert holder.stdout is not None
    await holder.stdin.send_all(b"?")
    assert await holder.stdout.receive_some() == b"?"  # so it is there
    return holder


async def _wire(switch: Machine, machines: dict[str, Machine]) -> None:
    lines = []
    for bridge in ("lan", "apart"):
        lines += [f"link add {bridge} type bridge", f"link set {bridge} up"]
    for number, machine in enumerate(machines.values()):
        port = f"port{number}"
        lines.append(f"link add {port} type veth peer name eth0 netns {machine.pid}")
        lines.append(f"link set {port} master lan up")
    await _ip(switch, lines)
    for machine in machines.values():
        address = f"address add {machine.address}/24 dev eth0"
        await _ip(machine, [address, "link set eth0 up", "link set lo up"])


async def _ip(machine: Machine, lines: Iterable[str]) -> None:
    await trio.run_process(
        machine.command("ip", "-batch", "-"), stdin="\n".join(lines).encode(), capture_stdout=True
    )


def _set_namespace(file: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(file, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
