"""The tables: aligned, cut to the terminal, and without what other machines would slip into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes_cli import FakeNode, made, run
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.node.cli_output import (
    Column,
    byte_size,
    cell_width,
    cut,
    duration,
    printable,
    table_lines,
)

PEERS: list[dict[str, Any]] = [
    {
        "peer": "12D3KooWGRUQyF9z5ZJxkYbW3pB8xYyK8mJm3bS9Fh1m5W8mTzUu",
        "node": "alpha",
        "state": "connected",
        "address": "",
        "providers": [
            {"name": "local_hf", "kind": "local_hf", "models": ["smol"], "slots": 16,
             "running": 3, "waiting": 2, "state": "ready"},
            {"name": "vllm", "kind": "openai_compatible", "models": ["smol", "big"], "slots": 4,
             "running": 0, "waiting": 0, "state": "ready"},
        ],
        "gpus": [{"index": 0, "name": "RTX 4090", "memory_total": 24_000_000_000,
                  "memory_free": 1, "utilisation": 0.42}],
        "machine": {"cpus": 8, "memory_total": 1, "memory_free": 1},
        "rtt_ms": None,
        "since": None,
        "reason": "",
    },
    {
        "peer": "12D3KooWLRPJAA5o6yTpMSsLmeAnX3T5cqDhNpDqYBpQVYbRdQMn",
        "node": "b\x1b[31mta",
        "state": "unreachable",
        "address": None,
        "providers": [],
        "gpus": [],
        "machine": {"cpus": 4, "memory_total": 8_000_000_000, "memory_free": 1},
        "rtt_ms": 1.234,
        "since": 3.0,
        "reason": "connection refused",
    },
    {
        "peer": "QmaYNYophAJjSGkA4e6KZizTUw3DsEg7jbjpm4bXnwNmeZ",
        "node": "",
        "state": "connected",
        "address": "/ip4/10.0.0.3/tcp/4001",
        "ipfs": "kubo/0.22.0",
        "providers": [],
        "gpus": [],
        "machine": {"cpus": 0, "memory_total": 0, "memory_free": 0},
        "rtt_ms": 0.3,
        "since": 3.0,
        "reason": "",
    },
]  # fmt: skip
MODELS = {
    "object": "list",
    "data": [
        {
            "id": "smol",
            "owned_by": "local_hf",
            "promptmesh": {
                "context_length": 8192,
                "sources": [{"peer": PEERS[0]["peer"], "node": "alpha", "provider": "local_hf"}],
            },
        }
    ],
}
PROVIDERS = [
    {"name": "local_hf", "kind": "local_hf", "state": "starting", "reason": "loading the model",
     "hint": "", "models": [], "slots": 16, "running": 0, "waiting": 0, "share": True},
    {"name": "vllm", "kind": "openai_compatible", "state": "unavailable", "reason": "no answer",
     "hint": "start it", "models": ["big"], "slots": 4, "running": 1, "waiting": 0, "share": False},
]  # fmt: skip
NODE = {
    "GET /mesh/v1/peers": PEERS,
    "GET /v1/models": MODELS,
    "GET /mesh/v1/providers": PROVIDERS,
}


def shown(home: Path, *command: str) -> tuple[list[list[str]], str]:
    """The cells of the table on stdout, and stderr."""
    with FakeNode(NODE).running(made(home)):
        ran = run(home, *command)
    assert ran.code == 0
    return [[cell for cell in line.split("  ") if cell] for line in ran.out.splitlines()], ran.err


@pytest.mark.parametrize(
    ("command", "value"),
    [
        (("peers",), PEERS),
        (("models",), MODELS["data"]),
        (("providers",), PROVIDERS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_json_gives_what_the_node_says(
    tmp_path: Path, command: tuple[str, ...], value: object
) -> None:
    with FakeNode(NODE).running(made(tmp_path)):
        ran = run(tmp_path, *command, "--json")
    assert json.loads(ran.out) == value
    assert ran.err == ""


def test_peers(tmp_path: Path) -> None:
    rows, said = shown(tmp_path, "peers")
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [
        ["NODE", "PEER", "STATE", "LOAD", "MODELS", "MACHINE", "RTT", "ADDRESS"],
        ["alpha (this)", "…5W8mTzUu", "connected", "3/20 +2", "smol, big",
         "RTX 4090 24 GB 42%", "-", "-"],
        ["b\N{REPLACEMENT CHARACTER}[31mta", "…" + PEERS[1]["peer"][-8:], "unreachable", "-", "-",
         "4 CPUs 8 GB", "1.2 ms", "-"],
        ["kubo/0.22.0 (ipfs)", "…bXnwNmeZ", "connected", "-", "-", "-", "0.3 ms",
         "/ip4/10.0.0.3/tcp/4001"],
    ]  # fmt: skip
    assert "connection refused" in said
    assert "\x1b" not in said


def test_models(tmp_path: Path) -> None:
    rows, _ = shown(tmp_path, "models")
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [["MODEL", "CONTEXT", "OFFERED BY"], ["smol", "8192", "alpha:local_hf"]]


def test_providers(tmp_path: Path) -> None:
    rows, said = shown(tmp_path, "providers")
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [
        ["NAME", "KIND", "STATE", "LOAD", "SHARED", "MODELS"],
        ["local_hf", "local_hf", "starting", "0/16", "yes", "-"],
        ["vllm", "openai_compatible", "unavailable", "1/4", "no", "big"],
    ]
    assert said == "local_hf: loading the model\nvllm: no answer (start it)\n"


def test_an_empty_node_says_what_to_do(tmp_path: Path) -> None:
    nothing = {
        "GET /v1/models": {"data": []},
        "GET /mesh/v1/providers": [],
    }
    said = {
        "models": "No model can be asked: set local_hf.model",
        "providers": "This node has no providers",
    }
    with FakeNode(nothing).running(made(tmp_path)):
        for command, sentence in said.items():
            ran = run(tmp_path, *command.split())
            assert (ran.code, ran.out) == (0, "")
            assert sentence in ran.err


COLUMNS = (Column("NAME"), Column("COUNT", right=True), Column("TEXT", shrink=True))


def test_a_table_is_aligned() -> None:
    rows = [("a", "1", "x"), ("日本", "1000", "y"), ("e\u0301", "22", "a\n b")]
    assert table_lines(COLUMNS, rows) == [
        "NAME  COUNT  TEXT",
        "a         1  x",
        "日本   1000  y",
        "e\u0301        22  a b",
    ]


def test_a_narrow_terminal_cuts_what_may_be_cut() -> None:
    rows = [("a", "1", "a long text that does not fit")]
    assert table_lines(COLUMNS, rows, width=24) == ["NAME  COUNT  TEXT", "a         1  a long tex…"]
    # The titles stay, and so does what may not be cut.
    assert table_lines(COLUMNS, rows, width=3)[1] == "a         1  a l…"


@given(st.lists(st.tuples(st.text(), st.text(), st.text()), max_size=5), st.integers(30, 60))
def test_no_row_breaks_the_table(rows: list[tuple[str, str, str]], width: int) -> None:
    columns = [Column(title, shrink=True) for title in "ABC"]
    lines = table_lines(columns, rows, width)
    assert len(lines) == len(rows) + 1
    for line in lines:
        assert cell_width(line) <= width
        assert len(line.splitlines()) <= 1
        assert printable(line) == line


def test_printable_keeps_text() -> None:
    assert printable("a\tb\nc é 日本 👨‍👩‍👧 مرحبا") == "a\tb\nc é 日本 👨‍👩‍👧 مرحبا"
    assert printable("a\r\nb\x07\x9b") == "a\nb\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(("size", "text"), [(1, "…"), (3, "日…"), (4, "日…")])
def test_a_wide_text_is_cut_within_its_size(size: int, text: str) -> None:
    assert cut("日本語", size) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (999_900, "1 MB"),
        (24e9, "24 GB"),
        (3e15, "3000 TB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert byte_size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (0, "0 s"), (89, "89 s"), (90, "2 min"), (7200, "2 h"), (3 * 86400, "3 d")],
)
def test_ages(seconds: float, text: str) -> None:
    assert duration(seconds) == text
