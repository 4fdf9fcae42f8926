"""Runs the requests of a model together, by transformers' continuous batching.

Its traps, and where they are met: the sizes of the cache are always given (`_manager_for`); a
prompt that does not fit would end the loop for everybody, so `hf_prompt` checks lengths and
`submit` checks again; a loop that died is buried with its requests and the next request starts a
new one; a cancelled request gets no last output, so it is forgotten here at once; a cancellation
that overtakes its request in the manager's queues is repeated when the request's output shows up.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from .hf_load import PAGE, LoadedModel
from .hf_sampling import Draw, DrawEachRow

logger = logging.getLogger(__name__)

#: Tokens of one step. While a long prompt is read, each step of the others waits for a piece of it:
#: on a CPU 128 tokens cost as much as some steps, on an accelerator 1024 cost little.
STEP_TOKENS = {"cuda": 1024, "cpu": 128}
#: Seconds a loop gets for its last step.
STOP_GRACE = 10.0


class Delivery(NamedTuple):
    """New tokens of a job, and whether they are the last. A token that ends an answer is among
    them."""

    tokens: list[int]
    end: Literal["", "stop", "length", "failed"] = ""
    error: str = ""


@dataclass(eq=False)
class Job:
    """A request as an engine sees it: tokens in, tokens out.

    `take` is called by the engine's thread for each delivery, never after `cancel` has returned and
    never after one with an `end`. It must not block.
    """

    prompt: list[int]
    #: Most tokens of the answer. Prompt and answer together must fit into the context.
    limit: int
    draw: Draw
    take: Callable[[Delivery], None]


class EngineStopped(RuntimeError):
    """The engine takes no more jobs."""


class Engine(Protocol):
    """What turns jobs into tokens."""

    @property
    def batches(self) -> bool:
        """Do jobs run together?"""
        ...

    @property
    def tokens(self) -> int:
        """Tokens made so far, wanted or not."""
        ...

    def submit(self, job: Job) -> None: ...

    def cancel(self, job: Job) -> None: ...

    def close(self) -> None: ...


def greedy(model: LoadedModel, **fields: Any) -> GenerationConfig:
    """The likeliest token each time. `DrawEachRow` and `DrawOne` leave the drawn one as that."""
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        # -1: a model without an end token goes on to its limit.
        eos_token_id=sorted(model.ends) or -1,
        pad_token_id=model.tokenizer.pad_token_id,
        **fields,
    )


@dataclass(eq=False)
class _Running:
    job: Job
    manager: Any
    seen: int = 0


class BatchEngine:
    """All jobs of a model in one batch, which they enter and leave at any step."""

    batches = True

    def __init__(self, model: LoadedModel, *, max_batch: int) -> None:
        self._model = model
        self._max_batch = max_batch
        self._lock = threading.RLock()
        self._running: dict[str, _Running] = {}
        self._names: dict[Job, str] = {}
        self._numbers = itertools.count()
        self._manager: Any = None
        self._reader: threading.Thread | None = None
        self._closed = False
        self.tokens = 0
        #: What ended the last loop.
        self.fatal: Exception | None = None

    # --- jobs -----------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Put a job in the queue. Raises `ValueError` for one that cannot fit."""
        if len(job.prompt) + job.limit > self._model.context_length:
            raise ValueError("prompt and answer do not fit into the context")
        while True:
            with self._lock:
                manager = self._open_manager()
                if self._add(manager, job):
                    return
                reader = self._reader
            # The loop is dying. Its reader buries it; then there is a new one.
            if reader is not None and reader is not threading.current_thread():
                reader.join()

    def _add(self, manager: Any, job: Job) -> bool:
        name = f"{next(self._numbers)}"
        # Known before it is added: its first token may come before this returns.
        self._running[name] = _Running(job, manager)
        self._names[job] = name
        accepted = manager.add_request(
            job.prompt,
            request_id=name,
            max_new_tokens=job.limit,
            streaming=True,
            eos_token_id=sorted(self._model.ends),
            draw=job.draw,
        )
        if accepted is None:
            self._forget(name)
        return accepted is not None

    def cancel(self, job: Job) -> None:
        """Nobody wants the job's tokens any more. Its place is free within a step."""
        with self._lock:
            name = self._names.get(job)
            if name is None:
                return
            running = self._forget(name)
        running.manager.cancel_request(name)

    def _forget(self, name: str) -> _Running:
        running = self._running.pop(name)
        del self._names[running.job]
        return running

    def close(self) -> None:
        """End the loop; jobs that still run fail."""
        with self._lock:
            self._closed = True
            manager, self._manager = self._manager, None
            reader = self._reader
        if manager is not None:
            manager.stop(block=True, timeout=STOP_GRACE, hard_stop=True)
        if reader is not None:
            reader.join(STOP_GRACE)

    # --- the loop -------------------------------------------------------------------------------

    def _open_manager(self) -> Any:
        if self._closed:
            raise EngineStopped("the engine is closed")
        if self._manager is None:
            self._manager = self._manager_for(self._model)
            self._reader = threading.Thread(
                target=self._read, args=(self._manager,), name="hf-results", daemon=True
            )
            self._manager.start()
            self._reader.start()
        return self._manager

    def _manager_for(self, model: LoadedModel) -> Any:
        manager = model.model.init_continuous_batching(
            generation_config=greedy(model),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=model.cache_tokens // PAGE,
                max_batch_tokens=max(STEP_TOKENS[model.model.device.type], self._max_batch),
                max_requests_per_batch=self._max_batch,
                # The sizes are chosen (`hf_load.cache_tokens`): only what cannot be is refused.
                max_memory_percent=0.95,
                use_cuda_graph=False,
                use_async_batching=False,
                auto_switch_to_flash=False,
                per_request_processors=True,
            ),
        )
        # The manager makes its processors from a GenerationConfig, which has no place for ours.
        processors = manager.logit_processor
        processors.logits_processor.append(DrawEachRow())
        processors.tensors_required += 1
        processors.supported_keys["draw"] = Draw
        processors.do_processing = True
        return manager

    def _read(self, manager: Any) -> None:
        """The thread that hands a manager's outputs to their jobs, until its loop has ended."""
        alive = True
        while alive:
            # Asked first: what a loop leaves behind when it ends is still read.
            alive = manager.is_running()
            output = manager.get_result(timeout=0.1)
            while output is not None:
                self._hand_over(manager, output)
                output = manager.get_result(timeout=0)
        self._bury(manager)

    def _hand_over(self, manager: Any, output: Any) -> None:
        with self._lock:
            running = self._running.get(output.request_id)
            if running is None:
                self.tokens += 1
                if not output.is_finished():
                    manager.cancel_request(output.request_id)
                return
            new = output.generated_tokens[running.seen :]
            running.seen += len(new)
            self.tokens += len(new)
            delivery = self._delivery(running.job, new, output)
            if delivery.end:
                self._forget(output.request_id)
                if delivery.end == "failed" and not output.is_finished():
                    manager.cancel_request(output.request_id)
            running.job.take(delivery)

    def _delivery(self, job: Job, new: list[int], output: Any) -> Delivery:
        if job.draw.error is not None:
            return Delivery([], "failed", f"drawing a token: {job.draw.error}")
        if output.error is not None:
            return Delivery(new, "failed", output.error)
        if not output.is_finished():
            return Delivery(new)
        return Delivery(new, "stop" if new and new[-1] in self._model.ends else "length")

    def _bury(self, manager: Any) -> None:
        """The manager's loop has ended: so have its jobs. Free its memory."""
        fatal = manager.background_thread_status.fatal_error
        with self._lock:
            self.fatal = fatal
            # Otherwise `close` has taken it and stops it.
            is_mine = self._manager is manager
            if is_mine:
                self._manager = None
            left = [name for name, run in self._running.items() if run.manager is manager]
            jobs = [self._forget(name).job for name in left]
        if is_mine:
            logger.error("the generation loop ended: %s", fatal)
            manager.stop(block=True, timeout=STOP_GRACE, hard_stop=True)
        for job in jobs:
            job.take(Delivery([], "failed", f"the model's loop ended: {fatal}"))
