"""Codex: one process that is kept for all answers, started when the first is asked for.

A version that is too old for that is started for each answer (`codex exec`), as it is where nobody
keeps the provider running.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import trio

from .base import (
    Answering,
    Embedding,
    EmbedRequest,
    GenerateRequest,
    Health,
    ModelOffer,
    Origin,
    ProviderUnavailable,
)
from .child import run_briefly
from .cli_answer import CliAnswer, Launch
from .cli_found import LIFETIME, Remembered, find, version_in, version_text
from .cli_prompt import CliPrompt, cli_prompt
from .codex_answer import CodexAnswer
from .codex_exec import CodexOutput
from .codex_flags import (
    KEPT_SINCE,
    MAX_PROMPT,
    NO_SYSTEM,
    OLDEST,
    environment,
    exec_command,
)
from .codex_found import (
    NOT_INSTALLED,
    NOT_LOGGED_IN,
    keyring,
    login_file,
    look,
    native_program,
)
from .codex_keeper import NO_MODELS, CodexKeeper
from .codex_server import MAX_LINE
from .codex_settings import CodexOptions, CodexSettings
from .codex_turn import CodexTurn
from .openai_errors import ErrorReader
from .options import read_options
from .private_folder import Folder

#: Seconds for a command such as `--version`. `Provider.check` may take 2.
BRIEF = 1.8
#: Seconds for `run` to begin, where the provider is asked at once.
RUN_TIME = 0.5
_TOO_OLD = "npm install -g @openai/codex@latest"
_LOGIN_HINT = "log in again: type `codex login`"


class CodexCli:
    """A `Provider`. `run` keeps its process, and ends it."""

    def __init__(self, settings: CodexSettings) -> None:
        """Raises `ValueError` that names the wrong setting; starts nothing."""
        settings.url  # noqa: B018 (it may be wrong)
        self._settings = settings
        hint = {"key": _LOGIN_HINT} if settings.needs_login else {}
        self._errors = ErrorReader(settings.name, [settings.key], **hint)
        self._offers = tuple(_offer(model) for model in settings.models)
        self._kept = CodexKeeper(settings, self._errors, self._program)
        self._version: Remembered[Health] = Remembered()
        self._found: tuple[int, ...] = ()
        #: Why the login, or the key, is not taken, which login that was, and until when that holds.
        self._refusal: tuple[str, tuple[int, ...], float] | None = None

    @property
    def name(self) -> str:
        return self._settings.name

    def models(self) -> Sequence[ModelOffer]:
        """The configured ones, or those that Codex listed."""
        return self._offers or tuple(map(_offer, self._kept.models))

    # --- answers

    @asynccontextmanager
    async def open(self, request: GenerateRequest) -> AsyncIterator[Answering]:
        async with await self.answer(request) as answering:
            yield answering

    async def answer(self, request: GenerateRequest) -> AbstractAsyncContextManager[Answering]:
        """How this request is answered. Raises a `GenerateError`."""
        prompt = cli_prompt(request, self.name, most_characters=MAX_PROMPT)
        options = read_options(CodexOptions, request.extra)
        origin = Origin(provider=self.name, model=request.model)
        ends_with_user = request.messages[-1].role == "user"
        if ends_with_user and await self._keeps():
            return CodexAnswer(
                origin,
                request,
                prompt,
                options,
                self._kept.process,
                CodexTurn(self._errors, self._refused),
                self._settings.read_timeout,
            )
        prepare = partial(self._prepare, prompt, request.model, options)
        return CliAnswer(
            origin, prepare, CodexOutput(self._errors, self._refused), request.sampling.stop
        )

    def _prepare(
        self, prompt: CliPrompt, model: str, options: CodexOptions, folder: Folder
    ) -> Launch:
        """Raises a `GenerateError`, `OSError`."""
        system = folder.write("system.txt", prompt.system or NO_SYSTEM)
        program, settings = self._program(), self._settings
        command = exec_command(program, settings, folder, model, options, system)
        seen = environment(self._settings, folder)
        return Launch(command, seen, prompt.text.encode(), max_line=MAX_LINE)

    def _program(self) -> str:
        """Raises `ProviderUnavailable`."""
        path = find(self._settings.command, self._settings.environment)
        if path is None:
            text = f"{self.name} is {NOT_INSTALLED.reason}: {NOT_INSTALLED.hint}"
            raise ProviderUnavailable(text)
        return native_program(path)

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        raise ProviderUnavailable(f"{self.name} makes no embeddings")

    # --- the process that is kept

    async def run(self) -> None:
        """Keep the process, from when it is needed, until cancelled."""
        await self._kept.run()

    async def _keeps(self) -> bool:
        """Can a process be kept? Raises `ProviderUnavailable`."""
        if self._settings.mode == "exec" or not await self._kept.runs(RUN_TIME):
            return False
        await self._look_at_program(await trio.to_thread.run_sync(self._program))
        return not self._found or self._found >= KEPT_SINCE

    def _refused(self, reason: str) -> None:
        """Ask no more with this login, or this key, for a while."""
        self._refusal = (reason, self._kept.login(), trio.current_time() + LIFETIME)

    # --- health

    async def check(self) -> Health:
        """Looks at files, and at what `--version` said; asks no model."""
        settings = self._settings
        find_out = partial(
            look,
            settings.environment,
            settings.command,
            needs_login=settings.needs_login,
        )
        health = await trio.to_thread.run_sync(find_out)
        if health.state != "ready":
            return health
        try:
            program = await trio.to_thread.run_sync(self._program)
        except ProviderUnavailable:  # it has gone just now
            return NOT_INSTALLED
        if self._refusal is not None:
            reason, login, until = self._refusal
            if trio.current_time() < until and login == self._kept.login():
                return Health(state="unavailable", reason=reason)
        health = await self._look_at_program(program)
        if health.state != "ready" or not settings.lists_models or self._kept.models:
            return health
        if settings.mode == "exec" or (self._found and self._found < KEPT_SINCE):
            return NO_MODELS
        return await self._kept.look(BRIEF)

    async def _look_at_program(self, program: str) -> Health:
        """Its version, and its login where only it can tell; remembered for minutes."""
        files = [program, str(login_file(self._settings.environment))]
        with trio.move_on_after(BRIEF):
            return await self._version.get(files, partial(self._ask_program, program))
        return Health(state="unavailable", reason=f"{program} --version takes too long")

    async def _ask_program(self, program: str) -> Health:
        own = self._settings.environment
        try:
            said = await run_briefly([program, "--version"], own)
        except OSError as error:
            reason = f"{program} cannot be started: {error.strerror or error}"
            return Health(state="unavailable", reason=reason)
        self._found = version_in(said.output)
        if self._found and self._found < OLDEST:
            reason = f"codex {version_text(self._found)} is too old"
            return Health(state="unavailable", reason=reason, hint=_TOO_OLD)
        if self._settings.needs_login and keyring(own) and not login_file(own).exists():
            status = await run_briefly([program, "login", "status"], own)
            if status.code:
                return NOT_LOGGED_IN
        return Health()


def _offer(model: str) -> ModelOffer:
    return ModelOffer(id=model, egress=True)
