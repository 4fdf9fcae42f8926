"""The wheel holds every module of the tree, and nothing beside `promptmesh`."""

import ast
import email
import importlib.metadata
import itertools
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def expected_modules() -> set[str]:
    modules = {"promptmesh/__init__.py", "promptmesh/py.typed"}
    for folder in ("node", "mesh", "providers", "cache"):
        modules |= {f"promptmesh/{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}
    return modules


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return folder


def test_wheel_equals_the_tree(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == expected_modules()


def test_what_the_wheel_says_of_itself(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        (info,) = {n.split("/")[0] for n in files.namelist() if ".dist-info/" in n}
        metadata = email.message_from_bytes(files.read(f"{info}/METADATA"))
        scripts = files.read(f"{info}/entry_points.txt").decode()
        assert files.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert metadata["Name"] == "promptmesh"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "promptmesh = promptmesh.node.cli:main" in scripts
    # A node without a model of its own needs no torch.
    heavy = [d for d in metadata.get_all("Requires-Dist", []) if re.match("torch|transformers", d)]
    assert len(heavy) == 2
    assert all(each.endswith('extra == "hf"') for each in heavy)


def test_import_is_light(tmp_path: Path) -> None:
    """`import promptmesh` starts nothing and loads no heavy library."""
    code = (
        "import sys, threading, promptmesh\n"
        "heavy = {'torch', 'transformers', 'libp2p', 'httpx', 'sqlite3'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert threading.active_count() == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_what_is_imported_is_named() -> None:
    """Each foreign library that a room imports is a dependency of its own, not one of another's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    named = {
        re.split(r"[<>=!~\[; ]", each, maxsplit=1)[0].lower().replace("_", "-")
        for each in [*project["dependencies"], *itertools.chain.from_iterable(extras)]
    }
    providers = importlib.metadata.packages_distributions()
    for folder in ("node", "mesh", "providers", "cache"):
        for path in (ROOT / folder).rglob("*.py"):
            for module in foreign_imports(ast.parse(path.read_text())):
                found = {name.lower().replace("_", "-") for name in providers.get(module, [])}
                assert found & named, f"{path.name} imports {module}, of {found or 'nobody'}"


def foreign_imports(tree: ast.AST) -> set[str]:
    """Top-level names of what is imported at run time and is neither ours nor Python's own."""
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"promptmesh"}
