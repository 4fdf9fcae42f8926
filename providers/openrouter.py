"""OpenRouter: one key to the models of many vendors. It speaks the OpenAI dialect."""

from __future__ import annotations

import msgspec

from .openai_compatible import OpenAICompatible, OpenAICompatibleSettings

BASE_URL = "https://openrouter.ai/api/v1"


class OpenRouterSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Its key never appears in logs or errors."""

    name: str = "openrouter"
    api_key: str = ""
    base_url: str = BASE_URL
    #: Empty: all that it lists, which are hundreds.
    models: tuple[str, ...] = ()
    #: Which program asks, for its statistics: a URL, and a name.
    http_referer: str = ""
    app_title: str = ""

    def __repr__(self) -> str:
        return f"OpenRouterSettings(name={self.name!r}, base_url={self.base_url!r})"


def openrouter(settings: OpenRouterSettings) -> OpenAICompatible:
    """The provider. Raises `ValueError` that names the wrong setting; connects to nothing."""
    if not settings.api_key:
        raise ValueError("there is no key: set OPENROUTER_API_KEY (https://openrouter.ai/keys)")
    told = {"HTTP-Referer": settings.http_referer, "X-Title": settings.app_title}
    return OpenAICompatible(
        OpenAICompatibleSettings(
            name=settings.name,
            base_url=settings.base_url,
            api_key=settings.api_key,
            models=settings.models,
            headers={name: value for name, value in told.items() if value},
            egress=True,  # also by a proxy on this machine
        )
    )
