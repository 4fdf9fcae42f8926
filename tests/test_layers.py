"""The import direction between the folders (docs/architecture.md)."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("cache", "mesh", "node", "providers")
#: What a folder may import of the others: a folder, or one module of it.
MAY_IMPORT: dict[str, set[str]] = {
    "cache": {"providers.base"},
    "mesh": {"providers.base", "providers.tokens"},
    "providers": set(),
    "node": {"cache", "mesh", "providers"},
}
#: Heavy or foreign libraries, and the only modules that may import them.
ONLY_IN: dict[str, set[str]] = {
    "libp2p": {
        f"mesh/{name}.py"
        for name in (
            "host",
            "library_host",
            "link",
            "patches",
            "pnet",
            "mdns",
            "streams",
            "gossipsub",
        )
    }
    # About connections themselves, below `Transport`.
    | {f"mesh/{name}.py" for name in ("relay", "relay_client", "hole_punching", "traversal")},
    "torch": {f"providers/{p.name}" for p in (ROOT / "providers").glob("*hf_*.py")},
    "transformers": {f"providers/{p.name}" for p in (ROOT / "providers").glob("*hf_*.py")},
    "ipfshttpclient": {"cache/kubo.py"},
    "sqlite3": {f"cache/{p.name}" for p in (ROOT / "cache").glob("*.py")}
    | {"node/node_database.py"},
}


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that a module imports, relative ones as `folder.module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = {0: "", 1: package, 2: "", 3: "above"}[node.level]
            stem = ".".join(part for part in (base, node.module or "") if part)
            yield from (
                (f"{stem}.{alias.name}" if stem else alias.name) if node.level else stem
                for alias in node.names
            )


def allowed(name: str, folder: str) -> bool:
    parts = name.split(".")
    if parts[0] == folder or parts[0] not in FOLDERS:
        return True
    return parts[0] in MAY_IMPORT[folder] or ".".join(parts[:2]) in MAY_IMPORT[folder]


@pytest.mark.parametrize("folder", FOLDERS)
def test_layers(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            # `from mesh.peers import x` works in the checkout and nowhere else.
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] not in FOLDERS, path
            elif isinstance(node, ast.Import):
                assert not {a.name.split(".")[0] for a in node.names} & set(FOLDERS), path
        for name in imports(tree, folder):
            assert allowed(name, folder), f"{path} imports {name}"


class Running(ast.NodeTransformer):
    """Leaves out what is imported for types alone."""

    def visit_If(self, node: ast.If) -> ast.AST:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
        return self.generic_visit(node)


def in_circles(sources: Mapping[str, str], folder: str) -> set[str]:
    """The modules, by name, that import themselves by way of others, be it later in a function."""
    needs: dict[str, set[str]] = {}
    for name, source in sources.items():
        found = imports(Running().visit(ast.parse(source)), folder)
        parts = (imported.split(".") for imported in found)
        needs[name] = {p[1] for p in parts if p[0] == folder and p[1:]} & set(sources)
    before = None
    while needs != before:
        before = needs
        needs = {name: own.union(*(before[n] for n in own)) for name, own in before.items()}
    return {name for name, own in needs.items() if name in own}


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_imports_itself_by_way_of_others(folder: str) -> None:
    sources = {path.stem: path.read_text() for path in (ROOT / folder).glob("*.py")}
    assert not in_circles(sources, folder)


def test_circles_are_seen() -> None:
    sources = {
        "a": "from .b import x",
        "b": "def f():\n    from . import c",
        "c": "if TYPE_CHECKING:\n    from .d import y\nelse:\n    from .a import z",
        "d": "from .a import x",
    }
    assert in_circles(sources, "node") == {"a", "b", "c"}
    assert in_circles(sources | {"b": ""}, "node") == set()


@pytest.mark.parametrize("library", ONLY_IN)
def test_foreign_library_stays_where_it_belongs(library: str) -> None:
    for folder in FOLDERS:
        for path in (ROOT / folder).glob("*.py"):
            names = {n.split(".")[0] for n in imports(ast.parse(path.read_text()), folder)}
            if library in names:
                assert f"{folder}/{path.name}" in ONLY_IN[library], f"{path} imports {library}"


def test_environment_is_read_in_one_place() -> None:
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            if path == ROOT / "node" / "config.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                    assert not (isinstance(node.value, ast.Name) and node.value.id == "os"), path


def test_the_detector_sees_each_form() -> None:
    source = (
        "from ..mesh.peers import A\nfrom .. import cache\nfrom . import x\n"
        "from ..providers.base import B\nimport os.path\n"
    )
    found = set(imports(ast.parse(source), "providers"))
    assert found == {"mesh.peers.A", "cache", "providers.x", "providers.base.B", "os.path"}
    assert not allowed("mesh.peers.A", "providers")
    assert allowed("providers.base.B", "cache")
    assert not allowed("providers.echo.Echo", "mesh")
