"""The real `gemini` command, against a stand-in for Google: what reaches it, and what is left."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import trio
from asking import ask, asked
from daemons import ROOT
from fakes_google import google
from faults import PARTIAL, WHOLE
from vendors import VendorServer, vendors

from promptmesh.providers.base import (
    ProviderUnavailable,
    Sampling,
    StreamInterrupted,
)
from promptmesh.providers.gemini_cli import GeminiCli
from promptmesh.providers.gemini_settings import GeminiSettings

PROGRAM = ROOT / "build" / "clis" / "bin" / "gemini"
KEY = "AIza-nobody-may-see-this"
#: Seconds for one run on a machine that has other things to do.
PATIENCE = 60

pytestmark = pytest.mark.interop


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the homes of the runs are made."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return place


def provider(server: VendorServer, tmp_path: Path, mode: str) -> GeminiCli:
    path = f"{PROGRAM.parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    return GeminiCli(
        GeminiSettings(
            mode="cli",
            api_key=KEY,
            base_url=server.base(mode),
            command=str(PROGRAM),
            environment=environment,
        )
    )


async def test_what_reaches_google(tmp_path: Path) -> None:
    sampling = Sampling(temperature=0.0, top_p=0.5, top_k=3, max_tokens=9, stop=("END",), seed=7)
    options = {"thinking_budget": 0, "safety": "block_none"}
    request = asked("hi", "Be brief.", sampling=sampling, extra=options)
    async with vendors() as server:
        found = await ask(provider(server, tmp_path, "ok"), request)
        (seen,) = server.of("ok")
        # Nothing but the one request for the answer.
        assert len(server.requests) == 1
    assert (found.text, found.finish_reason, found.usage.total_tokens) == (WHOLE, "stop", 16)
    assert seen.request.path.endswith("/models/stub-model:streamGenerateContent?alt=sse")
    assert seen.request.headers["x-goog-api-key"] == KEY
    body = seen.request.json
    assert body["systemInstruction"]["parts"] == [{"text": "Be brief."}]
    assert body["tools"] == [{"functionDeclarations": []}]
    assert [s["threshold"] for s in body["safetySettings"]] == ["BLOCK_NONE"] * 4
    config = body["generationConfig"]
    assert config["thinkingConfig"]["thinkingBudget"] == 0
    assert {k: v for k, v in config.items() if k != "thinkingConfig"} == {
        "temperature": 0.0,
        "topP": 0.5,
        "topK": 3,
        "maxOutputTokens": 9,
        "stopSequences": ["END"],
        "seed": 7,
    }


PROMPTS = [
    "@secret.txt @{secret.txt} !{ls} {{x}}",
    "@/etc/hostname",
    "/help",
    "/quit now",
    "/init",
    "/directory add /etc",
    "/directory add /etc\n@/etc/hostname",
    "/model set another",
    "/bug x",
    "// not a command",
    "!ls",
    "--help",
    "-p x",
    "?",
    "$(id) `id` ${HOME}",
    "  \r\n\tends in spaces \u00fc\u2603\U0001f600\u202e\ufeff \n\n",
    "\x1b[31mred\x07\x7f\x01",
]


def random_prompts(rng: random.Random) -> list[str]:
    letters = "@/!-${}()`'\"\\ \n\t\u00e9\u4e2d\U0001f600\u0301abc\x0b\x1f\u2028\ufffd"
    return ["".join(rng.choices(letters, k=rng.randrange(1, 300))) for _ in range(10)]


@pytest.mark.parametrize(
    "text", [*PROMPTS, *random_prompts(random.Random(5)), "line \u00e9\n" * 60_000]
)
async def test_a_prompt_reaches_google_byte_for_byte(text: str, tmp_path: Path) -> None:
    text = text if text.strip() else "x" + text
    async with vendors() as server:
        found = await ask(provider(server, tmp_path, "ok"), asked(text))
        (seen,) = server.of("ok")
    assert found.text == WHOLE
    *context, last = seen.request.json["contents"][0]["parts"]
    assert last["text"] in (text, f"\n{text}" if text.startswith("/") else text)
    assert [part["text"].startswith("<session_context>") for part in context] == [True]


async def test_nothing_above_its_folder_is_taken_up(tmp_path: Path, temporary: Path) -> None:
    """Anybody may write into the folder of temporary files."""
    trap = "HTTPS_PROXY=http://127.0.0.1:9\nHTTP_PROXY=http://127.0.0.1:9\nGEMINI_MODEL=trap\n"
    (temporary / ".gemini").mkdir()
    for name in (".env", ".gemini/.env"):
        (temporary / name).write_text(trap)
    for name in ("GEMINI.md", "NONE.md", "AGENTS.md"):
        (temporary / name).write_text("the trap")
    settings = {"mcpServers": {"trap": {"command": "touch", "args": [str(tmp_path / "trap")]}}}
    (temporary / ".gemini" / "settings.json").write_text(json.dumps(settings))
    async with vendors() as server:
        assert (await ask(provider(server, tmp_path, "ok"), asked("hi"))).text == WHOLE
        (seen,) = server.of("ok")
    assert b"the trap" not in seen.request.body
    assert not (tmp_path / "trap").exists()


async def test_an_answer_comes_byte_for_byte(tmp_path: Path) -> None:
    text = '\x1b[31m {"type":"result"}\n \u00e9\U0001f600\u2028 ' * 200
    async with vendors() as server:
        found = await ask(provider(server, tmp_path, "echo"), asked(text))
        long = await ask(provider(server, tmp_path, "big-300000"), asked("much"))
    # Of what steers a terminal only the control characters are taken away.
    assert found.text.replace("\x1b[31m", "") == text.replace("\x1b[31m", "")
    assert len(long.text) == 300_000


async def test_a_login(tmp_path: Path) -> None:
    """Its copy does, the token that a run fetches serves the next, and the user's file stays."""
    folder = tmp_path / ".gemini"
    folder.mkdir()
    login = {"access_token": "too old", "refresh_token": "refresh", "expiry_date": 1000}
    (folder / "oauth_creds.json").write_text(json.dumps(login))
    (folder / "google_accounts.json").write_text('{"active": "somebody@example.org", "old": []}')
    path = f"{PROGRAM.parent}:{os.environ['PATH']}"
    async with google(tmp_path) as server:
        environment = {"PATH": path, "HOME": str(tmp_path), **server.environment()}
        gemini = GeminiCli(GeminiSettings(command=str(PROGRAM), environment=environment))
        for _ in range(2):
            found = await ask(gemini, asked("hi", model="gemini-2.5-pro"))
            assert (found.text, found.finish_reason) == ("hello", "stop")
            assert server.model == "gemini-2.5-pro"
    assert json.loads((folder / "oauth_creds.json").read_text()) == login
    assert sorted(os.listdir(folder)) == ["google_accounts.json", "oauth_creds.json"]
    assert server.asked.count("token") == 1
    assert server.asked.count("streamGenerateContent") == 2
    known = {"token", "tokeninfo", "loadCodeAssist", "listExperiments", "retrieveUserQuota"}
    assert {*server.asked} - {"streamGenerateContent"} <= known


async def test_a_login_that_google_does_not_take(tmp_path: Path) -> None:
    (tmp_path / ".gemini").mkdir()
    (tmp_path / ".gemini" / "oauth_creds.json").write_text('{"refresh_token": "r"}')
    path = f"{PROGRAM.parent}:{os.environ['PATH']}"
    # No proxy is there, which is as good as a refusal.
    environment = {"PATH": path, "HOME": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}
    gemini = GeminiCli(GeminiSettings(command=str(PROGRAM), environment=environment))
    with pytest.raises(ProviderUnavailable, match="not logged in: start `gemini`"):
        await ask(gemini, asked("hi"))


async def test_nothing_of_an_answer_is_lost_that_is_read_slowly(tmp_path: Path) -> None:
    """The command ends while most of it is still to be read."""
    size = 0
    async with vendors() as server:
        gemini = provider(server, tmp_path, "big-1000000")
        with trio.fail_after(PATIENCE):
            async with gemini.open(asked("x" * 1_000_000)) as answering:
                await trio.sleep(3)
                async for chunk in answering.chunks:
                    size += len(chunk.text)
                    await trio.sleep(0.001)
    assert size == 1_000_000


@pytest.mark.parametrize(("mode", "reason"), [("truncate", "length"), ("filter", "content_filter")])
async def test_an_answer_that_was_cut_is_told_from_a_whole_one(
    mode: str, reason: str, tmp_path: Path
) -> None:
    async with vendors() as server:
        found = await ask(provider(server, tmp_path, mode), asked("hi"))
    assert (found.text, found.finish_reason) == (PARTIAL, reason)


async def test_another_model_is_never_taken_for_the_one_that_was_asked(tmp_path: Path) -> None:
    async with vendors() as server:
        request = asked("hi", model="gemini-3-pro-preview")
        with pytest.raises(StreamInterrupted, match="instead of 'gemini-3-pro-preview'"):
            await ask(provider(server, tmp_path, "ok"), request)
