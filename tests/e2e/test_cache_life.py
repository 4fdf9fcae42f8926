"""The stored answers of real nodes: through kill -9, damage, and the commands about them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from daemons import ECHO, MEET_S, Daemon, mesh, until

from promptmesh.cache.cid import cid_bytes, cid_text

pytestmark = pytest.mark.e2e

#: kill -9 in the middle of requests, so many times.
ROUNDS = 6
ACKNOWLEDGED = 30
LONG = "0123456789" * 15_000  # one word, which `echo` gives at once


def question(prompt: str) -> dict[str, object]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": "echo", "temperature": 0, "messages": messages}


def ask_once(client: httpx.Client, prompt: str) -> str | None:
    """The CID of the answer; None if the node was killed, and nothing acknowledged.

    In a thread: the asynchronous client complains of what a broken connection leaves behind.
    """
    try:
        answer = client.post("/v1/chat/completions", json=question(prompt))
    except httpx.HTTPError:
        return None
    cid: str = answer.json()["promptmesh"]["cid"]
    return cid


async def asked_until_killed(daemon: Daemon, first: int) -> dict[str, str]:
    """Ask new questions from several tasks, kill the node meanwhile: prompt -> CID of what came."""
    came: dict[str, str] = {}
    enough = trio.Event()

    async def ask(number: int) -> None:
        while True:
            prompt = f"{number} {LONG if number % 7 == 0 else ''}"
            cid = await trio.to_thread.run_sync(ask_once, client, prompt)
            if cid is None:
                return
            came[prompt] = cid
            if len(came) >= ACKNOWLEDGED:
                enough.set()
            number += 4

    with httpx.Client(base_url=daemon.url, timeout=180) as client, trio.fail_after(180):
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(ask, first + number)
            await enough.wait()
            await daemon.kill()
    return came


async def test_nothing_that_was_answered_is_lost(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "a", "a", ECHO)
    acknowledged: dict[str, str] = {}
    try:
        for round_ in range(ROUNDS):
            await daemon.start()
            acknowledged |= await asked_until_killed(daemon, 1 + round_ * 1000)
        await daemon.start()
        async with httpx.AsyncClient(base_url=daemon.url, timeout=60) as client:
            for prompt, cid in acknowledged.items():
                answer = await client.post("/v1/chat/completions", json=question(prompt))
                assert answer.headers["x-promptmesh-cache"] == "hit-local"
                assert answer.headers["x-promptmesh-cid"] == cid
                assert answer.json()["choices"][0]["message"]["content"] == prompt
                block = await client.get(f"/ipfs/{cid}?format=raw")
                assert cid_text(cid_bytes(block.content)) == cid
        assert len(acknowledged) >= ROUNDS * ACKNOWLEDGED
        assert "set aside" not in daemon.log.read_text()
    finally:
        await daemon.aclose()


def fingerprints(home: Path) -> dict[str, str]:
    """What lies in the folder and stays as it is while the node runs."""
    changing = ("cache.sqlite", "node.sqlite", "log", "node.json", "lock", "epoch")
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in home.iterdir()
        if path.is_file() and not path.name.startswith(changing)
    }


async def test_a_damaged_cache_is_set_aside_and_nothing_else_is_touched(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "a", "a", ECHO)
    path = daemon.home / "cache.sqlite"
    try:
        await daemon.start()
        peer = (await daemon.json("/mesh/v1/status"))["peer"]
        first = (await daemon.chat("hello", "echo", temperature=0)).json()["promptmesh"]["cid"]
        await daemon.stop()
        garbage = b"this was a database" + bytes(10_000)
        path.write_bytes(garbage)
        before = fingerprints(daemon.home)
        assert {"identity.key", "swarm.key", "config.toml"} <= before.keys()

        await daemon.start()
        assert (daemon.home / "cache.sqlite.damaged").read_bytes() == garbage
        assert "is damaged" in daemon.log.read_text()
        assert (await daemon.json("/mesh/v1/status"))["peer"] == peer
        answer = await daemon.chat("hello", "echo", temperature=0)
        assert answer.headers["x-promptmesh-cache"] == "miss"
        assert answer.headers["x-promptmesh-cid"] == first
        again = await daemon.chat("hello", "echo", temperature=0)
        assert again.headers["x-promptmesh-cache"] == "hit-local"
        assert fingerprints(daemon.home) == before
        usage = json.loads(await daemon.cli("usage", "--json"))
        assert usage["own"]["requests"] == 3  # the one before is still known
    finally:
        await daemon.aclose()


async def test_the_commands_with_and_without_a_node(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "a", "a", ECHO)

    async def listed() -> list[dict[str, object]]:
        rows: list[dict[str, object]] = json.loads(await daemon.cli("cache", "ls", "--json"))
        return rows

    try:
        await daemon.start()
        for prompt in ("one", "two", LONG):
            await daemon.chat(prompt, "echo", temperature=0)
        await daemon.chat("one", "echo", temperature=0)
        rows = {str(row["text"])[:3]: row for row in await listed()}
        cid = str(rows["012"]["cid"])
        assert await daemon.cli("cache", "get", cid[:20]) == f"{LONG}\n"
        assert "parts" in json.loads(await daemon.cli("cache", "get", cid, "--json"))
        await daemon.cli("cache", "pin", cid)
        stat = json.loads(await daemon.cli("cache", "stat", "--json"))
        assert (stat["hits_local"], stat["misses"], stat["pinned"]) == (1, 3, 1)
        await daemon.cli("cache", "rm", str(rows["one"]["cid"]))
        await daemon.stop()

        assert {str(row["text"])[:3] for row in await listed()} == {"two", "012"}
        assert await daemon.cli("cache", "rm", "--model", "echo") == (
            "1 answers removed; 1 pinned ones stay (`cache unpin`)\n"
        )
        stat = json.loads(await daemon.cli("cache", "stat", "--json"))
        assert (stat["answers"], stat["hits"]) == (1, 1)
        await daemon.cli("cache", "unpin", cid)

        await daemon.start()
        assert [row["cid"] for row in await listed()] == [cid]
        await daemon.cli("cache", "rm", "--namespace", "")
        assert await listed() == []
    finally:
        await daemon.aclose()


async def test_without_a_node_answers_are_stored_and_counted_too(tmp_path: Path) -> None:
    nobody = Daemon(tmp_path / "a", "a", ECHO)
    await nobody.cli("init", "--quiet")
    for _ in range(2):
        assert await nobody.cli("ask", "hello") == "hello\n"
    stat = json.loads(await nobody.cli("cache", "stat", "--json"))
    assert (stat["answers"], stat["misses"], stat["hits_local"]) == (1, 1, 1)
    assert stat["tokens_saved"] > 0


async def test_what_is_not_for_all_goes_only_to_whom_it_is_for(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": ECHO, "b": ""}) as (a, b):
        await b.wait_for_model("echo")
        await a.wait_for_peers("b")

        async def ask(node: Daemon, prompt: str, **cache: str) -> httpx.Response:
            fields: dict[str, Any] = {"promptmesh": {"cache": cache}}
            return await node.chat(prompt, "echo", temperature=0, **fields)

        async def claimed(number: int) -> None:
            async def heard() -> bool:
                status = await b.json("/mesh/v1/status")
                return bool(status["cache"]["claims"] >= number)

            await until(heard, f"b has heard {number} claims; {b.log}", MEET_S)

        team = (await ask(a, LONG, namespace="team")).headers["x-promptmesh-cid"]
        own = (await ask(a, "own", scope="local")).headers["x-promptmesh-cid"]
        public = (await ask(a, "public")).headers["x-promptmesh-cid"]
        await claimed(2)

        # Who names the namespace gets the answer, root and leaves, and nobody else.
        hit = await ask(b, LONG, namespace="team")
        assert hit.headers["x-promptmesh-cache"] == "hit-mesh"
        assert hit.headers["x-promptmesh-cid"] == team
        assert hit.json()["choices"][0]["message"]["content"] == LONG
        for node in (a, b):
            refused = await node.get(f"/ipfs/{team}?format=raw")
            assert refused.status_code == 404
            assert f"promptmesh cache get {team}" in refused.text
            assert await node.cli("cache", "get", team) == f"{LONG}\n"
        # An answer of scope `local` is computed anew for another node, which gives it to all.
        assert (await a.get(f"/ipfs/{own}?format=raw")).status_code == 404
        assert (await ask(a, "own", scope="local")).headers["x-promptmesh-cache"] == "hit-local"
        assert (await ask(b, "own")).headers["x-promptmesh-cache"] == "miss"
        assert (await a.get(f"/ipfs/{public}?format=raw")).status_code == 200
        assert (await ask(b, "public")).headers["x-promptmesh-cache"] == "hit-mesh"
