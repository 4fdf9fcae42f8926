"""The tables: aligned, cut to the terminal, and without what other machines would slip into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes_cli import FakeNode, made, run
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.node import survey
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
        "via": "",
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
        "via": "direct",
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
     "hint": "start it", "models": ["big"], "slots": 4, "running": 1, "waiting": 0, "share": False,
     "paid": True},
]  # fmt: skip
NODE = {
    "GET /mesh/v1/peers": PEERS,
    "GET /v1/models": MODELS,
    "GET /mesh/v1/providers": PROVIDERS,
}


@pytest.fixture(autouse=True)
def _no_vendors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of them this machine has is not what these tests are about."""
    monkeypatch.setattr(survey, "VENDOR_KINDS", ())


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
        (("providers",), [{**row, "offered": True} for row in PROVIDERS]),
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
        ["NODE", "PEER", "REACHED", "FOR", "LOAD", "TOK/S", "MODELS", "RTT", "MACHINE"],
        ["alpha (this)", "…5W8mTzUu", "here", "-", "3/20 +2", "-", "smol, big", "-",
         "RTX 4090 24 GB 42%"],
        ["b\N{REPLACEMENT CHARACTER}[31mta", "…" + PEERS[1]["peer"][-8:], "unreachable",
         cells[2][3], "-", "-", "-", "1.2 ms", "4 CPUs 8 GB"],
        ["kubo/0.22.0 (ipfs)", "…bXnwNmeZ", "direct", cells[3][3], "-", "-", "-", "0.3 ms", "-"],
    ]  # fmt: skip
    assert cells[2][3].endswith(" d")
    assert "connection refused" in said
    assert "\x1b" not in said


def provider(name: str, **fields: Any) -> dict[str, Any]:
    plain = {"name": name, "kind": "k", "models": ["smol"], "slots": 4, "running": 1, "waiting": 0,
             "state": "ready", "reason": "", "ttft_s": None, "tokens_per_s": None,
             "measured": [], "in_flight": 0, "paused": None}  # fmt: skip
    return plain | fields


def test_what_a_peer_claims_and_what_we_see(tmp_path: Path) -> None:
    seen = {"model": "smol", "ttft_s": 0.5, "tokens_per_s": 31.2, "answers": 12, "errors": 0.03}
    few = seen | {"model": "big", "ttft_s": None, "tokens_per_s": None, "answers": 1, "errors": 0}
    providers = [
        provider("vllm", ttft_s=0.02, tokens_per_s=90.1, measured=[few, seen]),
        provider("other", tokens_per_s=7.0, state="unavailable", reason="no \x1b[1manswer",
                 paused={"seconds": 3.2, "reason": "it answered 500"}),
    ]  # fmt: skip
    peer = PEERS[1] | {"node": "beta", "state": "connected", "via": "relayed", "reason": "",
                       "warning": "two nodes have its identity", "providers": providers,
                       "address": "/ip4/1.2.3.4/tcp/1/p2p/Q/p2p-circuit"}  # fmt: skip
    claims = PEERS[2] | {"node": "c", "ipfs": "", "providers": providers[1:]}
    with FakeNode({"GET /mesh/v1/peers": [PEERS[0], peer, claims]}).running(made(tmp_path)):
        short, long = run(tmp_path, "peers"), run(tmp_path, "peers", "-v")
    _, _, beta, only_claims = short.out.splitlines()
    assert " relayed " in beta
    assert " 31 of 90 " in beta
    assert " (7) " in only_claims
    assert "beta: two nodes have its identity" in short.err
    assert long.out.startswith(short.out)
    lines = [" ".join(line.split()) for line in long.out.splitlines()]
    i = lines.index(f"beta {peer['peer']}")
    assert lines[i + 1 :][:7] == [
        "address /ip4/1.2.3.4/tcp/1/p2p/Q/p2p-circuit",
        "machine 4 CPUs 8 GB",
        "vllm 1/4 busy; claims 90 tok/s, 20.0 ms to the first token",
        "we see no speed yet from big (1 answers)",
        "we see 31 tok/s, 0.50 s to the first token from smol (12 answers, 3% of the last failed)",
        "other 1/4 busy (unavailable: no \N{REPLACEMENT CHARACTER}[1manswer); claims 7 tok/s",
        "left alone for 3.2 s more: it answered 500",
    ]


def test_what_is_optional_is_left_out_where_there_is_no_room() -> None:
    columns = (
        Column("NAME"),
        Column("TEXT", shrink=True),
        Column("MORE", shrink=True, optional=True),
    )
    rows = [("a" * 10, "b" * 30, "c" * 30)]
    wide, narrow, tiny = (table_lines(columns, rows, width) for width in (50, 30, 5))
    assert "cccc" in wide[1]
    assert max(map(cell_width, wide)) <= 50
    assert narrow == ["NAME        TEXT", "aaaaaaaaaa  bbbbbbbbbbbbbbbbb…"]
    assert "MORE" not in tiny[0]
    assert table_lines(columns, rows) == table_lines(columns, rows, 200)


def test_models(tmp_path: Path) -> None:
    rows, _ = shown(tmp_path, "models")
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [["MODEL", "CONTEXT", "OFFERED BY"], ["smol", "8192", "alpha:local_hf"]]


def test_providers(tmp_path: Path) -> None:
    rows, said = shown(tmp_path, "providers")
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [
        ["NAME", "KIND", "STATE", "LOAD", "SHARED", "COST", "MODELS"],
        ["local_hf", "local_hf", "starting", "0/16", "yes", "free", "-"],
        ["vllm", "openai_compatible", "unavailable", "1/4", "no", "paid", "big"],
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


def test_what_a_relay_does_is_told(tmp_path: Path) -> None:
    beta, gamma = ({"peer": f"12D3KooW{n}", "node": n} for n in ("beta", "gamma"))
    nameless = {"peer": "12D3KooWNameless", "node": ""}
    relaying = {
        "places": [beta, gamma],
        "circuits": [
            {"from": gamma, "to": beta, "count": 2},
            {"from": nameless, "to": gamma, "count": 1},
        ],
    }
    for told, line in (
        (relaying, "alpha: relays for 2 members; circuits: gamma - beta (2), …Nameless - gamma"),
        ({"places": [beta], "circuits": []}, "alpha: relays for 1 member"),
        (None, ""),
    ):
        rows = [{**PEERS[0], "relaying": told}]
        with FakeNode({"GET /mesh/v1/peers": rows}).running(made(tmp_path)):
            ran = run(tmp_path, "peers")
        assert [text for text in ran.err.splitlines() if "relays" in text] == [line] * bool(line)
