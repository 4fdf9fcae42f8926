"""`ClaudeCli` with programs in the place of the `claude` command: recordings of it, and one that
tells how it was started."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from asking import ask, asked
from faults import WHOLE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recordings import playing_program

from promptmesh.providers.anthropic_http import AnthropicHttp
from promptmesh.providers.base import (
    ContextTooLong,
    GenerateRequest,
    ModelOffer,
    ProviderRefused,
    ProviderUnavailable,
    RequestRejected,
    Sampling,
)
from promptmesh.providers.claude_cli import MAX_PROMPT, ClaudeCli
from promptmesh.providers.claude_settings import ClaudeSettings
from promptmesh.providers.cli_prompt import PLAIN_SYSTEM
from promptmesh.providers.options import SettingsError
from promptmesh.providers.registry import build

KEY = "sk-ant-abcdef0123456789"
#: Tells how it was started, as its answer; and of itself what the command tells, as it is told.
PROBE = """#!/bin/sh
exec {python} -S -E -c '
import json, os, sys
if sys.argv[1:] == ["--version"]:
    print(os.environ.get("LC_TEST_VERSION", "2.1.330 (Claude Code)")); sys.exit(0)
if sys.argv[1:] == ["auth", "status"]:
    known = "LC_TEST_LOGIN" in os.environ
    print(json.dumps({{"loggedIn": known}})); sys.exit(not known)
system = sys.argv[sys.argv.index("--system-prompt-file") + 1]
told = {{
    "argv": sys.argv[1:],
    "environment": dict(os.environ),
    "stdin": sys.stdin.buffer.read().decode(),
    "cwd": os.listdir("."),
    "system": open(system, newline="", encoding="utf-8").read(),
}}
def say(value): print(json.dumps(value))
def event(kind, **fields): say({{"type": "stream_event", "event": {{"type": kind, **fields}}}})
event("message_start", message={{}})
event("content_block_delta", index=0, delta={{"type": "text_delta", "text": json.dumps(told)}})
event("message_delta", delta={{"stop_reason": "end_turn"}})
say({{"type": "result", "is_error": False, "num_turns": 1, "result": "told"}})
' "$@"
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A user's home, with a login."""
    (tmp_path / "home" / ".claude").mkdir(parents=True)
    (tmp_path / "home" / ".claude" / ".credentials.json").write_text("{}")
    return tmp_path / "home"


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    path = tmp_path / "claude"
    path.write_text(PROBE.format(python=sys.executable))
    path.chmod(0o755)
    return path


def provider(command: Path, home: Path, **fields: Any) -> ClaudeCli:
    environment = {"PATH": os.environ["PATH"], "HOME": str(home)} | fields.pop("environment", {})
    values = {"name": "claude", "mode": "cli", "command": str(command), "environment": environment}
    return ClaudeCli(ClaudeSettings(**{**values, **fields}))


def player(tmp_path: Path, home: Path, case: str, **fields: Any) -> ClaudeCli:
    """The command as it was recorded in that case."""
    program = playing_program(tmp_path, "claude", "played")
    return provider(program, home, api_key=KEY, base_url=f"http://127.0.0.1:1/m/{case}", **fields)


async def told(provider: ClaudeCli, request: GenerateRequest | None = None) -> Any:
    """How the probe was started."""
    return json.loads((await ask(provider, request)).text)


async def test_answers_as_recorded(tmp_path: Path, home: Path) -> None:
    found = await ask(player(tmp_path, home, "ok"))
    assert (found.text, found.finish_reason) == (WHOLE, "stop")
    with pytest.raises(ProviderRefused, match="log in again"):
        await ask(player(tmp_path, home, "e401"))


async def test_stop_strings_are_ours(tmp_path: Path, home: Path) -> None:
    request = asked(sampling=Sampling(stop=("a time",)))
    found = await ask(player(tmp_path, home, "ok"), request)
    assert (found.text, found.finish_reason) == ("Once upon ", "stop")


# --- how it is started ---------------------------------------------------------------------------


async def test_a_configured_key_has_a_home_of_its_own(probe: Path, home: Path) -> None:
    found = await told(provider(probe, home, api_key=KEY, base_url="http://127.0.0.1:1"))
    seen = found["environment"]
    assert (seen["ANTHROPIC_API_KEY"], seen["ANTHROPIC_BASE_URL"]) == (KEY, "http://127.0.0.1:1")
    assert "--bare" in found["argv"]
    assert KEY not in "".join(found["argv"])
    assert seen["HOME"] != str(home)
    assert not os.path.exists(seen["HOME"])  # noqa: ASYNC240 (a test)
    assert found["cwd"] == []


async def test_a_login_is_used_where_it_is(probe: Path, home: Path) -> None:
    """A key of the environment stands behind it, and is not shown to the command."""
    found = await told(provider(probe, home, environment={"ANTHROPIC_API_KEY": KEY}))
    assert "--restricted" in found["argv"]
    assert found["environment"]["HOME"] == str(home)
    assert "ANTHROPIC_API_KEY" not in found["environment"]
    assert KEY not in json.dumps(found)


async def test_a_token_of_setup_token_needs_no_folder(probe: Path, home: Path) -> None:
    variables = {"CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-x", "ANTHROPIC_API_KEY": KEY}
    found = await told(provider(probe, home, environment=variables))
    assert found["environment"]["CLAUDE_CODE_OAUTH_TOKEN"] == "sk-ant-oat01-x"
    assert found["environment"]["HOME"] != str(home)
    assert KEY not in json.dumps(found)


@pytest.mark.parametrize(
    "text",
    [
        "@/etc/hostname",
        "--help $(x) `y`",
        "!ls",
        "# note",
        "line\r\nline\u2028 é 😀",
        "x" * 300_000,
    ],
    ids=["file", "dash", "bang", "note", "unicode", "long"],
)
async def test_prompts_arrive_as_they_are(probe: Path, home: Path, text: str) -> None:
    found = await told(provider(probe, home), asked(text, system="/sys @x"))
    assert (found["stdin"], found["system"]) == (text, "/sys @x")
    assert text not in found["argv"]
    assert found["environment"]["CLAUDE_CODE_DISABLE_ATTACHMENTS"] == "1"


async def test_a_command_of_its_own_becomes_text(probe: Path, home: Path) -> None:
    found = await told(provider(probe, home), asked("/compact"))
    assert (found["stdin"], found["system"]) == ("\n/compact", PLAIN_SYSTEM)


async def test_prompts_that_would_not_arrive_are_refused(probe: Path, home: Path) -> None:
    claude = provider(probe, home)
    for text, kind in (
        ("a\0b", ProviderUnavailable),
        ("\ud800", RequestRejected),
        ("x" * (MAX_PROMPT + 1), ContextTooLong),
    ):
        with pytest.raises(kind):
            await ask(claude, asked(text))


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=99))
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_prompt_arrives_byte_for_byte(probe: Path, home: Path, text: str) -> None:
    found = trio.run(told, provider(probe, home, api_key=KEY), asked(text + "x"))
    assert found["stdin"] == ("\n" if text.startswith("/") else "") + text + "x"


@pytest.mark.parametrize(
    ("version", "has"),
    [("2.1.197 (Claude Code)", False), ("2.1.330 (Claude Code)", True), ("none", False)],
)
async def test_an_option_is_given_where_the_version_has_it(
    probe: Path, home: Path, version: str, has: bool
) -> None:
    found = await told(provider(probe, home, environment={"LC_TEST_VERSION": version}))
    assert ("--restricted" in found["argv"]) is has
    assert "--bare" not in found["argv"]


async def test_names_of_models(probe: Path, home: Path) -> None:
    """They stand on the command line."""
    claude = provider(probe, home, api_key=KEY)
    for name in ("claude-sonnet-4-5", "us.anthropic.claude-x:0", "sonnet[1m]"):
        argv = (await told(claude, msgspec.structs.replace(asked(), model=name)))["argv"]
        assert argv[argv.index("--model") + 1] == name
    for name in ("--bare", "-x", "", "a b", "a\0b", "a\nb"):
        with pytest.raises(ProviderUnavailable, match="no name of a model"):
            await ask(claude, msgspec.structs.replace(asked(), model=name))


async def test_limits_and_options(probe: Path, home: Path) -> None:
    claude = provider(probe, home)
    request = asked(sampling=Sampling(max_tokens=100), extra={"effort": "low", "thinking": 2000})
    found = await told(claude, request)
    assert found["argv"][found["argv"].index("--effort") + 1] == "low"
    assert found["environment"]["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "2100"
    assert found["environment"]["MAX_THINKING_TOKENS"] == "2000"
    plain = (await told(claude))["environment"]
    assert plain["CLAUDE_CODE_DISABLE_THINKING"] == "1"
    with pytest.raises(RequestRejected, match="did you mean 'effort'"):
        await ask(claude, asked(extra={"efort": "low"}))


# --- can it be asked -----------------------------------------------------------------------------


async def test_check(probe: Path, home: Path, tmp_path: Path) -> None:
    ready = {"LC_TEST_LOGIN": "1"}
    with trio.fail_after(120):
        assert (await provider(probe, home, environment=ready).check()).state == "ready"
        assert (await provider(probe, home, api_key=KEY).check()).state == "ready"
        out = await provider(probe, home).check()
        assert (out.reason, "/login" in out.hint) == ("not logged in", True)
        old = await provider(
            probe, home, environment={**ready, "LC_TEST_VERSION": "2.0.1 (Claude Code)"}
        ).check()
        assert (old.reason, "@latest" in old.hint) == ("version 2.0.1 is too old", True)
        gone = await provider(tmp_path / "none", home).check()
        assert (gone.reason, "npm install" in gone.hint) == ("not installed", True)


async def test_a_login_that_was_refused_is_asked_no_more(tmp_path: Path, home: Path) -> None:
    """Until it changes."""
    claude = player(tmp_path, home, "e401")
    assert (await claude.check()).state == "ready"
    with pytest.raises(ProviderRefused):
        await ask(claude)
    refused = await claude.check()
    assert refused.state == "unavailable"
    assert "log in again" in refused.reason
    (home / ".claude" / ".credentials.json").write_text('{"claudeAiOauth": {}}')
    assert (await claude.check()).state == "ready"


@pytest.mark.parametrize("case", ["e403", "e429", "e500"])
async def test_another_failure_says_nothing_of_the_login(
    tmp_path: Path, home: Path, case: str
) -> None:
    claude = player(tmp_path, home, case)
    with pytest.raises(ProviderUnavailable):
        await ask(claude)
    assert (await claude.check()).state == "ready"


async def test_without_a_program_the_answer_says_how_to_get_it(tmp_path: Path, home: Path) -> None:
    with pytest.raises(ProviderUnavailable, match="npm install -g @anthropic-ai/claude-code"):
        await ask(provider(tmp_path / "none", home))


def test_which_way_it_goes() -> None:
    key = {"ANTHROPIC_API_KEY": KEY}
    assert isinstance(build("claude_code", "c", {"environment": key}), AnthropicHttp)
    assert isinstance(build("claude_code", "c", {"environment": {}}), ClaudeCli)
    assert isinstance(build("claude_code", "c", {"mode": "cli", "environment": key}), ClaudeCli)
    with pytest.raises(SettingsError, match="ANTHROPIC_API_KEY"):
        build("claude_code", "c", {"mode": "http"})
    offers = build("claude_code", "c", {"models": ["opus"]}).models()
    assert list(offers) == [ModelOffer(id="opus", egress=True)]
