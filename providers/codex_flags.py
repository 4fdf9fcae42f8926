"""How Codex is started: as a model and nothing else.

Without these settings it sends 40 kB of instructions and eight tools along with a prompt, looks up
four hosts, tries again up to thirty times, and waits for ever where nobody listens. They were tried
with 0.104.0, 0.120.0, 0.163.0 and 0.169.0; what a version does not know it passes over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .codex_found import home, keyring, login_file
from .codex_settings import CodexOptions, CodexSettings
from .http_address import parse_base_url
from .private_folder import Folder

#: The oldest version that was tried, and the oldest whose process can be kept.
OLDEST = (0, 104, 0)
KEPT_SINCE = (0, 120, 0)
#: Characters of a prompt that it takes.
MAX_PROMPT = 1 << 20
#: System text for a process that takes none: without any it sends its own, of 17 kB.
NO_SYSTEM = "You are a helpful assistant."
#: What Codex calls the place that it asks.
PLACE = "promptmesh"
#: The variable that its key is handed over in.
KEY_VARIABLE = "PROMPTMESH_CODEX_KEY"

_SETTINGS: Mapping[str, object] = {
    "model_provider": PLACE,
    "approval_policy": "never",
    "web_search": "disabled",
    "include_permissions_instructions": False,
    "include_apps_instructions": False,
    "include_collaboration_mode_instructions": False,
    "include_environment_context": False,
    "project_doc_max_bytes": 0,
    "skills.bundled.enabled": False,
    "analytics.enabled": False,
    "feedback.enabled": False,
    "otel.metrics_exporter": "none",
    "check_for_update_on_startup": False,
    "history.persistence": "none",
}
_FEATURES = (
    "shell_tool",
    "unified_exec",
    "multi_agent",
    "goals",
    "view_image",
    "apps",
    "plugins",
    "hooks",
    "shell_snapshot",
    "tool_suggest",
    "sleep_tool",
    "image_generation",
    "unbounded_connection_retries",
)


def configuration(settings: CodexSettings) -> list[str]:
    """The arguments that all its ways of working have in common. No key is among them."""
    said = [f"{name}={_toml(value)}" for name, value in _SETTINGS.items()]
    said += [f"features.{name}=false" for name in _FEATURES]
    said.append(f"model_providers.{PLACE}={{{_place(settings)}}}")
    return [word for each in said for word in ("-c", each)]


def _place(settings: CodexSettings) -> str:
    """Whom it asks, with no retries: whoever asks us decides about those."""
    values: dict[str, object] = {
        "name": "OpenAI",
        "wire_api": "responses",
        "request_max_retries": 0,
        "stream_max_retries": 0,
        "stream_idle_timeout_ms": int(settings.read_timeout * 1000),
    }
    if settings.needs_login:
        values["requires_openai_auth"] = True
    else:
        values["base_url"] = settings.url
        if settings.key:
            values["env_key"] = KEY_VARIABLE
    return ",".join(f"{name}={_toml(value)}" for name, value in values.items())


def _toml(value: object) -> str:
    """What JSON writes of a text, a number or a truth value is TOML, too."""
    return json.dumps(value)


def kept_command(program: str, settings: CodexSettings) -> list[str]:
    """The process that answers one request after the other."""
    return [program, "app-server", *configuration(settings)]


def exec_command(
    program: str,
    settings: CodexSettings,
    folder: Folder,
    model: str,
    options: CodexOptions,
    system: Path,
) -> list[str]:
    """The process for one answer; its prompt is its input."""
    command = [
        *(program, "exec", "--json", "--ephemeral", "--skip-git-repo-check"),
        *("-s", "read-only", "--color", "never", "-C", str(folder.work), "-m", model),
        *configuration(settings),
        *("-c", f"model_instructions_file={_toml(str(system))}"),
    ]
    for name, value in (
        ("model_reasoning_effort", options.reasoning_effort),
        ("model_reasoning_summary", options.reasoning_summary),
    ):
        if value is not None:
            command += ["-c", f"{name}={_toml(value)}"]
    return [*command, "-"]


def environment(settings: CodexSettings, folder: Folder) -> dict[str, str]:
    """What it sees. Its home is a private one that has the user's login and nothing else of theirs:
    no instructions, no servers of tools. A login in the keyring belongs to the home it is of."""
    own = settings.environment
    seen = {name: value for name, value in own.items() if name != "CODEX_API_KEY"}
    if not (settings.needs_login and keyring(own)):
        private = folder.path / "home"
        private.mkdir(exist_ok=True)
        if settings.needs_login:
            # Codex writes a login that it renews through this.
            (private / "auth.json").symlink_to(login_file(own).absolute())
        seen["CODEX_HOME"] = str(private)
    else:
        seen["CODEX_HOME"] = str(home(own))
    if settings.key:
        seen[KEY_VARIABLE] = settings.key
    if settings.base_url and parse_base_url(settings.base_url).private:
        seen["NO_PROXY"] = ",".join(filter(None, (own.get("NO_PROXY"), "127.0.0.1,localhost")))
    return seen
