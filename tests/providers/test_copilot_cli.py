"""Where Copilot is found, who pays, and how the command is started."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import trio
from asking import asked
from fakes_copilot import playing_copilot
from faults import WHOLE

from promptmesh.providers import copilot_found
from promptmesh.providers.base import (
    GenerateRequest,
    ProviderUnavailable,
    RequestRejected,
    Sampling,
)
from promptmesh.providers.cli_answer import Launch
from promptmesh.providers.copilot_cli import CopilotCli
from promptmesh.providers.copilot_found import copilot_program, look
from promptmesh.providers.copilot_login import login_of
from promptmesh.providers.copilot_settings import CopilotSettings, with_environment
from promptmesh.providers.private_folder import Folder

KEY = "sk-nobody-may-see-this"


def settings(home: Path, *, seen: dict[str, str] | None = None, **more: Any) -> CopilotSettings:
    environment = {"PATH": str(home), "HOME": str(home), **(seen or {})}
    return with_environment(CopilotSettings(name="copilot", environment=environment, **more))


def program(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


# --- the program


def test_the_real_program_behind_npms_wrapper(tmp_path: Path) -> None:
    package = next(copilot_found._packages())
    modules = tmp_path / "node_modules" / "@github"
    wrapper = program(modules / "copilot" / "npm-loader.js")
    (tmp_path / "copilot").symlink_to(wrapper)
    assert copilot_program(settings(tmp_path)) == tmp_path / "copilot"  # better than nothing
    real = program(modules / package / "copilot")
    assert copilot_program(settings(tmp_path)) == real
    inner = program(modules / "copilot" / "node_modules" / "@github" / package / "copilot")
    real.unlink()
    assert copilot_program(settings(tmp_path)) == inner


def test_what_the_sdk_has_downloaded_the_newest_first(tmp_path: Path) -> None:
    assert copilot_program(settings(tmp_path)) is None
    cache = tmp_path / ".cache" / "github-copilot-sdk" / "cli"
    found = [program(cache / v / "prebuilds" / "x" / "copilot") for v in ("1.0.9", "1.0.102")]
    assert copilot_program(settings(tmp_path)) == found[1]
    own = program(tmp_path / "elsewhere" / "copilot")
    seen = {"COPILOT_CLI_PATH": str(own)}
    assert copilot_program(settings(tmp_path, seen=seen)) == own
    assert copilot_program(settings(tmp_path, command=str(tmp_path / "no"))) is None


@pytest.mark.parametrize(
    ("version", "words"),
    [("1.0.99", "version 1.0.99 is too old"), ("1.0.102", ""), ("1.1.0", ""), ("?", "")],
)
def test_its_version_by_its_package(tmp_path: Path, version: str, words: str) -> None:
    program(tmp_path / "copilot")
    package = {"name": "@github/copilot-linux-x64", "version": version}
    (tmp_path / "package.json").write_text(json.dumps(package))
    assert look(settings(tmp_path, base_url="http://127.0.0.1:1")).reason == words


async def test_its_version_by_itself(tmp_path: Path) -> None:
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    provider = CopilotCli(settings(tmp_path, seen=path, base_url="http://127.0.0.1:1"))
    assert (await provider.check()).reason == "not installed"
    program(tmp_path / "copilot", "#!/bin/sh\necho GitHub Copilot CLI 1.0.9.\n")
    with trio.fail_after(120):
        health = await provider.check()
    assert (health.state, health.reason) == ("unavailable", "version 1.0.9 is too old")
    playing_copilot(tmp_path)
    with trio.fail_after(120):
        assert (await provider.check()).state == "ready"


# --- who pays


def test_logins_in_their_order(tmp_path: Path) -> None:
    program(tmp_path / "copilot")
    assert look(settings(tmp_path)).reason == "nobody is logged in"
    assert "copilot login" in look(settings(tmp_path)).hint
    classic = {"GH_TOKEN": "ghp_x"}
    assert "classic" in look(settings(tmp_path, seen=classic)).reason
    program(tmp_path / "gh")
    hosts = tmp_path / ".config" / "gh" / "hosts.yml"
    hosts.parent.mkdir(parents=True)
    hosts.write_text("github.com:\n    user: me\n")
    assert login_of(settings(tmp_path, seen=classic)).kind == "gh"
    config = tmp_path / ".copilot" / "config.json"
    config.parent.mkdir()
    config.write_text('// managed\n{"loggedInUsers": []}')
    assert login_of(settings(tmp_path)).kind == "gh"
    config.write_text('// managed\n{"loggedInUsers": [{"login": "me"}]}')
    assert login_of(settings(tmp_path, seen=classic)).config == config
    tokens = {"GITHUB_TOKEN": "gho_1", "GH_TOKEN": "ghp_x"}
    assert login_of(settings(tmp_path, seen=tokens)).token == "gho_1"
    tokens["COPILOT_GITHUB_TOKEN"] = "github_pat_2"
    assert login_of(settings(tmp_path, seen=tokens)).token == "github_pat_2"
    assert login_of(settings(tmp_path, seen=tokens, api_key="gho_3")).token == "gho_3"
    assert login_of(settings(tmp_path, seen=tokens, base_url="http://h/v1")).kind == "server"


@pytest.mark.parametrize("text", ["", "[", "[]", "null", '{"loggedInUsers": 0}', "\xff"])
def test_a_file_that_makes_no_sense_is_no_login(tmp_path: Path, text: str) -> None:
    (tmp_path / ".copilot").mkdir()
    (tmp_path / ".copilot" / "config.json").write_text(text, "latin-1")
    assert login_of(settings(tmp_path)).kind == "none"


def test_a_token_of_githubs_goes_to_no_other_server(tmp_path: Path) -> None:
    seen = {"COPILOT_PROVIDER_BASE_URL": "http://other/v1", "COPILOT_PROVIDER_API_KEY": "k"}
    own = settings(tmp_path, seen=seen)
    assert (own.base_url, own.api_key) == ("http://other/v1", "k")
    assert settings(tmp_path, seen=seen, api_key="gho_x").base_url == ""
    other = settings(tmp_path, seen=seen, base_url="http://mine/v1")
    assert (other.base_url, other.api_key) == ("http://mine/v1", None)
    with pytest.raises(ValueError, match="server"):
        settings(tmp_path, seen={**seen, "COPILOT_PROVIDER_TYPE": "nobody"})


# --- the start of the command


def launched(tmp_path: Path, said: CopilotSettings, request: GenerateRequest) -> Launch:
    program(tmp_path / "copilot")
    folder = Folder(tmp_path / "private")
    folder.path.mkdir()
    return CopilotCli(said)._prepare(request, folder)


def test_a_server_of_ones_own(tmp_path: Path) -> None:
    said = settings(tmp_path, base_url="http://127.0.0.1:1/v1", api_key=KEY, seen={"GH_TOKEN": "t"})
    request = asked("-p @x", "Be brief.", sampling=Sampling(max_tokens=9))
    launch = launched(tmp_path, said, request)
    assert launch.text == b"Be brief.\n\n-p @x"
    assert launch.command[-2:] == ["--available-tools", "none"]
    assert KEY not in " ".join(launch.command)
    assert "stub-model" not in launch.command
    seen = launch.environment
    assert seen["COPILOT_PROVIDER_API_KEY"] == KEY
    assert seen["COPILOT_PROVIDER_MAX_OUTPUT_TOKENS"] == "9"
    assert (seen["COPILOT_MODEL"], seen["COPILOT_OFFLINE"]) == ("stub-model", "true")
    assert seen["COPILOT_HOME"] == str(tmp_path / "private" / "home")
    assert "GH_TOKEN" not in seen


@pytest.mark.parametrize(
    ("system", "text", "said"),
    [
        ("", "/compact", "user: /compact"),
        ("", "\n \ufeff/compact", "user: \n \ufeff/compact"),
        ("/clear", "hi", "user: /clear\n\nhi"),
        ("Be brief.", "/compact", "Be brief.\n\n/compact"),
        ("", "and/or", "and/or"),
    ],
)
def test_no_prompt_is_a_command(tmp_path: Path, system: str, text: str, said: str) -> None:
    own = settings(tmp_path, base_url="http://127.0.0.1:1/v1")
    assert launched(tmp_path, own, asked(text, system)).text.decode() == said


def test_a_token(tmp_path: Path) -> None:
    said = settings(tmp_path, seen={"GH_TOKEN": "gho_x"}, cache_dir="/keep")
    launch = launched(tmp_path, said, asked(extra={"reasoning_effort": "low"}))
    assert {"--model=stub-model", "--reasoning-effort=low"} <= set(launch.command)
    seen = launch.environment
    assert (seen["COPILOT_GITHUB_TOKEN"], seen["COPILOT_DISABLE_KEYTAR"]) == ("gho_x", "1")
    assert seen["COPILOT_CACHE_HOME"] == "/keep/copilot"
    assert "COPILOT_OFFLINE" not in seen


def test_what_is_not_started(tmp_path: Path) -> None:
    said = settings(tmp_path, base_url="http://127.0.0.1:1/v1")
    with pytest.raises(ProviderUnavailable, match="not installed"):
        CopilotCli(said)._prepare(asked(), Folder(tmp_path))
    program(tmp_path / "copilot")
    with pytest.raises(ProviderUnavailable, match="nobody is logged in: log in"):
        CopilotCli(settings(tmp_path))._prepare(asked(), Folder(tmp_path))
    with pytest.raises(RequestRejected, match="did you mean 'reasoning_effort'"):
        CopilotCli(said)._prepare(asked(extra={"reasoning_efort": "low"}), Folder(tmp_path))


async def test_an_answer_of_the_recorded_command(tmp_path: Path) -> None:
    playing_copilot(tmp_path)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = settings(tmp_path, seen=path, base_url="http://127.0.0.1:1/m/ok")
    request = asked(sampling=Sampling(stop=("a time",)))
    with trio.fail_after(120):
        async with CopilotCli(said).open(asked()) as answering:
            assert (await answering.completion()).text == WHOLE
        async with CopilotCli(said).open(request) as answering:
            assert (await answering.completion()).text == WHOLE.partition("a time")[0]


def test_nothing_shows_a_key(tmp_path: Path) -> None:
    assert KEY not in repr(settings(tmp_path, base_url="http://h", api_key=KEY))
