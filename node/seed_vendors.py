"""The vendors' programs as providers of the Python API: one entry for each kind.

An entry says what the variables of `generate_text` mean for its vendor, and whether files show that
it can surely not be used: that is asked at each call that names no provider, so it starts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..providers.base import Health
from ..providers.variables import environment_of
from .config_values import Secret
from .seed_settings import RouterSettings


def _nothing(said: RouterSettings) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Vendor:
    """One kind. Each part is called only when it is needed, and imports what it needs then."""

    #: The model where a call names none; "": the first that the provider lists.
    model: Callable[[RouterSettings], str]
    #: From the environment that the provider gets, and the options of its table.
    look: Callable[[Mapping[str, str], Mapping[str, Any]], Health]
    #: Keys of its table in `config.toml`, as the variables set them.
    options: Callable[[RouterSettings], Mapping[str, Any]] = _nothing
    #: The key of a variable that is not among those the provider sees (`providers.variables`).
    api_key: Callable[[RouterSettings], Secret | None] = lambda said: None


def obstacle(kind: str, environment: Mapping[str, str], options: Mapping[str, Any]) -> str:
    """Why a provider of that kind can surely not be used, and what to do; "": it may be."""
    vendor = VENDORS.get(kind)
    if vendor is None:
        return ""
    health = vendor.look(environment_of(kind, environment), options)
    if health.state != "unavailable":
        return ""
    return f"{health.reason}: {health.hint}" if health.hint else health.reason


# --- each of them


def _look_for_codex(environment: Mapping[str, str], options: Mapping[str, Any]) -> Health:
    from ..providers.codex_found import COMMAND, look

    has_own_server = bool(options.get("base_url"))
    return look(environment, str(options.get("command") or COMMAND), needs_login=not has_own_server)


def _options_of_codex(said: RouterSettings) -> Mapping[str, Any]:
    return {"base_url": said.codex_base_url} if said.codex_base_url else {}


def _look_for_copilot(environment: Mapping[str, str], options: Mapping[str, Any]) -> Health:
    from ..providers.copilot_found import look
    from ..providers.copilot_settings import COMMAND, CopilotSettings, with_environment

    said = CopilotSettings(
        name="",
        command=str(options.get("command") or COMMAND),
        base_url=str(options.get("base_url") or ""),
        environment=dict(environment),
    )
    try:
        return look(with_environment(said))
    except ValueError as error:  # a variable of Copilot's that makes no sense
        return Health(state="unavailable", reason=str(error))


def _copilot_options(said: RouterSettings) -> Mapping[str, Any]:
    seconds = said.copilot_sdk_timeout
    return {"read_timeout": seconds} if seconds else {}


def _look_for_gemini(environment: Mapping[str, str], options: Mapping[str, Any]) -> Health:
    from ..providers.gemini_found import COMMAND, look
    from ..providers.gemini_settings import KEYS, NO_KEY

    keyed, mode = any(environment.get(name) for name in KEYS), options.get("mode", "auto")
    if mode == "http" or (keyed and mode == "auto"):
        return Health() if keyed else Health(state="unavailable", reason=NO_KEY)
    return look(environment, str(options.get("command") or COMMAND), keyed=keyed)


def _look_for_claude(environment: Mapping[str, str], options: Mapping[str, Any]) -> Health:
    from ..providers.claude_found import COMMAND, look
    from ..providers.claude_settings import KEY, NO_KEY, TOKEN

    keyed = any(environment.get(name) for name in (KEY, TOKEN))
    mode = options.get("mode", "auto")
    if mode == "http" or (keyed and mode == "auto"):
        return Health() if keyed else Health(state="unavailable", reason=NO_KEY)
    return look(environment, str(options.get("command") or COMMAND), keyed=keyed)


VENDORS: Mapping[str, Vendor] = {
    "codex_cli": Vendor(
        model=lambda said: said.codex_cli_model or said.codex_model,
        look=_look_for_codex,
        options=_options_of_codex,
    ),
    "copilot_cli": Vendor(model=lambda said: "", look=_look_for_copilot),
    "copilot_sdk": Vendor(
        model=lambda said: said.copilot_sdk_model,
        look=_look_for_copilot,
        options=_copilot_options,
    ),
    "gemini_cli": Vendor(model=lambda said: said.gemini_model, look=_look_for_gemini),
    "claude_code": Vendor(model=lambda said: said.claude_model, look=_look_for_claude),
}
