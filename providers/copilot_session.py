"""One answer of a Copilot runtime: a session of its own, and one turn in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self
from uuid import uuid4

import msgspec
import trio

from .base import (
    Answering,
    Chunk,
    DeadlineExceeded,
    GenerateRequest,
    Origin,
    ProviderRefused,
    StreamInterrupted,
)
from .cli_prompt import CliPrompt
from .copilot_events import CopilotEvents
from .copilot_runtime import Call, CopilotRuntime, Listener, Refused
from .copilot_settings import CopilotOptions, CopilotSettings
from .copilot_wire import EMPTY_OPTIONS, new_session
from .stop_strings import StopScanner
from .tokens import estimated_usage

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
        self._listener: Listener | None = None

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
        chunks = _Chunks(listener, self._request, self._prompt, self._settings.read_timeout)
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
        if listener is not None and not listener.idle and not runtime.gone:
            await runtime.begin("session.abort", {"sessionId": self._session}).answered.wait()


class _Chunks:
    """The chunks of a turn, up to a stop string."""

    __slots__ = ("_limit", "_listener", "_over", "_prompt", "_ready", "_scanner")

    def __init__(
        self, listener: Listener, request: GenerateRequest, prompt: CliPrompt, limit: float
    ) -> None:
        """`limit` is the longest silence (s)."""
        self._listener = listener
        self._prompt = prompt
        self._limit = limit
        self._scanner = StopScanner(request.sampling.stop)
        self._ready: deque[Chunk] = deque()
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        decoder = self._listener.decoder
        while not self._ready:
            if self._over:
                raise StopAsyncIteration
            for chunk in decoder.take():
                self._pass_on(chunk)
            if not self._ready and not self._over:
                if decoder.failure is not None:
                    raise decoder.failure
                await self._wait(decoder)
        return self._ready.popleft()

    async def _wait(self, decoder: CopilotEvents) -> None:
        with trio.move_on_after(self._limit):
            await self._listener.news()
            return
        failure = decoder.broken(f"silent for {self._limit:g} s")
        if isinstance(failure, StreamInterrupted):
            raise failure
        raise DeadlineExceeded(failure.message)

    def _pass_on(self, chunk: Chunk) -> None:
        if self._over:
            return  # it was said after a stop string
        if not chunk.text and chunk.finish_reason is None:
            self._ready.append(chunk)
            return
        text = self._scanner.feed(chunk.text)
        if chunk.finish_reason is not None:
            text += self._scanner.flush()
        if text:
            self._ready.append(Chunk(text=text))
        if self._scanner.found:
            chunk = Chunk(finish_reason="stop")
        if chunk.finish_reason is not None:
            self._over = True
            usage = chunk.usage or estimated_usage(self._prompt.text, self._listener.decoder.text)
            self._ready.append(msgspec.structs.replace(chunk, text="", usage=usage))
