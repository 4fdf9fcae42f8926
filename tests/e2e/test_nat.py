"""Nodes behind routers that let nothing in: real daemons in network namespaces of their own."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import namespaces
import pytest
import trio
from daemons import ECHO, Daemon, clean_environment, until
from namespaces import Internet, Nat, internet

pytestmark = pytest.mark.e2e

#: Seconds until nodes that find each other with help have done so.
FIND_S = 180
#: Asks a URL and prints the status and the body of the answer.
FETCH = """
import http.client, sys
host, path, body = sys.argv[1:]
connection = http.client.HTTPConnection(host, timeout=100)
connection.request("POST" if body else "GET", path, body or None)
answer = connection.getresponse()
print(answer.status, answer.headers.get("x-promptmesh-node", "-"), answer.read().decode())
"""


class Far(Daemon):
    """A daemon on a host of the test's network, which only programs there can ask."""

    def __init__(self, home: Path, name: str, network: Internet, config: str = "") -> None:
        self._inside = ["ip", "netns", "exec", network.namespace(name)]
        super().__init__(home, name)
        (home / "config.toml").write_text(
            f'[node]\nname = "{name}"\n[http]\nlisten = "127.0.0.1:7411"\n'
            f'[mesh]\nlisten = ["/ip4/0.0.0.0/tcp/7412"]\nmdns = false\n{config}'
        )

    def _command(self, *arguments: str) -> list[str]:
        return [*self._inside, *super()._command(*arguments)]

    async def get(self, path: str, **options: Any) -> httpx.Response:
        return await self._fetch(path)

    async def ask(self, prompt: str) -> httpx.Response:
        """One chat completion by whoever has the model `echo`."""
        message = {"role": "user", "content": prompt}
        body = json.dumps({"model": "echo", "messages": [message]})
        return await self._fetch("/v1/chat/completions", body)

    async def _fetch(self, path: str, body: str = "") -> httpx.Response:
        fetched = await trio.run_process(
            [*self._inside, sys.executable, "-c", FETCH, "127.0.0.1:7411", path, body],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=clean_environment(),
        )
        if fetched.returncode:
            raise httpx.ConnectError(fetched.stderr.decode())
        status, node, content = fetched.stdout.decode().split(" ", 2)
        return httpx.Response(int(status), headers={"x-promptmesh-node": node}, text=content)

    async def peer(self, name: str) -> dict[str, Any]:
        """What `promptmesh peers` says of that node; {} if it says nothing."""
        peers = (await self.json("/mesh/v1/peers"))[1:]
        return next((peer for peer in peers if peer["node"] == name), {})

    async def wait_for_path(self, name: str, path: str, *, by: str = "") -> None:
        """Until that node is reached so, `by` a peer id or anyhow."""

        async def there() -> bool:
            peer = await self.peer(name)
            return peer.get("via") == path and by in peer["address"]

        await until(there, f"{self.name} has a {path} way to {name}; {self.log}", FIND_S)

    async def wait_for_reachability(self, state: str) -> None:
        async def known() -> bool:
            found = (await self.json("/mesh/v1/status"))["mesh"]["reachability"]
            return bool(found == state)

        await until(known, f"{self.name} knows that it is {state}; {self.log}", FIND_S)


@pytest.fixture(autouse=True, scope="module")
def networks() -> None:
    """Skip where none can be made, and say why."""
    if reason := namespaces.why_not():
        pytest.skip(reason)


@asynccontextmanager
async def two_behind_routers(folder: Path, nat: Nat) -> AsyncIterator[Sequence[Far]]:
    """Two relays that everybody can reach, and two nodes that nobody can."""
    with internet("t") as network:
        for name in ("r1", "r2"):
            network.public(name)
        for name in ("a", "b"):
            network.private(name, nat)
        configs = {"r1": "relay = true\n", "r2": "relay = true\n", "a": "", "b": ECHO}
        nodes = [Far(folder / name, name, network, config) for name, config in configs.items()]
        try:
            first, *others = nodes
            await first.start()
            link = json.loads(await first.cli("invite", "--json"))["link"]
            for node in others:
                await node.cli("join", "-", stdin=link)
                await node.start()
            yield nodes
        finally:
            for node in nodes:
                await node.aclose()


async def test_two_behind_routers_meet_by_relays(tmp_path: Path) -> None:
    async with two_behind_routers(tmp_path, "random ports") as (r1, r2, a, b):
        for node in (a, b):
            await node.wait_for_reachability("unreachable")
        await r1.wait_for_reachability("reachable")
        await a.wait_for_path("b", "relayed")
        await b.wait_for_path("a", "relayed")
        answer = await a.ask("hello")
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-promptmesh-node"] == "b"
        assert " relayed " in await a.cli("peers")

        async def told() -> bool:
            return "through a relay" in (await a.json("/mesh/v1/peers"))[0]["warning"]

        await until(told, "the owner of a is told that relays are used", FIND_S)

        async def placed() -> bool:  # one is enough for both to meet, and the other comes later
            relaying = [(await r.json("/mesh/v1/status"))["mesh"]["relaying"] for r in (r1, r2)]
            ends = [{c["from"]["node"], c["to"]["node"]} for d in relaying for c in d["circuits"]]
            places = [{p["node"] for p in does["places"]} for does in relaying]
            return places == [{"a", "b"}] * 2 and {"a", "b"} in ends

        await until(placed, "both have a place at each relay, and use one", FIND_S)
        # A place at the other relay is there before the one that is used goes.
        ids = {r: (await r.json("/mesh/v1/status"))["peer"] for r in (r1, r2)}
        used = (await a.peer("b"))["address"]
        gone, left = (r1, r2) if ids[r1] in used else (r2, r1)
        await gone.kill()
        await a.wait_for_path("b", "relayed", by=ids[left])
        again = await a.ask("hello again")
        assert again.status_code == 200, again.text


async def test_routers_that_keep_ports_are_passed(tmp_path: Path) -> None:
    async with two_behind_routers(tmp_path, "keeps ports") as (r1, r2, a, b):
        await a.wait_for_path("b", "direct")
        await b.wait_for_path("a", "direct")
        await a.wait_for_reachability("unreachable")
        await r1.kill()
        await r2.kill()
        answer = await a.ask("hello")
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-promptmesh-node"] == "b"
        assert (await a.peer("b"))["via"] == "direct"
