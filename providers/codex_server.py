"""A `codex app-server` that runs: JSON-RPC in lines, with a thread for each answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from .codex_turn import CodexTurn
from .json_rpc import Incoming, WireError, read
from .kept_process import KeptProcess

logger = logging.getLogger(__name__)

#: A line repeats a prompt, and holds a whole answer.
MAX_LINE = 32 << 20
_CLIENT = {"name": "promptmesh", "title": "promptmesh", "version": "1"}


class _Where(msgspec.Struct, rename="camel"):
    thread_id: str = ""


class CodexServer(KeptProcess[CodexTurn]):
    """See the module."""

    #: Each turn leaves a megabyte behind.
    MAX_ANSWERS = 200

    async def greet(self) -> None:
        await self.call("initialize", {"clientInfo": _CLIENT})
        self._send({"method": "initialized"})

    def forget(self, thread: str) -> None:
        """Nobody listens any more, and the thread is not needed."""
        self._listeners.pop(thread, None)
        if not self.gone:
            self.request("thread/unsubscribe", {"threadId": thread})

    def _pack(self, message: Mapping[str, Any]) -> bytes:
        return msgspec.json.encode(message) + b"\n"

    async def _next(self) -> Incoming | None:
        async for line in self._child:
            try:
                return read(line, Incoming)
            except WireError as error:
                logger.debug("%s: %s", self._errors.name, error)
        return None

    def _hear(self, message: Incoming) -> None:
        try:
            listener = self._listeners.get(read(message.params, _Where).thread_id)
        except WireError as error:
            logger.debug("%s: %s", self._errors.name, error)
            return
        if listener is None or message.method is None:
            return
        if message.id is not None:
            listener.decoder.asked(message.method)
        else:
            listener.decoder.event(message.method, bytes(message.params))
            listener.over = listener.decoder.over
        listener.tell()

    def _lose(self, decoder: CodexTurn, reason: str) -> None:
        decoder.failure = decoder.failure or decoder.broken(reason)
