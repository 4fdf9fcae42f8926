"""docs/python.md and docs/providers.md do what they say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from daemons import ROOT, mesh
from doc_blocks import all_blocks

PYTHON = (ROOT / "docs" / "python.md").read_text()
PROVIDERS = (ROOT / "docs" / "providers.md").read_text()
FILES = {block.place: block.text for block in all_blocks(PROVIDERS) if block.place}

pytestmark = pytest.mark.e2e


def run(folder: Path, code: str, *paths: Path) -> str:
    """What a program prints that has no key, no node and no settings."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith(("PROMPTMESH", "IPFS", "OPENROUTER"))
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=kept
        | {
            "PROMPTMESH_HOME": str(folder / "home"),
            "PROMPTMESH_LOCAL_SERVERS_ENABLED": "false",
            "PYTHONPATH": ":".join(map(str, paths)),
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package of the tutorial is installed."""
    source = tmp_path_factory.mktemp("package")
    for name in ("pyproject.toml", "promptmesh_reversed.py"):
        (source / name).write_text(FILES[name])
    target = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--target"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, target, source],
        check=True,
        capture_output=True,
    )
    return target


def test_the_blocks_of_the_page(tmp_path: Path) -> None:
    first, *others = [b.text for b in all_blocks(PYTHON) if b.language == "python"]
    # The first asks whatever is there, which is nothing here.
    assert 'generate_text("What is' in first
    assert len(others) == 2
    out = [run(tmp_path, code) for code in others]
    assert out == ["", "2 entries\n"]


def test_a_class_of_a_program(tmp_path: Path) -> None:
    assert run(tmp_path, FILES["try.py"]) == "three two one\n"
    assert run(tmp_path, FILES["stream.py"]) == "'one '\n'two '\n"


def test_a_package_is_found_by_its_name(tmp_path: Path, installed: Path) -> None:
    assert run(tmp_path, FILES["installed.py"], installed) == "three two one\n"
    refused = "import pytest\nwith pytest.raises(ValueError, match='reversed'):\n    "
    code = refused + FILES["installed.py"].replace("\n", "\n    ")
    assert run(tmp_path, code) == ""


async def test_a_node_offers_it(
    tmp_path: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(installed))
    async with mesh(tmp_path, {"a": FILES["config.toml"], "b": ""}) as (a, b):
        await a.wait_for_model("words")
        answer = await a.chat("one two three", "backwards/words")
        assert answer.json()["choices"][0]["message"]["content"] == "three-two-one"
        assert "words" not in await b.models(), "it is not shared"
