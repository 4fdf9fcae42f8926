"""A Copilot runtime that runs: JSON-RPC in frames, with many sessions at once.

What it tells of a session goes to that session's decoder as it comes, so that nothing piles up
where an asker is slow: a decoder holds no more than an answer may have.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import count
from typing import Any

import msgspec
import trio

from .base import DeadlineExceeded, ProviderUnavailable
from .child import Child, ChildError
from .copilot_events import CopilotEvents
from .copilot_output import first_line
from .copilot_wire import (
    METHOD_NOT_FOUND,
    PROTOCOL,
    Incoming,
    SessionEvent,
    WireError,
    connected,
    decode,
    frame,
    length_in,
    session_event,
)
from .openai_errors import ErrorReader

logger = logging.getLogger(__name__)

#: Seconds for the first answer: at its first start of all, a runtime unpacks 235 MB.
START_TIME = 60.0
#: Seconds for an answer to a call, of which none waits for a model.
REPLY_TIME = 20.0
#: Sessions after which a runtime is used no more: each leaves something behind in it.
MAX_SESSIONS = 500
_NOBODY = {"code": METHOD_NOT_FOUND, "message": "nobody is here to answer"}


class Refused(ProviderUnavailable):
    """A call that the runtime answered with an error."""


class Call:
    """A call whose answer is waited for."""

    def __init__(self, method: str, number: int) -> None:
        self.method = method
        self.number = number
        self.answered = trio.Event()
        self.answer: Incoming | None = None


class Listener:
    """A session that somebody listens to."""

    def __init__(self, decoder: CopilotEvents) -> None:
        self.decoder = decoder
        #: It does nothing more.
        self.idle = False
        self._news = trio.Event()

    def tell(self) -> None:
        """The decoder has something new."""
        self._news.set()

    async def news(self) -> None:
        """Wait for what was not seen yet."""
        await self._news.wait()
        self._news = trio.Event()


class CopilotRuntime:
    """See the module. `read` must run beside its calls."""

    def __init__(self, child: Child, errors: ErrorReader, work: str, idle: float) -> None:
        """`work` is its folder, and `idle` the seconds after which it ends where nobody asks."""
        self._child = child
        self._errors = errors
        self._idle = idle
        self.work = work
        #: Cancelled: it is to end now.
        self.scope = trio.CancelScope(deadline=trio.current_time() + START_TIME + idle)
        self._numbers = count(1)
        self._calls: dict[int, Call] = {}
        self._listeners: dict[str, Listener] = {}
        self._users = 0
        self._sessions = 0
        #: Why it cannot be asked any more; empty: it can.
        self.gone = ""

    # --- who uses it

    @property
    def usable(self) -> bool:
        """May one more ask it?"""
        return not self.gone and not self.scope.cancel_called and self._sessions < MAX_SESSIONS

    def enter(self) -> None:
        """Somebody uses it."""
        self._users += 1
        self._sessions += 1
        self.scope.deadline = float("inf")

    def leave(self) -> None:
        """They do no more. Worn out, it ends with its last user."""
        self._users -= 1
        if not self._users:
            wait = self._idle if self._sessions < MAX_SESSIONS else 0.0
            self.scope.deadline = trio.current_time() + wait

    # --- calls

    async def connect(self) -> None:
        """The first call. Raises `ProviderUnavailable`."""
        try:
            told = connected(await self.call("connect", {}, START_TIME))
        except WireError as error:
            raise ProviderUnavailable(f"{self._errors.name}: {error}") from None
        if told.protocol_version != PROTOCOL:
            raise ProviderUnavailable(
                f"{self._errors.name}: Copilot {told.version[:40]} speaks version "
                f"{told.protocol_version} of its protocol, and only {PROTOCOL} is known here"
            )

    async def call(
        self, method: str, params: Mapping[str, Any], patience: float = REPLY_TIME
    ) -> msgspec.Raw:
        """Its answer. Raises `ProviderUnavailable`; one that answers nothing is ended."""
        return await self.answer_to(self.begin(method, params), patience)

    def begin(self, method: str, params: Mapping[str, Any]) -> Call:
        """Make a call. Raises `ProviderUnavailable`."""
        call = Call(method, next(self._numbers))
        self._send({"id": call.number, "method": method, "params": params})
        self._calls[call.number] = call
        return call

    async def answer_to(self, call: Call, patience: float = REPLY_TIME) -> msgspec.Raw:
        """The answer to a call. As `call`."""
        with trio.move_on_after(patience) as limit:
            await call.answered.wait()
        if limit.cancelled_caught:
            self.scope.cancel()
            raise DeadlineExceeded(f"{self._errors.name} does not answer to {call.method}")
        if call.answer is None:
            raise ProviderUnavailable(f"{self._errors.name}: {self.gone}", again=True)
        if (error := call.answer.error) is not None:
            said = self._errors.redact(error.message[:500])
            raise Refused(f"{self._errors.name} refused {call.method}: {said}")
        return call.answer.result

    def request(self, method: str, params: Mapping[str, Any]) -> None:
        """A call whose answer nobody needs."""
        self._send({"id": next(self._numbers), "method": method, "params": params})

    def _send(self, message: dict[str, Any]) -> None:
        """Raises `ProviderUnavailable`."""
        if self.gone:
            raise ProviderUnavailable(f"{self._errors.name}: {self.gone}", again=True)
        try:
            self._child.send(frame(message))
        except ChildError as error:
            self.scope.cancel()
            raise ProviderUnavailable(f"{self._errors.name}: {error}", again=True) from None

    # --- what it tells

    def listen(self, session: str, decoder: CopilotEvents) -> Listener:
        """Hear what is told of a session, until `forget`."""
        listener = self._listeners[session] = Listener(decoder)
        return listener

    def forget(self, session: str) -> None:
        """Nobody listens any more, and what the runtime has written down of it is removed."""
        self._listeners.pop(session, None)
        if not self.gone:
            self.request("session.delete", {"sessionId": session})

    async def read(self) -> None:
        """Pass on what it tells until it ends, or the scope is cancelled."""
        reason = "the runtime was ended"
        try:
            with self.scope:
                while (body := await self._frame()) is not None:
                    self._take(decode(body))
                code = await self._child.ended()
                reason = f"the runtime ended ({code}){self._last_words()}"
        except (ChildError, WireError) as error:
            reason = str(error)
        finally:
            self._end(reason)

    async def _frame(self) -> bytes | None:
        """The next frame's body; None after the last. Raises `ChildError` and `WireError`."""
        length: int | None = None
        while (line := await self._child.line()) is not None:
            if line.strip():
                length = length_in(line) if length is None else length
            elif length is None:
                raise WireError("a message without its length")
            else:
                return await self._child.exactly(length)
        return None

    def _last_words(self) -> str:
        line = first_line(self._child.errors)
        return f": {self._errors.redact(line)}" if line else ""

    def _take(self, message: Incoming) -> None:
        """Raises `WireError`."""
        if message.method is None:
            call = self._calls.pop(message.id, None) if isinstance(message.id, int) else None
            if call is not None:
                call.answer = message
                call.answered.set()
        elif message.id is not None:
            self._refuse(message.id)
        elif message.method == "session.event":
            self._hear(session_event(message.params))

    def _refuse(self, number: int | str) -> None:
        try:
            self._send({"id": number, "error": _NOBODY})
        except ProviderUnavailable as error:  # whoever waits hears that it is ended
            logger.debug("%s", error)

    def _hear(self, told: SessionEvent) -> None:
        listener = self._listeners.get(told.session_id)
        if listener is not None:
            listener.decoder.told(told.event.type, told.event.data)
            listener.idle = listener.idle or told.event.type == "session.idle"
            listener.tell()

    def _end(self, reason: str) -> None:
        self.gone = reason
        for call in self._calls.values():
            call.answered.set()
        for listener in self._listeners.values():
            if not listener.decoder.over:
                listener.decoder.failure = listener.decoder.broken(reason)
                listener.decoder.failure.again = not listener.decoder.pieces
            listener.idle = True
            listener.tell()
