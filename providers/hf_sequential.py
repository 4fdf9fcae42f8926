"""Runs the requests of a model one after another, by `generate`.

For models that continuous batching cannot run (state space models, some kinds of attention). It is
slower for many, and right.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from .hf_engine import Delivery, EngineStopped, Job, greedy
from .hf_load import LoadedModel
from .hf_sampling import DrawOne

logger = logging.getLogger(__name__)


class _Cancelled(Exception):
    """Nobody wants the running job any more."""


class SequentialEngine:
    """One job of a model at a time, in the order they came."""

    batches = False

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        #: Jobs that are queued or running; a job leaves it with its last delivery.
        self._wanted: set[Job] = set()
        self._lock = threading.RLock()
        self._closed = False
        self.tokens = 0
        self._current: Job | None = None
        # Before each forward pass, and so between two pieces of a long prompt.
        self._hook = model.model.register_forward_pre_hook(self._check)
        self._thread = threading.Thread(target=self._run, name="hf-generate", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job in the queue. Raises `ValueError` for one that cannot fit."""
        if len(job.prompt) + job.limit > self._model.context_length:
            raise ValueError("prompt and answer do not fit into the context")
        with self._lock:
            if self._closed:
                raise EngineStopped("the engine is closed")
            self._wanted.add(job)
            self._queue.put(job)

    def cancel(self, job: Job) -> None:
        """Nobody wants the job's tokens any more. It ends before the next step."""
        with self._lock:
            self._wanted.discard(job)

    def close(self) -> None:
        """End the thread; jobs that still run fail."""
        with self._lock:
            self._closed = True
            left, self._wanted = self._wanted, set()
            self._queue.put(None)
        self._thread.join(10)
        self._hook.remove()
        for job in left:
            job.take(Delivery([], "failed", "the engine is closed"))

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            if job not in self._wanted:
                continue
            self._current = job
            try:
                self._generate(job)
            except _Cancelled:
                pass
            except Exception as error:
                # The asker of this job sees it; the next one may well work.
                logger.exception("generate failed")
                self.hand_over(job, Delivery([], "failed", str(error) or type(error).__name__))

    def _generate(self, job: Job) -> None:
        prompt = torch.tensor([job.prompt], device=self._model.model.device)
        with torch.inference_mode():
            self._model.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=greedy(self._model, max_new_tokens=job.limit),
                logits_processor=LogitsProcessorList([DrawOne(job.draw)]),
                streamer=_Tokens(self, job),
            )

    def _check(self, module: Any, inputs: Any) -> None:
        if threading.current_thread() is self._thread and self._current not in self._wanted:
            raise _Cancelled

    def arrived(self, job: Job, token: int, count: int) -> None:
        """The job's next token, the `count`-th."""
        self.tokens += 1
        if job.draw.error is not None:
            raise job.draw.error
        if token in self._model.ends:
            self.hand_over(job, Delivery([token], "stop"))
        else:
            self.hand_over(job, Delivery([token], "length" if count == job.limit else ""))

    def hand_over(self, job: Job, delivery: Delivery) -> None:
        """Give a job its tokens, if it is still wanted."""
        with self._lock:
            if job not in self._wanted:
                return
            if delivery.end:
                self._wanted.discard(job)
            job.take(delivery)


class _Tokens(BaseStreamer):
    """What `generate` tells of its tokens; the prompt comes first."""

    def __init__(self, engine: SequentialEngine, job: Job) -> None:
        self._engine = engine
        self._job = job
        self._count = -1

    def put(self, value: torch.Tensor) -> None:
        self._count += 1
        if self._count:
            self._engine.arrived(self._job, int(value.reshape(-1)[-1]), self._count)

    def end(self) -> None:
        pass
