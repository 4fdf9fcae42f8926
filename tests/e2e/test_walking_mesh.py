"""Daemons as processes: asked anywhere, answered by who can, stored once, found everywhere."""

import json
import signal
from pathlib import Path

import pytest
import trio
from daemons import ECHO, SETTLE_S, STOP_S, Daemon, mesh, until

pytestmark = pytest.mark.e2e


async def running(daemon: Daemon) -> int:
    """Requests that its provider works on now."""
    (provider,) = await daemon.json("/mesh/v1/providers")
    return int(provider["running"])


async def test_a_prompt_to_a_is_answered_by_c_and_found_by_b(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": "", "b": "", "c": ECHO}) as (a, b, c):
        await a.wait_for_peers("b", "c")
        await b.wait_for_peers("a", "c")
        await a.wait_for_model("echo")
        prompt = "to be or not to be"
        async with a.stream(prompt, "echo", temperature=0) as events:
            seen = [event async for event in events]
        text = "".join(
            choice["delta"].get("content", "") for event in seen for choice in event["choices"]
        )
        origin = seen[-1]["promptmesh"]
        assert text == prompt
        assert (origin["node"], origin["provider"], origin["cache"]) == ("c", "echo", "miss")

        async def found_by_b() -> bool:
            answer = await b.chat(
                prompt,
                "echo",
                temperature=0,
                headers={"cache-control": "only-if-cached"},
            )
            return answer.status_code == 200

        await until(found_by_b, f"b knows of the answer; {b.log}")
        again = await b.chat(prompt, "echo", temperature=0)
        assert again.json()["choices"][0]["message"]["content"] == prompt
        assert again.headers["x-promptmesh-cid"] == origin["cid"]
        assert again.json()["usage"]["cached"] is True
        record = json.loads(await b.cli("cache", "get", origin["cid"], "--json"))
        assert record["output"] == [{"role": "assistant", "text": prompt}]
        (provider,) = await c.json("/mesh/v1/providers")
        assert provider["stats"]["started"] == 1


async def test_a_client_that_leaves_stops_the_work_on_the_peer(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": "", "c": ECHO}) as (a, c):
        await a.wait_for_model("echo")
        async with a.stream("x [[echo n=1000 gap_s=0.05]]", "echo") as events:
            await anext(events)
            assert await running(c) == 1

        async def stopped() -> bool:
            return await running(c) == 0

        await until(stopped, "the provider of c stops")
        (provider,) = await c.json("/mesh/v1/providers")
        assert provider["stats"]["cancelled"] == 1


async def test_a_whole_answer_tells_of_itself_what_a_streamed_one_does(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": "", "c": ECHO}) as (a, c):
        await a.wait_for_model("echo")
        stored = await c.chat("known there", "echo", temperature=0)
        for node, prompt, headers, expected in (
            (c, "not to be kept", {"cache-control": "no-store"}, "bypass"),
            (a, "not to be kept", {"cache-control": "no-store"}, "bypass"),
            (c, "to be made anew", {"cache-control": "no-cache"}, "miss"),
            (a, "known there", {}, "hit-mesh"),
        ):
            whole = await node.chat(prompt, "echo", temperature=0, headers=headers)
            assert whole.headers["x-promptmesh-cache"] == expected
            assert whole.json()["promptmesh"]["cache"] == expected
        assert whole.headers["x-promptmesh-cid"] == stored.headers["x-promptmesh-cid"]


async def test_auto_is_answered_while_a_server_is_down(tmp_path: Path) -> None:
    down = (
        '[[providers]]\nkind = "openai_compatible"\nname = "down"\nmodels = ["a-model"]\n'
        'base_url = "http://127.0.0.1:1/v1"\n'
    )
    async with mesh(tmp_path, {"a": down + ECHO}) as (a,):

        async def found_out() -> bool:
            states = {p["name"]: p["state"] for p in await a.json("/mesh/v1/providers")}
            return states == {"down": "unavailable", "echo": "ready"}

        await until(found_out, f"a knows that the server is down; {a.log}")
        answer = await a.chat("anybody?", "auto")
        assert answer.headers["x-promptmesh-provider"] == "echo", answer.text


async def test_failover_before_the_first_token_and_return(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": "", "b": ECHO, "c": ECHO}) as (a, b, c):
        await a.wait_for_model("echo", "b", "c")
        answers = []

        async def ask() -> None:
            answers.append(await a.chat("whole [[echo first_s=8]]", "echo"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)

            async def one_works() -> bool:
                return await running(b) + await running(c) == 1

            await until(one_works, "b or c got the request")
            chosen, other = (b, c) if await running(b) else (c, b)
            await chosen.kill()
        (answer,) = answers
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == "whole"
        assert answer.headers["x-promptmesh-node"] == other.name
        assert answer.headers["x-promptmesh-attempts"] == "2"
        await chosen.start()
        await a.wait_for_peers("b", "c")


async def test_a_stranger_cannot_join(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": ECHO}) as (a,):
        status = await a.json("/mesh/v1/status")
        stranger = Daemon(tmp_path / "s", "s", f"bootstrap = {json.dumps(status['addresses'])}\n")
        try:
            await stranger.start()

            async def refused() -> bool:
                peers = (await stranger.json("/mesh/v1/peers"))[1:]
                return any(p["state"] == "unreachable" and p["reason"] for p in peers)

            await until(refused, "the stranger is told why")
            assert (await a.json("/mesh/v1/peers"))[1:] == []
            assert await stranger.models() == set()
        finally:
            await stranger.aclose()


async def test_ctrl_c_stops_within_its_time(tmp_path: Path) -> None:
    """With a streaming client, two stalled ones (writing, reading) and a stopped peer attached."""
    async with mesh(tmp_path, {"a": ECHO, "b": ""}) as (a, b):
        await a.wait_for_peers("b")
        host, port = a.url.removeprefix("http://").split(":")
        stalled = await trio.open_tcp_stream(host, int(port))
        await stalled.send_all(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        deaf = a.stream("x [[echo n=100000]]", "echo")  # never read
        await deaf.__aenter__()
        b.signal(signal.SIGSTOP)
        try:
            with trio.fail_after(SETTLE_S):
                async with a.stream("x [[echo n=10000 gap_s=0.01]]", "echo") as events:
                    await anext(events)
                    a.signal(signal.SIGINT)
                    assert await a.wait_exit(STOP_S) == 0
        finally:
            b.signal(signal.SIGCONT)
            await stalled.aclose()
            await deaf.__aexit__(None, None, None)
