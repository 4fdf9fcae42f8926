"""`generate_text` by Gemini: by HTTP where there is a key, and by its command as recorded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import ROOT
from doc_blocks import blocks
from faults import WHOLE
from recordings import playing_program
from vendors import VendorServer, vendors_in_a_thread

from promptmesh import (
    RouterDeps,
    count_tokens,
    generate_text,
    get_last_generation_trace,
    set_default_router_deps,
    stream_text,
)
from promptmesh.node.config import load_config
from promptmesh.providers.registry import build


@pytest.fixture(autouse=True)
def deps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program on a machine without any vendor."""
    for name in [*os.environ]:
        if name.startswith(("GEMINI", "GOOGLE", "PROMPTMESH", "IPFS", "OPENROUTER")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PROMPTMESH_HOME", str(tmp_path / "node"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with RouterDeps() as deps:
        set_default_router_deps(deps)
        yield
        set_default_router_deps(None)


@pytest.fixture
def server() -> Iterator[VendorServer]:
    with vendors_in_a_thread() as running:
        yield running


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is installed, and the user is logged in."""
    (tmp_path / "bin").mkdir()
    playing_program(tmp_path / "bin", "gemini", "gemini")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / ".gemini").mkdir()
    (tmp_path / ".gemini" / "oauth_creds.json").write_text('{"refresh_token": "r"}')


def provider_and_model() -> tuple[str, str]:
    trace = get_last_generation_trace()
    assert trace is not None
    return trace["provider"], trace["model"]


def test_by_http(server: VendorServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_API_KEY", "AIza-1")
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.base())
    # With the default model, which is asked for; streamed; and with an option of Gemini's.
    assert generate_text("one", provider="gemini_cli") == WHOLE
    assert provider_and_model() == ("gemini_cli", "stub-model")
    monkeypatch.setenv("IPFS_ACCELERATE_PY_GEMINI_MODEL", "stub-model-mini")
    assert "".join(stream_text("two", provider="gemini", thinking_budget=0)) == WHOLE
    assert provider_and_model() == ("gemini_cli", "stub-model-mini")
    sent = server.of("ok")[1].request
    assert "stub-model-mini:streamGenerateContent" in sent.path
    assert sent.json["generationConfig"] == {
        "temperature": 0.2,
        "maxOutputTokens": 256,
        "thinkingConfig": {"thinkingBudget": 0},
    }
    assert count_tokens("two", provider="gemini") == (11, True)
    with pytest.raises(TypeError, match="did you mean 'thinking_budget'"):
        generate_text("three", provider="gemini_cli", thinking_budge=0)


def test_by_http_with_the_key_refused(
    server: VendorServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", "AIza-wrong")
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.base("badkey"))
    with pytest.raises(RuntimeError, match="check the key") as caught:
        generate_text("one", provider="gemini_cli", model_name="m")
    assert "AIza-wrong" not in str(caught.value)


def test_by_the_command(
    command: None, server: VendorServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = (
        '[[providers]]\nkind = "gemini_cli"\nmode = "cli"\nmodels = ["stub-model"]\n'
        f'api_key_env = "KEY_OF_GEMINI"\nbase_url = "{server.base()}"\n'
    )
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "config.toml").write_text(table)
    monkeypatch.setenv("KEY_OF_GEMINI", "AIza-1")
    assert generate_text("one", provider="gemini_cli") == WHOLE
    assert provider_and_model() == ("gemini_cli", "stub-model")
    assert "".join(stream_text("two", provider="gemini_cli")) == WHOLE
    assert not server.seen  # the recording asks nobody


# --- the page ------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "gemini.md").read_text()


def test_the_program_of_the_page(
    server: VendorServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", "AIza-1")
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.base())
    (program,) = blocks(PAGE, "python")
    exec(program, {})
    assert capsys.readouterr().out == f"{WHOLE}\n"


@pytest.mark.parametrize("text", blocks(PAGE, "toml"))
def test_the_tables_of_the_page(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(text)
    (table,) = load_config(tmp_path, environ={}).providers
    assert not table.share
    build(table.kind, table.name, table.options)


def test_it_is_left_out_where_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match="gemini cannot be used: not installed: npm install"):
        generate_text("one", provider="gemini")
