"""What peers may, between real nodes: a right that is taken, or given back, is so at once."""

import json
from pathlib import Path
from typing import Any

import pytest
from daemons import ECHO, Daemon, mesh, until
from ports import free_port

pytestmark = pytest.mark.e2e
#: Liveness bound (s): a breaker that a refusal opened, and a connection that is made again.
AGAIN = 120


async def row(daemon: Daemon, node: str) -> dict[str, Any]:
    """What `promptmesh peers` says of a node."""
    rows: list[dict[str, Any]] = json.loads(await daemon.cli("peers", "--json"))
    return next(r for r in rows if r["node"] == node)


async def until_answered(daemon: Daemon, model: str) -> None:
    async def answered() -> bool:
        return (await daemon.chat("again", model)).status_code == 200

    await until(answered, f"{daemon.name} is answered by {model}", AGAIN)


async def test_a_peer_may_not_be_served_or_asked(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": ECHO, "b": ECHO}) as (a, b):
        for daemon in (a, b):
            await daemon.wait_for_model("echo", "a", "b")
        await until_answered(b, "a:echo/echo")

        said = json.loads(await a.cli("peers", "deny", "b", "serve", "--json"))
        assert (said["node"], said["denied"]) == ("b", ["serve"])
        for _ in range(5):  # it is refused, and no failure: no breaker opens
            refused = await b.chat("hello", "a:echo/echo")
            assert refused.status_code == 502
            assert "a:echo: its owner does not let this node use it" in refused.text
        # With another candidate the request is answered all the same.
        assert (await b.chat("hello", "echo")).headers["x-promptmesh-node"] == "b"
        # It goes one way only.
        await until_answered(a, "b:echo/echo")

        await a.cli("peers", "deny", "b", "ask")
        assert (await row(a, "b"))["denied"] == ["serve", "ask"]
        refused = await a.chat("hello", "b:echo/echo")
        assert refused.status_code == 400
        assert "b:echo: it may not be asked by this node's owner" in refused.text
        assert (await a.chat("hello", "echo")).headers["x-promptmesh-node"] == "a"

        await a.cli("peers", "allow", "b")
        assert (await row(a, "b"))["denied"] == []
        for daemon, model in ((a, "b:echo/echo"), (b, "a:echo/echo")):
            assert (await daemon.chat("again", model)).status_code == 200


async def test_a_peer_may_not_share_answers(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": ECHO, "b": ""}) as (a, b):
        await b.wait_for_model("echo")
        first = await a.chat("what is known?", "echo", temperature=0)
        cid = first.headers["x-promptmesh-cid"]

        await a.cli("peers", "deny", "b", "cache")
        asked = await b.chat("what is known?", "echo", temperature=0)
        assert asked.headers["x-promptmesh-cache"] == "miss"
        assert asked.headers["x-promptmesh-cid"] == cid  # an answer of its own, and the same
        await b.cli("cache", "rm", cid)
        assert (await b.get(f"/ipfs/{cid}?format=raw")).status_code == 404

        await a.cli("peers", "allow", "b", "cache")
        asked = await b.chat("what is known?", "echo", temperature=0)
        assert asked.headers["x-promptmesh-cache"] == "hit-mesh"


async def test_a_blocked_peer_is_not_connected_until_it_is_allowed(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": "", "b": ECHO}) as (a, b):
        await a.wait_for_model("echo")
        await b.wait_for_peers("a")
        peer = (await row(a, "b"))["peer"]
        await a.cli("peers", "block", "b")

        async def gone() -> bool:
            return all(p["state"] != "connected" for p in (await b.json("/mesh/v1/peers"))[1:])

        await until(gone, "b sees that it was cut off")
        assert (await a.chat("hello", "echo")).status_code in (400, 404)
        # It is so after a restart as well, and who is not there is changed by its id.
        await a.stop()
        address = (await b.json("/mesh/v1/status"))["addresses"][0]
        await a.start("--listen", f"/ip4/127.0.0.1/tcp/{free_port()}")
        blocked = next(r for r in json.loads(await a.cli("peers", "--json")) if r["peer"] == peer)
        assert blocked["blocked"]
        assert blocked["state"] != "connected"
        refused = await b.cli("peers", "block", peer, check=False)  # its own id
        assert refused == ""
        assert address.endswith(peer)

        await a.stop()
        await a.cli("peers", "allow", peer[-8:])
        await a.start()
        await a.wait_for_peers("b", within=AGAIN)
        await until_answered(a, "echo")


async def test_a_damaged_file_keeps_the_node_from_starting(tmp_path: Path) -> None:
    a = Daemon(tmp_path / "a", "a", ECHO)
    try:
        await a.start()
        await a.stop()
        (a.home / "node.sqlite").write_bytes(b"no database" * 1000)
        log = a.log.stat().st_size
        with pytest.raises(AssertionError):
            await a.start()
        assert "node.sqlite is damaged" in a.log.read_text()[log:]
        assert (a.home / "node.sqlite").read_bytes().startswith(b"no database")
    finally:
        await a.aclose()
