"""The vendors' programs as the tests use them: how a provider is pointed at each, and its failures.

A table of `config.toml` makes each of them talk with the vendors' stub (`vendors`), whose mode its
address says, or stand for one that did (`recordings`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

CLIS = Path(__file__).parent.parent / "build" / "clis"
#: Holds the key of all of them, which must be seen nowhere.
KEY_VARIABLE = "CLI_PROGRAMS_KEY"
KEY = "sk-nobody-may-see-this-0123456789"
MODEL = "stub-model"


class CliProgram(NamedTuple):
    """One of them."""

    kind: str
    #: The real one, below the folder in which `scripts/install-clis` installs them.
    installed: str
    #: The keys of its table, from the program's path and the address of the stub.
    settings: Callable[[str, str], Mapping[str, Any]]
    #: A pattern of what it puts before a prompt.
    before: str = ""
    #: It drops white space at the end of a prompt.
    drops_end: bool = False
    #: One process answers all requests.
    persistent: bool = False
    #: When it runs: `always` for real; by its recordings, and with `--interop` for real
    #: (`recorded`); only with that (`interop`).
    tier: Literal["always", "recorded", "interop"] = "recorded"

    @property
    def path(self) -> Path:
        """The real one."""
        return CLIS / self.installed

    def table(self, name: str, path: Path, base: str, **more: Any) -> str:
        """Its table of `config.toml`. What JSON writes of such values is TOML, too."""
        values = {"kind": self.kind, "name": name, "models": [MODEL], "api_key_env": KEY_VARIABLE}
        values |= {**self.settings(str(path), base), **more}
        return "[[providers]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items())


PROGRAMS: Mapping[str, CliProgram] = {
    "codex": CliProgram(
        "codex_cli",
        "bin/codex",
        lambda path, base: {"command": path, "base_url": f"{base}/v1"},
        persistent=True,
        tier="always",
    ),
    # As most people have it, and a newer one; the provider finds the program behind the wrapper.
    "codex-npm": CliProgram(
        "codex_cli",
        "codex-npm/node_modules/@openai/codex/bin/codex.js",
        lambda path, base: {"command": path, "base_url": f"{base}/v1"},
        persistent=True,
        tier="interop",
    ),
    # A process for each answer, as of a version that is too old to be kept.
    "codex-exec": CliProgram(
        "codex_cli",
        "bin/codex",
        lambda path, base: {"command": path, "base_url": f"{base}/v1", "mode": "exec"},
        tier="interop",
    ),
    "copilot": CliProgram(
        "copilot_cli",
        "bin/copilot",
        lambda path, base: {"command": path, "base_url": f"{base}/v1"},
        before=r"<current_datetime>[^<]*</current_datetime>\n\n(user: )?",
        drops_end=True,
    ),
    "copilot_sdk": CliProgram(
        "copilot_sdk",
        "bin/copilot",
        lambda path, base: {"command": path, "base_url": f"{base}/v1"},
        before=r"<current_datetime>[^<]*</current_datetime>\n\n",
        drops_end=True,
        persistent=True,
        tier="interop",
    ),
    "gemini": CliProgram(
        "gemini_cli",
        "bin/gemini",
        lambda path, base: {"mode": "cli", "command": path, "base_url": base},
        before=r"\n?",
    ),
    "claude": CliProgram(
        "claude_code",
        "bin/claude",
        lambda path, base: {"mode": "cli", "command": path, "base_url": base},
        before=r"\n?",
    ),
}
