"""Coming and going: join a running node, leave, restart; frozen peers, garbage at the door."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
import trio
from daemons import ECHO, Daemon, mesh, until

pytestmark = pytest.mark.e2e


async def table(daemon: Daemon) -> dict[str, str]:
    """The peers it knows: name -> state."""
    return {p["node"]: p["state"] for p in (await daemon.json("/mesh/v1/peers"))[1:]}


async def mesh_address(daemon: Daemon) -> str:
    """Where it listens, for a restart at the same place: those of the tests take any free port."""
    address: str = (await daemon.json("/mesh/v1/status"))["addresses"][0]
    return address.partition("/p2p/")[0]


async def test_join_and_leave_while_running(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": ECHO}) as (a,):
        b = Daemon(tmp_path / "b", "b")
        try:
            await b.start()
            assert await b.models() == set()
            link = json.loads(await a.cli("invite", "--json"))["link"]
            await b.cli("join", link)
            await b.wait_for_model("echo")
            answer = await b.chat("hello", "echo")
            assert answer.headers["x-promptmesh-node"] == "a"

            await b.cli("leave")
            assert await b.models() == set()

            async def forgotten() -> bool:
                return await table(a) == {}

            await until(forgotten, "a forgets b at once, as it said that it leaves", 5)
            # Alone in a mesh of its own, with a link of its own.
            assert json.loads(await b.cli("invite", "--json"))["link"] != link
        finally:
            await b.aclose()


async def test_a_restarted_node_finds_its_mesh_without_help(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": "", "b": ECHO}) as (a, b):
        await a.wait_for_model("echo")
        at_a, at_b = await mesh_address(a), await mesh_address(b)
        await a.stop()
        await a.start("--listen", at_a)
        await a.wait_for_model("echo")
        await b.kill()
        await b.start("--listen", at_b)
        await a.wait_for_peers("b")
        await a.wait_for_model("echo")
        assert (await a.chat("hello", "echo")).status_code == 200


async def test_a_frozen_peer_is_noticed_and_found_again(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": "", "b": ECHO}) as (a, b):
        await a.wait_for_model("echo")
        b.signal(signal.SIGSTOP)

        async def noticed() -> bool:
            return (await table(a)).get("b") != "connected"

        await until(noticed, "a notices that b is silent", 15)
        answer = await a.chat("hello", "echo")
        assert answer.status_code in (404, 502, 503), answer.text
        assert "echo" in answer.json()["error"]["message"]
        b.signal(signal.SIGCONT)
        await a.wait_for_peers("b")
        await a.wait_for_model("echo")


async def test_garbage_at_the_mesh_port_does_not_stop_the_node(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": ECHO, "b": ""}) as (a, b):
        await b.wait_for_model("echo")
        address = (await a.json("/mesh/v1/status"))["addresses"][0].split("/")
        host, port = address[2], int(address[4])
        async with contextlib.AsyncExitStack() as idle:
            for _ in range(300):
                await idle.enter_async_context(await trio.open_tcp_stream(host, port))
            with contextlib.suppress(trio.BrokenResourceError):
                async with await trio.open_tcp_stream(host, port) as noise:
                    await noise.send_all(os.urandom(1 << 20))
            assert (await b.chat("still there?", "echo")).status_code == 200
            late = Daemon(tmp_path / "late", "late")
            link = json.loads(await a.cli("invite", "--json"))["link"]
            await late.cli("join", link)
            try:
                await late.start()
                await late.wait_for_model("echo")
            finally:
                await late.aclose()


async def test_two_nodes_on_one_folder(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": ""}) as (a,):
        output = await a.cli("up", check=False)
        assert output == ""
        # The first goes on.
        assert (await a.get("/healthz")).status_code == 200


async def test_ask_without_a_node_answers_in_this_process(tmp_path: Path) -> None:
    alone = Daemon(tmp_path / "alone", "alone", ECHO)
    await alone.cli("init")
    first = json.loads(await alone.cli("ask", "hello there", "--json"))
    again = json.loads(await alone.cli("ask", "-", "--json", stdin="hello there"))
    assert (first["text"], first["cache"]) == ("hello there", "miss")
    assert (again["text"], again["cache"], again["cid"]) == (
        "hello there",
        "hit-local",
        first["cid"],
    )
