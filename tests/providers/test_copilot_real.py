"""The real Copilot, against stand-ins for GitHub and for a server of one's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from asking import asked
from cli_programs import CLIS
from daemons import until
from faults import PARTIAL, WHOLE
from vendor_free import MODELS
from vendors import VendorServer, vendors

from promptmesh.providers.base import (
    Completion,
    ContextTooLong,
    GenerateRequest,
    Message,
    Provider,
    ProviderRefused,
    Sampling,
    Text,
)
from promptmesh.providers.child import _lives
from promptmesh.providers.copilot_cli import CopilotCli
from promptmesh.providers.copilot_sdk import CopilotSdk
from promptmesh.providers.copilot_settings import CopilotSettings
from promptmesh.providers.registry import Runs

PROGRAM = CLIS / "bin" / "copilot"
SDKS = CLIS / "sdks"
KEY = "sk-nobody-may-see-this"
TOKEN = "github_pat_nobody_may_see_this"
#: Seconds for one answer on a machine that has other things to do.
PATIENCE = 60

pytestmark = pytest.mark.interop

KINDS: tuple[Callable[[CopilotSettings], Provider], ...] = (CopilotCli, CopilotSdk)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it unpacks, once for all tests."""
    return tmp_path_factory.mktemp("cache")


def settings(cache: Path, user: Path, seen: dict[str, str], **more: Any) -> CopilotSettings:
    environment = {"PATH": os.environ["PATH"], "HOME": str(user), "NO_PROXY": "127.0.0.1", **seen}
    return CopilotSettings(
        name="copilot",
        command=str(PROGRAM),
        environment=environment,
        cache_dir=str(cache),
        **more,
    )


def own_server(server: VendorServer, mode: str, cache: Path, user: Path) -> CopilotSettings:
    base = server.base(mode) + "/v1"
    return settings(cache, user, {}, base_url=base, api_key=KEY, models=("stub-model",))


def signed_in(server: VendorServer, mode: str, cache: Path, user: Path) -> CopilotSettings:
    """With Copilot's own variables for tests, which show it another GitHub."""
    base = server.base(mode)
    github = {"COPILOT_DEBUG_GITHUB_API_URL": f"{base}/gh", "COPILOT_API_URL": f"{base}/capi"}
    return settings(cache, user, github, api_key=TOKEN)


async def ask(provider: Provider, *requests: GenerateRequest) -> list[Completion]:
    found = []
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            if isinstance(provider, Runs):
                nursery.start_soon(provider.run)
            for request in requests or (asked(),):
                async with provider.open(request) as answering:
                    found.append(await answering.completion())
            nursery.cancel_scope.cancel()
    return found


@pytest.mark.parametrize("kind", KINDS)
async def test_a_login_and_what_github_is_asked(
    kind: Callable[[CopilotSettings], Provider], cache: Path, tmp_path: Path
) -> None:
    async with vendors() as server:
        provider = kind(signed_in(server, "ok", cache, tmp_path))
        assert (await provider.check()).state == "ready"
        (found,) = await ask(provider)
        assert (found.text, found.finish_reason) == (WHOLE, "stop")
        assert (found.usage.prompt_tokens, found.usage.exact) == (11, True)
        (seen,) = server.of("ok")
        assert seen.request.path.endswith("/capi/chat/completions")
        assert seen.request.headers["authorization"] == f"Bearer {TOKEN}"
        assert seen.request.json["model"] == "stub-model"
        # No server of tools, and no second question to the model.
        assert not [r.path for r in server.requests if "mcp" in r.path]
    if isinstance(provider, CopilotSdk):
        assert [offer.id for offer in provider.models()] == list(MODELS)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_login_that_is_refused(
    kind: Callable[[CopilotSettings], Provider], cache: Path, tmp_path: Path
) -> None:
    async with vendors() as server:
        with pytest.raises((ProviderRefused, ExceptionGroup)) as told:
            await ask(kind(signed_in(server, "e401", cache, tmp_path)))
    assert "copilot login" in str(_inner(told.value))
    assert TOKEN not in str(_inner(told.value))


async def test_a_saved_login_is_known_by_its_copy(cache: Path, tmp_path: Path) -> None:
    """And nothing else of the user's is used: not their servers of tools either."""
    home = tmp_path / ".copilot"
    home.mkdir()
    login = {"host": "https://github.com", "login": "stub"}
    config = {
        "storeTokenPlaintext": True,
        "loggedInUsers": [{**login, "kind": "githubDotCom"}],
        "lastLoggedInUser": login,
        "authTokens": {"https://github.com:stub": {"token": TOKEN}},
    }
    text = "// This file is managed automatically.\n" + json.dumps(config)
    (home / "config.json").write_text(text)
    trap = {"mcpServers": {"trap": {"command": "touch", "args": [str(tmp_path / "trap")]}}}
    (home / "mcp-config.json").write_text(json.dumps(trap))
    async with vendors() as server:
        for kind in KINDS:
            base = server.base("ok")
            seen = {
                "COPILOT_DEBUG_GITHUB_API_URL": f"{base}/gh",
                "COPILOT_API_URL": f"{base}/capi",
            }
            (found,) = await ask(kind(settings(cache, tmp_path, seen)))
            assert found.text == WHOLE
        tokens = {asked.request.headers["authorization"] for asked in server.of("ok")}
    assert tokens == {f"Bearer {TOKEN}"}
    assert (home / "config.json").read_text() == text
    assert not (tmp_path / "trap").exists()


async def test_what_a_server_of_ones_own_gets(cache: Path, tmp_path: Path) -> None:
    system = Message(role="system", content=(Text(text="Be brief."),))
    request = asked(sampling=Sampling(max_tokens=9))
    request = GenerateRequest(
        model="stub-model", messages=(system, *request.messages), sampling=request.sampling
    )
    async with vendors() as server:
        await ask(CopilotSdk(own_server(server, "ok", cache, tmp_path)), request)
        (seen,) = server.of("ok")
        assert len(server.requests) == 1
    body = seen.request.json
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["messages"][1]["content"].endswith("\n\nTell me a tale.")
    assert len(body["messages"]) == 2
    assert body["max_tokens"] == 9
    assert "tools" not in body
    assert seen.request.headers["authorization"] == f"Bearer {KEY}"


async def test_a_prompt_over_the_budget(cache: Path, tmp_path: Path) -> None:
    async with vendors() as server:
        with pytest.raises((ContextTooLong, ExceptionGroup)) as told:
            await ask(
                CopilotSdk(own_server(server, "ok", cache, tmp_path)), asked("word " * 160_000)
            )
        assert server.of("ok") == []
    assert isinstance(_inner(told.value), ContextTooLong)


async def test_an_abort_reaches_the_server(cache: Path, tmp_path: Path) -> None:
    async with vendors() as server:
        provider = CopilotSdk(own_server(server, "stall", cache, tmp_path))
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(provider.run)
                async with provider.open(asked()) as answering:
                    assert (await anext(answering.chunks)).text == PARTIAL
                assert provider._kept._process is not None
                group = provider._kept._process._child.pid
                async with provider.open(asked()) as answering:  # the same one answers on
                    assert (await anext(answering.chunks)).text == PARTIAL
                assert provider._kept._process._child.pid == group
                nursery.cancel_scope.cancel()

        async def gone() -> bool:
            return not _lives(group)

        await until(gone, "the runtime is gone", 10)


def _inner(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    return error


SDK = """
import asyncio, sys
from copilot import CopilotClient, RuntimeConnection

program, base, home, work, path, cache = sys.argv[1:]

async def main():
    place = RuntimeConnection.for_stdio(path=program)
    place.env = {
        "PATH": path, "HOME": home, "COPILOT_OFFLINE": "true", "COPILOT_CACHE_HOME": cache,
        "COPILOT_PROVIDER_BASE_URL": base, "COPILOT_MODEL": "stub-model", "NO_PROXY": "127.0.0.1",
    }
    client = CopilotClient(
        connection=place, mode="empty", base_directory=home, use_logged_in_user=False
    )
    await client.start()
    async with await client.create_session(
        model="stub-model", streaming=True, available_tools=[], working_directory=work,
        system_message={"mode": "replace", "content": "Be brief."},
        provider={"type": "openai", "base_url": base, "api_key": "k", "wire_api": "completions"},
    ) as session:
        print((await session.send_and_wait("Tell me a tale.", timeout=60)).data.content)
    await client.stop()

asyncio.run(main())
"""
#: What our provider sends beside what the SDK does, and otherwise than it.
OURS = {"disabledMcpServers", "includeSubAgentStreamingEvents"}
#: What is another one in each run.
VARIES = {"sessionId", "workingDirectory", "provider"}


async def test_the_sdk_itself_says_the_same(cache: Path, tmp_path: Path) -> None:
    """To the runtime, and the runtime to the model's server."""
    listener = tmp_path / "listening"
    listener.write_text(LISTENING.format(python=sys.executable, program=PROGRAM))
    listener.chmod(0o755)
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    async with vendors() as server:
        base = server.base("ok") + "/v1"
        words = [base, tmp_path / "home", tmp_path / "work", os.environ["PATH"], cache / "copilot"]
        environment = {"PYTHONPATH": str(SDKS), "PATH": os.environ["PATH"]}
        done = await trio.run_process(
            [sys.executable, "-c", SDK, str(listener), *map(str, words)],
            capture_stdout=True,
            stderr=subprocess.DEVNULL,
            env=environment | {"HOME": str(tmp_path)},
        )
        assert done.stdout.decode().strip() == WHOLE
        theirs = _said(tmp_path)
        said = own_server(server, "ok", cache, tmp_path)
        environment = {**said.environment}
        ours_settings = settings(
            cache, tmp_path, environment, base_url=base, api_key="k", models=("stub-model",)
        )
        provider = CopilotSdk(_with_command(ours_settings, listener))
        await ask(provider, asked(system="Be brief."))
        ours = _said(tmp_path)
        bodies = [_body(asked.request.json) for asked in server.of("ok")]
    assert bodies[0] == bodies[1]
    for method in ("session.create", "session.options.update", "session.send"):
        left = {k: v for k, v in ours[method].items() if k not in VARIES | OURS}
        right = {k: v for k, v in theirs[method].items() if k not in VARIES | OURS}
        assert left == right, method
    assert ours.keys() - theirs.keys() <= {"session.delete"}


#: A runtime that writes down what it is told. `TEE` is beside its home.
LISTENING = textwrap.dedent(
    """\
    #!{python}
    import os, subprocess, sys, threading
    log = open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "told"), "wb", 0)
    child = subprocess.Popen(["{program}", *sys.argv[1:]], stdin=subprocess.PIPE)
    while data := os.read(0, 65536):
        log.write(data)
        child.stdin.write(data)
        child.stdin.flush()
    child.stdin.close()
    sys.exit(child.wait())
    """
)


def _with_command(said: CopilotSettings, command: Path) -> CopilotSettings:
    import msgspec

    return msgspec.structs.replace(said, command=str(command))


def _said(folder: Path) -> dict[str, Any]:
    """The parameters of each call, by its method."""
    text, found = (folder / "told").read_bytes(), {}
    while text:
        head, _, rest = text.partition(b"\r\n\r\n")
        size = int(head.split(b":")[1])
        message = json.loads(rest[:size])
        found[message["method"]] = message["params"]
        text = rest[size:]
    (folder / "told").unlink()
    return found


def _body(body: dict[str, Any]) -> dict[str, Any]:
    """The request to the model, without the time."""
    messages = [{**m, "content": m["content"].split("\n\n")[-1]} for m in body["messages"]]
    return {**body, "messages": messages}
