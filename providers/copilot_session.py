"""One answer of a Copilot runtime: a session of its own, and one turn in it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from uuid import uuid4

import trio

from .base import (
    Answering,
    GenerateRequest,
    Origin,
    ProviderRefused,
)
from .cli_prompt import CliPrompt
from .copilot_events import CopilotEvents
from .copilot_runtime import CopilotRuntime
from .copilot_settings import CopilotOptions, CopilotSettings
from .copilot_wire import EMPTY_OPTIONS, new_session
from .kept_process import Call, Listener, Refused
from .tokens import estimated_usage
from .turn_chunks import TurnChunks, UntilStop

#: Seconds for a session to end that was told to; then the runtime is ended, which takes 2 more.
ABORT_TIME = 0.8


class SessionAnswer:
    """Entered when the turn runs, left when it runs no more."""

    __slots__ = (
        "_created",
        "_decoder",
        "_find",
        "_listener",
        "_options",
        "_origin",
        "_prompt",
        "_request",
        "_runtime",
        "_session",
        "_settings",
    )

    def __init__(
        self,
        settings: CopilotSettings,
        request: GenerateRequest,
        prompt: CliPrompt,
        options: CopilotOptions,
        decoder: CopilotEvents,
        find: Callable[[], Awaitable[CopilotRuntime]],
    ) -> None:
        """`find` gives the runtime to ask."""
        self._settings = settings
        self._origin = Origin(provider=settings.name, model=request.model)
        self._request = request
        self._prompt = prompt
        self._options = options
        self._decoder = decoder
        self._find = find
        self._session = str(uuid4())
        self._created: Call | None = None
        self._listener: Listener[CopilotEvents] | None = None

    async def __aenter__(self) -> Answering:
        runtime = self._runtime = await self._find()
        runtime.enter()
        try:
            await self._create(runtime)
            listener = self._listener = runtime.listen(self._session, self._decoder)
            said = {"sessionId": self._session, "prompt": self._prompt.text}
            await runtime.call("session.send", said)
        except BaseException:
            await self._leave()
            raise
        until = UntilStop(
            self._request.sampling.stop,
            lambda: estimated_usage(self._prompt.text, self._decoder.text),
        )
        limit = self._settings.read_timeout
        chunks = TurnChunks(self._decoder, listener.news, until, limit)
        return Answering(self._origin, chunks)

    async def _create(self, runtime: CopilotRuntime) -> None:
        """Raises `ProviderUnavailable`."""
        params = new_session(
            self._settings,
            self._options,
            id_=self._session,
            model=self._request.model,
            system=self._prompt.system,
            folder=runtime.work,
            max_tokens=self._request.sampling.max_tokens,
        )
        self._created = runtime.begin("session.create", params)
        try:
            await runtime.answer_to(self._created)
        except Refused as error:
            if "is not available" in error.message:  # the model
                raise ProviderRefused(error.message) from None
            raise
        options = {"sessionId": self._session, **EMPTY_OPTIONS}
        await runtime.call("session.options.update", options)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._leave()

    async def _leave(self) -> None:
        """End the turn, by the runtime if it does not end otherwise."""
        runtime = self._runtime
        try:
            with trio.CancelScope(shield=True), trio.move_on_after(ABORT_TIME) as limit:
                await self._end_turn(runtime)
            if limit.cancelled_caught:
                runtime.scope.cancel()
            elif self._created is not None and not runtime.gone:
                runtime.forget(self._session)
        finally:
            runtime.leave()

    async def _end_turn(self, runtime: CopilotRuntime) -> None:
        """Return when the session does nothing more."""
        if self._created is not None:
            await self._created.answered.wait()
        listener = self._listener
        if listener is not None and not listener.over and not runtime.gone:
            await runtime.begin("session.abort", {"sessionId": self._session}).answered.wait()
