"""`generate_text` by Claude and Gemini: by HTTP with a key, and by their commands as recorded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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


class Vendor(NamedTuple):
    """One of the two."""

    kind: str
    #: The program, which is also its page and another name of the provider.
    name: str
    key: str
    url: str
    #: An option of its own, which has another name without its last letter.
    option: Mapping[str, Any]
    #: What is sent of it, and of the usual options, to a model of that name.
    sent: Mapping[str, Any]
    #: What is wrong where only its program is there.
    not_logged_in: str

    def page(self) -> str:
        return (ROOT / "docs" / f"{self.name}.md").read_text()


VENDORS = {
    vendor.name: vendor
    for vendor in (
        Vendor(
            "claude_code",
            "claude",
            "ANTHROPIC_API_KEY",
            "ANTHROPIC_BASE_URL",
            {"effort": "low", "thinking": 2000},
            {
                "model": "stub-model-mini",
                "max_tokens": 2256,
                "output_config": {"effort": "low"},
                "thinking": {"type": "enabled", "budget_tokens": 2000},
            },
            "not logged in: start `claude`",
        ),
        Vendor(
            "gemini_cli",
            "gemini",
            "GOOGLE_API_KEY",
            "GOOGLE_GEMINI_BASE_URL",
            {"thinking_budget": 0},
            {
                "generationConfig": {
                    "temperature": 0.2,
                    "maxOutputTokens": 256,
                    "thinkingConfig": {"thinkingBudget": 0},
                }
            },
            "not logged in: start `gemini`",
        ),
    )
}


@pytest.fixture(params=VENDORS.values(), ids=list(VENDORS))
def vendor(request: pytest.FixtureRequest) -> Vendor:
    found: Vendor = request.param
    return found


@pytest.fixture(autouse=True)
def deps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program on a machine without any vendor."""
    foreign = ("ANTHROPIC", "CLAUDE", "GEMINI", "GOOGLE", "PROMPTMESH", "IPFS", "OPENROUTER")
    for name in [*os.environ]:
        if name.startswith(foreign):
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
def command(vendor: Vendor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is installed, and the user is logged in."""
    (tmp_path / "bin").mkdir()
    playing_program(tmp_path / "bin", vendor.name, vendor.name)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("CLAUDE_CODE_OAUTH_TOKEN", "sk-ant-oat01-x")
    (tmp_path / ".gemini").mkdir()
    (tmp_path / ".gemini" / "oauth_creds.json").write_text('{"refresh_token": "r"}')


def provider_and_model() -> tuple[str, str]:
    trace = get_last_generation_trace()
    assert trace is not None
    return trace["provider"], trace["model"]


def test_by_http(vendor: Vendor, server: VendorServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(vendor.key, KEY)
    monkeypatch.setenv(vendor.url, server.base())
    # With the model that it would have by itself; streamed; and with options of its own.
    assert generate_text("one", provider=vendor.kind) == WHOLE
    assert provider_and_model() == (vendor.kind, "stub-model")
    monkeypatch.setenv(f"IPFS_ACCELERATE_PY_{vendor.name.upper()}_MODEL", "stub-model-mini")
    assert "".join(stream_text("two", provider=vendor.name, **vendor.option)) == WHOLE
    assert provider_and_model() == (vendor.kind, "stub-model-mini")
    sent = server.of("ok")[1].request
    assert "stub-model-mini" in (sent.json.get("model") or sent.path)
    assert sent.json == {**sent.json, **vendor.sent}
    assert count_tokens("two", provider=vendor.name) == (PROMPT_TOKENS, True)
    name = next(iter(vendor.option))
    misspelt: dict[str, Any] = {name[:-1]: 0}
    with pytest.raises(TypeError, match=f"did you mean '{name}'"):
        generate_text("three", provider=vendor.kind, **misspelt)


def test_by_http_with_the_key_refused(
    vendor: Vendor, server: VendorServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(vendor.key.replace("GOOGLE", "GEMINI"), KEY)
    monkeypatch.setenv(vendor.url, server.base("badkey"))
    with pytest.raises(RuntimeError, match="check the key") as caught:
        generate_text("one", provider=vendor.kind, model_name="m")
    assert KEY not in str(caught.value)


def test_by_the_command(
    vendor: Vendor,
    command: None,
    server: VendorServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Although there is a key."""
    table = (
        f'[[providers]]\nkind = "{vendor.kind}"\nmode = "cli"\nmodels = ["stub-model"]\n'
        f'api_key_env = "KEY_OF_ITS_OWN"\nbase_url = "{server.base()}"\n'
    )
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "config.toml").write_text(table)
    monkeypatch.setenv("KEY_OF_ITS_OWN", KEY)
    assert generate_text("one", provider=vendor.kind) == WHOLE
    assert provider_and_model() == (vendor.kind, "stub-model")
    assert "".join(stream_text("two", provider=vendor.kind)) == WHOLE
    assert not server.seen  # the recording asks nobody


@pytest.mark.parametrize("vendor", [VENDORS["claude"]], ids=["claude"])
def test_by_the_command_with_a_login(
    vendor: Vendor, command: None, server: VendorServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(vendor.url, server.base())
    monkeypatch.setenv("PROMPTMESH_CLAUDE_MODEL", "stub-model")
    assert generate_text("one", provider=vendor.kind) == WHOLE
    assert provider_and_model() == (vendor.kind, "stub-model")
    assert "".join(stream_text("two", provider=vendor.name)) == WHOLE
    assert not server.seen


@pytest.mark.parametrize("installed", [False, True])
def test_it_is_left_out_where_it_cannot_be_used(
    vendor: Vendor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    if installed:
        playing_program(tmp_path, vendor.name, vendor.name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    said = vendor.not_logged_in if installed else "not installed: npm install"
    with pytest.raises(RuntimeError, match=f"{vendor.name} cannot be used: {said}"):
        generate_text("one", provider=vendor.name)


# --- the pages -----------------------------------------------------------------------------------


def test_the_program_of_the_page(
    vendor: Vendor,
    server: VendorServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(vendor.key, KEY)
    monkeypatch.setenv(vendor.url, server.base())
    (program,) = blocks(vendor.page(), "python")
    exec(program, {})
    assert capsys.readouterr().out == f"{WHOLE}\n"


@pytest.mark.parametrize(
    "text", [text for vendor in VENDORS.values() for text in blocks(vendor.page(), "toml")]
)
def test_the_tables_of_the_pages(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(text)
    (table,) = load_config(tmp_path, environ={}).providers
    assert not table.share
    build(table.kind, table.name, table.options)
