"""Real daemons as processes, for the end-to-end tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import h11
import httpx
import trio
from ports import free_port

from promptmesh.node.home import Home

ROOT = Path(__file__).parent.parent
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"
#: To read the authorities of this machine takes a client 50 ms, for nothing.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
#: Liveness bounds (s), with slack for a busy machine of two cores.
START_S = MEET_S = SETTLE_S = 180
#: A node gives those that it talks with 3 s to end; the rest is slack.
STOP_S = 60

ECHO = '[[providers]]\nkind = "echo"\nname = "echo"\nshare = true\n'
REAL_MODEL = f'[local_hf]\nmodel = "{MODEL}"\nthreads = 1\n'


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without what would configure a node."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PROMPTMESH_", "IPFS_ACCELERATE_PY_"))
    }
    ours = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # What happens to listen on this machine is none of a test's business.
    return kept | ours | {"PROMPTMESH_LOCAL_SERVERS_ENABLED": "false"} | extra


async def until(
    condition: Callable[[], Awaitable[bool]], what: str, within: float = SETTLE_S
) -> None:
    """Wait for something of another process, which can only be asked again and again."""
    try:
        with trio.fail_after(within):
            while not await condition():  # noqa: ASYNC110 - another process has no events
                await trio.sleep(0.05)
    except trio.TooSlowError:
        raise AssertionError(f"not within {within:g} s: {what}") from None


class Daemon:
    """One `promptmesh up` with a home of its own, and an address in the mesh that it keeps."""

    def __init__(self, home: Path, name: str, config: str = "", **environment: str) -> None:
        self.home = home
        #: What it has beside this process's environment.
        self._environment = environment
        self.name = name
        self.log = home / "log"
        self._process: trio.Process | None = None
        #: For what it leaves behind when it is killed. Its path is short, as sockets may be in it.
        self._temporary = ""
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            f'[node]\nname = "{name}"\n[http]\nlisten = "127.0.0.1:0"\n'
            f'[mesh]\nlisten = ["/ip4/127.0.0.1/tcp/{free_port()}"]\nmdns = false\n'
            f"{config}"
        )

    async def cli(self, *arguments: str, stdin: str = "", check: bool = True) -> str:
        """Run `promptmesh ...` on this home, and return what it printed."""
        done = await trio.run_process(
            self._command(*arguments),
            stdin=stdin.encode(),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=clean_environment(**self._environment),
        )
        assert not check or done.returncode == 0, (arguments, done.stderr.decode())
        return done.stdout.decode()

    def _command(self, *arguments: str) -> list[str]:
        program = Path(sys.executable).parent / "promptmesh"
        return [str(program), "--home", str(self.home), *arguments]

    async def start(self, *arguments: str) -> Self:
        """Start it and wait until it answers HTTP and is in its mesh."""
        self._temporary = self._temporary or tempfile.mkdtemp(prefix="pm-daemon-")
        with self.log.open("ab") as log:
            self._process = await trio.lowlevel.open_process(
                self._command("up", *arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=clean_environment(TMPDIR=self._temporary, **self._environment),
            )
        await until(self._answers, f"{self.name} is up; {self.log}", START_S)
        return self

    async def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text()
        # Not what the file says of one that was killed: its port may be somebody else's by now.
        running = Home(self.home).running()
        if running is None or running.pid != self.pid:
            return False
        try:
            status = await self.json("/mesh/v1/status")
        except httpx.HTTPError:
            return False
        return bool(status["addresses"] or status["mesh"]["problem"])

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def temporary(self) -> set[str]:
        """What is in its folder for temporary files, from its first start on."""
        return set(os.listdir(self._temporary))

    @property
    def url(self) -> str:
        """Where it serves HTTP now."""
        address: str = json.loads((self.home / "node.json").read_text())["http"]
        return address if address.startswith("http") else f"http://{address}"

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    async def wait_exit(self, within: float = SETTLE_S) -> int:
        """Its exit status. Fails the test if it takes longer."""
        assert self._process is not None
        with trio.fail_after(within):
            return await self._process.wait()

    async def kill(self) -> None:
        """`kill -9`, as a crash would."""
        self.signal(signal.SIGKILL)
        await self.wait_exit()

    async def stop(self) -> int:
        """Ctrl-C, and the exit status."""
        self.signal(signal.SIGINT)
        return await self.wait_exit(STOP_S)

    async def aclose(self) -> None:
        """Leave nothing running, whatever state it is in."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            with trio.CancelScope(shield=True), trio.move_on_after(60):
                await self._process.wait()
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = ""

    def client(self, *, timeout: float) -> httpx.AsyncClient:
        """A client of its HTTP interface."""
        return httpx.AsyncClient(base_url=self.url, timeout=timeout, verify=NO_TLS)

    async def get(self, path: str, **options: Any) -> httpx.Response:
        async with self.client(timeout=60) as client:
            return await client.get(path, **options)

    async def json(self, path: str) -> Any:
        """A JSON document, which must be there."""
        response = await self.get(path)
        assert response.status_code == 200, response.text
        return response.json()

    async def chat(
        self, prompt: str, model: str, headers: Mapping[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        """One whole chat completion."""
        body = {"model": model, "messages": [{"role": "user", "content": prompt}]} | fields
        async with self.client(timeout=120) as client:
            return await client.post("/v1/chat/completions", json=body, headers=headers)

    @asynccontextmanager
    async def stream(self, prompt: str, model: str, **fields: Any) -> AsyncIterator[EventStream]:
        """One streamed chat completion. Leaving closes the connection, as a client that goes."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "stream": True,
        } | fields
        host, port = self.url.removeprefix("http://").split(":")
        async with await trio.open_tcp_stream(host, int(port)) as connection:
            data = json.dumps(body).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
            await connection.send_all(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            yield EventStream(connection)

    async def models(self) -> set[str]:
        return {model["id"] for model in (await self.json("/v1/models"))["data"]}

    async def wait_for_model(self, model: str, *sources: str, within: float = START_S) -> None:
        """Until it knows a provider that has the model, and is ready.

        With `sources`, `NODE` or `NODE:PROVIDER`, all of these.
        """

        async def offered() -> bool:
            ready = [
                (row["node"], provider["name"])
                for row in await self.json("/mesh/v1/peers")
                if row["state"] == "connected"
                for provider in row["providers"]
                if provider["state"] == "ready" and model in provider["models"]
            ]
            names = {name for node, by in ready for name in (node, f"{node}:{by}")}
            return bool(ready) and names >= {*sources}

        await until(offered, f"{self.name} sees {model} {sources or ''}; {self.log}", within)

    async def wait_for_peers(self, *names: str, within: float = MEET_S) -> None:
        """Until exactly these peers are connected."""

        async def met() -> bool:
            peers = (await self.json("/mesh/v1/peers"))[1:]
            return {p["node"] for p in peers if p["state"] == "connected"} == set(names)

        await until(met, f"{self.name} is connected to {names}; {self.log}", within)


class EventStream:
    """The events of a streamed answer, up to the `[DONE]`, which must come.

    Not by httpx: its generators complain when a client leaves in the middle, as tests do here.
    """

    def __init__(self, connection: trio.SocketStream) -> None:
        self._connection = connection
        self._http = h11.Connection(h11.CLIENT)
        self._http.send(h11.Request(method="POST", target="/", headers=[("host", "x")]))
        self._http.send(h11.EndOfMessage())
        self._buffer = b""
        #: The last event, which may say how the answer broke.
        self._last: dict[str, Any] = {}

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> dict[str, Any]:
        while (event := await self._next()).startswith(b":"):
            pass  # a comment
        data = event.removeprefix(b"data: ")
        if data == b"[DONE]":
            raise StopAsyncIteration
        fields: dict[str, Any] = json.loads(data)
        self._last = fields
        return fields

    async def comment(self) -> str:
        """The next thing that comes, which must be a comment."""
        event = await self._next()
        assert event.startswith(b":"), event
        return event.decode()

    async def _next(self) -> bytes:
        while b"\n\n" not in self._buffer:
            self._buffer += await self._more()
        event, self._buffer = self._buffer.split(b"\n\n", 1)
        return event

    async def until_error(self) -> list[dict[str, Any]]:
        """The events up to the one that says how the answer broke, which must come."""
        events: list[dict[str, Any]] = []
        while not events or "error" not in events[-1]:
            events.append(await anext(self))
        return events

    async def _more(self) -> bytes:
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(await self._connection.receive_some())
            elif isinstance(event, h11.Response):
                assert event.status_code == 200, event
            elif isinstance(event, h11.Data):
                return bytes(event.data)
            else:
                raise AssertionError(f"the stream ended without [DONE], after {self._last}")


@asynccontextmanager
async def mesh(folder: Path, configs: Mapping[str, str]) -> AsyncIterator[Sequence[Daemon]]:
    """Daemons of one mesh, by name and configuration: the first makes it, the others join."""
    daemons = [Daemon(folder / name, name, config) for name, config in configs.items()]
    try:
        first, *others = daemons
        await first.start()
        link = json.loads(await first.cli("invite", "--json"))["link"]
        async with trio.open_nursery() as nursery:
            for daemon in others:
                nursery.start_soon(_join, daemon, link)
        yield daemons
    finally:
        for daemon in daemons:
            await daemon.aclose()


async def _join(daemon: Daemon, link: str) -> None:
    await daemon.cli("join", "-", stdin=link)
    await daemon.start()
