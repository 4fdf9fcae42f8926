"""The wheel holds every module of the tree, and nothing beside `promptmesh`."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def expected_modules() -> set[str]:
    modules = {"promptmesh/__init__.py", "promptmesh/py.typed"}
    for folder in ("node", "mesh", "providers", "cache"):
        modules |= {f"promptmesh/{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}
    return modules


def test_wheel_equals_the_tree(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == expected_modules()


def test_import_is_light(tmp_path: Path) -> None:
    """`import promptmesh` starts nothing and loads no heavy library."""
    code = (
        "import sys, threading, promptmesh\n"
        "heavy = {'torch', 'transformers', 'libp2p', 'httpx', 'sqlite3'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert threading.active_count() == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
