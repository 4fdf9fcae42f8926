"""The Codex process that is kept, and the models that it lists."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import msgspec
import trio

from .base import GenerateError, Health
from .cli_found import state_of
from .codex_flags import environment, kept_command
from .codex_found import login_file
from .codex_server import MAX_LINE, CodexServer
from .codex_settings import CodexSettings
from .keeper import Keeper
from .kept_process import Refused
from .openai_errors import ErrorReader
from .private_folder import Folder

logger = logging.getLogger(__name__)

#: Seconds after which one that listed no models is asked again.
LIST_AGAIN = 10.0
NO_MODELS = Health(state="unavailable", reason="it lists no models", hint="name some in `models`")
NOT_LISTED = Health(state="starting", reason="Codex has not listed its models yet")


class CodexKeeper(Keeper[CodexServer]):
    """See the module."""

    MAX_LINE = MAX_LINE

    def __init__(
        self, settings: CodexSettings, errors: ErrorReader, program: Callable[[], str]
    ) -> None:
        """`program` is called in a thread, and raises `ProviderUnavailable` where there is none."""
        super().__init__(CodexServer, errors, settings.idle_timeout)
        self._settings = settings
        self._program = program
        #: The models that it listed, the one it prefers first.
        self.models: Sequence[str] = ()
        #: Set when the models have been asked for, and why there are none.
        self._listing: trio.Event | None = None
        self._unlisted = NO_MODELS
        self._list_again = -math.inf

    async def run(self) -> None:
        try:
            await super().run()
        finally:
            self._listing = None

    def login(self) -> tuple[int, ...]:
        """What changes when the user logs in anew."""
        return state_of(str(login_file(self._settings.environment)))

    def _state(self) -> object:
        return self.login()

    def _launch(self, folder: Folder) -> tuple[list[str], dict[str, str]]:
        command = kept_command(self._program(), self._settings)
        return command, environment(self._settings, folder)

    async def _prepare(self, process: CodexServer) -> None:
        """Of all models that it lists, the one it prefers first."""
        if not self._settings.lists_models:
            return
        try:
            listed = msgspec.json.decode(await process.call("model/list", {"limit": 100}))
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
            await self.process()
            self._unlisted = NO_MODELS
        except GenerateError as error:
            self._unlisted = Health(state="unavailable", reason=error.message)
        self._list_again = trio.current_time() + LIST_AGAIN
        done.set()
