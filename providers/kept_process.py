"""A vendor's program that runs for many answers at once, and is asked by JSON-RPC.

What it tells of an answer goes to that answer's decoder as it comes, so that nothing piles up where
an asker is slow: a decoder holds no more than an answer may have. A vendor says how its messages
are cut, and what they mean.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import count
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
import trio

from .base import DeadlineExceeded, ProviderUnavailable
from .child import Child, ChildError
from .json_rpc import NOBODY, Incoming, WireError
from .openai_errors import ErrorReader
from .turn_chunks import TurnDecoder

logger = logging.getLogger(__name__)

#: Seconds for an answer to a call, of which none waits for a model.
REPLY_TIME = 20.0

D = TypeVar("D", bound=TurnDecoder)


class Refused(ProviderUnavailable):
    """A call that the program answered with an error."""

    #: What it said of it beside a message.
    data: Any = None


class Call:
    """A call whose answer is waited for."""

    def __init__(self, method: str, number: int) -> None:
        self.method = method
        self.number = number
        self.answered = trio.Event()
        self.answer: Incoming | None = None


class Listener(Generic[D]):
    """An answer under way that somebody listens to."""

    def __init__(self, decoder: D) -> None:
        self.decoder = decoder
        #: The program does nothing more for it.
        self.over = False
        self._news = trio.Event()

    def tell(self) -> None:
        """The decoder has something new, or it is over."""
        self._news.set()

    async def news(self) -> None:
        """Wait for what was not seen yet."""
        await self._news.wait()
        self._news = trio.Event()


class KeptProcess(ABC, Generic[D]):
    """See the module. `read` must run beside its calls."""

    #: What its errors call it.
    NOUN: ClassVar[str] = "process"
    #: Answers after which it is used no more: each leaves something behind in it.
    MAX_ANSWERS: ClassVar[int]
    #: Which line of its complaints says why it ended.
    TELLING: ClassVar[int] = -1

    def __init__(self, child: Child, errors: ErrorReader, work: str, idle: float) -> None:
        """`work` is its folder, and `idle` the seconds after which it ends where nobody asks."""
        self._child = child
        self._errors = errors
        self._idle = idle
        self.work = work
        #: Cancelled: it is to end now.
        self.scope = trio.CancelScope()
        self._numbers = count(1)
        self._calls: dict[int, Call] = {}
        self._listeners: dict[str, Listener[D]] = {}
        self._users = 0
        self._answers = 0
        #: Why it cannot be asked any more; empty: it can.
        self.gone = ""

    # --- what a vendor says

    @abstractmethod
    async def greet(self) -> None:
        """The first call. Raises `ProviderUnavailable`."""

    @abstractmethod
    def _pack(self, message: Mapping[str, Any]) -> bytes:
        """A message as it is sent."""

    @abstractmethod
    async def _next(self) -> Incoming | None:
        """What it says next; None after the last. Raises `ChildError`, `WireError`."""

    @abstractmethod
    def _hear(self, message: Incoming) -> None:
        """Take an event, or a question, which was refused already. Raises `WireError`."""

    @abstractmethod
    def _lose(self, decoder: D, reason: str) -> None:
        """It has ended in the middle of an answer."""

    # --- who uses it

    @property
    def usable(self) -> bool:
        """May one more ask it?"""
        return not self.gone and not self.scope.cancel_called and self._answers < self.MAX_ANSWERS

    def enter(self) -> None:
        """Somebody uses it, for one answer."""
        self._users += 1
        self._answers += 1
        self.scope.deadline = float("inf")

    def leave(self) -> None:
        """They do no more. Worn out, it ends with its last user."""
        self._users -= 1
        self.rest()

    def rest(self) -> None:
        """Where nobody uses it, it ends after a while."""
        if not self._users:
            wait = self._idle if self._answers < self.MAX_ANSWERS else 0.0
            self.scope.deadline = trio.current_time() + wait

    # --- calls

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
            refused = Refused(f"{self._errors.name} refused {call.method}: {said}")
            refused.data = error.data
            raise refused
        return call.answer.result

    def request(self, method: str, params: Mapping[str, Any]) -> None:
        """A call whose answer nobody needs. Raises `ProviderUnavailable`."""
        self._send({"id": next(self._numbers), "method": method, "params": params})

    def _send(self, message: Mapping[str, Any]) -> None:
        """Raises `ProviderUnavailable`."""
        if self.gone:
            raise ProviderUnavailable(f"{self._errors.name}: {self.gone}", again=True)
        try:
            self._child.send(self._pack(message))
        except ChildError as error:
            self.scope.cancel()
            raise ProviderUnavailable(f"{self._errors.name}: {error}", again=True) from None

    # --- what it tells

    def listen(self, place: str, decoder: D) -> Listener[D]:
        """Hear what is told of a place, its id of an answer, until that is forgotten."""
        listener = self._listeners[place] = Listener(decoder)
        return listener

    async def read(self) -> None:
        """Pass on what it tells until it ends, or the scope is cancelled."""
        reason = f"the {self.NOUN} was ended"
        try:
            with self.scope:
                while (message := await self._next()) is not None:
                    self._take(message)
                code = await self._child.ended()
                reason = f"the {self.NOUN} ended ({code}){self._last_words()}"
        except (ChildError, WireError) as error:
            reason = str(error)
        finally:
            self._end(reason)

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._child.errors.splitlines() if line.strip()]
        return f": {self._errors.redact(lines[self.TELLING][:300])}" if lines else ""

    def _take(self, message: Incoming) -> None:
        """Raises `WireError`."""
        if message.method:
            if message.id is not None:
                self._refuse(message.id)
            self._hear(message)
            return
        call = self._calls.pop(message.id, None) if isinstance(message.id, int) else None
        if call is not None:
            call.answer = message
            call.answered.set()

    def _refuse(self, number: int | str) -> None:
        try:
            self._send({"id": number, "error": NOBODY})
        except ProviderUnavailable as error:  # whoever waits hears that it is ended
            logger.debug("%s", error)

    def _end(self, reason: str) -> None:
        self.gone = reason
        for call in self._calls.values():
            call.answered.set()
        for listener in self._listeners.values():
            if not listener.over:
                self._lose(listener.decoder, reason)
                listener.over = True
            listener.tell()
