"""`local_hf`: a transformers model of this machine, in a process of its own.

The node starts the process, watches it and starts it again when it dies: a crash or an out of
memory there is an error to those who waited for it, and nothing else. This module imports neither
torch nor transformers.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from .base import (
    Answering,
    Asked,
    Embedding,
    EmbedRequest,
    GenerateRequest,
    Health,
    ModelNotFound,
    ModelOffer,
    Origin,
    ProviderUnavailable,
    RequestRejected,
)
from .hf_call import Call, CountCall, EmbedCall
from .hf_frames import (
    Begun,
    Cancel,
    Count,
    Counted,
    Counters,
    Embed,
    Event,
    Failed,
    Finished,
    FrameError,
    Generate,
    Load,
    Loaded,
    LoadFailed,
    Loading,
    Order,
    Piece,
    Vectors,
)
from .hf_process import COMMAND, WorkerProcess, open_worker, worker_environment
from .hf_settings import LocalHFSettings
from .tokens import TokenCount

__all__ = ["LocalHF", "LocalHFSettings"]

logger = logging.getLogger(__name__)

#: Seconds before a worker that died is started again: the first time, and at most.
FIRST_DELAY = 0.5
LONGEST_DELAY = 60.0
#: A worker that answered for so many seconds starts the delays anew.
SETTLED = 60.0
#: Seconds before a model that could not be loaded is tried again: a package may have been
#: installed, a hub be back.
FAILED_DELAY = 60.0


class LocalHF:
    """A `Provider` for one local model. Something must run `run`."""

    def __init__(self, settings: LocalHFSettings, *, command: Sequence[str] = COMMAND) -> None:
        self._settings = settings
        self._command = command
        self._model_id = settings.model_id
        self._worker: WorkerProcess | None = None
        self._offer: ModelOffer | None = None
        self._health = Health(state="starting", reason="its process was not started yet")
        #: When what it does now began, and when the next start is due.
        self._since = 0.0
        self._next_start = 0.0
        self._bar = ""
        self._changed = trio.Event()
        self._numbers = itertools.count(1)
        self._calls: dict[int, Call | EmbedCall | CountCall] = {}
        self._counters = Counters()
        self._past = Counters()
        self._restarts = 0
        self._loading = trio.CancelScope()

    # --- Provider -------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The provider's name."""
        return self._settings.name

    def models(self) -> Sequence[ModelOffer]:
        """The model, once it was loaded; also while a worker that died is started again."""
        return () if self._offer is None else (self._offer,)

    async def check(self) -> Health:
        """Is the model loaded? Asks nobody, so it takes no time."""
        if self._health.state != "starting":
            return self._health
        return Health(state="starting", reason=self.progress)

    @asynccontextmanager
    async def open(self, request: GenerateRequest) -> AsyncIterator[Answering]:
        """Begin an answer; leaving cancels the work in the model within a step.

        While the model is loading or starting again a request waits, at most `start_wait` seconds.
        """
        call = Call(next(self._numbers))
        async with self._asked(call, request):
            await call.wait_begun()
            yield Answering(self._origin(), call)

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        """The embeddings; cancelling stops the work in the model within a batch."""
        call = EmbedCall(next(self._numbers))
        async with self._asked(call, request):
            return await call.embeddings()

    async def count_tokens(self, request: GenerateRequest) -> TokenCount:
        """Those of the prompt as the model reads it, by its own tokenizer and template."""
        call = CountCall(next(self._numbers))
        async with self._asked(call, request):
            return TokenCount(await call.tokens(), True)

    @asynccontextmanager
    async def _asked(
        self, call: Call | EmbedCall | CountCall, request: Asked
    ) -> AsyncIterator[None]:
        """Pass a request on to the worker; leaving before its end cancels it."""
        if request.model != self._model_id or request.task != self._settings.task:
            raise ModelNotFound(f"{self.name} has {self._model_id}, not {request.model}")
        worker = await self._wait_ready()
        if len(self._calls) >= self._settings.max_batch + self._settings.max_waiting:
            raise ProviderUnavailable(f"{self.name} has too many requests", retry_after=1.0)
        try:
            worker.send(_order_of(call, request))
        except FrameError as error:
            raise RequestRejected(f"the request cannot be passed on: {error}") from error
        self._calls[call.number] = call
        try:
            yield
        finally:
            # What already ended is not in there any more.
            if self._calls.pop(call.number, None) is not None:
                worker.send(Cancel(call=call.number))

    def _origin(self) -> Origin:
        offer = self._offer
        if offer is None:
            return Origin(provider=self.name, model=self._model_id)
        return Origin(
            provider=self.name,
            model=offer.id,
            weights=offer.weights,
            engine=offer.engine,
            numerics=offer.numerics,
        )

    async def _wait_ready(self) -> WorkerProcess:
        with trio.move_on_after(self._settings.start_wait):
            while True:
                if self._worker is not None:
                    return self._worker
                if self._health.state == "unavailable":
                    break
                await self._changed.wait()
        raise ProviderUnavailable(
            f"{self.name}: {self._health.reason}",
            retry_after=max(1.0, self._next_start - trio.current_time()),
        )

    # --- what can be seen of it -----------------------------------------------------------------

    @property
    def progress(self) -> str:
        """What it does before it can answer, such as "loading SmolLM2: reading the tokenizer,
        3 s"; empty once it can."""
        if self._health.state != "starting":
            return ""
        seconds = trio.current_time() - self._since
        bar = f" ({self._bar})" if self._bar else ""
        return f"{self._health.reason}{bar}, {seconds:.0f} s"

    @property
    def pid(self) -> int | None:
        """The process that holds the model, while it answers."""
        return None if self._worker is None else self._worker.pid

    def stats(self) -> dict[str, int]:
        """Counted since `run` began: requests, active, finished, cancelled, failed, tokens (each
        one the model made, also after nobody waited any more), restarts."""
        now, past = self._counters, self._past
        counted = {
            field: getattr(past, field) + getattr(now, field)
            for field in Counters.__struct_fields__
        }
        return {**counted, "active": now.active, "restarts": self._restarts}

    # --- the worker's life ----------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a worker running until cancelled."""
        failures = 0
        try:
            while True:
                self._become(self._starting(""))
                began = trio.current_time()
                failed = await self._live()
                failures = failures + 1 if trio.current_time() - began < SETTLED else 1
                delay = min(FIRST_DELAY * 2 ** (failures - 1), LONGEST_DELAY)
                if failed is not None:
                    delay = FAILED_DELAY
                self._next_start = trio.current_time() + delay
                await trio.sleep(delay)
                self._restarts += 1
        finally:
            self._lose_calls("the node stops")
            self._become(Health(state="unavailable", reason="stopped"))

    async def _live(self) -> LoadFailed | None:
        """One worker, from its start to its end; what it said if it could not load."""
        wanted = self._settings
        environment = worker_environment(wanted.environment, wanted.effective_threads)
        reason = "the node stops"
        try:
            async with open_worker(self._command, environment, self._draw) as worker:
                worker.send(self._order())
                try:
                    failed = await self._follow(worker)
                    self._retire(failed)
                    reason = f"the model's process is gone: {await worker.obituary()}"
                finally:
                    self._lose_calls(reason)
                if failed is None:
                    self._mourn(reason, worker.last_lines)
        except OSError as error:
            failed = LoadFailed(reason=f"no process can be started: {error}")
            self._retire(failed)
        return failed

    def _retire(self, failed: LoadFailed | None) -> None:
        """The worker answers no more: nothing new goes to it."""
        self._worker = None
        if failed is None:
            self._become(self._starting(" again"))
            return
        logger.error("%s: %s. %s", self.name, failed.reason, failed.hint)
        self._offer = None
        self._next_start = trio.current_time() + FAILED_DELAY
        self._become(Health(state="unavailable", reason=failed.reason, hint=failed.hint))

    def _order(self) -> Load:
        wanted = self._settings
        return Load(
            model=wanted.model,
            task=wanted.task,
            device=wanted.device,
            dtype=wanted.dtype,
            threads=wanted.effective_threads,
            max_batch=wanted.max_batch,
            max_context=wanted.max_context,
            memory=wanted.memory,
            cache_dir=wanted.cache_dir,
        )

    async def _follow(self, worker: WorkerProcess) -> LoadFailed | None:
        """Take a worker's events until it ends."""
        with trio.CancelScope() as self._loading:
            self._sign_of_life()
            while (events := await worker.receive()) is not None:
                for event in events:
                    if isinstance(event, LoadFailed):
                        return event
                    self._take(worker, event)
        if self._loading.cancelled_caught:
            return LoadFailed(
                reason=f"no progress in {self._settings.load_timeout:.0f} s: {self._health.reason}"
            )
        return None

    def _mourn(self, reason: str, last_lines: Sequence[str]) -> None:
        logger.error("%s: %s", self.name, reason)
        for line in last_lines:
            logger.error("%s: it had printed: %s", self.name, line)
        self._become(self._starting(f" again, as {reason}"))

    def _lose_calls(self, reason: str) -> None:
        """The worker is gone, and with it all answers under way and its counters."""
        self._worker = None
        past, now = self._past, self._counters
        self._past = Counters(
            requests=past.requests + now.requests,
            finished=past.finished + now.finished,
            cancelled=past.cancelled + now.cancelled,
            failed=past.failed + now.failed + len(self._calls),
            tokens=past.tokens + now.tokens,
        )
        self._counters = Counters()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.fail(ProviderUnavailable(f"{self.name}: {reason}", retry_after=1.0))

    def _starting(self, detail: str) -> Health:
        return Health(state="starting", reason=f"loading {self._model_id}{detail}")

    def _become(self, health: Health) -> None:
        self._health = health
        self._since = trio.current_time()
        self._bar = ""
        self._changed.set()
        self._changed = trio.Event()

    def _draw(self, bar: str) -> None:
        self._bar = bar
        self._sign_of_life()

    def _sign_of_life(self) -> None:
        if self._worker is None:
            self._loading.deadline = trio.current_time() + self._settings.load_timeout

    # --- its events -----------------------------------------------------------------------------

    def _take(self, worker: WorkerProcess, event: Event) -> None:
        match event:
            case Piece(call=number) | Vectors(call=number) | Begun(call=number):
                # Nobody there: it was cancelled, and the worker does not know yet.
                if (call := self._calls.get(number)) is not None:
                    call.take(event)
            case Finished(call=number) | Failed(call=number) | Counted(call=number):
                if (call := self._calls.pop(number, None)) is not None:
                    call.take(event)
            case Counters():
                self._counters = event
            case Loading(stage=stage):
                self._sign_of_life()
                since = self._since
                self._become(self._starting(f": {stage}"))
                self._since = since
                logger.info("%s: %s", self.name, self.progress)
            case Loaded(offer=offer, about=about):
                logger.info("%s: ready after %.1f s: %s", self.name, self._age(), about)
                self._loading.deadline = float("inf")
                self._offer = offer
                self._worker = worker
                self._become(Health())

    def _age(self) -> float:
        return trio.current_time() - self._since


def _order_of(call: Call | EmbedCall | CountCall, request: Asked) -> Order:
    if isinstance(request, EmbedRequest):
        return Embed(call=call.number, request=request)
    kind = Count if isinstance(call, CountCall) else Generate
    return kind(call=call.number, request=request)
