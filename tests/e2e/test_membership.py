"""Coming and going: join a running node, leave, restart; frozen peers, garbage at the door."""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import trio
from daemons import ECHO, Daemon, mesh, until

pytestmark = pytest.mark.e2e


async def table(daemon: Daemon) -> dict[str, str]:
    """The peers it knows: name -> state."""
    return {p["node"]: p["state"] for p in (await daemon.json("/mesh/v1/peers"))[1:]}


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
            await both_ends_explain(answer.headers["x-promptmesh-request-id"], b, a)

            await b.cli("leave")
            assert await b.models() == set()

            async def forgotten() -> bool:
                return await table(a) == {}

            await until(forgotten, "a forgets b at once, as it said that it leaves")
            # Alone in a mesh of its own, with a link of its own.
            assert json.loads(await b.cli("invite", "--json"))["link"] != link
        finally:
            await b.aclose()


async def both_ends_explain(request_id: str, asker: Daemon, answerer: Daemon) -> None:
    """The id is the same on both nodes; each tells its own part."""
    asked = await asker.json(f"/mesh/v1/requests/{request_id}")
    served = await answerer.json(f"/mesh/v1/requests/{request_id}")
    assert asked["explained_on"]["node"] == asked["answered_by"]["node"] == answerer.name
    assert (asked["asker"], served["asker"]["node"]) == (None, asker.name)
    assert [t["error"] for t in asked["attempts"]] == [t["error"] for t in served["attempts"]]
    assert asked["cache"]["key"] == served["cache"]["key"]
    assert asked["cache"]["cid"] == served["cache"]["cid"]
    assert served["total_s"] <= asked["total_s"]


async def test_a_restarted_node_finds_its_mesh_without_help(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": "", "b": ECHO}) as (a, b):
        await a.wait_for_model("echo")
        await a.stop()
        await a.start()
        await a.wait_for_model("echo")
        await b.kill()
        await b.start()
        await a.wait_for_peers("b")
        await a.wait_for_model("echo")
        assert (await a.chat("hello", "echo")).status_code == 200


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
async def test_a_dead_peer_gets_no_more_work_and_is_found_again(
    tmp_path: Path, how: signal.Signals
) -> None:
    """Stopped, its kernel still takes what is sent to it; killed, its connections break."""
    config = {"a": "", "b": ECHO, "c": ECHO}
    async with mesh(tmp_path, config) as (a, b, c):
        await a.wait_for_peers("b", "c")
        await both_answer(a)
        row: dict[str, Any] = {}

        async def quiet() -> bool:
            nonlocal row
            (row,) = [p for p in await a.json("/mesh/v1/peers") if p["node"] == "b"]
            return all(p["in_flight"] == 0 for p in row["providers"])

        await until(quiet, "a has noted the end of its requests to b")
        assert (row["via"], row["reason"], row["warning"]) == ("direct", "", "")
        (echo,) = row["providers"]
        assert echo["paused"] is None
        (seen,) = echo["measured"]
        assert seen["model"] == "echo"
        assert seen["answers"] >= 1
        assert seen["ttft_s"] > 0
        b.signal(how)
        answers = [(await a.chat(f"after {n}", "echo")) for n in range(6)]
        assert [x.status_code for x in answers] == [200] * 6
        assert {x.headers["x-promptmesh-node"] for x in answers} == {"c"}
        # At most one of them was tried at b in vain.
        assert sum(int(x.headers["x-promptmesh-attempts"]) for x in answers) <= 7

        async def noticed() -> bool:
            return (await table(a)).get("b") != "connected"

        async def forgotten() -> bool:
            sources = [m["promptmesh"]["sources"] for m in (await a.json("/v1/models"))["data"]]
            return "b" not in {source["node"] for one in sources for source in one}

        async with trio.open_nursery() as nursery:
            nursery.start_soon(until, noticed, "a notices that b is silent")
            nursery.start_soon(until, forgotten, "a offers no model of b any more")
        (lost,) = [p for p in await a.json("/mesh/v1/peers") if p["node"] == "b" or p["reason"]]
        assert (lost["node"], lost["state"], lost["via"]) == ("b", "unreachable", "")
        assert lost["reason"]
        if how is signal.SIGSTOP:
            b.signal(signal.SIGCONT)
        else:
            await b.wait_exit()
            await b.start()
        await a.wait_for_peers("b", "c")
        await both_answer(a)
        assert (await c.json("/mesh/v1/status"))["mesh"]["problem"] is None


async def both_answer(daemon: Daemon) -> None:
    """Wait until it has had answers of b and of c."""
    seen: set[str] = set()

    async def ask() -> bool:
        answer = await daemon.chat(f"hello {trio.current_time()}", "echo")
        seen.add(answer.headers.get("x-promptmesh-node", ""))
        return {"b", "c"} <= seen

    await until(ask, "both b and c answer")


async def test_a_copied_folder_is_said_clearly(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": "", "b": ECHO}) as (a, b):
        await a.wait_for_model("echo")
        left_out = shutil.ignore_patterns("lock", "node.json", "log", "*.sqlite*", "config.toml")
        shutil.copytree(b.home, tmp_path / "copy", ignore=left_out)
        copy = Daemon(tmp_path / "copy", "copy")
        try:
            await copy.start()

            async def says_so() -> bool:
                problem = (await copy.json("/mesh/v1/status"))["mesh"]["problem"]
                return "another node runs with the identity of this one" in (problem or "")

            await until(says_so, "the copy knows that it is one")
            assert "delete identity.key" in copy.log.read_text()
        finally:
            await copy.aclose()


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
