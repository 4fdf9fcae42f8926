"""The vendors' programs for `generate_text`: what is planned, and what is plainly not usable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from promptmesh.node import seed_providers
from promptmesh.node.config import router_settings
from promptmesh.node.config_providers import ProviderConfig
from promptmesh.node.config_sections import Config
from promptmesh.node.config_values import Secret
from promptmesh.node.seed_providers import Planner, Unusable
from promptmesh.node.seed_vendors import VENDORS, obstacle
from promptmesh.providers.variables import VARIABLES


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """What the planner takes for the environment; nothing of a vendor's is there."""
    found = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    monkeypatch.setattr(seed_providers, "child_environment", lambda: found)
    return found


def planner(environ: dict[str, str] | None = None, **config: Any) -> Planner:
    home: Any = SimpleNamespace(running=lambda: None, config_path="config.toml", path=Path())
    return Planner(Config(**config), router_settings(environ or {}), home)


def install(program: str, folder: Path) -> None:
    (folder / program).write_text("")
    (folder / program).chmod(0o755)


def test_each_vendor_is_a_kind_of_its_own() -> None:
    assert VENDORS.keys() <= VARIABLES.keys()


@pytest.mark.parametrize("kind", sorted(VENDORS))
def test_one_that_is_plainly_not_usable_is_not_planned(
    kind: str, environment: dict[str, str]
) -> None:
    with pytest.raises(Unusable, match=r"^not installed: \w.*install"):
        planner().auto(kind, None)
    with pytest.raises(Unusable, match=r"^not installed"):
        planner().plan(kind, "m")


def test_codex(environment: dict[str, str], tmp_path: Path) -> None:
    install("codex", tmp_path)
    with pytest.raises(Unusable, match=r"^not logged in: type .* set CODEX_API_KEY$"):
        planner().plan("codex", None)
    environment |= {"CODEX_API_KEY": "k", "ANTHROPIC_API_KEY": "other"}
    plan = planner().plan("codex", None)
    assert (plan.name, plan.kind, plan.model, plan.paid) == ("codex_cli", "codex_cli", "", True)
    assert planner().plan("codex_cli", "m").model == "m"
    said = {"IPFS_ACCELERATE_PY_CODEX_MODEL": "a", "PROMPTMESH_CODEX_CLI_MODEL": "b"}
    assert planner(said).plan("codex_cli", None).model == "b"
    del said["PROMPTMESH_CODEX_CLI_MODEL"]
    assert planner(said).plan("codex_cli", None).model == "a"


def test_gemini(environment: dict[str, str], tmp_path: Path) -> None:
    environment["GOOGLE_API_KEY"] = "k"
    plan = planner().plan("gemini", None)
    assert (plan.name, plan.kind, plan.model, plan.paid) == ("gemini_cli", "gemini_cli", "", True)
    said = {"IPFS_ACCELERATE_PY_GEMINI_MODEL": "a"}
    assert planner(said).plan("gemini_cli", None).model == "a"
    # A table may want the command although there is a key, or HTTP although there is none.
    assert obstacle("gemini_cli", environment, {"mode": "cli"}).startswith("not installed")
    del environment["GOOGLE_API_KEY"]
    assert obstacle("gemini_cli", environment, {"mode": "http"}).startswith("there is no key")
    install("gemini", tmp_path)
    with pytest.raises(Unusable, match=r"^not logged in: .* set GEMINI_API_KEY$"):
        planner().plan("gemini", None)
    (tmp_path / ".gemini").mkdir()
    (tmp_path / ".gemini" / "oauth_creds.json").write_text("{}")
    assert planner().plan("gemini", None).kind == "gemini_cli"


@pytest.mark.parametrize("kind", ["copilot_cli", "copilot_sdk"])
def test_copilot(kind: str, environment: dict[str, str], tmp_path: Path) -> None:
    install("copilot", tmp_path)
    with pytest.raises(Unusable, match=r"^nobody is logged in: log in: copilot login"):
        planner().plan(kind, None)
    environment["GH_TOKEN"] = "gho_x"
    plan = planner().plan(kind, None)
    assert (plan.name, plan.kind, plan.model, plan.paid) == (kind, kind, "", True)
    said = {"IPFS_ACCELERATE_PY_COPILOT_SDK_MODEL": "a", "PROMPTMESH_COPILOT_SDK_TIMEOUT": "5"}
    other = planner(said).plan(kind, None)
    assert other.model == ("a" if kind == "copilot_sdk" else "")
    assert (other.key == plan.key) is (kind == "copilot_cli")
    environment["COPILOT_PROVIDER_TYPE"] = "nobody"
    with pytest.raises(Unusable, match="server"):
        planner().plan(kind, None)


def test_another_login_is_another_provider_and_another_model_is_not(
    environment: dict[str, str], tmp_path: Path
) -> None:
    install("codex", tmp_path)
    environment["CODEX_API_KEY"] = "k"
    one = planner().plan("codex", "a")
    assert one.key == planner().plan("codex", "b").key
    environment["GEMINI_API_KEY"] = "of another vendor"
    assert one.key == planner().plan("codex", "a").key
    environment["CODEX_API_KEY"] = "l"
    assert one.key != planner().plan("codex", "a").key


def test_a_table_is_looked_at_as_it_says(environment: dict[str, str], tmp_path: Path) -> None:
    table = ProviderConfig(kind="codex_cli", name="work", share=False, options={"models": ["m"]})
    with pytest.raises(Unusable, match="not installed"):
        planner(providers=(table,)).auto("work", None)
    install("codex-2", tmp_path)
    options = {"command": str(tmp_path / "codex-2"), "base_url": "http://127.0.0.1:1/v1"}
    own = replace(table, options={**table.options, **options})
    assert planner(providers=(own,)).auto("work", None).model == "m"
    assert obstacle("codex_cli", environment, options) == ""
    assert obstacle("codex_cli", environment, {**options, "base_url": ""}).startswith("not logged")
    keyed = replace(own, api_key=Secret("k"), options={"command": options["command"]})
    assert planner(providers=(keyed,)).auto("work", None).kind == "codex_cli"


def test_a_kind_without_an_entry_is_tried() -> None:
    assert obstacle("openrouter", {}, {}) == ""
