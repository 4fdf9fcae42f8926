"""Copilot's program, as `copilot_cli` and `copilot_sdk` use it: how well it is, and who pays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from .base import Health, ModelOffer, ProviderUnavailable
from .child import run_briefly
from .cli_found import Remembered, version_in
from .copilot_found import NOT_INSTALLED, copilot_program, look, look_at_version, packaged_version
from .copilot_login import LOG_IN, Login, login_of, secrets_of
from .copilot_settings import DEFAULT_MODEL, CopilotSettings, with_environment
from .openai_errors import ErrorReader

#: Bytes of a prompt. Models take a fourth of it; what is longer Copilot itself refuses, and slowly.
MAX_PROMPT = 4_000_000
#: Seconds for `--version`: `check` may take 2.
BRIEF = 1.8


class CopilotProgram:
    """What `copilot_cli` and `copilot_sdk` share: the program, who pays, and how well it is."""

    def __init__(self, settings: CopilotSettings) -> None:
        """Raises `ValueError` that names the wrong setting; starts nothing."""
        self.settings = with_environment(settings)
        hint = {} if self.settings.base_url else {"key": LOG_IN}
        self.errors = ErrorReader(settings.name, secrets_of(self.settings), **hint)
        self._version: Remembered[Health] = Remembered()

    def find(self) -> Path:
        """Raises `ProviderUnavailable`."""
        program = copilot_program(self.settings)
        if program is None:
            text = f"{self.settings.name} is {NOT_INSTALLED.reason}: {NOT_INSTALLED.hint}"
            raise ProviderUnavailable(text)
        return program

    def login(self) -> Login:
        """Who pays. Raises `ProviderUnavailable` where nobody does."""
        login = login_of(self.settings)
        if login.kind == "none":
            raise ProviderUnavailable(f"{self.settings.name}: {login.reason}: {LOG_IN}")
        return login

    def offers(self, models: Sequence[str] = ()) -> tuple[ModelOffer, ...]:
        """The configured models, else these, else the usual one."""
        found = self.settings.models or models or (DEFAULT_MODEL,)
        return tuple(ModelOffer(id=model, egress=True) for model in found)

    async def check(self) -> Health:
        """As far as files tell, and what `--version` said some minutes ago."""
        health = await trio.to_thread.run_sync(look, self.settings)
        if health.state != "ready":
            return health
        program = await trio.to_thread.run_sync(copilot_program, self.settings)
        if program is None or packaged_version(program):
            return health
        with trio.move_on_after(BRIEF):
            return await self._version.get([str(program)], partial(self._ask_version, program))
        return Health(state="unavailable", reason=f"{program} --version takes too long")

    async def _ask_version(self, program: Path) -> Health:
        own = {k: v for k, v in self.settings.environment.items() if k in ("PATH", "HOME")}
        own["COPILOT_AUTO_UPDATE"] = "false"
        try:
            said = await run_briefly([str(program), "--version"], own)
        except OSError as error:
            reason = f"{program} cannot be started: {error.strerror or error}"
            return Health(state="unavailable", reason=reason)
        return look_at_version(version_in(said.output))
