"""Which variables of the environment a provider of each kind may see: its vendor's, and few others.

The environment is read in `node.config`, and handed to each kind in this part only: no vendor's
program gets the key of another, and what is not named here reaches none of them.
"""

from __future__ import annotations

from collections.abc import Mapping

#: What every program needs to run in this place and reach the network.
BASE = frozenset(
    {
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "LANG",
        "LANGUAGE",
        "TZ",
        "TMPDIR",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "NO_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "no_proxy",
    }
)
#: With what such a variable's name begins.
BASE_PREFIX = "LC_"
_COPILOT = (
    *("COPILOT_HOME", "COPILOT_CLI_PATH", "COPILOT_MODEL"),
    *("COPILOT_GITHUB_TOKEN", "GH_TOKEN", "GITHUB_TOKEN", "COPILOT_GH_HOST", "GH_HOST"),
    *("COPILOT_PROVIDER_BASE_URL", "COPILOT_PROVIDER_API_KEY"),
    *("COPILOT_PROVIDER_TYPE", "COPILOT_PROVIDER_WIRE_API"),
    # Where the login of GitHub's own program is, and the keychain.
    *("GH_CONFIG_DIR", "XDG_CONFIG_HOME", "DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR"),
)
#: Those of each vendor: where its program keeps its login, and its keys.
VARIABLES: Mapping[str, tuple[str, ...]] = {
    "codex_cli": ("CODEX_HOME", "CODEX_API_KEY"),
    "copilot_cli": _COPILOT,
    "copilot_sdk": _COPILOT,
    "gemini_cli": (
        "GEMINI_CLI_HOME",
        "GEMINI_API_KEY",
        "GOOGLE_API_KEY",
        "GOOGLE_GEMINI_BASE_URL",
        "GOOGLE_CLOUD_PROJECT",
    ),
    "claude_code": (
        "CLAUDE_CONFIG_DIR",
        "CLAUDE_CODE_OAUTH_TOKEN",
        "ANTHROPIC_API_KEY",
        "ANTHROPIC_AUTH_TOKEN",
        "ANTHROPIC_BASE_URL",
    ),
}


def environment_of(kind: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that a provider of that kind may see; what is empty is not set."""
    own = VARIABLES.get(kind, ())
    return {
        name: value
        for name, value in environment.items()
        if value and (name in BASE or name.startswith(BASE_PREFIX) or name in own)
    }
