"""A Copilot runtime that runs: JSON-RPC in frames, with a session for each answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import ProviderUnavailable
from .copilot_events import CopilotEvents
from .copilot_wire import PROTOCOL, Connected, SessionEvent, frame, length_in
from .json_rpc import Incoming, WireError, read
from .kept_process import KeptProcess

#: Seconds for the first answer: at its first start of all, a runtime unpacks 235 MB.
START_TIME = 60.0


class CopilotRuntime(KeptProcess[CopilotEvents]):
    """See the module."""

    NOUN = "runtime"
    MAX_ANSWERS = 500
    #: The reason stands in the first, and below it what to try.
    TELLING = 0

    async def greet(self) -> None:
        try:
            told = read(await self.call("connect", {}, START_TIME), Connected)
        except WireError as error:
            raise ProviderUnavailable(f"{self._errors.name}: {error}") from None
        if told.protocol_version != PROTOCOL:
            raise ProviderUnavailable(
                f"{self._errors.name}: Copilot {told.version[:40]} speaks version "
                f"{told.protocol_version} of its protocol, and only {PROTOCOL} is known here"
            )

    def forget(self, session: str) -> None:
        """Nobody listens any more, and what the runtime has written down of it is removed."""
        self._listeners.pop(session, None)
        if not self.gone:
            self.request("session.delete", {"sessionId": session})

    def _pack(self, message: Mapping[str, Any]) -> bytes:
        return frame(message)

    async def _next(self) -> Incoming | None:
        length: int | None = None
        while (line := await self._child.line()) is not None:
            if line.strip():
                length = length_in(line) if length is None else length
            elif length is None:
                raise WireError("a message without its length")
            else:
                return read(await self._child.exactly(length), Incoming)
        return None

    def _hear(self, message: Incoming) -> None:
        if message.id is not None or message.method != "session.event":
            return
        told = read(message.params, SessionEvent)
        listener = self._listeners.get(told.session_id)
        if listener is not None:
            listener.decoder.told(told.event.type, told.event.data)
            listener.over = listener.over or told.event.type == "session.idle"
            listener.tell()

    def _lose(self, decoder: CopilotEvents, reason: str) -> None:
        if not decoder.over:
            decoder.failure = decoder.broken(reason)
            decoder.failure.again = not decoder.pieces
