"""`promptmesh providers`: what works on this machine, and the next step for what does not."""

import json
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes_cli import FakeNode, made, run
from fakes_http import ServerSide, always, json_reply, scripted_server

from promptmesh.node import survey
from promptmesh.node.seed_vendors import VENDORS
from promptmesh.providers.base import Health

LIST = {"object": "list", "data": [{"id": "m", "owned_by": "library"}]}
OWN = [
    {"name": "here", "kind": "openrouter", "state": "ready", "reason": "", "hint": "",
     "models": ["m"], "slots": 4, "running": 1, "waiting": 0, "share": False, "paid": True,
     "offers": [{"id": "m", "price": {"prompt": 0.5, "completion": 1.5}}]},
]  # fmt: skip


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("  ") if cell] for line in text.splitlines()]


def vendors(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(survey, "VENDOR_KINDS", names)


async def test_without_a_node_it_looks_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vendors(monkeypatch)
    made(tmp_path)
    async with scripted_server(always(json_reply(200, LIST))) as server:
        (tmp_path / "config.toml").write_text(
            '[local_hf]\nmodel = "some/model"\n'
            '[[providers]]\nkind = "echo"\nprice = {prompt = 1, completion = 2}\n'
            f'[[providers]]\nkind = "openai_compatible"\nbase_url = "{server.base_url}"\n'
            'name = "up"\n'
            '[[providers]]\nkind = "openai_compatible"\nbase_url = "http://127.0.0.1:1/v1"\n'
            'name = "down"\n'
        )
        ran = await trio.to_thread.run_sync(run, tmp_path, "providers")
        found = await trio.to_thread.run_sync(run, tmp_path, "providers", "--json")
    assert ran.code == 0
    assert cells(ran.out) == [
        ["NAME", "KIND", "STATE", "LOAD", "SHARED", "COST", "MODELS"],
        ["local_hf", "local_hf", "starting", "0/16", "yes", "free", "-"],
        ["echo", "echo", "ready", "0/64", "no", "$1 + $2", "echo"],
        ["up", "openai_compatible", "ready", "0/16", "yes", "free", "m"],
        ["down", "openai_compatible", "unavailable", "0/16", "yes", "free", "-"],
    ]
    assert "no node runs here" in ran.err
    assert "connection refused (start the server at 127.0.0.1:1, or correct base_url)" in ran.err
    rows = json.loads(found.out)
    assert [row["name"] for row in rows] == ["local_hf", "echo", "up", "down"]
    assert all(row["offered"] for row in rows)


async def test_it_shows_a_server_that_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vendors(monkeypatch)
    made(tmp_path)

    def ask(port: int) -> Any:
        return run(
            tmp_path,
            "providers",
            PROMPTMESH_LOCAL_SERVERS_ENABLED="1",
            PROMPTMESH_LOCAL_SERVERS_PORTS=str(port),
        )

    unlike_a_node = json_reply(200, LIST)
    async with scripted_server(always(unlike_a_node)) as server:
        ran = await trio.to_thread.run_sync(ask, server.port)
    assert cells(ran.out)[1:] == [
        ["ollama", "openai_compatible", "ready", "0/16", "yes", "free", "m"]
    ]


def test_each_vendor_has_its_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vendors(monkeypatch, "openrouter", "gemini_cli")
    missing = Health(state="unavailable", reason="not logged in", hint="run `gemini` once")
    entry = VENDORS["gemini_cli"]
    monkeypatch.setattr(
        "promptmesh.node.seed_vendors.VENDORS",
        {"gemini_cli": type(entry)(model=entry.model, look=lambda *_: missing)},
    )
    made(tmp_path)
    ran = run(tmp_path, "providers", OPENROUTER_API_KEY="")
    assert cells(ran.out) == [
        ["NOT OFFERED", "STATE", "NEXT"],
        ["openrouter", "no key", "set OPENROUTER_API_KEY (https://openrouter.ai/keys)"],
        ["gemini_cli", "not logged in", "run `gemini` once"],
    ]
    assert "This node has no providers" in ran.err
    rows = json.loads(run(tmp_path, "providers", "--json", OPENROUTER_API_KEY="").out)
    assert [(row["name"], row["offered"], row["paid"]) for row in rows] == [
        ("openrouter", False, True),
        ("gemini_cli", False, True),
    ]


def test_what_the_node_has_is_not_shown_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vendors(monkeypatch, "openrouter")
    with FakeNode({"GET /mesh/v1/providers": OWN}).running(made(tmp_path)):
        ran = run(tmp_path, "providers", OPENROUTER_API_KEY="")
    assert cells(ran.out)[1:] == [["here", "openrouter", "ready", "1/4", "no", "$0.5 + $1.5", "m"]]
    assert ran.err == ""


async def test_a_vendor_that_is_ready_can_be_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vendors(monkeypatch, "openrouter")
    made(tmp_path)
    async with scripted_server(always(json_reply(200, LIST))) as server:
        ran = await trio.to_thread.run_sync(
            lambda: run(
                tmp_path,
                "providers",
                OPENROUTER_API_KEY="sk-or-1",
                PROMPTMESH_OPENROUTER_BASE_URL=server.base_url,
            )
        )
        assert {request.method for request in server.requests} == {"GET"}
    assert cells(ran.out)[1:] == [
        [
            "openrouter",
            "ready",
            'generate_text may use it; [[providers]] kind = "openrouter" offers it',
        ]
    ]
    assert "sk-or-1" not in ran.out + ran.err


async def test_one_that_is_silent_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vendors(monkeypatch)
    monkeypatch.setattr(survey, "LIMIT", 0.2)
    made(tmp_path)

    async def silent(side: ServerSide) -> None:
        while await side.request_or_end() is not None:
            pass

    async with scripted_server(silent) as server:
        (tmp_path / "config.toml").write_text(
            f'[[providers]]\nkind = "openai_compatible"\nbase_url = "{server.base_url}"\n'
            '[[providers]]\nkind = "echo"\n'
        )
        ran = await trio.to_thread.run_sync(run, tmp_path, "providers", "--json")
    states = {row["name"]: row["state"] for row in json.loads(ran.out)}
    assert states == {"openai_compatible": "unavailable", "echo": "ready"}
