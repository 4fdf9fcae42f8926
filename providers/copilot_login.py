"""Who pays for Copilot's answers: a token, a login that was made before, or a server of one's own.

A child gets a home of its own. Of the user's it gets `config.json` alone, which says who is logged
in, and where no keychain is holds the token: with the whole home would come the user's MCP servers,
hooks and plugins, which are no part of an answer.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from .copilot_settings import DEFAULT_MODEL, CopilotSettings

#: In the order in which Copilot looks at them.
TOKENS = ("COPILOT_GITHUB_TOKEN", "GH_TOKEN", "GITHUB_TOKEN")
#: Classic personal access tokens, which Copilot does not take.
CLASSIC = "ghp_"
LOG_IN = (
    "log in: copilot login; or set COPILOT_GITHUB_TOKEN to a fine-grained token with the "
    'permission "Copilot Requests"'
)
CONFIG = "config.json"
#: Variables that were read already, or are set anew for a child.
_OURS = frozenset(
    {
        *TOKENS,
        "COPILOT_CLI_PATH",
        "COPILOT_MODEL",
        "COPILOT_PROVIDER_API_KEY",
        "COPILOT_PROVIDER_BASE_URL",
        "COPILOT_PROVIDER_TYPE",
        "COPILOT_PROVIDER_WIRE_API",
    }
)
_MAX_CONFIG = 1 << 20
_MAX_HOSTS = 1 << 18


class Login(NamedTuple):
    """How a child will be known."""

    kind: Literal["server", "token", "saved", "gh", "none"]
    token: str = ""
    #: Of a saved login: the file that says so.
    config: Path | None = None
    #: Of none: why not.
    reason: str = ""


def login_of(settings: CopilotSettings) -> Login:
    """The login that there is. Looks at files only, and proves nothing."""
    environment = settings.environment
    if settings.base_url:
        return Login("server")
    tokens = [settings.api_key, *(environment.get(name) for name in TOKENS)]
    given = [token for token in tokens if token]
    usable = next((token for token in given if not token.startswith(CLASSIC)), None)
    if usable is not None:
        return Login("token", token=usable)
    config = copilot_home(environment) / CONFIG
    if _someone_is_in(config):
        return Login("saved", config=config)
    if _gh_is_in(environment):
        return Login("gh")
    classic = "its token is a classic one (ghp_), which Copilot does not take"
    return Login("none", reason=classic if given else "nobody is logged in")


def copilot_home(environment: Mapping[str, str]) -> Path:
    """Where the user's Copilot keeps its things."""
    own = environment.get("COPILOT_HOME")
    return Path(own) if own else Path(environment.get("HOME", "/")) / ".copilot"


def _someone_is_in(config: Path) -> bool:
    said = _read_config(config)
    return bool(said.get("loggedInUsers") or said.get("authTokens") or said.get("copilotTokens"))


def _read_config(config: Path) -> dict[str, Any]:
    """It is JSON below lines of comment."""
    try:
        with config.open("rb") as file:
            lines = file.read(_MAX_CONFIG).splitlines()
        said = msgspec.json.decode(b"\n".join(ln for ln in lines if not ln.startswith(b"//")))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _gh_is_in(environment: Mapping[str, str]) -> bool:
    """Is somebody logged in with GitHub's other program, which Copilot asks where it is there?"""
    if shutil.which("gh", path=environment.get("PATH", "")) is None:
        return False
    home = Path(environment.get("HOME", "/"))
    above = Path(environment.get("XDG_CONFIG_HOME") or home / ".config")
    folder = Path(environment.get("GH_CONFIG_DIR") or above / "gh")
    try:
        with (folder / "hosts.yml").open(encoding="utf-8", errors="replace") as file:
            return re.search(r"^\S+:", file.read(_MAX_HOSTS), re.MULTILINE) is not None
    except OSError:
        return False


def secrets_of(settings: CopilotSettings) -> list[str]:
    """What no error may hold."""
    tokens = [settings.environment.get(name) for name in TOKENS]
    return [secret for secret in (settings.api_key, *tokens) if secret]


def child_environment(settings: CopilotSettings, login: Login, home: Path) -> dict[str, str]:
    """What a child is started with, but for a key. Copies a saved login into its `home`.

    Raises `OSError`.
    """
    kept = {name: v for name, v in settings.environment.items() if name not in _OURS}
    kept |= {"COPILOT_HOME": str(home), "COPILOT_AUTO_UPDATE": "false"}
    if settings.cache_dir:
        kept["COPILOT_CACHE_HOME"] = str(Path(settings.cache_dir) / "copilot")
    if login.kind == "server":
        kept |= {"COPILOT_OFFLINE": "true", "COPILOT_PROVIDER_BASE_URL": settings.base_url}
        # It wants one at its start already, whichever it is asked for then.
        kept["COPILOT_MODEL"] = next(iter(settings.models), DEFAULT_MODEL)
        kept["NO_PROXY"] = ",".join(filter(None, (kept.get("NO_PROXY"), "127.0.0.1,localhost")))
    home.mkdir(mode=0o700, exist_ok=True)
    if login.config is not None:
        copy = home / CONFIG
        shutil.copyfile(login.config, copy)
        copy.chmod(0o600)
    else:
        # Whoever was named pays, and nobody whom a keychain happens to know.
        kept["COPILOT_DISABLE_KEYTAR"] = "1"
    return kept
