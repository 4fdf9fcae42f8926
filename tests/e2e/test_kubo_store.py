"""A node with a daemon of IPFS behind its store."""

import json
from pathlib import Path

import pytest
import trio
from daemons import ECHO, Daemon, until
from fakes_kubo import ScriptedKubo, json_reply
from js_ipfs import JsIpfs

from promptmesh.cache.cid import cid_bytes, cid_text, parse_cid
from promptmesh.cache.kubo import KuboBlocks

pytestmark = pytest.mark.e2e

BLOCK = b"a block that only the daemon has"
CID = cid_bytes(BLOCK, "raw")


async def test_a_public_daemon_is_refused(tmp_path: Path) -> None:
    public = ScriptedKubo(
        {
            "bootstrap": json_reply({"Peers": ["/dnsaddr/bootstrap.libp2p.io/p2p/Q"]}),
            "swarm/peers": json_reply({"Peers": None}),
            "id": json_reply({"Addresses": []}),
            "swarm/addrs/listen": json_reply({"Strings": []}),
        }
    )
    async with public.running():
        node = Daemon(tmp_path, "a", f'{ECHO}[kubo]\napi = "{public.api}"\n')
        try:
            with pytest.raises(AssertionError, match=r"Bootstrap.*Set kubo\.publish = true"):
                await node.start()
            assert await node.wait_exit() == 1
        finally:
            await node.aclose()


async def test_without_its_daemon_a_node_is_whole(tmp_path: Path) -> None:
    node = Daemon(tmp_path, "a", f'{ECHO}[kubo]\napi = "/ip4/127.0.0.1/tcp/1"\n')
    try:
        await node.start()
        answer = await node.chat("hello", "echo", temperature=0)
        assert answer.status_code == 200
        kubo = (await node.json("/mesh/v1/status"))["kubo"]
        assert kubo["state"] == "away"
        assert "nothing listens" in kubo["problem"]
        assert node.log.read_text().count("nothing listens") == 1
        assert await node.stop() == 0
    finally:
        await node.aclose()


@pytest.mark.interop
async def test_answers_go_to_a_real_daemon_and_come_back(tmp_path: Path) -> None:
    with JsIpfs(tmp_path / "js-ipfs") as daemon:
        config = f'{ECHO}[kubo]\napi = "{daemon.api}"\npin = true\n'
        node = Daemon(tmp_path / "a", "a", config)
        kubo = KuboBlocks(daemon.api)
        try:
            await node.start()
            shared = await node.chat("to be or not to be", "echo", temperature=0)
            scope = {"x-promptmesh-cache-scope": "local"}
            local = await node.chat("a secret", "echo", scope, temperature=0)
            cid = shared.headers["x-promptmesh-cid"]

            async def arrived() -> bool:
                status = (await node.json("/mesh/v1/status"))["kubo"]
                assert status["state"] == "ready", status
                return status["waiting"] == 0 and await kubo.has(parse_cid(cid))

            await until(arrived, f"the answer is in js-ipfs; {node.log}")
            assert (await kubo.size()).pinned >= 1
            assert not await kubo.has(parse_cid(local.headers["x-promptmesh-cid"]))

            # The node loses its cache, and still has the answer.
            before = await node.cli("cache", "get", cid, "--json")
            await node.stop()
            for file in node.home.glob("cache.sqlite*"):
                file.unlink()
            await node.start()
            assert json.loads(await node.cli("cache", "ls", "--json")) == []
            assert await node.cli("cache", "get", cid, "--json") == before
        finally:
            await node.aclose()


@pytest.mark.interop
async def test_programs_read_what_only_the_daemon_has(tmp_path: Path) -> None:
    with JsIpfs(tmp_path / "js-ipfs") as daemon:
        assert await KuboBlocks(daemon.api).put(CID, BLOCK)
        node = Daemon(tmp_path / "a", "a", f'[kubo]\napi = "{daemon.api}"\n')
        try:
            await node.start()
            gateway = await node.get(f"/ipfs/{cid_text(CID)}?format=raw")
            assert (gateway.status_code, gateway.content) == (200, BLOCK)
            # It is here now.
            daemon.kill()
            again = await node.get(f"/ipfs/{cid_text(CID)}?format=raw")
            assert (again.status_code, again.content) == (200, BLOCK)
        finally:
            await node.aclose()


@pytest.mark.interop
async def test_a_real_daemon_that_dies_costs_nothing(tmp_path: Path) -> None:
    with JsIpfs(tmp_path / "js-ipfs") as daemon:
        node = Daemon(tmp_path / "a", "a", f'{ECHO}[kubo]\napi = "{daemon.api}"\n')
        try:
            await node.start()
            daemon.kill()
            with trio.fail_after(60):
                for number in range(20):
                    answer = await node.chat(f"prompt {number}", "echo", temperature=0)
                    assert answer.status_code == 200

            async def away() -> bool:
                return bool((await node.json("/mesh/v1/status"))["kubo"]["state"] == "away")

            await until(away, f"the node sees that js-ipfs is gone; {node.log}")
            assert node.log.read_text().count("did not put a block") == 1
        finally:
            await node.aclose()
