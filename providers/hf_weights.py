"""The digest of a model's weights, and a notebook for what takes long to find out."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

#: The first kind that is there holds the weights.
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")
#: Fields of config.json that say how the file came about, not what the model computes.
INCIDENTAL = ("_name_or_path", "transformers_version")


class Notebook:
    """Remembers facts over restarts in one small JSON file; without a folder it remembers nothing.

    Facts that cannot be read or written are found out again: only a warning tells.
    """

    def __init__(self, folder: str | None) -> None:
        self._path = Path(folder) / "local_hf.json" if folder else None
        self._facts: dict[str, Any] = {}
        if self._path is None:
            return
        try:
            facts = json.loads(self._path.read_text())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read: %s", self._path, error)
            return
        if isinstance(facts, dict):
            self._facts = facts

    def recall(self, key: str) -> Any:
        """The fact, or None."""
        return self._facts.get(key)

    def note(self, key: str, fact: Any) -> None:
        """Keep a fact that JSON can express."""
        self._facts[key] = fact
        if self._path is None:
            return
        scratch = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps(self._facts, indent=1))
            scratch.replace(self._path)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._path, error)


def weights_digest(folder: Path, notebook: Notebook, tell: Callable[[str], None]) -> str:
    """`sha256:` and a digest over the names, sizes and digests of the weight files, and over the
    configuration without what is incidental in it. `tell` hears of each file."""
    digest = hashlib.sha256()
    files = weight_files(folder)
    for number, path in enumerate(files, 1):
        tell(f"checking the weights, file {number} of {len(files)}")
        line = f"{path.name} {path.stat().st_size} {file_digest(path, notebook)}\n"
        digest.update(line.encode())
    config = json.loads((folder / "config.json").read_bytes())
    for field in INCIDENTAL:
        config.pop(field, None)
    digest.update(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    return f"sha256:{digest.hexdigest()}"


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, by name."""
    for pattern in WEIGHT_FILES:
        if found := sorted(folder.glob(pattern)):
            return found
    return []


def file_digest(path: Path, notebook: Notebook) -> str:
    """sha256 of a file, remembered as long as its size and time of change stay the same."""
    state = path.stat()
    key = f"sha256 {path} {state.st_size} {state.st_mtime_ns}"
    known = notebook.recall(key)
    if isinstance(known, str):
        return known
    with path.open("rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
    notebook.note(key, value)
    return value
