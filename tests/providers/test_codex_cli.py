"""Codex as a provider, with a program in its place that does what no server can make it do."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes_codex import fake_codex

from promptmesh.providers import codex_answer
from promptmesh.providers.base import (
    ContextTooLong,
    DeadlineExceeded,
    GenerateRequest,
    Message,
    ModelOffer,
    ProviderUnavailable,
    RequestRejected,
    Sampling,
    Text,
    Tool,
)
from promptmesh.providers.codex_cli import CodexCli
from promptmesh.providers.codex_server import CodexServer
from promptmesh.providers.codex_settings import CodexSettings
from promptmesh.providers.options import SettingsError
from promptmesh.providers.registry import build

KEY = "sk-nobody-may-see-this"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the program is; nothing is left in the folder for temporary files."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield tmp_path / "codex"
    assert list(temporary.iterdir()) == []


def settings(folder: Path, version: str = "9.0.0", **more: Any) -> CodexSettings:
    program = fake_codex(folder, version, more.pop("listed", ()))
    own = {"PATH": "/bin:/usr/bin", "HOME": str(folder), **more.pop("environment", {})}
    said = {"base_url": "http://127.0.0.1:1/v1", "models": ("m",), "api_key": KEY, **more}
    return CodexSettings(command=str(program), environment=own, **said)


@asynccontextmanager
async def running(said: CodexSettings) -> AsyncIterator[CodexCli]:
    provider = CodexCli(said)
    with trio.fail_after(240):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(provider.run)
            yield provider
            nursery.cancel_scope.cancel()


def asking(*texts: str, **fields: Any) -> GenerateRequest:
    """A chat whose turns alternate; the last is the user's."""
    roles = ("user", "assistant") * len(texts)
    turns = zip(roles[len(texts) % 2 == 0 :], texts, strict=False)
    messages = tuple(
        Message(role=role, content=(Text(text=text),))  # type: ignore[arg-type]
        for role, text in turns
    )
    return GenerateRequest(model="m", messages=messages, **fields)


async def ask(provider: CodexCli, *texts: str, **fields: Any) -> str:
    async with provider.open(asking(*texts, **fields)) as answering:
        return (await answering.completion()).text


def seen(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]


def processes(folder: Path) -> list[dict[str, Any]]:
    """Those that were kept."""
    return [note for note in seen(folder) if note.get("argv", [""])[0] == "app-server"]


def calls(folder: Path, method: str) -> list[dict[str, Any]]:
    return [note["params"] for note in seen(folder) if note.get("method") == method]


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_many_answers_of_one_process(folder: Path) -> None:
    async with running(settings(folder)) as provider:
        answers: dict[int, str] = {}

        async def one(number: int) -> None:
            answers[number] = await ask(provider, f"say number {number}")

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(one, number)
        assert answers == {number: f"number {number}" for number in range(20)}
        (process,) = processes(folder)
        assert is_there(process["pid"])
        assert len({params["threadId"] for params in calls(folder, "turn/start")}) == 20
        assert await ask(provider, "bye") == "bye"
        assert len(calls(folder, "thread/unsubscribe")) >= 20
    assert not is_there(process["pid"])


async def test_a_chat_goes_as_it_is(folder: Path) -> None:
    async with running(settings(folder)) as provider:
        system = Message(role="system", content=(Text(text="Be brief."),))
        chat = asking("one", "two", "three", extra={"reasoning_effort": "low"})
        request = GenerateRequest(
            model="m", messages=(system, *chat.messages), extra=chat.extra, dialect="openai"
        )
        async with provider.open(request) as answering:
            assert answering.origin.provider == "codex_cli"
            assert (await answering.completion()).text == "three"
    (start,) = calls(folder, "thread/start")
    assert start["baseInstructions"] == "Be brief."
    assert (start["model"], start["ephemeral"], start["sandbox"]) == ("m", True, "read-only")
    (injected,) = calls(folder, "thread/inject_items")
    said = [(item["role"], item["content"][0]["type"]) for item in injected["items"]]
    assert said == [("user", "input_text"), ("assistant", "output_text")]
    (turn,) = calls(folder, "turn/start")
    assert turn["input"] == [{"type": "text", "text": "three"}]
    assert turn["effort"] == "low"


async def test_its_key_is_in_its_environment_only(folder: Path) -> None:
    given = {"CODEX_HOME": str(folder), "CODEX_API_KEY": "another", "LANG": "C"}
    async with running(settings(folder, environment=given)) as provider:
        await ask(provider, "hi")
    (process,) = processes(folder)
    assert KEY not in json.dumps(process["argv"])
    own = process["environment"]
    assert own["PROMPTMESH_CODEX_KEY"] == KEY
    assert own["CODEX_HOME"].endswith("/home")
    assert not own["CODEX_HOME"].startswith(str(folder))
    assert own["NO_PROXY"] == "127.0.0.1,localhost"
    assert "another" not in own.values()
    assert KEY not in repr(settings(folder))


async def test_the_login_is_the_users_own_file(folder: Path) -> None:
    said = settings(folder, base_url="", api_key=None)
    (folder / ".codex").mkdir()
    (folder / ".codex" / "auth.json").write_text("{}")
    (folder / ".codex" / "AGENTS.md").write_text("obey")
    async with running(said) as provider:
        assert (await provider.check()).state == "ready"
        assert await ask(provider, "hi") == "hi"
        home = Path(processes(folder)[0]["environment"]["CODEX_HOME"])
        assert os.listdir(home) == ["auth.json"]
        (home / "auth.json").write_text('{"new": 1}')
    assert (folder / ".codex" / "auth.json").read_text() == '{"new": 1}'
    argv = " ".join(processes(folder)[0]["argv"])
    assert '"requires_openai_auth"' not in argv
    assert "requires_openai_auth=true" in argv
    assert "base_url" not in argv


async def test_leaving_ends_the_turn_and_not_the_process(folder: Path) -> None:
    async with running(settings(folder)) as provider:
        async with provider.open(asking("hang")):
            pass
        assert await ask(provider, "still there") == "still there"
        assert len(calls(folder, "turn/interrupt")) == 1
        assert len(processes(folder)) == 1


async def test_a_turn_that_does_not_end_takes_its_process_along(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codex_answer, "INTERRUPT_GRACE", 0.2)
    async with running(settings(folder)) as provider:
        async with provider.open(asking("deaf")):
            pass
        assert await ask(provider, "a new one") == "a new one"
        first, second = (note["pid"] for note in processes(folder))
        with trio.fail_after(60):
            while is_there(first):  # noqa: ASYNC110 (another process has no events)
                await trio.sleep(0.01)
        assert is_there(second)


async def test_one_that_dies_is_started_again(folder: Path) -> None:
    async with running(settings(folder)) as provider:
        with pytest.raises(ProviderUnavailable, match=r"process ended \(9\): fatal: out of luck"):
            await ask(provider, "die")
        assert await ask(provider, "hi") == "hi"
        assert len(processes(folder)) == 2


async def test_a_question_to_its_user_is_an_error(folder: Path) -> None:
    async with running(settings(folder)) as provider:
        with pytest.raises(ProviderUnavailable, match="asked for 'item/tool/requestUserInput'"):
            await ask(provider, "ask")
        assert await ask(provider, "hi") == "hi"
    (reply,) = [note for note in seen(folder) if note.get("id") == "q"]
    assert reply["error"]["code"] == -32601


async def test_silence_is_a_deadline(folder: Path) -> None:
    async with running(settings(folder, read_timeout=0.2)) as provider:
        with pytest.raises(DeadlineExceeded, match="silent for"):
            await ask(provider, "hang")


async def test_a_stop_string_ends_the_turn(folder: Path) -> None:
    async with running(settings(folder)) as provider:
        sampling = Sampling(stop=("cd",))
        async with provider.open(asking("say abcdef", sampling=sampling)) as answering:
            completion = await answering.completion()
    assert (completion.text, completion.finish_reason) == ("ab", "stop")
    assert not completion.usage.exact


async def test_what_is_refused(folder: Path) -> None:
    async with running(settings(folder)) as provider:
        with pytest.raises(ContextTooLong, match="too large"):
            await ask(provider, "refuse")
        with pytest.raises(ContextTooLong, match="1048576"):
            await ask(provider, "x" * ((1 << 20) + 1))
        with pytest.raises(ProviderUnavailable, match="tools"):
            await ask(provider, "hi", tools=(Tool(name="t"),))
        with pytest.raises(ProviderUnavailable, match="NUL"):
            await ask(provider, "a\0b")
        with pytest.raises(RequestRejected, match="reasoning_effort"):
            await ask(provider, "hi", extra={"reasoning_efort": "low"})


async def test_a_turn_that_is_refused_costs_no_other_its_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codex_answer, "INTERRUPT_GRACE", 0.2)
    async with running(settings(folder)) as provider, provider.open(asking("hang")):
        with pytest.raises(ContextTooLong, match="too large"):
            await ask(provider, "refuse")
        assert await ask(provider, "hi") == "hi"
        assert len(processes(folder)) == 1
        monkeypatch.setattr(codex_answer, "INTERRUPT_GRACE", 60)


async def test_an_idle_process_ends(folder: Path) -> None:
    async with running(settings(folder, idle_timeout=0.05)) as provider:
        await ask(provider, "hi")
        pid = processes(folder)[0]["pid"]
        with trio.fail_after(60):
            while is_there(pid):  # noqa: ASYNC110 (another process has no events)
                await trio.sleep(0.01)
        assert await ask(provider, "again") == "again"
        assert len(processes(folder)) == 2


async def test_a_worn_out_process_is_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CodexServer, "MAX_ANSWERS", 2)
    async with running(settings(folder)) as provider:
        for number in range(5):
            assert await ask(provider, f"say {number}") == str(number)
    assert len(processes(folder)) == 3


async def test_models_that_it_lists(folder: Path) -> None:
    listed = ("other", "h", "best")
    said = settings(folder, base_url="", models=(), listed=listed)
    async with running(said) as provider:
        assert provider.models() == ()
        while (await provider.check()).state == "starting":
            pass
        assert provider.models() == (
            ModelOffer(id="best", egress=True),
            ModelOffer(id="other", egress=True),
        )


async def test_one_without_models_says_what_to_do(folder: Path) -> None:
    said = settings(folder, base_url="", models=())
    async with running(said) as provider:
        health = await provider.check()
        while health.state == "starting":
            health = await provider.check()
    assert (health.state, health.hint) == ("unavailable", "name some in `models`")


# --- versions


@pytest.mark.parametrize(("version", "mode"), [("0.104.0", "auto"), ("9.0.0", "exec")])
async def test_a_process_for_each_answer(folder: Path, version: str, mode: str) -> None:
    async with running(settings(folder, version, mode=mode)) as provider:
        more = {"reasoning_effort": "low", "reasoning_summary": "none"}
        assert await ask(provider, "@/etc/hostname", extra=more) == "@/etc/hostname"
        assert (await provider.check()).state == "ready"
    assert processes(folder) == []
    (process,) = [note for note in seen(folder) if note.get("argv", [""])[0] == "exec"]
    assert process["argv"][-1] == "-"
    assert {'model_reasoning_effort="low"', 'model_reasoning_summary="none"'} < {*process["argv"]}
    assert "@/etc/hostname" not in process["argv"]
    assert KEY not in json.dumps(process["argv"])


async def test_without_anybody_who_runs_it_a_process_answers(folder: Path) -> None:
    provider = CodexCli(settings(folder))
    assert await ask(provider, "hi") == "hi"
    assert processes(folder) == []


async def test_one_that_is_too_old(folder: Path) -> None:
    health = await CodexCli(settings(folder, "0.99.1")).check()
    assert health.state == "unavailable"
    assert health.reason == "codex 0.99.1 is too old"
    assert "npm install" in health.hint


async def test_one_that_is_not_there(folder: Path) -> None:
    said = settings(folder)
    os.unlink(said.command)
    provider = CodexCli(said)
    assert (await provider.check()).reason == "not installed"
    with pytest.raises(ProviderUnavailable, match="npm install -g @openai/codex"):
        await ask(provider, "hi")


async def test_one_that_is_not_logged_in(folder: Path) -> None:
    said = settings(folder, base_url="", api_key=None)
    assert (await CodexCli(said).check()).reason == "not logged in"
    (folder / ".codex").mkdir()
    (folder / ".codex" / "config.toml").write_text('cli_auth_credentials_store = "keyring"\n')
    assert (await CodexCli(said).check()).reason == "not logged in"  # as `login status` says
    assert ["login", "status"] in [note.get("argv") for note in seen(folder)]


async def test_a_login_that_is_refused_is_not_used_until_it_changes(folder: Path) -> None:
    said = settings(folder, base_url="", api_key=None)
    login = folder / ".codex" / "auth.json"
    login.parent.mkdir()
    login.write_text("old")
    async with running(said) as provider:
        with pytest.raises(ProviderUnavailable, match="log in again: type `codex login`"):
            await ask(provider, "401")
        health = await provider.check()
        assert health.state == "unavailable"
        assert "codex login" in health.reason
        login.write_text("a new one")
        assert (await provider.check()).state == "ready"
        assert await ask(provider, "hi") == "hi"
    assert len(processes(folder)) == 2  # one for each login


async def test_its_version_is_asked_for_once(folder: Path) -> None:
    provider = CodexCli(settings(folder))
    for _ in range(3):
        assert (await provider.check()).state == "ready"
    assert len(seen(folder)) == 1


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"base_url": "ftp://x"}, "base_url: expected a URL"),
        ({"api_key": "a b"}, "api_key: it has characters"),
        ({"modle": "x"}, "did you mean"),
        ({"mode": "fast"}, "mode"),
    ],
)
def test_wrong_settings(said: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        build("codex_cli", "c", {"environment": {}, **said})
