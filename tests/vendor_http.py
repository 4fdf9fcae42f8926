"""The vendors' models by HTTP: at the stub of the vendors, and at a server that a test scripts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pytest
import trio
from asking import ask
from fakes_http import Script, ScriptedServer, scripted_server
from vendors import VendorServer, vendors

from promptmesh.providers.anthropic_http import AnthropicHttp
from promptmesh.providers.base import (
    GenerateError,
)
from promptmesh.providers.claude_settings import ClaudeSettings
from promptmesh.providers.gemini_http import GeminiHttp
from promptmesh.providers.gemini_settings import GeminiSettings

P = TypeVar("P", AnthropicHttp, GeminiHttp)


@dataclass(frozen=True)
class HttpVendor(Generic[P]):
    """A vendor, and how its provider is made of settings."""

    name: str
    key: str
    make: Callable[..., P]

    @asynccontextmanager
    async def at(self, base_url: str, **fields: Any) -> AsyncIterator[P]:
        values = {"name": self.name, "base_url": base_url, "api_key": self.key} | fields
        async with aclosing(self.make(**values)) as provider:
            yield provider

    @asynccontextmanager
    async def at_stub(
        self, mode: str = "ok", **fields: Any
    ) -> AsyncIterator[tuple[VendorServer, P]]:
        with trio.fail_after(120):
            async with vendors() as server, self.at(server.base(mode), **fields) as provider:
                yield server, provider

    @asynccontextmanager
    async def scripted(
        self, *scripts: Script, **fields: Any
    ) -> AsyncIterator[tuple[ScriptedServer, P]]:
        async with scripted_server(*scripts) as server, self.at(server.origin, **fields) as found:
            yield server, found

    async def failure(self, mode: str) -> GenerateError:
        async with self.at_stub(mode) as (_, provider):
            with pytest.raises(GenerateError) as caught:
                await ask(provider)
        assert self.key not in str(caught.value)
        return caught.value


CLAUDE = HttpVendor(
    "claude", "sk-ant-abcdef0123456789", lambda **said: AnthropicHttp(ClaudeSettings(**said))
)
GEMINI = HttpVendor(
    "gemini", "AIza-abcdef0123456789", lambda **said: GeminiHttp(GeminiSettings(**said))
)
