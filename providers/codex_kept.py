"""The Codex process that is kept: started when an answer needs it, replaced when it must be."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import trio

from .base import GenerateError, Health, ProviderUnavailable
from .child import Folder, open_child, private_folder
from .cli_found import state_of
from .codex_flags import environment, kept_command
from .codex_found import login_file
from .codex_server import MAX_LINE, CodexServer, Refused
from .codex_settings import CodexSettings
from .openai_errors import ErrorReader

logger = logging.getLogger(__name__)

#: Seconds in which `run` must have begun.
RUN_TIME = 0.5
#: Seconds after which one that listed no models is asked again.
LIST_AGAIN = 10.0
NO_MODELS = Health(state="unavailable", reason="it lists no models", hint="name some in `models`")
NOT_LISTED = Health(state="starting", reason="Codex has not listed its models yet")


class KeptCodex:
    """See the module. `run` must run beside its users."""

    def __init__(
        self, settings: CodexSettings, errors: ErrorReader, program: Callable[[], str]
    ) -> None:
        """`program` is called in a thread, and raises `ProviderUnavailable` where there is none."""
        self._settings = settings
        self._errors = errors
        self._program = program
        #: The models that it listed, the one it prefers first.
        self.models: Sequence[str] = ()
        self._nursery: trio.Nursery | None = None
        self._running = trio.Event()
        self._starting = trio.Lock()
        self._server: CodexServer | None = None
        self._began_with: tuple[int, ...] = ()
        #: Set when the models have been asked for, and why there are none.
        self._listing: trio.Event | None = None
        self._unlisted = NO_MODELS
        self._list_again = -math.inf

    async def run(self) -> None:
        """Keep the process, from when it is needed, until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                self._running.set()
                await trio.sleep_forever()
        finally:
            self._nursery, self._server, self._running = None, None, trio.Event()
            self._listing = None

    async def runs(self) -> bool:
        """Is there somebody who runs it, or will there be at once?"""
        with trio.move_on_after(RUN_TIME):
            await self._running.wait()
        return self._nursery is not None

    def login(self) -> tuple[int, ...]:
        """What changes when the user logs in anew."""
        return state_of(str(login_file(self._settings.environment)))

    async def server(self) -> CodexServer:
        """The process, started if it must be. Raises `ProviderUnavailable`."""
        async with self._starting:
            # A process keeps the login that it began with.
            login = self.login()
            if self._server is None or not self._server.usable or login != self._began_with:
                self._server, self._began_with = await self._start(), login
            return self._server

    async def _start(self) -> CodexServer:
        """Raises `ProviderUnavailable`."""
        if self._nursery is None:
            raise ProviderUnavailable(f"{self._errors.name} has ended")
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
                raise ProviderUnavailable(
                    f"{self._errors.name} cannot be started: {reason}"
                ) from error
            idle = self._settings.idle_timeout
            server = CodexServer(child, self._errors, str(folder.work), idle)
            task_status.started(server)
            await server.read()

    def _launch(self, folder: Folder) -> tuple[list[str], dict[str, str]]:
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
        self.models = tuple(dict.fromkeys(names))

    async def look(self, patience: float) -> Health:
        """What is to be said while no models are known, after so many seconds at most."""
        if self._nursery is None:
            return NOT_LISTED
        if self._listing is None or trio.current_time() >= self._list_again:
            self._listing, self._list_again = trio.Event(), math.inf
            self._nursery.start_soon(self._find_models, self._listing)
        with trio.move_on_after(patience):  # the first start of all takes longer
            await self._listing.wait()
            return Health() if self.models else self._unlisted
        return NOT_LISTED

    async def _find_models(self, done: trio.Event) -> None:
        try:
            await self.server()
            self._unlisted = NO_MODELS
        except GenerateError as error:
            self._unlisted = Health(state="unavailable", reason=error.message)
        self._list_again = trio.current_time() + LIST_AGAIN
        done.set()
