"""README.md and docs/tutorial.md do what they say: each command of theirs is typed here.

Not typed: `scripts/test`, which runs this, and `pip install .`, which tests/test_wheel.py covers.
Long commands (`scripts/start`, `promptmesh up`) stay in the foreground of their terminal until the
document presses Ctrl-C there. Ports are replaced by free ones, the home folder by a fresh one. What
the documents show is compared by the rule of tests/doc_shown.py.
"""

import argparse
import re
import shutil
from pathlib import Path

import pytest
from daemons import ECHO, ROOT
from doc_blocks import Command, all_blocks, anchors, blocks, code_spans, commands, links
from doc_shown import Ids
from doc_terminals import person

from promptmesh.node.cli_parser import parser
from promptmesh.node.config import load_config

README = ROOT / "README.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"
IPFS = ROOT / "docs" / "ipfs.md"
DOCUMENTS = [README, *sorted(ROOT.glob("docs/**/*.md"))]


# --- the commands ---------------------------------------------------------------------------------


@pytest.mark.e2e
@pytest.mark.model
@pytest.mark.skipif(shutil.which("curl") is None, reason="the documents use curl")
@pytest.mark.parametrize("document", [README, TUTORIAL], ids=lambda path: path.stem)
async def test_each_command_works(document: Path, tmp_path: Path) -> None:
    typed = 0
    to_do = list(all_blocks(document.read_text()))  # noqa: ASYNC240 - nothing runs yet
    async with person(tmp_path) as somebody:
        for block in to_do:
            if block.language == "python":
                await somebody.runs_python(block.text)
            elif block.language in ("sh", "console"):
                for command in commands(block):
                    await somebody.types(command)
                    typed += 1
    assert typed > 8


@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("curl") is None, reason="the document uses curl")
async def test_what_programs_do_with_ipfs(tmp_path: Path) -> None:
    """The console and Python blocks of docs/ipfs.md, typed at a node with a model that echoes."""
    to_do = list(all_blocks(IPFS.read_text()))
    typed = 0
    async with person(tmp_path) as somebody:
        home = tmp_path / "home" / ".local" / "share" / "promptmesh"
        home.mkdir(parents=True)
        (home / "config.toml").write_text(ECHO)
        await somebody.types(Command(".venv/bin/promptmesh up", (), "", 0))
        for block in to_do:
            if block.language == "python":
                await somebody.runs_python(block.text)
            elif block.language == "console":
                for command in commands(block):
                    await somebody.types(command)
                    typed += 1
    assert typed > 5


def test_the_settings_of_the_readme_are_settings(tmp_path: Path) -> None:
    tables = blocks(README.read_text(), "toml")
    assert tables
    for text in tables:
        (tmp_path / "config.toml").write_text(text)
        load_config(tmp_path, environ={})


# --- the rule -------------------------------------------------------------------------------------

CIDS = ["bafyrei" + letter * 52 for letter in "abc"]


@pytest.mark.parametrize(
    ("shown", "came"),
    [
        (["20:01:02 node: up"], ["21:59:58 node: up"]),
        (["NODE  LOAD", "beta  0/16"], ["NODE    LOAD", "beta    3/4"]),
        (["a", "...", "c"], ["a", "b", "c"]),
        (["a", "...", "c"], ["a", "c"]),
        (["ready after 3.5 s: ..."], ["loading", "ready after 7 s: float32", "more"]),
        ([f"kept {CIDS[0]}", f"found {CIDS[0]}"], [f"kept {CIDS[1]}", f"found {CIDS[1]}"]),
        ([f"{CIDS[0]} {CIDS[0]}"], [f"{CIDS[2]} {CIDS[2]}"]),
        (["beta  …nVYeX4VQ  12D3KooWHNs…"], ["beta  …k4THi6Z1  12D3KooWXYZ"]),
    ],
)
def test_what_counts_as_the_same(shown: list[str], came: list[str]) -> None:
    assert Ids().missing(shown, came) is None


@pytest.mark.parametrize(
    ("shown", "came"),
    [
        (["hit-mesh"], ["hit-local"]),
        (["Paris"], []),
        (["a", "b"], ["b", "a"]),
        (["a", "a"], ["a"]),
        (["Paris."], ["Paris?"]),
        (["0.5 s"], ["- s"]),
        ([f"kept {CIDS[0]}", f"found {CIDS[0]}"], [f"kept {CIDS[1]}", f"found {CIDS[2]}"]),
        ([f"{CIDS[0]} {CIDS[0]}"], [f"{CIDS[1]} {CIDS[2]}"]),
        ([f"kept {CIDS[0]}", f"found {CIDS[1]}"], [f"kept {CIDS[2]}", f"found {CIDS[2]}"]),
    ],
)
def test_what_does_not(shown: list[str], came: list[str]) -> None:
    assert Ids().missing(shown, came) is not None


def test_commands_take_the_ids_that_really_came() -> None:
    ids = Ids()
    assert ids.missing([f"stored {CIDS[0]}"], [f"stored {CIDS[1]}"]) is None
    assert ids.replaced(f"cache get {CIDS[0]}") == f"cache get {CIDS[1]}"


# --- names and links ------------------------------------------------------------------------------


def options(of: argparse.ArgumentParser) -> set[str]:
    return {name for action in of._actions for name in action.option_strings}


def subcommands(of: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def mentions(markdown: str) -> list[list[str]]:
    """The words behind each `promptmesh` that is written as a command."""
    code = [*code_spans(markdown)]
    typed = [block for block in all_blocks(markdown) if block.language != "python"]
    code += [line for block in typed for line in block.text.splitlines()]
    found = []
    for text in code:
        for said in re.findall(r"(?:^|[\s`|])(?:\.venv/bin/)?promptmesh((?: +[^\s`|,]+)+)", text):
            found.append([word.strip("[]()") for word in said.split()])
    return found


def problem_with(words: list[str]) -> str | None:
    """What no `promptmesh` understands of these words; placeholders are in capitals."""
    at = parser()
    for word in words:
        known = subcommands(at)
        if word in known:
            at = known[word]
        elif word.startswith("-") and word != "-":
            if word.partition("=")[0] not in options(at):
                return word
        elif known and re.fullmatch("[a-z]+", word) and not word.isupper():
            return word
    return None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_commands_and_flags_exist(document: Path) -> None:
    wrong = {" ".join(m): problem_with(m) for m in mentions(document.read_text())}
    assert not {command: word for command, word in wrong.items() if word}


def test_a_wrong_command_would_be_found() -> None:
    assert len(mentions(TUTORIAL.read_text())) > 20
    (mention,) = mentions("See `promptmesh --home ~/beta cashe ls`.")
    assert problem_with(mention) == "cashe"
    (mention,) = mentions("```console\n$ .venv/bin/promptmesh up --htpp 127.0.0.1:1\n```")
    assert problem_with(mention) == "--htpp"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(document: Path) -> None:
    for link in links(document.read_text()):
        if re.match("[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link
