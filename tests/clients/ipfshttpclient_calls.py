"""Calls a node with the `ipfshttpclient` that is found first, unpatched, and prints what came.

    python ipfshttpclient_calls.py MULTIADDR CID-OF-AN-ANSWER

A process of its own, since two versions of one package do not go into one.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import warnings
from typing import Any

import ipfshttpclient

# Its only warning: it says at each call what urllib3 1 wanted to hear, and urllib3 3 will refuse.
warnings.filterwarnings("ignore", "The 'strict' parameter is no longer needed", FutureWarning)

#: More than two leaves.
LARGE = bytes(range(256)) * 2400
DAG = b'{"list":[1,{"deep":"x"}],"bytes":{"/":{"bytes":"AQI"}}}'


def blocks(client: ipfshttpclient.Client) -> dict[str, Any]:
    put = client.block.put(io.BytesIO(b"a block"))
    cbor = client.block.put(io.BytesIO(b"\xa0"), opts={"cid-codec": "dag-cbor"})
    cid = put["Key"]
    return {
        "put": put.as_json(),
        "cbor": cbor["Key"],
        "get": client.block.get(cid).decode(),
        "stat": client.block.stat(cid).as_json(),
        "refs": cid in [ref["Ref"] for ref in client.unstable.refs.local()],
    }


def files(client: ipfshttpclient.Client) -> dict[str, Any]:
    small, large = client.add_bytes(b"hello\n"), client.add(io.BytesIO(LARGE))
    version_1 = client.add(io.BytesIO(LARGE), cid_version=1, raw_leaves=True)
    as_json = client.add_json({"a": [1, "é"]})
    return {
        "add_bytes": small,
        "add_str": client.add_str("hello\n"),
        "add": large.as_json(),
        "version_1": version_1["Hash"],
        "only_hash": client.add(io.BytesIO(b"hello\n"), only_hash=True)["Hash"],
        "cat": client.cat(large["Hash"]) == client.cat(version_1["Hash"]) == LARGE,
        "part": client.cat(large["Hash"], offset=262_100, length=100) == LARGE[262_100:262_200],
        "end": client.cat(small, offset=4).decode(),
        "get_json": client.get_json(as_json),
    }


def dags(client: ipfshttpclient.Client, answer: str) -> dict[str, Any]:
    cid = client.dag.put(io.BytesIO(DAG))["Cid"]["/"]
    return {
        "put": cid,
        "get": client.dag.get(cid).as_json(),
        "path": client.dag.get(f"{cid}/list/1").as_json(),
        "resolve": client.dag.resolve(f"{cid}/list/1").as_json(),
        "export": base64.b64encode(client.dag.export(cid)).decode(),
        "import": client.dag.imprt(io.BytesIO(client.dag.export(cid))).as_json(),
        "answer": client.dag.get(answer).as_json(),
        "text": client.dag.get(f"{answer}/output/0").as_json()["text"],
    }


def pins(client: ipfshttpclient.Client) -> dict[str, Any]:
    cid = client.block.put(io.BytesIO(b"pinned"))["Key"]
    added = client.pin.add(cid).as_json()
    listed = client.pin.ls(type="recursive").as_json()["Keys"].get(cid)
    one = client.pin.ls(cid).as_json()
    removed = client.pin.rm(cid).as_json()
    return {
        "cid": cid,
        "add": added,
        "ls": listed,
        "one": one,
        "rm": removed,
        "after": cid in client.pin.ls(type="all")["Keys"],
        "missing": failure(lambda: client.pin.ls(cid)),
    }


def failure(call: Any) -> list[str]:
    """The kind and the words of the error that a call raises."""
    try:
        call()
    except ipfshttpclient.exceptions.Error as error:
        return [type(error).__name__, str(error)]
    raise AssertionError("it did not fail")


def main(address: str, answer: str) -> None:
    absent = "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
    with ipfshttpclient.connect(address, timeout=30) as client:
        found = {
            "client": ipfshttpclient.__version__,
            "version": client.version().as_json(),
            "id": client.id().as_json(),
            "blocks": blocks(client),
            "files": files(client),
            "dags": dags(client, answer),
            "pins": pins(client),
            "stat": client.repo.stat().as_json(),
            "gc": client.repo.gc(),
            "peers": client.swarm.peers().as_json(),
            "addrs": client.swarm.addrs().as_json(),
            "no block": failure(lambda: client.block.get(absent, offline=True)),
            "no path": failure(lambda: client.dag.get("nothing")),
            "no command": failure(lambda: client.key.list()),
        }
    print(json.dumps(found))


main(*sys.argv[1:])
