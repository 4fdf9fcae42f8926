"""`generate_text` by Claude: by HTTP where there is a key, and by its command as recorded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import ROOT
from doc_blocks import blocks
from faults import WHOLE
from recordings import playing_program
from vendor_replies import PROMPT_TOKENS
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

KEY = "sk-ant-abcdef0123456789"
PAGE = (ROOT / "docs" / "claude.md").read_text()


@pytest.fixture(autouse=True)
def deps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program on a machine without any vendor."""
    for name in [*os.environ]:
        if name.startswith(("ANTHROPIC", "CLAUDE", "PROMPTMESH", "IPFS", "OPENROUTER")):
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
    playing_program(tmp_path / "bin", "claude", "claude")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("CLAUDE_CODE_OAUTH_TOKEN", "sk-ant-oat01-x")


def provider_and_model() -> tuple[str, str]:
    trace = get_last_generation_trace()
    assert trace is not None
    return trace["provider"], trace["model"]


def test_by_http(server: VendorServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server.base())
    # With the first model that is listed; streamed; and with options of Claude's.
    assert generate_text("one", provider="claude_code") == WHOLE
    assert provider_and_model() == ("claude_code", "stub-model")
    monkeypatch.setenv("IPFS_ACCELERATE_PY_CLAUDE_MODEL", "stub-model-mini")
    asked = {"provider": "claude", "effort": "low", "thinking": 2000}
    assert "".join(stream_text("two", **asked)) == WHOLE  # type: ignore[arg-type] # by name
    assert provider_and_model() == ("claude_code", "stub-model-mini")
    sent = server.of("ok")[1].request.json
    assert (sent["model"], sent["max_tokens"]) == ("stub-model-mini", 2256)
    assert sent["output_config"] == {"effort": "low"}
    assert sent["thinking"] == {"type": "enabled", "budget_tokens": 2000}
    assert count_tokens("two", provider="claude") == (PROMPT_TOKENS, True)
    with pytest.raises(TypeError, match="did you mean 'effort'"):
        generate_text("three", provider="claude_code", efort="low")


def test_by_http_with_the_key_refused(
    server: VendorServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server.base("badkey"))
    with pytest.raises(RuntimeError, match="check the key") as caught:
        generate_text("one", provider="claude_code", model_name="m")
    assert KEY not in str(caught.value)


def test_by_the_command(
    command: None, server: VendorServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server.base())
    monkeypatch.setenv("PROMPTMESH_CLAUDE_MODEL", "stub-model")
    assert generate_text("one", provider="claude_code") == WHOLE
    assert provider_and_model() == ("claude_code", "stub-model")
    assert "".join(stream_text("two", provider="claude")) == WHOLE
    assert not server.seen  # the recording asks nobody


def test_by_the_command_although_there_is_a_key(
    command: None, server: VendorServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = (
        '[[providers]]\nkind = "claude_code"\nmode = "cli"\nmodels = ["stub-model"]\n'
        f'api_key_env = "KEY_OF_CLAUDE"\nbase_url = "{server.base()}"\n'
    )
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "config.toml").write_text(table)
    monkeypatch.setenv("KEY_OF_CLAUDE", KEY)
    assert generate_text("one", provider="claude_code") == WHOLE
    assert provider_and_model() == ("claude_code", "stub-model")
    assert not server.seen


@pytest.mark.parametrize(
    ("installed", "said"),
    [(False, "not installed: npm install"), (True, "not logged in: start `claude`")],
)
def test_it_is_left_out_where_it_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, said: str
) -> None:
    if installed:
        playing_program(tmp_path, "claude", "claude")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(RuntimeError, match=f"claude cannot be used: {said}"):
        generate_text("one", provider="claude")


# --- the page ------------------------------------------------------------------------------------


def test_the_program_of_the_page(
    server: VendorServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server.base())
    (program,) = blocks(PAGE, "python")
    exec(program, {})
    assert capsys.readouterr().out == f"{WHOLE}\n"


@pytest.mark.parametrize("text", blocks(PAGE, "toml"))
def test_the_tables_of_the_page(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(text)
    (table,) = load_config(tmp_path, environ={}).providers
    assert not table.share
    build(table.kind, table.name, table.options)
