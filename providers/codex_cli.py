"""Codex: one process that is kept for all answers, started when the first is asked for.

A version that is too old for that is started for each answer (`codex exec`), as it is where nobody
keeps the provider running.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any

import trio

from .base import (
    Answering,
    Embedding,
    EmbedRequest,
    GenerateError,
    GenerateRequest,
    Health,
    ModelOffer,
    Origin,
    ProviderUnavailable,
)
from .child import Folder, open_child, private_folder, run_briefly
from .cli_answer import CliAnswer, Launch
from .cli_found import LIFETIME, Remembered, find, state_of, version_in, version_text
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
    kept_command,
)
from .codex_found import (
    NOT_INSTALLED,
    NOT_LOGGED_IN,
    keyring,
    login_file,
    look,
    native_program,
)
from .codex_server import MAX_LINE, CodexServer, Refused
from .codex_settings import CodexOptions, CodexSettings
from .codex_turn import CodexTurn
from .openai_errors import ErrorReader
from .registry import read_options

logger = logging.getLogger(__name__)

#: Seconds in which a provider that is kept must have begun to run.
RUN_TIME = 0.5
#: Seconds after which one that listed no models is asked again.
LIST_AGAIN = 10.0
#: Seconds for a command such as `--version`. `Provider.check` may take 2.
BRIEF = 1.8
_TOO_OLD = "npm install -g @openai/codex@latest"
_LOGIN_HINT = "log in again: type `codex login`"
_NO_MODELS = Health(state="unavailable", reason="it lists no models", hint="name some in `models`")
_NOT_LISTED = Health(state="starting", reason="Codex has not listed its models yet")


class CodexCli:
    """A `Provider`. `run` keeps its process, and ends it."""

    def __init__(self, settings: CodexSettings) -> None:
        """Raises `ValueError` that names the wrong setting; starts nothing."""
        key, self._url = settings.key, settings.url
        self._settings = settings
        hint = {"key": _LOGIN_HINT} if settings.needs_login else {}
        self._errors = ErrorReader(settings.name, [key], **hint)
        self._offers = tuple(_offer(model) for model in settings.models)
        self._version: Remembered[Health] = Remembered()
        self._found: tuple[int, ...] = ()
        #: Set when the models have been asked for, and why there are none.
        self._listing: trio.Event | None = None
        self._unlisted = _NO_MODELS
        self._list_again = -math.inf
        self._nursery: trio.Nursery | None = None
        self._running = trio.Event()
        self._starting = trio.Lock()
        self._server: CodexServer | None = None
        self._began_with: tuple[int, ...] = ()
        #: Why the login, or the key, is not taken, which login that was, and until when that holds.
        self._refusal: tuple[str, tuple[int, ...], float] | None = None

    @property
    def name(self) -> str:
        return self._settings.name

    def models(self) -> Sequence[ModelOffer]:
        """The configured ones, or those that Codex listed."""
        return self._offers

    # --- answers

    def open(self, request: GenerateRequest) -> AbstractAsyncContextManager[Answering]:
        return _Open(self, request)

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
                self._kept,
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
        effort = options.reasoning_effort or ""
        command = exec_command(self._program(), self._settings, folder, model, effort, system)
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
        try:
            async with trio.open_nursery() as self._nursery:
                self._running.set()
                await trio.sleep_forever()
        finally:
            self._nursery, self._server, self._running = None, None, trio.Event()
            self._listing = None

    async def _keeps(self) -> bool:
        """Can a process be kept? Raises `ProviderUnavailable`."""
        if self._settings.mode == "exec":
            return False
        with trio.move_on_after(RUN_TIME):
            await self._running.wait()
        if self._nursery is None:
            return False
        await self._look_at_program(await trio.to_thread.run_sync(self._program))
        return not self._found or self._found >= KEPT_SINCE

    async def _kept(self) -> CodexServer:
        """The process, started if it must be. Raises `ProviderUnavailable`."""
        async with self._starting:
            # A process keeps the login that it began with.
            login = self._login()
            if self._server is None or not self._server.usable or login != self._began_with:
                self._server, self._began_with = await self._start(), login
            return self._server

    def _login(self) -> tuple[int, ...]:
        """What changes when the user logs in anew."""
        return state_of(str(login_file(self._settings.environment)))

    def _refused(self, reason: str) -> None:
        """Ask no more with this login, or this key, for a while."""
        self._refusal = (reason, self._login(), trio.current_time() + LIFETIME)

    async def _start(self) -> CodexServer:
        """Raises `ProviderUnavailable`."""
        if self._nursery is None:
            raise ProviderUnavailable(f"{self.name} has ended")
        server: CodexServer = await self._nursery.start(self._serve)
        try:
            await server.initialize()
            if self._settings.lists_models:
                await self._list_models(server)
        except BaseException:
            server.scope.cancel()
            raise
        server.rest()
        return server

    async def _serve(self, *, task_status: Any) -> None:
        """Run one process to its end. Raises `ProviderUnavailable` where it cannot be started."""
        async with AsyncExitStack() as stack:
            try:
                folder = await stack.enter_async_context(private_folder())
                command, seen = await trio.to_thread.run_sync(self._launch, folder)
                opened = open_child(command, seen, folder, max_line=MAX_LINE)
                child = await stack.enter_async_context(opened)
            except OSError as error:
                reason = error.strerror or str(error)
                raise ProviderUnavailable(f"{self.name} cannot be started: {reason}") from error
            idle = self._settings.idle_timeout
            server = CodexServer(child, self._errors, str(folder.work), idle)
            task_status.started(server)
            await server.read()

    def _launch(self, folder: Folder) -> tuple[list[str], Mapping[str, str]]:
        command = kept_command(self._program(), self._settings)
        return command, environment(self._settings, folder)

    async def _list_models(self, server: CodexServer) -> None:
        """Of all that it lists, the one it prefers first. Raises `ProviderUnavailable`."""
        try:
            listed = await server.call("model/list", {"limit": 100})
        except Refused as error:  # `check` says that there are none
            logger.info("%s", error)
            return
        found = listed.get("data") if isinstance(listed, dict) else None
        shown = [m for m in found or () if isinstance(m, dict) and not m.get("hidden")]
        shown.sort(key=lambda model: not model.get("isDefault"))
        names = [m["model"] for m in shown if isinstance(m.get("model"), str)]
        self._offers = tuple(_offer(name) for name in dict.fromkeys(names))

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
            if trio.current_time() < until and login == self._login():
                return Health(state="unavailable", reason=reason)
        health = await self._look_at_program(program)
        if health.state != "ready" or self._offers or not settings.lists_models:
            return health
        return await self._look_at_models()

    async def _look_at_models(self) -> Health:
        """What check says while no models are known, for which the process is needed."""
        if self._settings.mode == "exec" or (self._found and self._found < KEPT_SINCE):
            return _NO_MODELS
        if self._nursery is None:
            return _NOT_LISTED
        if self._listing is None or trio.current_time() >= self._list_again:
            self._listing, self._list_again = trio.Event(), math.inf
            self._nursery.start_soon(self._find_models, self._listing)
        with trio.move_on_after(BRIEF):  # the first start of all takes longer
            await self._listing.wait()
            return Health() if self._offers else self._unlisted
        return _NOT_LISTED

    async def _find_models(self, done: trio.Event) -> None:
        try:
            await self._kept()
            self._unlisted = _NO_MODELS
        except GenerateError as error:
            self._unlisted = Health(state="unavailable", reason=error.message)
        self._list_again = trio.current_time() + LIST_AGAIN
        done.set()

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


class _Open:
    """An answer whose way is found when it is entered."""

    __slots__ = ("_context", "_provider", "_request")

    def __init__(self, provider: CodexCli, request: GenerateRequest) -> None:
        self._provider = provider
        self._request = request

    async def __aenter__(self) -> Answering:
        self._context = await self._provider.answer(self._request)
        return await self._context.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._context.__aexit__(kind, error, traceback)
