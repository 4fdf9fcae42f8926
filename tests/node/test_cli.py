"""The command line as a whole: exit codes, streams, what is imported, the generated pages."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fakes_cli import FakeNode, Problem, made, run

from promptmesh.node.cli_parser import parser

ROOT = Path(__file__).parent.parent.parent
MAIN = "import sys; from promptmesh.node.cli import main; sys.exit(main())"
#: What belongs to a running node: the network, the models, the store.
HEAVY = ("torch", "transformers", "libp2p", "trio", "httpx", "httptools", "sqlite3", "multiaddr")


def test_a_light_command_imports_nothing_heavy() -> None:
    code = (
        "import sys; from promptmesh.node.cli import main; main(['version']);"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"promptmesh {importlib.metadata.version('promptmesh')}\n"
    assert done.stderr == "[]\n"


def test_without_a_command_there_is_help(tmp_path: Path) -> None:
    ran = run(tmp_path)
    assert (ran.code, ran.out) == (2, "")
    assert "promptmesh up" in ran.err or "run the node" in ran.err
    ran = run(tmp_path, "cache")
    assert (ran.code, ran.out) == (2, "")
    assert "list the stored answers" in ran.err


@pytest.mark.parametrize(
    "arguments",
    [("nonsense",), ("join",), ("peers", "--jsn"), ("ask", "x", "--policy", "fastest"),
     ("ask", "x", "--max-tokens", "many"), ("cache", "get")],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ran = run(tmp_path, *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "promptmesh" in ran.err


def test_the_version(tmp_path: Path) -> None:
    assert run(tmp_path, "version") == run(tmp_path, "--version")
    assert run(tmp_path, "version").out.startswith("promptmesh ")


def test_a_wrong_configuration_is_2_and_says_all(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[mesh]\npolcy = 1\n[cache]\nttl = 'x'\n")
    ran = run(tmp_path, "config")
    assert (ran.code, ran.out) == (2, "")
    assert "did you mean mesh.policy?" in ran.err
    assert "cache.ttl: expected a number of seconds" in ran.err


@pytest.mark.parametrize(
    "arguments",
    [("peers",), ("models",)],
    ids=" ".join,
)
def test_without_a_node_it_says_how_to_start_one(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    ran = run(tmp_path, *arguments)
    assert (ran.code, ran.out) == (1, "")
    start = f"Start it with `promptmesh --home {tmp_path} up`"
    assert f"no node runs on {tmp_path}. {start}" in ran.err


def test_a_node_file_without_a_node_behind_it(tmp_path: Path) -> None:
    home = made(tmp_path)
    node = FakeNode({})
    with node.running():
        pass  # the port is free again
    with home.announced(node.http):
        ran = run(tmp_path, "peers")
    assert ran.code == 1
    assert f"the node does not answer at {node.http}" in ran.err
    assert f"promptmesh --home {tmp_path} up" in ran.err


def test_the_nodes_own_error_is_said(tmp_path: Path) -> None:
    with FakeNode({"GET /mesh/v1/peers": Problem(503, "not yet")}).running(made(tmp_path)):
        ran = run(tmp_path, "peers", "--json")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "promptmesh: not yet\n"


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"{", b"[" * 100_000])
def test_something_else_at_the_nodes_address(tmp_path: Path, body: bytes) -> None:
    with FakeNode({"GET /mesh/v1/peers": body}).running(made(tmp_path)):
        ran = run(tmp_path, "peers")
    assert (ran.code, ran.out) == (1, "")
    assert "is not promptmesh" in ran.err


def test_config_shows_where_each_value_comes_from(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[node]\nname = "alpha"\n')
    ran = run(tmp_path, "config", "--json", PROMPTMESH_MESH_MDNS="0")
    shown = json.loads(ran.out)
    assert shown["home"] == str(tmp_path)
    assert shown["settings"]["node.name"] == {"value": "alpha", "source": "config.toml"}
    assert shown["settings"]["mesh.mdns"] == {"value": False, "source": "PROMPTMESH_MESH_MDNS"}
    assert shown["settings"]["mesh.policy"] == {"value": "round_robin", "source": "default"}
    lines = run(tmp_path, "config").out.splitlines()
    assert lines[0].split() == ["KEY", "VALUE", "FROM"]
    assert ["node.name", '"alpha"', "config.toml"] in [line.split() for line in lines]


def test_home_may_stand_on_both_sides(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    ran = run(tmp_path / "outer", "config", "--json", "--home", str(inner))
    assert json.loads(ran.out)["home"] == str(inner)


def test_colour_is_for_terminals(tmp_path: Path) -> None:
    assert "\x1b[" not in run(tmp_path, "config").out
    assert "\x1b[" in run(tmp_path, "config", tty=True).out
    assert "\x1b[" not in run(tmp_path, "config", tty=True, NO_COLOR="1").out


def test_a_reader_that_leaves_does_no_harm(tmp_path: Path) -> None:
    """As `promptmesh config | head -1`, with a pipe nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "--home", str(tmp_path), "config"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_poor_encoding_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[node]\nname = "\u00e4lpha"\n', encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "--home", str(tmp_path), "config"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=True,
    )
    assert rb"\xe4lpha" in done.stdout


def load_generator() -> ModuleType:
    path = str(ROOT / "scripts" / "generate-docs")
    loader = importlib.machinery.SourceFileLoader("generate_docs", path)
    spec = importlib.util.spec_from_loader("generate_docs", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # A script without an ending would leave a file of bytecode beside it.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return load_generator()


def test_the_generated_pages_are_fresh(generator: ModuleType) -> None:
    assert generator.main(["--check"]) == 0


def test_a_stale_page_is_noticed_and_mended(
    generator: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in generator.pages().items():
        (tmp_path / name).write_text(text.replace("promptmesh", "promptmush"))
    assert generator.main(["--check"], tmp_path) == 1
    assert "docs/cli.md is stale: run scripts/generate-docs" in capsys.readouterr().err
    assert generator.main([], tmp_path) == 0
    assert generator.main(["--check"], tmp_path) == 0


def test_every_command_and_flag_is_in_the_page(generator: ModuleType) -> None:
    page = generator.pages()["cli.md"]
    for command in ("init", "up", "ask", "invite", "join", "leave", "peers", "peers allow",
                        "peers deny", "peers block", "models", "providers",
                    "config", "cache ls", "cache get", "cache stat", "cache pin", "cache unpin",
                    "cache rm", "cache gc", "version"):  # fmt: skip
        assert f"## promptmesh {command}\n" in page
    assert all(action.help for action in parser()._actions if action.option_strings)
