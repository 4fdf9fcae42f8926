"""A `codex app-server` that runs: JSON-RPC in lines, with many turns at once.

What it tells of a turn goes to that turn's decoder as it comes, so that nothing piles up where an
asker is slow: a decoder holds no more than an answer may have.
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
from .codex_turn import CodexTurn
from .openai_errors import ErrorReader

logger = logging.getLogger(__name__)

#: A line repeats a prompt, and holds a whole answer.
MAX_LINE = 32 << 20
#: Seconds for an answer to a call, of which none waits for a model.
REPLY_TIME = 20.0
#: Turns after which a process is used no more: each leaves a megabyte behind in it.
MAX_TURNS = 200
#: What it is told where it wants to ask its user.
_NOBODY = {"code": -32601, "message": "nobody is here to answer"}
_CLIENT = {"name": "promptmesh", "title": "promptmesh", "version": "1"}


class Refused(ProviderUnavailable):
    """A call that Codex answered with an error."""

    def __init__(self, message: str, word: str) -> None:
        super().__init__(message)
        #: Its own word for the error, where it has one.
        self.word = word


class _Error(msgspec.Struct):
    message: str = ""
    data: Any = None


class _Message(msgspec.Struct):
    id: int | str | None = None
    method: str = ""
    params: msgspec.Raw = msgspec.Raw(b"{}")
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: _Error | None = None


class _Where(msgspec.Struct, rename="camel"):
    thread_id: str = ""


_decode = msgspec.json.Decoder(_Message).decode
_where = msgspec.json.Decoder(_Where).decode


class _Call:
    """A call whose answer is waited for."""

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.answer: _Message | None = None


class Listener:
    """A thread that somebody listens to."""

    def __init__(self, decoder: CodexTurn) -> None:
        self.decoder = decoder
        self._news = trio.Event()

    def tell(self) -> None:
        """The decoder has something new."""
        self._news.set()

    async def news(self) -> None:
        """Wait for what was not seen yet."""
        await self._news.wait()
        self._news = trio.Event()


class CodexServer:
    """See the module. `read` must run beside its calls."""

    def __init__(self, child: Child, errors: ErrorReader, work: str, idle: float) -> None:
        """`work` is its folder, and `idle` the seconds after which it ends where nobody asks."""
        self._child = child
        self._errors = errors
        self._idle = idle
        self.work = work
        #: Cancelled: it is to end now.
        self.scope = trio.CancelScope()
        self._numbers = count(1)
        self._calls: dict[int, _Call] = {}
        self._listeners: dict[str, Listener] = {}
        self._users = 0
        self._turns = 0
        #: Why it cannot be asked any more; empty: it can.
        self.gone = ""

    # --- who uses it

    @property
    def usable(self) -> bool:
        """May one more ask it?"""
        return not self.gone and not self.scope.cancel_called and self._turns < MAX_TURNS

    def enter(self) -> None:
        """Somebody uses it."""
        self._users += 1
        self._turns += 1
        self.scope.deadline = float("inf")

    def leave(self) -> None:
        """They do no more. Worn out, it ends with its last user."""
        self._users -= 1
        self.rest()

    def rest(self) -> None:
        """Where nobody uses it, it ends after a while."""
        if not self._users:
            wait = self._idle if self._turns < MAX_TURNS else 0.0
            self.scope.deadline = trio.current_time() + wait

    # --- calls

    async def initialize(self) -> None:
        """The first call. Raises `ProviderUnavailable`."""
        await self.call("initialize", {"clientInfo": _CLIENT})
        self._send({"method": "initialized"})

    async def call(self, method: str, params: Mapping[str, Any]) -> Any:
        """Its answer. Raises `ProviderUnavailable`; one that answers nothing is ended."""
        number = next(self._numbers)
        call = self._calls[number] = _Call()
        try:
            self._send({"id": number, "method": method, "params": params})
            with trio.move_on_after(REPLY_TIME) as limit:
                await call.answered.wait()
        finally:
            del self._calls[number]
        if limit.cancelled_caught:
            self.scope.cancel()
            raise DeadlineExceeded(f"{self._errors.name} does not answer to {method}")
        if call.answer is None:
            raise ProviderUnavailable(f"{self._errors.name}: {self.gone}", again=True)
        if (error := call.answer.error) is not None:
            said = self._errors.redact(error.message[:500])
            word = error.data.get("input_error_code") if isinstance(error.data, dict) else None
            raise Refused(f"{self._errors.name} refused {method}: {said}", str(word or ""))
        return msgspec.json.decode(call.answer.result)

    def request(self, method: str, params: Mapping[str, Any]) -> None:
        """A call whose answer nobody needs."""
        self._send({"id": next(self._numbers), "method": method, "params": params})

    def _send(self, message: Mapping[str, Any]) -> None:
        """Raises `ProviderUnavailable`."""
        if self.gone:
            raise ProviderUnavailable(f"{self._errors.name}: {self.gone}", again=True)
        try:
            self._child.send(msgspec.json.encode(message) + b"\n")
        except ChildError as error:
            self.scope.cancel()
            raise ProviderUnavailable(f"{self._errors.name}: {error}", again=True) from None

    # --- what it tells

    def listen(self, thread: str, decoder: CodexTurn) -> Listener:
        """Hear what is told of a thread, until `forget`."""
        listener = self._listeners[thread] = Listener(decoder)
        return listener

    def forget(self, thread: str) -> None:
        """Nobody listens any more, and the thread is not needed."""
        self._listeners.pop(thread, None)
        if not self.gone:
            self.request("thread/unsubscribe", {"threadId": thread})

    async def read(self) -> None:
        """Pass on what it tells until it ends, or the scope is cancelled."""
        reason = "the process was ended"
        try:
            with self.scope:
                async for line in self._child:
                    self._take(line)
                code = await self._child.ended()
                reason = f"the process ended ({code}){self._last_words()}"
        except ChildError as error:
            reason = str(error)
        finally:
            self._end(reason)

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._child.errors.splitlines() if line.strip()]
        return f": {self._errors.redact(lines[-1][:300])}" if lines else ""

    def _take(self, line: bytes) -> None:
        try:
            message = _decode(line)
            place = _where(message.params) if message.method else _Where()
        except (ValueError, RecursionError) as error:
            logger.debug("%s: a line that cannot be read: %s", self._errors.name, error)
            return
        listener = self._listeners.get(place.thread_id)
        if not message.method:
            call = self._calls.get(message.id) if isinstance(message.id, int) else None
            if call is not None:
                call.answer = message
                call.answered.set()
            return
        if message.id is not None:
            self._send({"id": message.id, "error": _NOBODY})
            if listener is not None:
                listener.decoder.asked(message.method)
        elif listener is not None:
            listener.decoder.event(message.method, bytes(message.params))
        if listener is not None:
            listener.tell()

    def _end(self, reason: str) -> None:
        self.gone = reason
        for call in self._calls.values():
            call.answered.set()
        for listener in self._listeners.values():
            decoder = listener.decoder
            if not decoder.over:
                decoder.failure = decoder.failure or decoder.broken(reason)
                decoder.over = True
            listener.tell()
