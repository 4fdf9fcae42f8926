"""The Kubo RPC: who may call, what wrong calls get, and what each command does."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import cbrrr
import httpx
import pytest
import trio
from daemons import ROOT
from doc_blocks import tables
from fakes_ipfs import PEER, IpfsNode, ipfs_node
from hypothesis import given, settings
from hypothesis import strategies as st

from promptmesh.cache import car, unixfs
from promptmesh.cache.cid import cid_bytes, cid_text, parse_cid
from promptmesh.cache.links import link_text, stored, version_0
from promptmesh.node.api_kubo_call import Refused, seconds
from promptmesh.providers.base import Completion

RAW = cid_text(cid_bytes(b"block", "raw"))
ABSENT = cid_text(cid_bytes(b"absent", "raw"))


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[IpfsNode]:
    async with ipfs_node(tmp_path) as node:
        yield node


def is_error(response: httpx.Response, message: str) -> None:
    """Kubo's form of what failed."""
    assert response.status_code == 500, response.text
    body = response.json()
    assert message in body.pop("Message")
    assert body == {"Code": 0, "Type": "error"}
    assert response.headers["content-type"] == "application/json"


def is_refused(response: httpx.Response, status: int, message: str) -> None:
    """Go's form of what is wrong with a request."""
    assert response.status_code == status, response.text
    assert message in response.text
    assert response.headers["content-type"] == "text/plain; charset=utf-8"


# --- who may call -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "{url}"},
        {"referer": "{url}/page?x=1"},
        {"origin": "http://localhost:{port}", "user-agent": "Mozilla/5.0"},
        {"user-agent": "Mozilla/5.0 Electron/30"},
    ],
)
async def test_programs_and_own_pages_may_call(node: IpfsNode, headers: dict[str, str]) -> None:
    port = node.url.rpartition(":")[2]
    sent = {name: value.format(url=node.url, port=port) for name, value in headers.items()}
    assert (await node.rpc("version", headers=sent)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3000"},
        {"referer": "https://evil.example/"},
        {"origin": "{url}", "referer": "http://127.0.0.1:1/"},
        {"referer": "http://127.0.0.1"},
        {"referer": "http://127.0.0.1:99999999"},
        {"user-agent": "Mozilla/5.0 (X11; Linux x86_64) Firefox/140.0"},
        {"host": "evil.example"},
    ],
)
async def test_other_pages_may_not(node: IpfsNode, headers: dict[str, str]) -> None:
    sent = {name: value.format(url=node.url) for name, value in headers.items()}
    put = await node.rpc("block/put", files=[b"block"], headers=sent)
    assert put.status_code == 403
    assert not await node.parts.blocks.has(parse_cid(RAW))


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "TRACE"])
async def test_only_post_is_taken(node: IpfsNode, method: str) -> None:
    response = await node.http.request(method, "/api/v0/version")
    assert response.status_code == 405
    assert response.headers["allow"] == "OPTIONS, POST"


async def test_no_page_is_allowed_by_options(node: IpfsNode) -> None:
    response = await node.http.options("/api/v0/version", headers={"origin": node.url})
    assert response.status_code == 204
    assert response.headers["allow"] == "OPTIONS, POST"
    assert "access-control-allow-origin" not in response.headers


# --- what wrong calls get -----------------------------------------------------------------------


@pytest.mark.parametrize("command", ["files/ls", "version/", "config", "shutdown", "a" * 1000])
async def test_other_commands_are_not_found(node: IpfsNode, command: str) -> None:
    is_refused(await node.rpc(command), 404, "404 page not found")


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("block/get", {}, 'argument "cid" is required'),
        ("block/put", {}, "file argument 'data' is required"),
        ("cat?offset=x&arg=" + RAW, {}, 'could not convert value "x"'),
        ("pin/add?recursive=perhaps&arg=" + RAW, {}, 'could not convert value "perhaps"'),
        ("pin/add?recursive=true&recursive=false&arg=" + RAW, {}, "single value"),
        ("block/stat?timeout=5&arg=" + RAW, {}, "invalid duration"),
        ("block/rm?" + "&".join(["arg=" + RAW] * 65), {}, "more than 64"),
    ],
)
async def test_wrong_arguments_are_said(
    node: IpfsNode, command: str, options: dict[str, str], message: str
) -> None:
    response = await node.http.post(f"/api/v0/{command}", params=options or None)
    is_refused(response, 400, message)


async def test_a_body_that_is_no_multipart_is_said(node: IpfsNode) -> None:
    response = await node.http.post("/api/v0/block/put", json={})
    is_refused(response, 400, "not multipart")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5s", 5),
        ("1m30s", 90),
        ("0.5h", 600),
        ("1h", 600),
        ("100ms", 0.1),
        (".5s", 0.5),
        ("2µs", 2e-6),
    ],
)
def test_times_are_those_of_go(text: str, expected: float) -> None:
    assert seconds(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "5", "s", "-1s", "5 s", "5sx", "1e3s", "9" * 40 + "s"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(Refused):
        seconds(text)


async def test_a_timeout_is_kept(node: IpfsNode) -> None:
    node.others.silent = True
    with trio.fail_after(60):
        is_error(await node.rpc("block/get", ABSENT, timeout="50ms"), "")


async def test_offline_asks_nobody(node: IpfsNode) -> None:
    is_error(await node.rpc("block/get", ABSENT, offline="true"), f"could not find {ABSENT}")
    assert node.others.asked == []
    is_error(await node.rpc("block/get", ABSENT), f"could not find {ABSENT}")
    assert node.others.asked == [parse_cid(ABSENT)]


# --- blocks -------------------------------------------------------------------------------------


async def test_a_block_is_put_and_read(node: IpfsNode) -> None:
    assert await node.ok("block/put", files=[b"block"]) == {"Key": RAW, "Size": 5}
    got = await node.rpc("block/get", RAW)
    assert (got.content, got.headers["content-type"]) == (b"block", "application/vnd.ipld.raw")
    assert got.headers["x-stream-output"] == "1"
    assert await node.ok("block/stat", "/ipfs/" + RAW) == {"Key": RAW, "Size": 5}


async def test_a_block_of_another_node_is_read_and_kept(node: IpfsNode) -> None:
    node.others.blocks[parse_cid(ABSENT)] = b"absent"
    assert (await node.rpc("block/get", ABSENT)).content == b"absent"
    assert (await node.rpc("block/get", ABSENT, offline="true")).content == b"absent"


@pytest.mark.parametrize(
    ("options", "codec"),
    [
        ({}, "raw"),
        ({"cid-codec": "dag-cbor"}, "dag-cbor"),
        ({"format": "cbor"}, "dag-cbor"),
        ({"format": "protobuf"}, "dag-pb"),
        ({"cid-codec": "dag-json", "format": "dag-json", "version": "1"}, "dag-json"),
        ({"mhtype": "sha2-256", "mhlen": "-1"}, "raw"),
    ],
)
async def test_the_codec_is_named(node: IpfsNode, options: dict[str, str], codec: str) -> None:
    response = await node.http.post("/api/v0/block/put", params=options, files={"f": b"block"})
    assert response.json()["Key"] == cid_text(cid_bytes(b"block", codec))  # type: ignore[arg-type]


async def test_a_block_of_version_0(node: IpfsNode) -> None:
    put = await node.ok("block/put", files=[b""], format="v0")
    assert put["Key"] == link_text(version_0(cid_bytes(b"", "dag-pb")))
    assert await node.ok("block/stat", put["Key"]) == put


async def test_several_blocks_are_several_lines(node: IpfsNode) -> None:
    response = await node.rpc("block/put", files=[b"1", b"2"])
    assert [json.loads(line)["Size"] for line in response.text.splitlines()] == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mhtype": "sha2-512"}, "only sha2-256"),
        ({"mhlen": "20"}, "32 bytes"),
        ({"cid_codec": "git-raw"}, "unknown multicodec"),
    ],
)
async def test_other_hashes_and_codecs(
    node: IpfsNode, options: dict[str, Any], message: str
) -> None:
    is_error(await node.rpc("block/put", files=[b"block"], **options), message)


async def test_two_codecs_at_once(node: IpfsNode) -> None:
    response = await node.rpc("block/put", files=[b""], cid_codec="dag-cbor", format="raw")
    is_refused(response, 400, "at the same time")


async def test_a_large_block(node: IpfsNode) -> None:
    is_error(await node.rpc("block/put", files=[b"x" * (2 * 1024 * 1024 + 1)]), "over 2MiB")
    assert (await node.ok("block/put", files=[b"x" * 2 * 1024 * 1024]))["Size"] == 2 * 1024 * 1024


async def test_blocks_are_removed_but_not_pinned_ones(node: IpfsNode) -> None:
    await node.ok("block/put", files=[b"block"], pin="true")
    assert await node.ok("block/rm", RAW) == {"Hash": RAW, "Error": "pinned: recursive"}
    await node.ok("pin/rm", RAW)
    assert await node.ok("block/rm", RAW) == {"Hash": RAW}
    assert "could not find" in (await node.ok("block/rm", RAW))["Error"]
    assert (await node.rpc("block/rm", RAW, force="true", quiet="true")).content == b""


async def test_refs_and_stat_count_blocks(node: IpfsNode) -> None:
    assert (await node.rpc("refs/local")).content == b""
    for number in range(600):
        await node.parts.reading.put(cid_bytes(b"%d" % number, "raw"), b"%d" % number)
    lines = (await node.rpc("refs/local")).text.splitlines()
    assert {json.loads(line)["Ref"] for line in lines} == {
        cid_text(cid_bytes(b"%d" % number, "raw")) for number in range(600)
    }
    stat = await node.ok("repo/stat")
    assert (stat["NumObjects"], stat["StorageMax"]) == (600, 1_000_000_000)
    assert (await node.rpc("repo/gc")).content == b""


# --- what is withheld ---------------------------------------------------------------------------


async def test_an_answer_of_this_node_alone_is_not_there(node: IpfsNode) -> None:
    answer = await node.parts.answers.store(
        b"k",
        Completion(text="secret", finish_reason="stop"),
        model="m",
        now=time.time(),
        shared=False,
    )
    assert answer is not None
    cid = answer.cid_text
    await node.parts.answers.pin(answer.cid.raw)
    for command in ("block/get", "block/stat", "dag/get", "dag/export", "cat", "pin/add"):
        is_error(await node.rpc(command, cid), "could not find")
    is_error(await node.rpc("pin/rm", cid), "not pinned")
    assert "could not find" in (await node.ok("block/rm", cid))["Error"]
    assert await node.ok("pin/ls") == {"Keys": {}}
    assert (await node.rpc("refs/local")).content == b""
    assert await node.parts.answers.get(answer.cid.raw, now=time.time())


async def test_an_answer_of_the_mesh_is_read(node: IpfsNode) -> None:
    answer = await node.parts.answers.store(
        b"k",
        Completion(text="".join(map(str, range(40_000))), finish_reason="stop"),
        model="m",
        now=time.time(),
    )
    assert answer is not None
    cid = answer.cid_text
    record = await node.ok("dag/get", cid)
    assert record["kind"] == "llm-response"
    exported = car.read((await node.rpc("dag/export", cid)).content)
    assert exported.roots == (answer.cid.raw,)
    assert [cid_text(cid) for cid in exported.blocks] == [
        cid,
        *(part["/"] for part in record["parts"]),
    ]
    await node.ok("pin/add", cid)
    assert (await node.ok("pin/ls", type="recursive"))["Keys"] == {cid: {"Type": "recursive"}}
    await node.ok("pin/rm", cid)
    assert await node.ok("block/rm", cid) == {"Hash": cid}
    assert (await node.parts.answers.stat(now=time.time())).answers == 0


# --- dags ---------------------------------------------------------------------------------------


async def test_a_dag_is_put_and_read_through_links(node: IpfsNode) -> None:
    put = await node.ok("dag/put", files=[b'{"b": [1, {"/": {"bytes": "AQ"}}], "a": null}'])
    inner = put["Cid"]["/"]
    assert parse_cid(inner) == cid_bytes(cbrrr.encode_dag_cbor({"a": None, "b": [1, b"\1"]}))
    outer = (await node.ok("dag/put", files=[b'{"in":{"/":"%s"}}' % inner.encode()]))["Cid"]["/"]
    got = await node.rpc("dag/get", f"/ipfs/{outer}/in/b")
    assert got.content == b'[1,{"/":{"bytes":"AQ"}}]'
    assert got.headers["content-type"] == "text/plain"
    assert (await node.rpc("dag/get", f"{outer}/in/b/0")).content == b"1"
    assert await node.ok("dag/resolve", f"{outer}/in/b/0") == {
        "Cid": {"/": inner},
        "RemPath": "b/0",
    }
    is_error(await node.rpc("dag/get", f"{outer}/in/c"), "no link named")
    is_error(await node.rpc("dag/get", "nothing"), "invalid path")


@pytest.mark.parametrize(
    ("options", "codec"),
    [
        ({"store_codec": "dag-json"}, "dag-json"),
        ({"format": "cbor", "input_enc": "json"}, "dag-cbor"),
        ({"store_codec": "dag-cbor", "input_codec": "dag-json", "hash": "sha2-256"}, "dag-cbor"),
    ],
)
async def test_codecs_of_dags(node: IpfsNode, options: dict[str, Any], codec: str) -> None:
    put = await node.ok("dag/put", files=[b'{"b":1,"a":[]}'], **options)
    block = {"dag-json": b'{"a":[],"b":1}', "dag-cbor": cbrrr.encode_dag_cbor({"a": [], "b": 1})}
    assert parse_cid(put["Cid"]["/"]) == cid_bytes(block[codec], codec)  # type: ignore[arg-type]
    out = await node.rpc("dag/get", put["Cid"]["/"], output_codec="dag-cbor")
    assert out.content == block["dag-cbor"]


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (b"{", {}),
        (b'{"/":"x"}', {}),
        (b"\xa2\x61b\x01\x61a\x02", {"input_codec": "dag-cbor"}),
        (b"{}", {"store_codec": "raw"}),
        (b"{}", {"store_codec": "dag-pb"}),
        (b"{}", {"input_codec": "nothing"}),
    ],
)
async def test_what_is_no_dag(node: IpfsNode, data: bytes, options: dict[str, Any]) -> None:
    is_error(await node.rpc("dag/put", files=[data], **options), "")


async def test_large_dags(node: IpfsNode) -> None:
    many = b"[" + b",".join([b'"a text of some length"'] * 20_000) + b"]"
    put = await node.ok("dag/put", files=[many])
    assert (await node.rpc("dag/get", put["Cid"]["/"])).content == many
    assert (await node.rpc("dag/get", put["Cid"]["/"] + "/19999")).content == many[-24:-1]
    is_error(await node.rpc("dag/put", files=[b'"' + b"x" * 2 * 1024 * 1024 + b'"']), "over 2MiB")
    is_error(await node.rpc("dag/put", files=[b" " * 5 * 1024 * 1024 + b"1"]), "is the most")


async def test_a_dag_goes_out_and_comes_in(node: IpfsNode, tmp_path: Path) -> None:
    leaf = (await node.ok("dag/put", files=[b'"leaf"']))["Cid"]["/"]
    both = b'[{"/":"%b"},{"/":"%b"}]' % (leaf.encode(), leaf.encode())
    root = (await node.ok("dag/put", files=[both]))["Cid"]["/"]
    exported = await node.rpc("dag/export", root)
    assert exported.headers["content-type"] == "application/vnd.ipld.car"
    (tmp_path / "other").mkdir()
    async with ipfs_node(tmp_path / "other") as other:
        got = await other.rpc("dag/import", files=[exported.content], stats="true")
        first, second = map(json.loads, got.text.splitlines())
        assert first == {"Root": {"Cid": {"/": root}, "PinErrorMsg": ""}}
        assert second["Stats"]["BlockCount"] == 2
        assert (await other.rpc("dag/get", f"{root}/1", offline="true")).content == b'"leaf"'
        assert (await other.ok("pin/ls", leaf))["Keys"][leaf]["Type"] == "indirect"
        is_error(await other.rpc("dag/import", files=[exported.content[:-1]]), "import failed")


async def test_an_import_without_all_blocks_says_so(node: IpfsNode) -> None:
    root = cbrrr.encode_dag_cbor([cbrrr.CID(parse_cid(ABSENT))])
    data = car.write([cid_bytes(root)], [(cid_bytes(root), root)])
    assert ABSENT in (await node.ok("dag/import", files=[data]))["Root"]["PinErrorMsg"]


async def test_an_export_that_breaks_is_cut(node: IpfsNode) -> None:
    root = await node.ok("dag/put", files=[b'{"x":{"/":"%b"}}' % ABSENT.encode()])
    with pytest.raises(httpx.RemoteProtocolError):
        await node.rpc("dag/export", root["Cid"]["/"])


# --- files --------------------------------------------------------------------------------------


def content(size: int) -> bytes:
    return (hashlib.sha256(b"x").digest() * (size // 32 + 1))[:size]


@pytest.mark.parametrize("size", [0, 1, 1000, unixfs.LEAF, unixfs.LEAF + 1, 1_000_000])
@pytest.mark.parametrize("version", [0, 1])
async def test_files_come_back(node: IpfsNode, size: int, version: int) -> None:
    added = await node.ok("add", files=[content(size)], cid_version=version)
    *_, root = unixfs.build(content(size), version=version)
    expected = {"Name": "name", "Hash": link_text(root.cid), "Size": str(root.size)}
    assert added == expected
    assert (await node.rpc("cat", added["Hash"])).content == content(size)
    assert (await node.ok("pin/ls", type="recursive"))["Keys"] == {
        added["Hash"]: {"Type": "recursive"}
    }
    exported = await node.rpc("dag/export", added["Hash"])
    await node.ok("pin/rm", added["Hash"])
    imported = await node.ok("dag/import", files=[exported.content])
    assert imported == {"Root": {"Cid": {"/": added["Hash"]}, "PinErrorMsg": ""}}
    assert (await node.ok("pin/ls", added["Hash"]))["Keys"][added["Hash"]]["Type"] == "recursive"


async def test_a_part_of_files(node: IpfsNode) -> None:
    data = content(600_000)
    whole = (await node.ok("add", files=[data], cid_version=1))["Hash"]
    small = (await node.ok("add", files=[b"small"]))["Hash"]
    got = await node.rpc("cat", whole, offset=262_100, length=100)
    assert got.content == data[262_100:262_200]
    assert got.headers["x-content-length"] == "100"
    assert (await node.rpc("cat", small, whole, offset=3, length=4)).content == b"ll" + data[:2]
    assert (await node.rpc("cat", small, offset=99)).content == b""
    assert (await node.rpc("cat", small, length=0)).content == b""
    is_error(await node.rpc("cat", small, offset=-1), "negative offset")
    is_error(await node.rpc("cat", small, length=-1), "negative length")


async def test_only_hash_keeps_nothing(node: IpfsNode) -> None:
    added = await node.ok("add", files=[b"x"], only_hash="true", cid_version=1)
    assert added["Hash"] == cid_text(cid_bytes(b"x", "raw"))
    assert (await node.ok("repo/stat"))["NumObjects"] == 0


async def test_a_file_that_is_not_pinned(node: IpfsNode) -> None:
    await node.ok("add", files=[b"x"], pin="false")
    assert await node.ok("pin/ls") == {"Keys": {}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trickle": "true"}, "trickle is not known"),
        ({"wrap_with_directory": "true"}, "wrap-with-directory is not known"),
        ({"chunker": "rabin"}, "chunker"),
        ({"cid_version": "2"}, "CID version"),
        ({"hash": "blake3"}, "sha2-256"),
    ],
)
async def test_other_files_are_refused(
    node: IpfsNode, options: dict[str, Any], message: str
) -> None:
    is_error(await node.rpc("add", files=[b"x"], **options), message)


async def test_a_directory_is_refused(node: IpfsNode) -> None:
    part = ("file", ("d", b"", "application/x-directory"))
    is_error(await node.http.post("/api/v0/add", files=[part]), "no directories")
    part = ("file", ("d/f", b"", "text/plain"))
    is_error(await node.http.post("/api/v0/add", files=[part]), "in a directory")


async def test_a_dag_is_no_file(node: IpfsNode) -> None:
    put = await node.ok("dag/put", files=[b"{}"])
    is_error(await node.rpc("cat", put["Cid"]["/"]), "dag get")


# --- pins ---------------------------------------------------------------------------------------


async def test_a_pin_fetches_what_is_below(node: IpfsNode) -> None:
    node.others.blocks[parse_cid(ABSENT)] = b"absent"
    root = (await node.ok("dag/put", files=[b'{"x":{"/":"%b"}}' % ABSENT.encode()]))["Cid"]["/"]
    assert await node.ok("pin/add", root) == {"Pins": [root]}
    assert (await node.ok("pin/ls"))["Keys"] == {
        root: {"Type": "recursive"},
        ABSENT: {"Type": "indirect"},
    }
    assert (await node.ok("pin/ls", type="indirect"))["Keys"] == {ABSENT: {"Type": "indirect"}}
    is_error(await node.rpc("pin/ls", ABSENT, type="direct"), "is not pinned")
    is_error(await node.rpc("pin/ls", type="other"), "invalid type")
    is_error(await node.rpc("pin/rm", ABSENT), "not pinned or pinned indirectly")
    assert await node.ok("pin/rm", root) == {"Pins": [root]}
    assert await node.ok("pin/ls") == {"Keys": {}}


async def test_a_pin_of_one_block_alone(node: IpfsNode) -> None:
    root = (await node.ok("dag/put", files=[b'{"x":{"/":"%b"}}' % ABSENT.encode()]))["Cid"]["/"]
    await node.ok("pin/add", root, recursive="false")
    assert (await node.ok("pin/ls"))["Keys"] == {root: {"Type": "direct"}}
    is_error(await node.rpc("pin/add", root), "could not find")


async def test_no_more_is_pinned_than_the_cache_may_hold(tmp_path: Path) -> None:
    async with ipfs_node(tmp_path, "[cache]\nmax_bytes = 100000\n") as node:
        is_error(await node.rpc("add", files=[content(100_001)]), "would be pinned")
        await node.ok("add", files=[content(90_000)])
        await node.ok("block/put", files=[content(50_000)])


# --- the node -----------------------------------------------------------------------------------


async def test_the_node_says_who_it_is(node: IpfsNode) -> None:
    assert (await node.ok("version"))["Version"] == "0.7.0"
    me = await node.ok("id")
    assert me["ID"] == node.parts.peer
    assert me["Addresses"] == list(node.swarm.addresses)
    assert me["PublicKey"].startswith("CAES")
    is_error(await node.rpc("id", PEER), "not connected")


async def test_connections(node: IpfsNode) -> None:
    assert await node.ok("swarm/peers") == {"Peers": []}
    address = f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}"
    # The second of them is what `ipfshttpclient` makes of one address.
    for arguments in ([address], [address, *"/ip4"]):
        said = await node.ok("swarm/connect", *arguments)
        assert said == {"Strings": [f"connect {PEER} success"]}
    peers = await node.ok("swarm/peers")
    assert peers == {"Peers": [{"Addr": "/ip4/127.0.0.1/tcp/4001", "Peer": PEER}]}
    assert await node.ok("swarm/addrs") == {"Addrs": {PEER: ["/ip4/127.0.0.1/tcp/4001"]}}
    assert (await node.ok("id", PEER))["ID"] == PEER
    is_error(await node.rpc("swarm/connect", "/ip4/1.2.3.4/tcp/1"), "failure")
    is_error(await node.rpc("swarm/connect", address[:-1]), "nobody is there")


# --- anything at all ----------------------------------------------------------------------------

COMMANDS = """
    add cat block/put block/get block/stat block/rm dag/put dag/get dag/resolve dag/export
    dag/import pin/add pin/rm pin/ls refs/local repo/stat repo/gc id version swarm/peers
    swarm/addrs swarm/connect"""
OPTIONS = """
    offset length pin recursive type format cid-codec store-codec input-codec input-enc
    output-codec mhtype mhlen hash cid-version raw-leaves only-hash chunker timeout offline force
    quiet stats pin-roots trickle"""
WORDS = f"""
    0 1 -1 true False x raw cbor v0 dag-json dag-pb 5s all é \0 a/../b {"9" * 30}
    {RAW} /ipfs/{RAW}/a/0 ipfs://{ABSENT}"""
BODIES = [b"", b"x", b"{}", b'{"/":"%s"}' % RAW.encode(), b"\xa0", b"\xd8\x2a\x40", b"[" * 500]
words = st.sampled_from(["", *WORDS.split()])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(COMMANDS.split()),
            st.lists(words, max_size=2),
            st.dictionaries(st.sampled_from(OPTIONS.split()), words, max_size=3),
            st.lists(st.sampled_from(BODIES), max_size=2),
        ),
        min_size=1,
        max_size=5,
    )
)
async def test_any_call_gets_an_answer_in_form(
    calls: list[tuple[str, list[str], dict[str, str], list[bytes]]],
) -> None:
    with tempfile.TemporaryDirectory() as home:
        async with ipfs_node(Path(home)) as node:
            await node.ok("block/put", files=[b"block"])
            for command, arguments, options, files in calls:
                response = await node.http.post(
                    f"/api/v0/{command}",
                    params=[*options.items(), *(("arg", word) for word in arguments)],
                    files=[("file", ("name", data)) for data in files] or None,
                )
                if response.status_code == 500:
                    is_error(response, "")
                elif response.status_code == 400:
                    is_refused(response, 400, "")
                else:
                    assert response.status_code == 200


async def test_the_commands_of_the_documentation(node: IpfsNode) -> None:
    rows = tables((ROOT / "docs" / "ipfs.md").read_text())["command"]
    written = {name for row in rows for name in re.findall("[a-z]+(?:/[a-z]+)?", row[0])}
    assert written == set(COMMANDS.split())
    for name in written:
        assert (await node.rpc(name)).status_code != 404


def test_the_cids_of_version_0_are_kept_as_version_1() -> None:
    assert stored(version_0(cid_bytes(b"", "dag-pb"))) == cid_bytes(b"", "dag-pb")
