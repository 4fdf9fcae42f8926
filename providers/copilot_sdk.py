"""`copilot_sdk`: the runtime of Copilot's SDK, one process for all answers.

It is started when it is first asked, and ended when nobody has asked for a while. What the SDK for
Python would say to it is said here, in trio (`copilot_wire`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from .base import (
    Answering,
    Embedding,
    EmbedRequest,
    GenerateRequest,
    Health,
    ModelOffer,
    ProviderUnavailable,
)
from .cli_prompt import cli_prompt
from .copilot_events import CopilotEvents
from .copilot_keeper import CopilotKeeper
from .copilot_program import MAX_PROMPT, CopilotProgram
from .copilot_runtime import CopilotRuntime
from .copilot_session import SessionAnswer
from .copilot_settings import CopilotOptions, CopilotSettings
from .options import read_options

#: Seconds for `run` to begin, where the provider is asked at once.
RUN_TIME = 5.0


class CopilotSdk:
    """A `Provider`. `run` keeps its runtime, and ends it."""

    def __init__(self, settings: CopilotSettings) -> None:
        """Raises `ValueError` that names the wrong setting; starts nothing."""
        self._program = CopilotProgram(settings)
        self._settings = self._program.settings
        self._kept = CopilotKeeper(self._program)

    @property
    def name(self) -> str:
        return self._settings.name

    def models(self) -> Sequence[ModelOffer]:
        """The configured ones, else those that Copilot listed when it was last started."""
        return self._kept.offers

    @asynccontextmanager
    async def open(self, request: GenerateRequest) -> AsyncIterator[Answering]:
        async with self.answer(request) as answering:
            yield answering

    def answer(self, request: GenerateRequest) -> SessionAnswer:
        """How this request is answered. Raises a `GenerateError`."""
        return SessionAnswer(
            self._settings,
            request,
            cli_prompt(request, self.name, most_bytes=MAX_PROMPT),
            read_options(CopilotOptions, request.extra),
            CopilotEvents(self._program.errors),
            self._runtime,
        )

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        raise ProviderUnavailable(f"{self.name} makes no embeddings")

    async def check(self) -> Health:
        """See `CopilotProgram.check`: no runtime is started for it."""
        return await self._program.check()

    # --- the runtime that is kept

    async def run(self) -> None:
        """Keep the runtime, from when it is needed, until cancelled."""
        await self._kept.run()

    async def _runtime(self) -> CopilotRuntime:
        """Raises `ProviderUnavailable`."""
        await self._kept.runs(RUN_TIME)
        return await self._kept.process()
