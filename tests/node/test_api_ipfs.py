"""The trustless gateway: formats, headers, and what it does not give."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import cbrrr
import httpx
import pytest
from fakes_ipfs import IpfsNode, ipfs_node
from multiformats import CID

from promptmesh.cache import car, unixfs
from promptmesh.cache.cid import cid_bytes, cid_text, parse_cid
from promptmesh.cache.links import link_text, stored, version_0
from promptmesh.providers.base import Completion

RAW = "application/vnd.ipld.raw"
CAR = "application/vnd.ipld.car"
DAG_JSON = "application/vnd.ipld.dag-json"

LEAF = b"leaf"
ROOT = cbrrr.encode_dag_cbor(
    {"b": [cbrrr.CID(cid_bytes(LEAF, "raw"))] * 2, "a": cbrrr.CID(cid_bytes(LEAF, "raw"))}
)
CID_LEAF, CID_ROOT = cid_text(cid_bytes(LEAF, "raw")), cid_text(cid_bytes(ROOT))
ABSENT = cid_text(cid_bytes(b"absent"))


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[IpfsNode]:
    async with ipfs_node(tmp_path) as node:
        await node.parts.reading.put(parse_cid(CID_LEAF), LEAF)
        await node.parts.reading.put(parse_cid(CID_ROOT), ROOT)
        yield node


async def get(node: IpfsNode, path: str, accept: str | None = None, **query: str) -> httpx.Response:
    headers = {} if accept is None else {"accept": accept}
    request = node.http.build_request("GET", f"/ipfs/{path}", params=query, headers=headers)
    if accept is None:
        del request.headers["accept"]
    return await node.http.send(request)


# --- formats ------------------------------------------------------------------------------------


async def test_a_block(node: IpfsNode) -> None:
    response = await get(node, CID_ROOT, format="raw")
    assert (response.status_code, response.content) == (200, ROOT)
    headers = response.headers
    assert headers["content-type"] == RAW
    assert headers["cache-control"] == "public, max-age=29030400, immutable"
    assert headers["etag"] == f'"{CID_ROOT}.raw"'
    assert headers["content-location"] == f"/ipfs/{CID_ROOT}?format=raw"
    assert headers["x-ipfs-path"] == f"/ipfs/{CID_ROOT}"
    assert headers["x-ipfs-roots"] == CID_ROOT
    assert headers["content-disposition"] == f'attachment; filename="{CID_ROOT}.bin"'
    assert headers["x-content-type-options"] == "nosniff"


async def test_dag_json(node: IpfsNode) -> None:
    response = await get(node, CID_ROOT, format="dag-json")
    link = f'{{"/":"{CID_LEAF}"}}'
    assert response.text == f'{{"a":{link},"b":[{link},{link}]}}'
    assert response.headers["content-type"] == DAG_JSON
    assert response.headers["etag"] == f'"{CID_ROOT}.dag-json"'


async def test_dag_json_of_dag_json(node: IpfsNode) -> None:
    block = b'{"a":1}'
    cid = cid_bytes(block, "dag-json")
    await node.parts.reading.put(cid, block)
    assert (await get(node, cid_text(cid), format="dag-json")).content == block


async def test_a_raw_block_has_no_dag_json(node: IpfsNode) -> None:
    response = await get(node, CID_LEAF, format="dag-json")
    assert response.status_code == 406
    assert "?format=raw or car" in response.text


@pytest.mark.parametrize(
    ("query", "blocks"),
    [
        ({}, [CID_ROOT, CID_LEAF]),
        ({"dag-scope": "all"}, [CID_ROOT, CID_LEAF]),
        ({"dag-scope": "block"}, [CID_ROOT]),
        ({"dag-scope": "entity"}, [CID_ROOT]),
        ({"car-version": "1", "car-order": "dfs", "car-dups": "n"}, [CID_ROOT, CID_LEAF]),
    ],
)
async def test_a_car(node: IpfsNode, query: dict[str, str], blocks: list[str]) -> None:
    response = await get(node, CID_ROOT, format="car", **query)
    read = car.read(response.content)
    assert [cid_text(cid) for cid in read.roots] == [CID_ROOT]
    assert [cid_text(cid) for cid in read.blocks] == blocks
    assert response.headers["content-type"] == f"{CAR}; version=1; order=dfs; dups=n"
    assert response.headers["content-disposition"] == f'attachment; filename="{CID_ROOT}.car"'
    assert response.headers["accept-ranges"] == "none"


async def test_each_scope_has_its_own_etag(node: IpfsNode) -> None:
    tags = [
        (await get(node, CID_ROOT, format="car", **{"dag-scope": scope})).headers["etag"]
        for scope in ("all", "block", "entity")
    ]
    assert len(set(tags)) == 3
    assert all(tag.startswith(f'W/"{CID_ROOT}.car.') for tag in tags)


async def test_the_entity_of_a_file_is_the_file(node: IpfsNode) -> None:
    *_, root = blocks = list(unixfs.build(bytes(range(256)) * 2000))
    for block in blocks:
        await node.parts.reading.put(stored(block.cid), block.block)
    response = await get(node, link_text(root.cid), format="car", **{"dag-scope": "entity"})
    assert list(car.read(response.content).blocks) == [root.cid, *(b.cid for b in blocks[:-1])]


async def test_the_car_of_a_long_answer_has_its_leaves(node: IpfsNode) -> None:
    text = "".join(map(str, range(40_000)))
    answer = await node.parts.answers.store(
        b"k", Completion(text=text, finish_reason="stop"), model="m", now=time.time()
    )
    assert answer is not None
    read = car.read((await get(node, answer.cid_text, format="car")).content)
    assert read.roots == (answer.cid.raw,)
    assert next(iter(read.blocks)) == answer.cid.raw
    assert sum(map(len, read.blocks.values())) == answer.size
    assert len(read.blocks) > 3


async def test_a_car_without_one_of_its_blocks_is_cut(node: IpfsNode) -> None:
    await node.parts.blocks.delete(parse_cid(CID_LEAF))
    with pytest.raises(httpx.RemoteProtocolError):
        await get(node, CID_ROOT, format="car")


# --- negotiation --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (RAW, RAW),
        (f"{CAR}; version=1; order=dfs; dups=n", f"{CAR}; version=1; order=dfs; dups=n"),
        (f"{RAW};q=0.5, {DAG_JSON};q=0.9, text/html", DAG_JSON),
        (f"{RAW};q=0, {DAG_JSON};q=0.1", DAG_JSON),
        (f"{DAG_JSON}, */*;q=0.8", DAG_JSON),
    ],
)
async def test_what_the_client_likes(node: IpfsNode, accept: str, kind: str) -> None:
    assert (await get(node, CID_ROOT, accept)).headers["content-type"] == kind


@pytest.mark.parametrize("accept", [RAW, CAR, DAG_JSON])
async def test_the_location_gives_the_same_without_a_header(node: IpfsNode, accept: str) -> None:
    first = await get(node, CID_ROOT, accept, **{"dag-scope": "block"})
    second = await node.http.get(first.headers["content-location"])
    assert (second.content, second.headers) == (first.content, first.headers)


async def test_the_query_stands_over_the_header(node: IpfsNode) -> None:
    assert (await get(node, CID_ROOT, CAR, format="raw")).headers["content-type"] == RAW


@pytest.mark.parametrize(
    ("accept", "query", "status"),
    [
        (None, {}, 400),
        ("text/html,application/xhtml+xml,*/*;q=0.8", {}, 406),
        ("*/*", {}, 406),
        (f"{RAW};q=0", {}, 406),
        (None, {"format": "tar"}, 406),
        (CAR + "; version=2", {}, 400),
        (CAR + "; dups=y", {}, 400),
        (CAR, {"car-order": "other"}, 400),
        (CAR, {"dag-scope": "some"}, 400),
        (CAR, {"entity-bytes": "0:*"}, 400),
    ],
)
async def test_what_is_not_given(
    node: IpfsNode, accept: str | None, query: dict[str, str], status: int
) -> None:
    response = await get(node, CID_ROOT, accept, **query)
    assert response.status_code == status
    assert response.json()["error"]["message"]


# --- caching ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["raw", "car", "dag-json"])
async def test_what_the_client_has_is_not_sent(node: IpfsNode, form: str) -> None:
    etag = (await get(node, CID_ROOT, format=form)).headers["etag"]
    for matching in (etag, f'"other", {etag}', "*", f"W/{etag.removeprefix('W/')}"):
        response = await node.http.get(
            f"/ipfs/{CID_ROOT}", params={"format": form}, headers={"if-none-match": matching}
        )
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["etag"] == etag
    other = await node.http.get(
        f"/ipfs/{CID_ROOT}", params={"format": form}, headers={"if-none-match": '"other"'}
    )
    assert other.status_code == 200


@pytest.mark.parametrize("form", ["raw", "car", "dag-json"])
async def test_head_is_get_without_content(node: IpfsNode, form: str) -> None:
    got = await get(node, CID_ROOT, format=form)
    head = await node.http.head(f"/ipfs/{CID_ROOT}", params={"format": form})
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers == got.headers


async def test_only_what_is_here(node: IpfsNode) -> None:
    node.others.blocks[parse_cid(ABSENT)] = b"absent"
    headers = {"cache-control": "only-if-cached"}
    path = f"/ipfs/{ABSENT}?format=raw"
    assert (await node.http.get(path, headers=headers)).status_code == 412
    assert node.others.asked == []
    assert (await node.http.get(path)).content == b"absent"
    assert (await node.http.get(path, headers=headers)).status_code == 200


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["base58btc", "base36", "base32upper", "base64url"])
async def test_other_bases(node: IpfsNode, base: str) -> None:
    name = str(CID.decode(CID_ROOT).set(base=base))
    response = await get(node, name, format="raw")
    assert response.content == ROOT
    assert response.headers["x-ipfs-path"] == f"/ipfs/{name}"
    assert response.headers["x-ipfs-roots"] == CID_ROOT


async def test_version_0(node: IpfsNode) -> None:
    (leaf,) = unixfs.build(b"file", version=0)
    await node.parts.reading.put(stored(leaf.cid), leaf.block)
    response = await get(node, link_text(leaf.cid), format="raw")
    assert response.content == leaf.block
    assert response.headers["x-ipfs-roots"] == link_text(version_0(stored(leaf.cid)))


@pytest.mark.parametrize("name", ["nothing", "bafkqabtim5xw2", CID_ROOT[:-1], "x" * 2000])
async def test_what_is_no_cid(node: IpfsNode, name: str) -> None:
    response = await get(node, name, format="raw")
    assert response.status_code == 400
    assert "CID" in response.text


@pytest.mark.parametrize("below", ["/a", "/b/0", "/"])
async def test_paths_are_not_followed(node: IpfsNode, below: str) -> None:
    response = await get(node, CID_ROOT + below, format="raw")
    if below == "/":
        assert response.status_code == 200
        return
    assert response.status_code == 400
    assert "no path" in response.text


async def test_the_probe_of_the_specification(node: IpfsNode) -> None:
    response = await get(node, "bafkqaaa", format="raw")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"] == RAW


async def test_what_is_not_here(node: IpfsNode) -> None:
    for form in ("raw", "car", "dag-json"):
        response = await get(node, ABSENT, format=form)
        assert response.status_code == 404
        assert "promptmesh cache get" in response.text


async def test_an_answer_of_this_node_alone_is_not_given(node: IpfsNode) -> None:
    answer = await node.parts.answers.store(
        b"k",
        Completion(text="secret", finish_reason="stop"),
        model="m",
        now=time.time(),
        shared=False,
    )
    assert answer is not None
    for form in ("raw", "car", "dag-json"):
        response = await get(node, answer.cid_text, format=form)
        assert response.status_code == 404
        assert response.json() == (
            {
                "error": {
                    "type": "invalid_request_error",
                    "message": (await get(node, ABSENT, format=form))
                    .json()["error"]["message"]
                    .replace(ABSENT, answer.cid_text),
                }
            }
        )


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_nothing_is_written_here(node: IpfsNode, method: str) -> None:
    response = await node.http.request(method, f"/ipfs/{CID_ROOT}")
    assert response.status_code == 405
    assert response.headers["allow"] == "GET, HEAD, OPTIONS"
