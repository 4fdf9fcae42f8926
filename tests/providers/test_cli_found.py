"""Programs of vendors on this machine: where they are, and what is remembered of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from promptmesh.providers.cli_found import LIFETIME, Remembered, find, version_in, version_text
from promptmesh.providers.codex_found import login_file, look, native_program


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_a_program_is_found_by_the_path_it_would_get(tmp_path: Path) -> None:
    made = program(tmp_path / "codex")
    assert find("codex", {"PATH": str(tmp_path)}) == str(made)
    assert find(str(made), {"PATH": ""}) == str(made)
    assert find("codex", {"PATH": str(tmp_path / "other")}) is None
    made.chmod(0o644)
    assert find("codex", {"PATH": str(tmp_path)}) is None


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("codex-cli 0.169.0\n", (0, 169, 0)),
        ("2.1.330 (Claude Code)", (2, 1, 330)),
        ("GitHub Copilot CLI 1.0.102.", (1, 0, 102)),
        ("version 7", ()),
        ("", ()),
    ],
)
def test_versions(text: str, version: tuple[int, ...]) -> None:
    assert version_in(text) == version
    assert version_text(version) in text


async def test_an_answer_is_remembered_until_something_changes(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    file, asked = tmp_path / "auth.json", 0
    remembered: Remembered[int] = Remembered()

    async def ask() -> int:
        nonlocal asked
        asked += 1
        await trio.sleep(1)
        return asked

    async def get() -> int:
        return await remembered.get([str(file)], ask)

    found: list[int] = []
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(lambda: _append(found, get))
    assert found == [1, 1, 1]
    file.write_text("a")
    assert await get() == 2
    os.utime(file, ns=(1, 1))
    assert await get() == 3
    assert await get() == 3
    await trio.sleep(LIFETIME)
    assert await get() == 4


async def _append(found: list[int], get: object) -> None:
    found.append(await get())  # type: ignore[operator]


async def test_a_failed_question_is_asked_again() -> None:
    remembered: Remembered[int] = Remembered()

    async def fails() -> int:
        raise OSError("no")

    async def works() -> int:
        return 1

    with pytest.raises(OSError, match="no"):
        await remembered.get([], fails)
    assert await remembered.get([], works) == 1


# --- Codex


def test_what_files_tell_of_codex(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)}
    assert look(environment).reason == "not installed"
    assert look(environment).hint == "npm install -g @openai/codex"
    program(tmp_path / "bin" / "codex")
    assert look(environment).reason == "not logged in"
    assert look(environment, needs_login=False).state == "ready"
    assert look({**environment, "CODEX_API_KEY": "k"}).state == "ready"
    login = login_file(environment)
    assert login == tmp_path / ".codex" / "auth.json"
    login.parent.mkdir()
    (login.parent / "config.toml").write_text('model = "x"\n')
    assert look(environment).state == "unavailable"
    login.write_text("{}")
    assert look(environment).state == "ready"
    moved = {**environment, "CODEX_HOME": str(tmp_path / "elsewhere")}
    assert look(moved).reason == "not logged in"


def test_a_login_in_the_keyring_is_not_denied(tmp_path: Path) -> None:
    program(tmp_path / "codex")
    (tmp_path / "config.toml").write_text('a = 1\ncli_auth_credentials_store = "keyring"\n')
    environment = {"PATH": str(tmp_path), "CODEX_HOME": str(tmp_path)}
    assert look(environment).state == "ready"


def test_the_program_behind_the_wrapper_of_npm(tmp_path: Path) -> None:
    modules = tmp_path / "node_modules" / "@openai"
    wrapper = program(modules / "codex" / "bin" / "codex.js")
    link = tmp_path / "bin" / "codex"
    link.parent.mkdir()
    link.symlink_to(wrapper)
    assert native_program(str(link)) == str(link)
    native = program(modules / "codex-linux-x64" / "vendor" / "x86_64-musl" / "bin" / "codex")
    assert native_program(str(link)) == str(native)
    nested = modules / "codex" / "node_modules" / "@openai" / "codex-linux-x64" / "vendor"
    nested_program = program(nested / "x86_64-musl" / "bin" / "codex")
    assert native_program(str(link)) == str(nested_program)
    assert native_program(str(native)) == str(native)
