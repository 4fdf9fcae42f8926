"""Is the `claude` command on this machine, and logged in?

`look` tells as far as files do, and starts nothing; `ask` starts the command twice, which takes
about half a second, and spends nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import trio

from .base import Health
from .child import Outcome, run_briefly
from .cli_found import find, version_in, version_text

COMMAND = "claude"
#: The oldest that this was tried with.
OLDEST = (2, 1, 197)
#: Options that not all of them have, and the oldest version that is known to have each: one that
#: does not know an option does nothing at all.
SINCE: Mapping[str, tuple[int, ...]] = {"--restricted": (2, 1, 330)}
#: The variable with the login that `claude setup-token` makes.
LOGIN = "CLAUDE_CODE_OAUTH_TOKEN"
#: Seconds for both commands. `Provider.check` may take 2.
BRIEF = 1.8
#: It looks nothing up in the network.
QUIET = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1"}
NOT_INSTALLED = Health(
    state="unavailable",
    reason="not installed",
    hint="npm install -g @anthropic-ai/claude-code, or set ANTHROPIC_API_KEY",
)
NOT_LOGGED_IN = Health(
    state="unavailable",
    reason="not logged in",
    hint="start `claude` and type `/login`, or set ANTHROPIC_API_KEY",
)


def look(environment: Mapping[str, str], command: str = COMMAND, *, keyed: bool = False) -> Health:
    """Why the command can surely not be asked; otherwise `ready`, as far as files tell. `keyed`: it
    needs no login."""
    if find(command, environment) is None:
        return NOT_INSTALLED
    # On a Mac the login is in the keychain, which only the command itself looks into.
    told = environment.get(LOGIN) or login_file(environment).exists() or sys.platform == "darwin"
    return Health() if keyed or told else NOT_LOGGED_IN


def login_file(environment: Mapping[str, str]) -> Path:
    """Where the command keeps its login, except on a Mac."""
    said = environment.get("CLAUDE_CONFIG_DIR")
    if said:
        return Path(said).expanduser() / ".credentials.json"
    return Path(environment.get("HOME") or "~").expanduser() / ".claude" / ".credentials.json"


class Said(NamedTuple):
    """What the command says of itself; empty: no version."""

    version: tuple[int, ...]
    logged_in: bool

    def has(self, option: str) -> bool:
        """Does it know one of the options that not all have?"""
        return self.version >= SINCE[option]

    @property
    def health(self) -> Health:
        """Can it be asked?"""
        if self.version and self.version < OLDEST:
            return Health(
                state="unavailable",
                reason=f"version {version_text(self.version)} is too old",
                hint="npm install -g @anthropic-ai/claude-code@latest",
            )
        return Health() if self.logged_in else NOT_LOGGED_IN


async def ask(program: str, environment: Mapping[str, str], *, keyed: bool) -> Said:
    """What the command says of its version and its login. Raises `OSError`."""
    told: dict[str, Outcome] = {}

    async def run(*words: str) -> None:
        told[words[0]] = await run_briefly([program, *words], {**environment, **QUIET})

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, "--version")
        if not keyed:
            nursery.start_soon(run, "auth", "status")
    # 0 and 1 are what it says; any other code is of a version that knows no such command.
    out = not keyed and told["auth"].code == 1 and "loggedIn" in told["auth"].output
    return Said(version_in(told["--version"].output), logged_in=not out)
