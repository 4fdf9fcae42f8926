"""One answer of a `codex app-server`: a thread of its own, and one turn in it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any

import msgspec
import trio

from .base import (
    Answering,
    ContextTooLong,
    GenerateRequest,
    Message,
    Origin,
)
from .cli_prompt import CliPrompt
from .codex_flags import PLACE
from .codex_server import CodexServer
from .codex_settings import CodexOptions
from .codex_turn import CodexTurn
from .kept_process import Listener, Refused
from .tokens import estimated_usage
from .turn_chunks import TurnChunks, UntilStop

#: Seconds for a turn to end that was told to; then the process is ended.
INTERRUPT_GRACE = 1.0


class CodexAnswer:
    """Entered when the turn runs, left when it runs no more."""

    __slots__ = (
        "_decoder",
        "_find",
        "_limit",
        "_listener",
        "_options",
        "_origin",
        "_prompt",
        "_request",
        "_server",
        "_thread",
    )

    def __init__(
        self,
        origin: Origin,
        request: GenerateRequest,
        prompt: CliPrompt,
        options: CodexOptions,
        find: Callable[[], Awaitable[CodexServer]],
        decoder: CodexTurn,
        limit: float,
    ) -> None:
        """`find` gives the process to ask; `limit` is the longest silence (s)."""
        self._origin = origin
        self._request = request
        self._prompt = prompt
        self._options = options
        self._find = find
        self._decoder = decoder
        self._limit = limit
        self._thread = ""
        self._listener: Listener[CodexTurn] | None = None

    async def __aenter__(self) -> Answering:
        server = self._server = await self._find()
        server.enter()
        try:
            await self._begin(server)
        except BaseException as error:
            await self._leave()
            if isinstance(error, Refused) and _is_too_large(error):
                raise ContextTooLong(error.message) from None
            raise
        assert self._listener is not None
        until = UntilStop(
            self._request.sampling.stop, lambda: estimated_usage(self._request, self._decoder.text)
        )
        chunks = TurnChunks(self._decoder, self._listener.news, until, self._limit)
        return Answering(self._origin, chunks)

    async def _begin(self, server: CodexServer) -> None:
        """Raises `ProviderUnavailable`."""
        started = await server.call(
            "thread/start",
            {
                "model": self._request.model,
                "modelProvider": PLACE,
                "cwd": server.work,
                "approvalPolicy": "never",
                "sandbox": "read-only",
                "ephemeral": True,
                # Empty: none at all, in the place of Codex's own.
                "baseInstructions": self._prompt.system,
            },
        )
        self._thread = str(msgspec.json.decode(started)["thread"]["id"])
        *earlier, last = (m for m in self._request.messages if m.role in ("user", "assistant"))
        if earlier:
            items = [_item(message) for message in earlier]
            place = {"threadId": self._thread, "items": items}
            await server.call("thread/inject_items", place)
        self._listener = server.listen(self._thread, self._decoder)
        said: dict[str, Any] = {"input": [{"type": "text", "text": last.text}]}
        if self._options.reasoning_effort is not None:
            said["effort"] = self._options.reasoning_effort
        if self._options.reasoning_summary is not None:
            said["summary"] = self._options.reasoning_summary
        try:
            await server.call("turn/start", {"threadId": self._thread, **said})
        except Refused:
            self._listener = None  # there is no turn whose end could be waited for
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._leave()

    async def _leave(self) -> None:
        """End the turn, by the process if it does not end otherwise."""
        server = self._server
        with trio.CancelScope(shield=True):
            if (listener := self._listener) is not None and not listener.over:
                with trio.move_on_after(INTERRUPT_GRACE):
                    await self._interrupt(server, listener)
                if not listener.over:
                    server.scope.cancel()
        if self._thread:
            server.forget(self._thread)
        server.leave()

    async def _interrupt(self, server: CodexServer, listener: Listener[CodexTurn]) -> None:
        told = False
        while not listener.over:
            if (turn := self._decoder.turn) and not told:
                told = True
                server.request("turn/interrupt", {"threadId": self._thread, "turnId": turn})
            await listener.news()


def _is_too_large(refused: Refused) -> bool:
    data = refused.data
    return isinstance(data, dict) and data.get("input_error_code") == "input_too_large"


def _item(message: Message) -> dict[str, Any]:
    """An earlier message as an item of the vendor's dialect."""
    kind = "output_text" if message.role == "assistant" else "input_text"
    content = [{"type": kind, "text": message.text}]
    return {"type": "message", "role": message.role, "content": content}
