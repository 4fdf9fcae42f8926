"""Providers by kind: a table of `config.toml` becomes a `Provider`.

A kind that is not known here may be one of another package (`plugins`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from .base import Provider, RequestRejected
from .options import SettingsError, meant, read_options, read_settings
from .plain import PlainProvider, is_provider
from .plugins import load_plugin, plugins

#: Builds a provider from its name and settings. Raises `SettingsError`.
Factory = Callable[[str, Mapping[str, Any]], Provider]
#: Gives the type of a kind's options; it is called, so that nothing is imported before.
OptionsType = Callable[[], type[msgspec.Struct]]


class NoOptions(msgspec.Struct, frozen=True):
    """The options of a kind that has none."""


@runtime_checkable
class Runs(Protocol):
    """A provider with work of its own, beside its answers."""

    async def run(self) -> None:
        """Work until cancelled. The daemon runs it in its nursery."""
        ...


_factories: dict[str, Factory] = {}
_options: dict[str, OptionsType | None] = {}


def register(
    kind: str, factory: Factory, *, options: OptionsType | None = lambda: NoOptions
) -> None:
    """Make a kind known. A later one of the same name takes its place.

    `options` are those of a request that only this kind understands (`options_of`).
    """
    _factories[kind] = factory
    _options[kind] = options


def kinds() -> Sequence[str]:
    """The kinds that can be built, sorted."""
    return sorted({*_factories, *plugins()})


def build(kind: str, name: str, settings: Mapping[str, Any]) -> Provider:
    """Build a provider. Raises `SettingsError`; connects to nothing and starts nothing."""
    factory = _factories.get(kind)
    try:
        if factory is not None:
            return factory(name, settings)
        plugin = load_plugin(kind)
        if plugin is not None:
            return _plugged(plugin, name, settings)
    except ValueError as error:
        raise SettingsError(f"provider {name!r} ({kind}): {error}") from None
    raise SettingsError(f"provider {name!r}: no kind {kind!r}{meant(kind, kinds())}")


def options_of(kind: str) -> type[msgspec.Struct] | None:
    """What a request may say to this kind beside what it says to all.

    None: any field of the dialect it came in, as to a server that knows more fields than we do, or
    to a kind of another package.
    """
    options = _options.get(kind)
    return None if options is None else options()


def options_fault(kind: str, extra: Mapping[str, Any]) -> str:
    """Why a provider of this kind does not take a request with such an `extra`; "": it does."""
    type_ = options_of(kind) if extra else None
    if type_ is None:
        return ""
    try:
        read_options(type_, extra)
    except RequestRejected as error:
        return error.message
    return ""


def _plugged(plugin: Callable[..., Any], name: str, settings: Mapping[str, Any]) -> Provider:
    """The provider of another package. Raises `ValueError`.

    Its `models`, where it is a plain class, are those of the table, and no keyword of the class.
    """
    settings = dict(settings)
    models = settings.pop("models", ())
    try:
        made = plugin(**settings)
        if is_provider(made):
            return made  # type: ignore[no-any-return] # asked just before
        return PlainProvider(name, made, models=models)
    except TypeError as error:  # a keyword that it does not take, or no provider at all
        raise ValueError(str(error)) from error


def _echo(name: str, settings: Mapping[str, Any]) -> Provider:
    from .echo import Echo, EchoSettings

    return Echo(read_settings(EchoSettings, settings, name=name))


def _openai_compatible(name: str, settings: Mapping[str, Any]) -> Provider:
    from .openai_compatible import OpenAICompatible, OpenAICompatibleSettings

    return OpenAICompatible(read_settings(OpenAICompatibleSettings, settings, name=name))


def _openrouter(name: str, settings: Mapping[str, Any]) -> Provider:
    from .openrouter import OpenRouterSettings, openrouter

    return openrouter(read_settings(OpenRouterSettings, settings, name=name))


def _local_hf(name: str, settings: Mapping[str, Any]) -> Provider:
    from .local_hf import LocalHF, LocalHFSettings

    return LocalHF(read_settings(LocalHFSettings, settings, name=name))


def _codex_cli(name: str, settings: Mapping[str, Any]) -> Provider:
    from .codex_cli import CodexCli
    from .codex_settings import CodexSettings

    return CodexCli(read_settings(CodexSettings, settings, name=name))


def _codex_options() -> type[msgspec.Struct]:
    from .codex_settings import CodexOptions

    return CodexOptions


def _gemini_cli(name: str, settings: Mapping[str, Any]) -> Provider:
    from .gemini_settings import GeminiSettings

    said = read_settings(GeminiSettings, settings, name=name)
    if said.way == "http":
        from .gemini_http import GeminiHttp

        return GeminiHttp(said)
    from .gemini_cli import GeminiCli

    return GeminiCli(said)


def _gemini_options() -> type[msgspec.Struct]:
    from .gemini_options import GeminiOptions

    return GeminiOptions


def _claude_code(name: str, settings: Mapping[str, Any]) -> Provider:
    from .claude_settings import ClaudeSettings

    said = read_settings(ClaudeSettings, settings, name=name)
    if said.way == "http":
        from .anthropic_http import AnthropicHttp

        return AnthropicHttp(said)
    from .claude_cli import ClaudeCli

    return ClaudeCli(said)


def _claude_options() -> type[msgspec.Struct]:
    from .anthropic_messages import ClaudeOptions

    return ClaudeOptions


def _copilot_cli(name: str, settings: Mapping[str, Any]) -> Provider:
    from .copilot_cli import CopilotCli
    from .copilot_settings import CopilotSettings

    return CopilotCli(read_settings(CopilotSettings, settings, name=name))


def _copilot_sdk(name: str, settings: Mapping[str, Any]) -> Provider:
    from .copilot_sdk import CopilotSdk
    from .copilot_settings import CopilotSettings

    return CopilotSdk(read_settings(CopilotSettings, settings, name=name))


def _copilot_options() -> type[msgspec.Struct]:
    from .copilot_settings import CopilotOptions

    return CopilotOptions


register("echo", _echo)
register("openai_compatible", _openai_compatible, options=None)
register("openrouter", _openrouter, options=None)
register("local_hf", _local_hf)
register("codex_cli", _codex_cli, options=_codex_options)
register("copilot_cli", _copilot_cli, options=_copilot_options)
register("copilot_sdk", _copilot_sdk, options=_copilot_options)
register("gemini_cli", _gemini_cli, options=_gemini_options)
register("claude_code", _claude_code, options=_claude_options)
