"""`promptmesh cache ...`: through a node, and on the file where none runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes_cli import FakeNode, Problem, made, run

from promptmesh.cache.answers import AnswerCache
from promptmesh.cache.blocks import SqliteBlocks
from promptmesh.cache.database import Database
from promptmesh.node.api_cache import PATH
from promptmesh.providers.base import Completion

LONG = "0123456789abcdef\n" * 12_000
ROW: dict[str, Any] = {
    "cid": "bafyreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy", "model": "smol",
    "bytes": 1234, "stored_at": 0, "expires_at": 0, "text": "Two\n\x1blines", "pinned": True,
    "hits": 3, "tokens": 9, "own": False, "source": "12D3KooWabcdefgh", "claimed": 2, "age": 7200,
}  # fmt: skip


def filled(folder: Path, *texts: str, **more: Any) -> list[str]:
    """Store answers in the folder's cache, each to a question of its own; their CIDs."""
    made(folder)

    async def store() -> list[str]:
        answers = AnswerCache(database, SqliteBlocks(database), peer="me")
        cids = []
        for number, text in enumerate(texts):
            settings = {"model": f"m{number}", "now": time.time() + number, **more}
            key = settings.pop("key", bytes([number]) * 32)
            completion = Completion(text=text, finish_reason="stop")
            stored = await answers.store(key, completion, **settings)
            assert stored is not None
            cids.append(stored.cid_text)
        return cids

    database = Database(folder / "cache.sqlite")
    try:
        return trio.run(store)
    finally:
        database.close()


def ok(folder: Path, *command: str, tty: bool = False) -> str:
    """What `promptmesh cache ...` printed; it must have worked."""
    ran = run(folder, "cache", *command, tty=tty, COLUMNS="80")
    assert ran.code == 0, ran.err
    return ran.out


# --- without a node -------------------------------------------------------------------------------


def test_nothing_is_stored(tmp_path: Path) -> None:
    ran = run(made(tmp_path).path, "cache", "ls")
    assert (ran.code, ran.out, ran.err) == (0, "", "No answer is stored yet.\n")
    assert "answers" in ok(tmp_path, "stat")
    assert json.loads(ok(tmp_path, "ls", "--json")) == []
    # Looking makes nothing.
    assert not (tmp_path / "cache.sqlite").exists()
    assert "No such answer" in run(tmp_path, "cache", "ls", "--model", "m").err


def test_ls_fits_a_terminal_and_tells_all_to_a_pipe(tmp_path: Path) -> None:
    cids = filled(tmp_path, "one " * 50, "two")
    ok(tmp_path, "pin", cids[0])
    head, first, second = ok(tmp_path, "ls", tty=True).splitlines()
    assert all(len(line) <= 80 for line in (first, second))
    titles = ["CID", "MODEL", "SIZE", "AGE", "LEFT", "HITS"]
    assert head.removeprefix("\x1b[2m").split()[:6] == titles
    assert cids[0].startswith(first.split()[0])
    assert "pinned" in first
    assert first.endswith("…")
    assert second.split()[-1] == "two"
    wide = run(tmp_path, "cache", "ls", tty=True, COLUMNS="120").out.splitlines()
    assert wide[1].split()[0] == cids[0]
    lines = ok(tmp_path, "ls").splitlines()
    assert [line.split()[0] for line in lines[1:]] == cids
    # What `ls` shows is enough to name it.
    assert ok(tmp_path, "get", second.split()[0]) == "two\n"
    assert len(ok(tmp_path, "ls", "--model", "m1").splitlines()) == 2
    assert "The first 1" in run(tmp_path, "cache", "ls", "--limit", "1").err
    assert len(json.loads(ok(tmp_path, "ls", "--namespace", "", "--json"))) == 2


def test_get_gives_the_whole_text_and_json_the_root(tmp_path: Path) -> None:
    cids = filled(tmp_path, LONG, "short")
    ran = run(tmp_path, "cache", "get", cids[0][:20])
    assert (ran.out, ran.err) == (f"{LONG}\n", f"m0 · {cids[0]}\n")
    root = json.loads(ok(tmp_path, "get", cids[0], "--json"))
    assert "output" not in root
    assert all(part["/"].startswith("bafkrei") for part in root["parts"])
    record = ok(tmp_path, "get", cids[1], "--json")
    assert record.startswith('{"finish_reason":"stop","kind":"llm-response","model":"m1",')
    assert json.loads(record)["output"] == [{"role": "assistant", "text": "short"}]


def test_a_beginning_of_several(tmp_path: Path) -> None:
    filled(tmp_path, "one", "two")
    ran = run(tmp_path, "cache", "get", "bafyrei")
    assert (ran.code, ran.out) == (1, "")
    assert "bafyrei is ambiguous" in ran.err
    assert "is no CID" in run(tmp_path, "cache", "pin", "x").err


def test_alternatives(tmp_path: Path) -> None:
    cids = filled(tmp_path, "mine", "theirs", key=b"k" * 32)
    assert "theirs" in ok(tmp_path, "get", cids[0], "--alternatives")
    rows = json.loads(ok(tmp_path, "get", cids[0], "--alternatives", "--json"))
    assert [row["cid"] for row in rows if not row["asked"]] == [cids[1]]
    alone = filled(tmp_path, "alone", key=b"a" * 32)
    assert "no other answer" in run(tmp_path, "cache", "get", *alone, "--alternatives").err


def test_pin_unpin_rm_gc_and_stat(tmp_path: Path) -> None:
    one, two, three = filled(tmp_path, "one", "two", "three")
    assert ok(tmp_path, "pin", one) == f"pinned {one}\n"
    assert json.loads(ok(tmp_path, "pin", two, "--json")) == {"cid": two, "pinned": True}
    assert "3, 2 of them pinned" in ok(tmp_path, "stat")
    assert ok(tmp_path, "unpin", two) == f"unpinned {two}\n"
    assert json.loads(ok(tmp_path, "stat", "--json"))["pinned"] == 1
    assert ok(tmp_path, "rm", three) == f"removed {three}\n"
    assert ok(tmp_path, "rm", "--model", "m1") == "1 answers removed\n"
    assert ok(tmp_path, "rm", "--namespace", "") == (
        "0 answers removed; 1 pinned ones stay (`cache unpin`)\n"
    )
    assert ok(tmp_path, "gc") == "0 answers expired, 0 blocks evicted, 0 B freed\n"
    assert [row["cid"] for row in json.loads(ok(tmp_path, "ls", "--json"))] == [one]


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    (cid,) = filled(tmp_path, "one")
    ok(tmp_path, "rm", cid)
    for command in (("get", cid), ("pin", cid), ("unpin", cid), ("rm", cid)):
        ran = run(tmp_path, "cache", *command)
        assert (ran.code, ran.out) == (1, "")
        assert ran.err == f"promptmesh: this node holds no answer {cid}\n"


@pytest.mark.parametrize(
    "command", [("rm",), ("rm", "bafy", "--model", "m"), ("ls", "--limit", "x")]
)
def test_wrong_usage(tmp_path: Path, command: tuple[str, ...]) -> None:
    filled(tmp_path, "one")
    assert run(tmp_path, "cache", *command).code == 2
    assert len(json.loads(ok(tmp_path, "ls", "--json"))) == 1


# --- through a node -------------------------------------------------------------------------------


def claimed(node: str, kind: str, reason: str = "") -> dict[str, str]:
    return {"node": node, "peer": "12D3KooW987654321", "kind": kind, "reason": reason}


def test_a_running_node_is_asked(tmp_path: Path) -> None:
    cid = ROW["cid"]
    gone = {"removed": 2, "pinned": 1}
    answers = {
        f"GET {PATH}?limit=100&model=a%2Fb": [ROW],
        f"GET {PATH}/{cid}": b'{"v":1}',
        f"GET {PATH}/{cid}/answer": {"cid": cid, "model": "smol", "text": "Two\nlines"},
        f"GET {PATH}/{cid}/alternatives": [
            ROW | {"here": True, "claims": [claimed("alpha", "computed"), claimed("beta", "held")]},
            {"cid": "bafy2", "here": False, "claims": [claimed("", "computed", "it flooded")]},
        ],
        f"PUT {PATH}/{cid}/pin": {"cid": cid, "pinned": True},
        f"DELETE {PATH}/{cid}/pin": {"cid": cid, "pinned": False},
        f"DELETE {PATH}/{cid}": {"cid": cid, "removed": True},
        f"DELETE {PATH}?model=m&namespace=": gone,
        f"POST {PATH}/gc": {"expired": 1, "evicted": 2, "freed": 1500, "bytes": 0},
    }
    with FakeNode(answers).running(made(tmp_path)):
        row = ok(tmp_path, "ls", "--model", "a/b").splitlines()[1]
        assert row.split()[:4] == [cid, "smol", "1.23", "kB"]
        assert row.endswith("pinned     3  Two \N{REPLACEMENT CHARACTER}lines")
        assert ok(tmp_path, "get", cid) == "Two\nlines\n"
        assert ok(tmp_path, "get", cid, "--json") == '{"v":1}\n'
        shown = [line.split() for line in ok(tmp_path, "get", cid, "--alternatives").splitlines()]
        assert shown[1][1:4] == ["…abcdefgh", "2", "h"]
        assert shown[2][1:] == ["(not", "here,", "but", "claimed)"]
        assert [line[1:] for line in shown[5:]] == [
            ["alpha", "computed", "yes"],
            ["beta", "held", "as", "a", "source"],
            ["…87654321", "computed", "no:", "it", "flooded"],
        ]
        assert ok(tmp_path, "pin", cid) == f"pinned {cid}\n"
        assert ok(tmp_path, "unpin", cid) == f"unpinned {cid}\n"
        assert ok(tmp_path, "rm", cid) == f"removed {cid}\n"
        assert ok(tmp_path, "rm", "--model", "m", "--namespace", "").startswith("2 answers removed")
        assert ok(tmp_path, "gc") == "1 answers expired, 2 blocks evicted, 1.5 kB freed\n"


def test_what_a_person_types_is_no_path(tmp_path: Path) -> None:
    answers = {f"GET {PATH}/a%2F..%2Fb/answer": Problem(404, "no such answer")}
    with FakeNode(answers).running(made(tmp_path)):
        ran = run(tmp_path, "cache", "get", "a/../b")
    assert (ran.code, ran.out, ran.err) == (1, "", "promptmesh: no such answer\n")
