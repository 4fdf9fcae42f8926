"""IPFS clients and a real Kubo on a real daemon: what one of them writes, all of them read."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import cbrrr
import httpx
import pytest
import trio
from daemons import ECHO, ROOT, Daemon, clean_environment, mesh, until
from helia import NODE_JS, PEERS
from kubo import kubo, needs_kubo

from promptmesh.cache import car, unixfs
from promptmesh.cache.cid import cid_bytes, cid_text, parse_cid
from promptmesh.cache.links import link_text, stored

pytestmark = pytest.mark.e2e

CALLS = ROOT / "tests" / "clients" / "ipfshttpclient_calls.py"
#: Made by scripts/get-clients.
OLDER = ROOT / "build" / "clients" / "ipfshttpclient-0.7.0"
#: Made by scripts/install-peers.
JS_CLIENT = PEERS / "kubo-rpc-client" / "node_modules"
LARGE = bytes(range(256)) * 2400


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    daemon = Daemon(tmp_path / "alpha", "alpha", ECHO)
    try:
        yield await daemon.start()
    finally:
        await daemon.aclose()


async def called(daemon: Daemon, answer: str, older: bool) -> Any:
    """What the calls of tests/clients gave."""
    host, port = daemon.url.removeprefix("http://").split(":")
    environment = clean_environment(**({"PYTHONPATH": str(OLDER)} if older else {}))
    done = await trio.run_process(
        [sys.executable, "-W", "error", str(CALLS), f"/ip4/{host}/tcp/{port}/http", answer],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.mark.parametrize("version", ["0.7.0", "0.8.0a2"])
async def test_ipfshttpclient_reads_and_writes(daemon: Daemon, version: str) -> None:
    asked = await daemon.chat("Say it again.", "echo")
    answer = asked.headers["x-promptmesh-cid"]
    found = await called(daemon, answer, older=version == "0.7.0")

    assert found["client"] == version
    status = await daemon.json("/mesh/v1/status")
    assert found["version"]["Version"] == "0.7.0"
    assert found["id"]["ID"] == status["peer"]

    block = cid_text(cid_bytes(b"a block", "raw"))
    assert found["blocks"] == {
        "put": {"Key": block, "Size": 7},
        "cbor": cid_text(cid_bytes(b"\xa0")),
        "get": "a block",
        "stat": {"Key": block, "Size": 7},
        "refs": True,
    }

    hello = "QmZULkCELmmk5XNfCgTnCyFgAVxBRBXyDHGGMVoLFLiXEN"  # Kubo's documentation has it
    *_, large = unixfs.build(LARGE, version=0)
    *_, large_1 = unixfs.build(LARGE, version=1)
    name = link_text(large.cid)
    assert found["files"] == {
        "add_bytes": hello,
        "add_str": hello,
        "add": {"Name": name, "Hash": name, "Size": str(large.size)},
        "version_1": cid_text(large_1.cid),
        "only_hash": hello,
        "cat": True,
        "part": True,
        "end": "o\n",
        "get_json": {"a": [1, "é"]},
    }

    dag = cbrrr.encode_dag_cbor({"bytes": b"\1\2", "list": [1, {"deep": "x"}]})
    cid = cid_text(cid_bytes(dag))
    dags = found["dags"]
    assert dags["put"] == cid
    assert dags["get"] == {"bytes": {"/": {"bytes": "AQI"}}, "list": [1, {"deep": "x"}]}
    assert dags["path"] == {"deep": "x"}
    assert dags["resolve"] == {"Cid": {"/": cid}, "RemPath": "list/1"}
    exported = car.read(base64.b64decode(dags["export"]))
    assert (exported.roots, exported.blocks) == ((cid_bytes(dag),), {cid_bytes(dag): dag})
    assert dags["import"] == {"Root": {"Cid": {"/": cid}, "PinErrorMsg": ""}}
    assert dags["answer"] == json.loads(await daemon.cli("cache", "get", answer, "--json"))
    assert dags["text"] == asked.json()["choices"][0]["message"]["content"]

    pinned = cid_text(cid_bytes(b"pinned", "raw"))
    pins = found["pins"]
    assert pins["add"] == pins["rm"] == {"Pins": [pinned]}
    assert pins["ls"] == {"Type": "recursive"}
    assert pins["one"] == {"Keys": {pinned: {"Type": "recursive"}}}
    assert not pins["after"]
    assert pins["missing"] == ["ErrorResponse", f"path '/ipfs/{pinned}' is not pinned"]

    assert found["stat"]["NumObjects"] > 5
    assert (found["gc"], found["peers"], found["addrs"]) == ([], {"Peers": []}, {"Addrs": {}})
    assert found["no block"][0] == found["no path"][0] == "ErrorResponse"
    assert "could not find" in found["no block"][1]
    assert found["no command"][0] == "StatusError"


@needs_kubo
async def test_kubo_and_the_rpc_read_what_the_other_has(daemon: Daemon, tmp_path: Path) -> None:
    swarm_key = (daemon.home / "swarm.key").read_text()
    async with (
        kubo(tmp_path / "kubo", swarm_key=swarm_key) as other,
        httpx.AsyncClient(base_url=f"{daemon.url}/api/v0/", timeout=60) as rpc,
    ):
        connected = await rpc.post("swarm/connect", params={"arg": other.address})
        assert connected.json() == {"Strings": [f"connect {other.peer_id} success"]}

        async def seen() -> bool:
            peers = (await rpc.post("swarm/peers")).json()["Peers"]
            return other.peer_id in [peer["Peer"] for peer in peers]

        await until(seen, "the connection is listed")
        for size in (0, 1, 1000, unixfs.LEAF, unixfs.LEAF + 1, 1_000_000):
            data = os.urandom(size)
            theirs = await other.add(data)
            ours = await rpc.post("add", files={"file": data}, params={"only-hash": "true"})
            assert ours.json()["Hash"] == theirs
            assert (await rpc.post("cat", params={"arg": theirs})).content == data
        data = os.urandom(700_000)
        for version in (0, 1):
            added = await rpc.post("add", files={"file": data}, params={"cid-version": version})
            assert await other.read(added.json()["Hash"]) == data
        dag = await rpc.post("dag/put", files={"file": b'{"of":"the mesh"}'})
        assert await other.pin(dag.json()["Cid"]["/"])


@pytest.mark.interop
@pytest.mark.skipif(not JS_CLIENT.exists(), reason="scripts/install-peers installs it")
async def test_the_present_client_of_javascript(daemon: Daemon) -> None:
    done = await trio.run_process(
        [str(NODE_JS), str(JS_CLIENT.parent / "calls.mjs"), daemon.url],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    block = cid_bytes(b"a block", "raw")
    dag = cid_bytes(cbrrr.encode_dag_cbor({"link": cbrrr.CID(block), "list": [1, {"deep": "x"}]}))
    *_, large = unixfs.build(bytes(i % 251 for i in range(600_000)), version=0)
    assert "could not find" in found.pop("absent")
    assert "404" in found.pop("unknown")
    assert found == {
        "id": (await daemon.json("/mesh/v1/status"))["peer"],
        "version": "0.7.0",
        "block": cid_text(block),
        "read": "a block",
        "size": 7,
        "dag": cid_text(dag),
        "deep": "x",
        "linked": "a block",
        "resolved": "list/1",
        "small": "bafkreicysg23kiwv34eg2d7qweipxwosdo2py4ldv42nbauguluen5v6am",
        "large": link_text(large.cid),
        "cat": True,
        "part": "el",
        "pinned": cid_text(dag),
        "kinds": ["recursive"],
        "unpinned": cid_text(dag),
        "imported": [cid_text(dag)],
        "removed": [cid_text(block)],
        "refs": True,
        "objects": True,
        "peers": 0,
    }


async def test_what_a_program_puts_here_is_read_at_another_node(tmp_path: Path) -> None:
    async with (
        mesh(tmp_path, {"alpha": ECHO, "beta": ""}) as (alpha, beta),
        httpx.AsyncClient(timeout=60) as http,
    ):
        await alpha.wait_for_peers("beta")
        await beta.wait_for_peers("alpha")
        added = await http.post(f"{alpha.url}/api/v0/add", files={"file": LARGE})
        cid = added.json()["Hash"]
        got = await http.post(f"{beta.url}/api/v0/cat", params={"arg": cid})
        assert got.content == LARGE
        exported = await http.get(f"{beta.url}/ipfs/{cid}", params={"format": "car"})
        blocks = list(unixfs.build(LARGE, version=0))
        assert car.read(exported.content).roots == (blocks[-1].cid,)
        assert car.read(exported.content).blocks.keys() == {stored(b.cid) for b in blocks}


async def test_curl_and_a_browser(daemon: Daemon) -> None:
    """What a page can send without asking: a form's POST, with its origin or none."""
    async with httpx.AsyncClient(base_url=daemon.url, timeout=60) as http:
        block = {"file": b"from a page"}
        cid = cid_text(cid_bytes(b"from a page", "raw"))
        for headers in ({"origin": "https://evil.example"}, {"user-agent": "Mozilla/5.0"}):
            sent = await http.post("/api/v0/block/put", files=block, headers=headers)
            assert sent.status_code == 403
        path = f"/ipfs/{cid}?format=raw"
        assert (await http.get(path)).status_code == 404
        await http.post("/api/v0/block/put", files=block, headers={"user-agent": "curl/8"})
        assert (await http.get(path)).content == b"from a page"
        assert parse_cid(cid) == cid_bytes(b"from a page", "raw")
