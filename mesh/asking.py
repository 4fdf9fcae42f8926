"""One candidate asked once: its deadlines, and what is learnt from how it went."""

from __future__ import annotations

import logging
import math
import types
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import msgspec
import trio

from ..providers.base import (
    Answering,
    CacheOnlyMiss,
    Chunk,
    DeadlineExceeded,
    Declined,
    EmbedRequest,
    GenerateError,
    Origin,
    ProviderBusy,
    ProviderRefused,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
    TimeLimits,
)
from .embedding import whole
from .frames import RemoteProtocolError
from .measure import Experience, Fault
from .policies import Candidate
from .pool import CONNECT, NoPlace, NotRead, PeerAnswer
from .protocol import is_plain
from .transport import TransportError

logger = logging.getLogger(__name__)


#: Seconds to the first token that one has who is tried again: so many times what is usual there,
#: but no less than that; where nothing was measured; the wait for a slot comes in addition.
TRIAL_TIMES, TRIAL_LEAST, TRIAL = 4.0, 3.0, 10.0


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """Time limits in seconds. `whole` None: what the request says, else none."""

    #: To have a connection and a stream, and to send the request.
    connect: float = CONNECT
    #: From there to the first token: queueing, loading a model, reading the prompt.
    first_token: float = 120.0
    #: Between two tokens.
    gap: float = 60.0
    whole: float | None = None

    def with_limits(self, *limits: TimeLimits | None) -> Deadlines:
        """The same, but for what these say otherwise; the later ones count more."""
        said: dict[str, float] = {}
        for each in limits:
            told = msgspec.structs.asdict(each) if each else {}
            said |= {name: seconds for name, seconds in told.items() if seconds is not None}
        return replace(self, **said) if said else self

    def on_trial(self, candidate: Candidate) -> Deadlines:
        """The same for one that has just failed, and is tried while another could be asked.

        It was silent, maybe: its caller is not to wait for that as long as for the first time.
        """
        if candidate.offer.loaded is False:
            return self
        speed = candidate.speed
        usual = (speed.late or speed.ttft if speed else None) or candidate.said_ttft
        seconds = TRIAL if usual is None else max(TRIAL_LEAST, TRIAL_TIMES * usual)
        seconds += candidate.busy.wait or 0.0
        return replace(self, first_token=min(self.first_token, seconds))


class Asking:
    """Asks one candidate. Its chunks are the answer's, each within its time.

    `source` begins the work: a provider's `Answering`, or a `PeerAnswer`.
    """

    def __init__(
        self,
        candidate: Candidate,
        source: Callable[[], AbstractAsyncContextManager[Answering | PeerAnswer]],
        *,
        deadlines: Deadlines,
        experience: Experience,
        kind: str | None,
        stamp: Callable[[Origin], Origin],
        closed: Callable[[Candidate, PeerAnswer], None],
        finished: Callable[[Chunk], None],
        embed: EmbedRequest | None = None,
    ) -> None:
        self.candidate = candidate
        #: Its first token came: what follows cannot be tried elsewhere.
        self.begun = False
        #: It failed because nobody here read it: there is nobody to go on for.
        self.unread = False
        self._source = source
        self._deadlines = deadlines
        self._experience = experience
        #: What lengths are remembered by (`GenerateRequest.kind`); None: it is no whole answer.
        self._kind = kind
        #: Makes the answer's origin what it is to this node's callers.
        self._stamp = stamp
        #: Takes what the closing frame of a peer carries.
        self._closed = closed
        #: Takes the last chunk.
        self._finished = finished
        #: Where it is for embeddings: they are an answer only once all are here and fit it.
        self._embed = embed
        self._started = trio.current_time()
        #: Cancels the wait for the first token, and for each further one.
        self._limit = trio.CancelScope()
        self._first: Chunk | None = None
        self._first_at = 0.0
        self._text: list[str] = []
        self._settled = self._over = self._ended = False
        self._origin = Origin()
        self._remote: PeerAnswer | None = None
        self._chunks: AsyncIterator[Chunk] | None = None

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return trio.current_time() - self._started

    @property
    def text(self) -> str:
        """The text given so far."""
        return "".join(self._text)

    def outrun(self) -> None:
        """Another candidate's first token came before this one's."""
        if self.candidate.busy.all < self.candidate.busy.slots:
            now = trio.current_time()
            self._experience.outrun(self.candidate.measured, self.seconds, now)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Answering]:
        """The answer, once its first token is there. Leaving cancels the work.

        Raises a `GenerateError`, here or from the chunks.
        """
        self._experience.begin(self.candidate.measured)
        limit = self._limit
        try:
            with limit:
                limit.deadline = self._started + self._deadlines.first_token
                async with self._source() as source:
                    try:
                        await self._wait_first(source)
                        limit.deadline = math.inf
                        self.begun = True
                        yield Answering(self._origin, self)
                    finally:
                        if isinstance(self._chunks, AsyncGenerator):
                            await self._chunks.aclose()
            if limit.cancelled_caught:
                raise self._too_late()
        except Exception as error:  # the caller sees it as a `GenerateError`
            if self.begun:
                raise
            raise self._failed(error) from error
        finally:
            self._end()

    async def _wait_first(self, source: Answering | PeerAnswer) -> None:
        if isinstance(source, PeerAnswer):
            self._chunks = self._remote = source
        else:
            self._chunks = aiter(source.chunks)
        if self._embed is not None:
            self._chunks = whole(self._chunks, self._embed)
        self._origin = self._stamp(source.origin)
        self._first = await self._read()
        self._first_at = trio.current_time()
        if self._computed and self.candidate.busy.all < self.candidate.busy.slots:
            speed = self._experience.measures.of(self.candidate.measured)
            speed.first_token(self._first_at - self._started, self._first_at)

    @property
    def _computed(self) -> bool:
        """Was it made for this request, so that its time says something?"""
        return self._origin.cache in ("miss", "bypass")

    # --- the chunks

    def __aiter__(self) -> Asking:
        return self

    async def __anext__(self) -> Chunk:
        if self._first is not None:
            chunk, self._first = self._first, None
        elif self._over:
            raise StopAsyncIteration
        else:
            chunk = await self._read_next()
        if chunk.finish_reason is None:
            self._text.append(chunk.text)
            return chunk
        self._finish(chunk)
        return chunk

    async def _read(self) -> Chunk:
        """The next chunk that holds anything."""
        assert self._chunks is not None
        async for chunk in self._chunks:
            if chunk.text or not is_plain(chunk):
                return chunk
        raise _Cut("it ended without its end marker")

    async def _read_next(self) -> Chunk:
        try:
            return await self._within_gap(self._read())
        except Exception as error:  # the caller sees it as a `GenerateError`
            raise self._interrupted(error) from error

    @types.coroutine
    def _within_gap(self, reading: Coroutine[Any, Any, Chunk]) -> Generator[Any, Any, Chunk]:
        """Await `reading` for at most the gap between two tokens; then the limit of all cancels.

        A timer costs more than all else about a chunk, and most are there already, so one is set
        only where the coroutine really waits: this does what `await` does, step by step.
        """
        try:
            trap = reading.send(None)
        except StopIteration as stop:
            return cast(Chunk, stop.value)
        self._limit.deadline = trio.current_time() + self._deadlines.gap
        try:
            while True:
                try:
                    result = yield trap
                except BaseException as error:  # goes where `await` would send it
                    trap = reading.throw(error)
                else:
                    trap = reading.send(result)
        except StopIteration as stop:
            return cast(Chunk, stop.value)
        finally:
            self._limit.deadline = math.inf

    def _too_late(self) -> GenerateError:
        """What to raise when the limit has cancelled the wait for a token."""
        if not self.begun:
            return _TooLate(f"no token within {self._deadlines.first_token:g} s")
        return self._interrupted(_TooLate(f"no token for {self._deadlines.gap:g} s"))

    def _interrupted(self, error: Exception) -> GenerateError:
        """What to raise when the answer broke after its first token."""
        self._over = True
        failure = self._failed(error)
        if isinstance(failure, RequestRejected):  # a content filter that woke up late
            failure.partial = self.text
            return failure
        return StreamInterrupted(
            f"{self.candidate} broke off its answer: {failure}",
            partial=self.text,
            retry_after=failure.retry_after,
            again=failure.again,
        )

    # --- what is learnt

    def _finish(self, last: Chunk) -> None:
        self._over = self._settled = True
        what = self.candidate.measured
        self._end()
        self._finished(last)
        self._experience.succeeded(what)
        tokens = last.usage.completion_tokens if last.usage else 0
        if self._computed and tokens:
            now = self._remote.arrived if self._remote else trio.current_time()
            self._experience.measures.of(what).finished(tokens, now - self._first_at, now)
            if self._kind is not None:
                self._experience.measures.add_length(what.model, tokens, self._kind)
        if self._remote:
            self._closed(self.candidate, self._remote)

    def _failed(self, error: Exception) -> GenerateError:
        """Learn from a failure, and say it in the caller's terms."""
        failure, fault = _judge(error)
        self.unread = isinstance(failure, _Unread)
        self._settled = True
        self._end()
        self._experience.failed(
            self.candidate.measured,
            fault,
            str(failure),
            trio.current_time(),
            failure.retry_after,
            seconds=self.seconds,
        )
        if self._remote:
            self._closed(self.candidate, self._remote)
        return failure

    def _end(self) -> None:
        """The request is not in flight any more."""
        if not self._ended:
            self._ended = True
            self._experience.end(self.candidate.measured)
            if not self._settled:
                self._experience.abandoned(self.candidate.measured)


class _TooLate(DeadlineExceeded):
    """A time limit of this module passed."""


class _Cut(ProviderUnavailable):
    """An answer ended without its end marker."""


class _Unread(ProviderUnavailable):
    """An answer was given up as its reader here took nothing."""


def _judge(error: Exception) -> tuple[GenerateError, Fault]:
    """What a failure is called, and whom it speaks against."""
    match error:
        case ExceptionGroup(exceptions=(Exception() as only,)):
            return _judge(only)
        case NotRead():
            return _Unread(str(error)), Fault.NONE
        case NoPlace():
            return ProviderBusy(str(error)), Fault.NONE
        case TransportError():
            return ProviderUnavailable(f"the connection failed: {error}"), Fault.PEER
        case RemoteProtocolError():
            message = f"it broke the protocol: {error}"
            return ProviderUnavailable(message), Fault.PROVIDER_AT_ONCE
        case _TooLate():
            return DeadlineExceeded(error.message), Fault.PROVIDER_AT_ONCE
        case _Cut():
            return ProviderUnavailable(error.message), Fault.PROVIDER
        case RequestRejected() | CacheOnlyMiss() | ProviderBusy() | Declined():
            return error, Fault.NONE
        case ProviderRefused():
            return error, Fault.REFUSED
        case GenerateError():
            return error, Fault.PROVIDER
        case _:
            logger.error("a provider failed", exc_info=error)
            return ProviderUnavailable(f"an internal error: {error!r:.200}"), Fault.PROVIDER
