"""The runtime of Copilot's SDK: kept, shared, ended for sure, and started again."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from asking import ask, asked
from daemons import until
from fakes_copilot import playing_copilot
from faults import PARTIAL, WHOLE

from promptmesh.providers import copilot_session
from promptmesh.providers.base import (
    ContextTooLong,
    DeadlineExceeded,
    GenerateError,
    ProviderRefused,
    ProviderUnavailable,
    RequestRejected,
    Sampling,
    StreamInterrupted,
    Tool,
)
from promptmesh.providers.copilot_sdk import CopilotSdk
from promptmesh.providers.copilot_settings import CopilotSettings

KEY = "sk-nobody-may-see-this"

Make = Callable[..., AbstractAsyncContextManager[CopilotSdk]]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[Path]]]:
    """The private folders that are there; none may outlive a test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield lambda: sorted(tmp_path.glob("promptmesh-*"))
    assert list(tmp_path.glob("promptmesh-*")) == []


@pytest.fixture
def make(tmp_path: Path, folders: object) -> Make:
    """Makes a provider whose runtime tells what the real one told."""
    program = playing_copilot(tmp_path)

    @asynccontextmanager
    async def made(case: str = "ok", **more: Any) -> AsyncIterator[CopilotSdk]:
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **more.pop("seen", {})}
        server = {
            "base_url": f"http://127.0.0.1:1/m/{case}",
            "api_key": KEY,
            "models": ("stub-model",),
        }
        settings = {**server, **more}
        provider = CopilotSdk(
            CopilotSettings(
                name="copilot", command=str(program), environment=environment, **settings
            )
        )
        with trio.fail_after(240):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(provider.run)
                yield provider
                nursery.cancel_scope.cancel()

    return made


def log(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What the one runtime was asked."""
    (folder,) = folders
    # The last of them may be half written.
    *lines, _ = (folder / "asked.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines]


async def test_an_answer_and_what_the_runtime_is_asked(
    make: Make, folders: Callable[[], list[Path]]
) -> None:
    request = asked(
        system="Be brief.", sampling=Sampling(max_tokens=9), extra={"reasoning_effort": "low"}
    )
    async with make() as provider:
        assert folders() == []  # nothing is started before it is asked
        found = await ask(provider, request)
        assert (found.text, found.finish_reason) == (WHOLE, "stop")
        assert (found.usage.prompt_tokens, found.usage.exact) == (11, True)
        (folder,) = folders()

        async def deleted() -> bool:
            return bool(log(folders())[-1]["method"] == "session.delete")

        await until(deleted, "the session is deleted")
        said = {message["method"]: message["params"] for message in log(folders())}
    created = said["session.create"]
    assert created["model"] == "stub-model"
    assert created["systemMessage"] == {"mode": "replace", "content": "Be brief."}
    assert created["availableTools"] == []
    assert created["workingDirectory"] == str(folder / "work")
    assert created["reasoningEffort"] == "low"
    assert created["provider"] == {
        "type": "openai",
        "wireApi": "completions",
        "baseUrl": "http://127.0.0.1:1/m/ok",
        "apiKey": KEY,
        "maxOutputTokens": 9,
    }
    assert said["session.send"]["prompt"] == "Tell me a tale."
    assert list(said) == [
        "connect",
        "session.create",
        "session.options.update",
        "session.send",
        "session.delete",
    ]


async def test_one_runtime_answers_many_at_once(
    make: Make, folders: Callable[[], list[Path]]
) -> None:
    async with make() as provider:
        found: list[str] = []

        async def one() -> None:
            found.append((await ask(provider)).text)

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(one)
        assert found == [WHOLE] * 8
        assert [m["method"] for m in log(folders())].count("connect") == 1


@pytest.mark.parametrize(
    ("case", "text", "reason"),
    [("truncate", PARTIAL, "length"), ("filter", PARTIAL, "content_filter")],
)
async def test_an_answer_that_was_cut_is_told_and_ended(
    make: Make, folders: Callable[[], list[Path]], case: str, text: str, reason: str
) -> None:
    async with make(case) as provider:
        found = await ask(provider)
        assert (found.text, found.finish_reason) == (text, reason)


async def test_it_is_ended_at_the_first_sign_of_another_try(
    make: Make, folders: Callable[[], list[Path]]
) -> None:
    async with make("e500") as provider:
        with pytest.raises(ProviderUnavailable, match="answered 500"):
            await ask(provider)
        assert "session.abort" in [m.get("method") for m in log(folders())]


async def test_a_cancelled_answer_is_aborted_and_the_runtime_kept(
    make: Make, folders: Callable[[], list[Path]]
) -> None:
    async with make("stall") as provider:
        with trio.CancelScope() as scope:
            async with provider.open(asked()) as answering:
                async for chunk in answering.chunks:
                    assert chunk.text == PARTIAL
                    scope.cancel()
        assert scope.cancelled_caught
        methods = [m.get("method") for m in log(folders())]
        assert methods.count("session.abort") == 1
        async with provider.open(asked()) as answering:
            assert (await anext(answering.chunks)).text == PARTIAL
        assert [m.get("method") for m in log(folders())].count("connect") == 1


async def test_a_runtime_that_heeds_nothing_is_ended_and_started_again(
    make: Make, folders: Callable[[], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copilot_session, "ABORT_TIME", 0.2)
    async with make() as provider:
        async with provider.open(asked("deaf")) as answering:
            assert (await anext(answering.chunks)).text == "Once"
            old = folders()
        assert (await ask(provider)).text == WHOLE

        async def ended() -> bool:
            return not set(old) & set(folders())

        await until(ended, "it is gone")


async def test_a_runtime_that_died_is_started_again(make: Make) -> None:
    async with make() as provider:
        with pytest.raises(ProviderUnavailable, match=r"ended \(3\): it is out of memory") as told:
            await ask(provider, asked("die"))
        assert told.value.again
        assert (await ask(provider)).text == WHOLE


async def test_it_ends_when_nobody_asks(make: Make, folders: Callable[[], list[Path]]) -> None:
    async with make(idle_timeout=0.05) as provider:
        for _ in range(2):
            assert (await ask(provider)).text == WHOLE

            async def ended() -> bool:
                return folders() == []

            await until(ended, "it has ended")


async def test_what_it_wants_to_ask_is_refused(
    make: Make, folders: Callable[[], list[Path]]
) -> None:
    async with make() as provider:
        assert (await ask(provider, asked("ask"))).text == WHOLE

        async def refused() -> bool:
            told = [m for m in log(folders()) if m.get("id") == "q1"]
            return [m["error"]["code"] for m in told] == [-32601]

        await until(refused, "it hears so")


@pytest.mark.parametrize(
    "garbage",
    [
        b"no head\r\n\r\n",
        b"Content-Length: 99999999999\r\n\r\n",
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: 4\r\n\r\nnull",
        b"Content-Length: 3\r\n\r\n{]\xff",
        b"x" * 10_000,
    ],
)
async def test_what_makes_no_sense_is_an_error(make: Make, garbage: bytes) -> None:
    async with make() as provider:
        with pytest.raises(ProviderUnavailable):
            await ask(provider, asked(f"garbage {garbage.hex()}"))
        assert (await ask(provider)).text == WHOLE


async def test_silence_is_not_waited_for(make: Make) -> None:
    # Longer than what comes before it takes.
    async with make("stall", read_timeout=3) as provider:
        with pytest.raises(StreamInterrupted, match="silent") as told:
            await ask(provider)
        assert told.value.partial == PARTIAL
    async with make("hang", read_timeout=0.2) as provider:
        with pytest.raises(DeadlineExceeded):
            await ask(provider)


async def test_a_model_that_is_not_there(make: Make) -> None:
    async with make() as provider:
        with pytest.raises(ProviderRefused, match="gpt-none"):
            await ask(provider, asked(model="gpt-none"))


async def test_what_it_cannot_do_it_is_not_asked(make: Make) -> None:
    async with make() as provider:
        for request, error in (
            (asked(tools=(Tool(name="t"),)), ProviderUnavailable),
            (asked("a\0b"), ProviderUnavailable),
            (asked("x" * 10_000_001), ContextTooLong),
            (asked("a\ud800"), RequestRejected),
            (asked(extra={"reasoning": "low"}), RequestRejected),
            (asked(extra={"reasoning_effort": "extreme"}), RequestRejected),
        ):
            with pytest.raises(error):
                await ask(provider, request)


async def test_another_protocol_is_not_spoken(make: Make) -> None:
    async with make(seen={"COPILOT_API_URL": "4"}) as provider:
        with pytest.raises(ProviderUnavailable, match="version 4 of its protocol"):
            await ask(provider)


async def test_the_models_of_a_login(make: Make) -> None:
    login = {"base_url": "", "api_key": "github_pat_x", "models": ()}
    async with make(**login) as provider:
        assert [m.id for m in provider.models()] == ["gpt-4o"]
        assert (await ask(provider)).text == WHOLE
        (model,) = provider.models()
    assert (model.id, model.context_length, model.egress) == ("gpt-x", 64_000, True)


async def test_a_login_that_github_does_not_take(make: Make) -> None:
    async with make(base_url="", api_key="github_pat_revoked", models=()) as provider:
        with pytest.raises(ProviderRefused, match="copilot login"):
            await ask(provider)


async def test_a_saved_login_is_copied(
    make: Make, tmp_path: Path, folders: Callable[[], list[Path]]
) -> None:
    home = tmp_path / ".copilot"
    home.mkdir()
    text = '// This file is managed automatically.\n{"loggedInUsers": [{"login": "me"}]}'
    (home / "config.json").write_text(text)
    (home / "mcp-config.json").write_text('{"mcpServers": {}}')
    async with make(base_url="", api_key=None, models=()) as provider:
        assert (await ask(provider)).text == WHOLE
        (folder,) = folders()
        assert [p.name for p in (folder / "home").iterdir()] == ["config.json"]
        assert (folder / "home" / "config.json").stat().st_mode & 0o777 == 0o600


async def test_one_that_does_not_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promptmesh.providers.copilot_sdk.RUN_TIME", 0.01)
    provider = CopilotSdk(CopilotSettings(name="copilot", base_url="http://127.0.0.1:1"))
    with pytest.raises(GenerateError, match="does not run"):
        await ask(provider)
