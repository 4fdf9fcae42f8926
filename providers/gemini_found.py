"""Is the `gemini` command on this machine, and logged in? As far as files tell; nothing is started:
`gemini --version` alone takes 2 to 5 s."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .base import Health
from .cli_found import find, version_in, version_text

COMMAND = "gemini"
#: The oldest that this was tried with.
OLDEST = (0, 61)
NOT_INSTALLED = Health(
    state="unavailable",
    reason="not installed",
    hint="npm install -g @google/gemini-cli, or set GEMINI_API_KEY",
)
NOT_LOGGED_IN = Health(
    state="unavailable",
    reason="not logged in",
    hint="start `gemini` and choose `Sign in with Google`, or set GEMINI_API_KEY",
)
NO_NODE = Health(
    state="unavailable",
    reason="the command needs Node.js, and there is none in PATH",
    hint="install Node.js 20 or later (https://nodejs.org)",
)
#: A `package.json` is read so far, in bytes.
_MAX_PACKAGE = 64 * 1024


def look(environment: Mapping[str, str], command: str = COMMAND, *, keyed: bool = False) -> Health:
    """Why the command can surely not be asked; otherwise `ready`, as far as files tell. `keyed`: it
    needs no login."""
    path = find(command, environment)
    if path is None:
        return NOT_INSTALLED
    if Path(path).resolve().suffix == ".js" and find("node", environment) is None:
        return NO_NODE
    version = installed_version(path)
    if version and version < OLDEST:
        return Health(
            state="unavailable",
            reason=f"version {version_text(version)} is too old",
            hint="npm install -g @google/gemini-cli@latest",
        )
    if not keyed and not login_file(environment).exists():
        return NOT_LOGGED_IN
    return Health()


def installed_version(path: str) -> tuple[int, ...]:
    """Its version, by the package that it is a part of; empty where that is not known."""
    package = Path(path).resolve().parent.parent / "package.json"
    try:
        with package.open("rb") as file:
            told = json.loads(file.read(_MAX_PACKAGE))
    except (OSError, ValueError):
        return ()
    if not isinstance(told, dict) or told.get("name") != "@google/gemini-cli":
        return ()
    return version_in(str(told.get("version")))


def home(environment: Mapping[str, str]) -> Path:
    """Where the command keeps its settings and its login."""
    said = environment.get("GEMINI_CLI_HOME") or environment.get("HOME") or "~"
    return Path(said).expanduser() / ".gemini"


def login_file(environment: Mapping[str, str]) -> Path:
    """The login of `Sign in with Google`."""
    return home(environment) / "oauth_creds.json"
