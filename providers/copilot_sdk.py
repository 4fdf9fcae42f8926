"""`copilot_sdk`: the runtime of Copilot's SDK, one process for all answers.

It is started when it is first asked, and ended when nobody has asked for a while. What the SDK for
Python would say to it is said here, in trio (`copilot_wire`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Any

import trio

from .base import (
    Answering,
    Embedding,
    EmbedRequest,
    GenerateRequest,
    Health,
    ModelOffer,
    ProviderRefused,
    ProviderUnavailable,
)
from .child import Folder, open_child, private_folder
from .cli_prompt import cli_prompt
from .copilot_events import CopilotEvents
from .copilot_login import LOG_IN, Login, child_environment
from .copilot_program import MAX_PROMPT, CopilotProgram
from .copilot_runtime import CopilotRuntime, Refused
from .copilot_session import SessionAnswer
from .copilot_settings import CopilotOptions, CopilotSettings
from .copilot_wire import (
    FLAGS,
    NO_LOGIN_FLAG,
    TOKEN_FLAGS,
    TOKEN_VARIABLE,
    WireError,
    is_authenticated,
    listed_models,
)
from .options import read_options

#: The longest line of a frame's head, in bytes.
MAX_HEAD = 4096
#: Seconds for `run` to begin, where the provider is asked at once.
RUN_TIME = 5.0


class CopilotSdk:
    """A `Provider`. `run` keeps its runtime, and ends it."""

    def __init__(self, settings: CopilotSettings) -> None:
        """Raises `ValueError` that names the wrong setting; starts nothing."""
        self._program = CopilotProgram(settings)
        self._settings = self._program.settings
        self._offers = self._program.offers()
        self._nursery: trio.Nursery | None = None
        self._running = trio.Event()
        self._starting = trio.Lock()
        self._runtime: CopilotRuntime | None = None

    @property
    def name(self) -> str:
        return self._settings.name

    def models(self) -> Sequence[ModelOffer]:
        """The configured ones, else those that Copilot listed when it was last started."""
        return self._offers

    def open(self, request: GenerateRequest) -> AbstractAsyncContextManager[Answering]:
        return _Open(self, request)

    def answer(self, request: GenerateRequest) -> SessionAnswer:
        """How this request is answered. Raises a `GenerateError`."""
        return SessionAnswer(
            self._settings,
            request,
            cli_prompt(request, self.name, most_bytes=MAX_PROMPT),
            read_options(CopilotOptions, request.extra),
            CopilotEvents(self._program.errors),
            self._kept,
        )

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        raise ProviderUnavailable(f"{self.name} makes no embeddings")

    async def check(self) -> Health:
        """See `CopilotProgram.check`: no runtime is started for it."""
        return await self._program.check()

    # --- the runtime that is kept

    async def run(self) -> None:
        """Keep the runtime, from when it is needed, until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                self._running.set()
                await trio.sleep_forever()
        finally:
            self._nursery, self._runtime, self._running = None, None, trio.Event()

    async def _kept(self) -> CopilotRuntime:
        """The runtime, started if it must be. Raises `ProviderUnavailable`."""
        with trio.move_on_after(RUN_TIME):
            await self._running.wait()
        async with self._starting:
            if self._runtime is None or not self._runtime.usable:
                self._runtime = await self._start()
            return self._runtime

    async def _start(self) -> CopilotRuntime:
        """Raises `ProviderUnavailable`."""
        if self._nursery is None:
            raise ProviderUnavailable(f"{self.name} does not run")
        login = await trio.to_thread.run_sync(self._program.login)
        runtime: CopilotRuntime = await self._nursery.start(self._serve, login)
        try:
            await runtime.connect()
            if login.kind != "server":
                await self._look_at_account(runtime)
        except BaseException:
            runtime.scope.cancel()
            raise
        return runtime

    async def _serve(self, login: Login, *, task_status: Any) -> None:
        """Run one runtime to its end. Raises `ProviderUnavailable` if it cannot be started."""
        async with AsyncExitStack() as stack:
            try:
                folder = await stack.enter_async_context(private_folder())
                command, seen = await trio.to_thread.run_sync(self._launch, login, folder)
                opened = open_child(command, seen, folder, max_line=MAX_HEAD)
                child = await stack.enter_async_context(opened)
            except OSError as error:
                reason = error.strerror or str(error)
                raise ProviderUnavailable(f"{self.name} cannot be started: {reason}") from error
            idle = self._settings.idle_timeout
            runtime = CopilotRuntime(child, self._program.errors, str(folder.work), idle)
            task_status.started(runtime)
            await runtime.read()

    def _launch(self, login: Login, folder: Folder) -> tuple[list[str], dict[str, str]]:
        """Raises `ProviderUnavailable`, `OSError`."""
        command = [str(self._program.find()), *FLAGS]
        seen = child_environment(self._settings, login, folder.path / "home")
        if login.kind == "token":
            seen[TOKEN_VARIABLE] = login.token
            command += [*TOKEN_FLAGS, NO_LOGIN_FLAG]
        elif login.kind == "server":
            command.append(NO_LOGIN_FLAG)
        return command, seen

    async def _look_at_account(self, runtime: CopilotRuntime) -> None:
        """Is somebody logged in, and which models are theirs? Costs no money.

        Raises `ProviderUnavailable`.
        """
        try:
            if not is_authenticated(await runtime.call("auth.getStatus", {})):
                raise ProviderRefused(f"{self.name}: Copilot does not know who asks: {LOG_IN}")
            if not self._settings.models:
                found = listed_models(await runtime.call("models.list", {}))
                self._offers = tuple(_offer(*model) for model in found) or self._offers
        except WireError as error:
            raise ProviderUnavailable(f"{self.name}: {error}") from None
        except Refused as error:
            raise ProviderRefused(f"{error.message} ({LOG_IN})") from None


def _offer(model: str, context: int | None) -> ModelOffer:
    return ModelOffer(id=model, context_length=context, egress=True)


class _Open:
    """An answer whose faults are told when it is entered."""

    __slots__ = ("_answer", "_provider", "_request")

    def __init__(self, provider: CopilotSdk, request: GenerateRequest) -> None:
        self._provider = provider
        self._request = request

    async def __aenter__(self) -> Answering:
        self._answer = self._provider.answer(self._request)
        return await self._answer.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._answer.__aexit__(kind, error, traceback)
