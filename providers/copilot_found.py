"""Is Copilot on this machine, in which version, and who would pay? As far as files tell; no process
is started, and nothing is ever downloaded.

npm puts a wrapper on the PATH, which starts the real program and dies without it; so the real one
is started. It is also the runtime of the SDK.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from .base import Health
from .cli_found import find, version_in, version_text
from .copilot_login import LOG_IN, login_of
from .copilot_settings import COMMAND, CopilotSettings

#: The oldest that this was tried with: its flags and its events change often.
OLDEST = (1, 0, 102)
NOT_INSTALLED = Health(
    state="unavailable", reason="not installed", hint="npm install -g @github/copilot"
)
_MACHINES = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}
_SYSTEMS = {"linux": ("linux", "linuxmusl"), "darwin": ("darwin",)}
#: A `package.json` is read so far, in bytes.
_MAX_PACKAGE = 64 * 1024


def look(settings: CopilotSettings) -> Health:
    """Why it can surely not be asked; otherwise `ready`, as far as files tell."""
    program = copilot_program(settings)
    if program is None:
        return NOT_INSTALLED
    health = look_at_version(packaged_version(program))
    if health.state != "ready":
        return health
    login = login_of(settings)
    if login.kind == "none":
        return Health(state="unavailable", reason=login.reason, hint=LOG_IN)
    return Health()


def look_at_version(version: tuple[int, ...]) -> Health:
    """Is it new enough? One that is not known is."""
    if version and version < OLDEST:
        return Health(
            state="unavailable",
            reason=f"version {version_text(version)} is too old",
            hint="npm install -g @github/copilot@latest",
        )
    return Health()


def copilot_program(settings: CopilotSettings) -> Path | None:
    """The program that is configured, else what the SDK has downloaded; None: there is none."""
    found = find(settings.command, settings.environment)
    if found is not None:
        return native(Path(found))
    if settings.command != COMMAND:
        return None
    return next(_downloaded(settings.environment), None)


def native(program: Path) -> Path:
    """The real program behind npm's wrapper; any other is what it is."""
    real = program.resolve()
    if real.name != "npm-loader.js":
        return program
    for package in _packages():
        # npm puts it beside the wrapper's package, or inside it.
        for above in (real.parent.parent, real.parent / "node_modules" / "@github"):
            found = above / package / "copilot"
            if os.access(found, os.X_OK):
                return found
    return program


def _packages() -> Iterator[str]:
    machine = _MACHINES.get(platform.machine().lower(), platform.machine())
    for system in _SYSTEMS.get(sys.platform, (sys.platform,)):
        yield f"copilot-{system}-{machine}"


def _downloaded(environment: Mapping[str, str]) -> Iterator[Path]:
    """What the SDK keeps, the newest first."""
    home = environment.get("HOME")
    if not home:
        return
    found = Path(home).glob(".cache/github-copilot-sdk/cli/*/prebuilds/*/copilot")
    for path in sorted(found, key=lambda path: version_in(path.parts[-4]), reverse=True):
        if os.access(path, os.X_OK):
            yield path


def packaged_version(program: Path) -> tuple[int, ...]:
    """The version that the package around the program says; empty where that is not known."""
    package = program.resolve().parent / "package.json"
    try:
        with package.open("rb") as file:
            told = msgspec.json.decode(file.read(_MAX_PACKAGE))
    except (OSError, ValueError):
        return ()
    if not isinstance(told, dict) or not str(told.get("name")).startswith("@github/copilot"):
        return ()
    return version_in(str(told.get("version")))
