"""The process that holds a model: `python -m promptmesh.providers.local_hf_worker`.

Orders come on standard input and events leave on standard output, as frames (`hf_frames`); what is
printed goes to standard error. It ends when its input ends, however the node ended. (The kernel's
"signal me when my parent dies" is not used: it is about the thread that started a process, and the
node starts it from a short-lived one.)

Threads: one reads orders, so that a cancellation never waits; the main one loads the model, then
prepares requests; the engine has its own; one writes.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
from typing import TYPE_CHECKING, NoReturn

from .base import GenerateError, ProviderUnavailable
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
    FrameBuffer,
    FrameError,
    Generate,
    Load,
    LoadFailed,
    Loading,
    Vectors,
    decode_order,
)
from .hf_outbox import Outbox

if TYPE_CHECKING:
    from .hf_answer import Answer
    from .hf_embed import Embedder
    from .hf_engine import Engine
    from .hf_load import LoadedModel

logger = logging.getLogger(__name__)


class Worker:
    """The orders of one node, carried out."""

    def __init__(self, out: int) -> None:
        self._lock = threading.Lock()
        self._orders: queue.SimpleQueue[Load | Generate | Embed | Count] = queue.SimpleQueue()
        #: Calls that were read and are not prepared yet, and answers under way.
        self._expected: set[int] = set()
        self._answers: dict[int, Answer] = {}
        self._engine: Engine | None = None
        #: Tokens the engine had made before the first request.
        self._probed = 0
        self._counts = {"requests": 0, "finished": 0, "cancelled": 0, "failed": 0}
        self.outbox = Outbox(out, self.counters)

    def counters(self) -> Counters:
        """What was done so far."""
        with self._lock:
            return Counters(
                active=len(self._expected) + len(self._answers),
                tokens=self._engine.tokens - self._probed if self._engine is not None else 0,
                **self._counts,
            )

    # --- the reading thread ---------------------------------------------------------------------

    def read(self, fd: int) -> None:
        """Read orders until the input ends, and then end the process."""
        buffer = FrameBuffer()
        try:
            while data := os.read(fd, 1 << 16):
                for body in buffer.feed(data):
                    self._receive(body)
        except (OSError, FrameError) as error:
            logger.error("orders cannot be read: %s", error)
        # Nobody listens any more. Whatever the model's threads are doing ends here.
        os._exit(0)

    def _receive(self, body: bytes) -> None:
        order = decode_order(body)
        if isinstance(order, Cancel):
            self._cancel(order.call)
            return
        if isinstance(order, Generate | Embed):
            with self._lock:
                self._expected.add(order.call)
                self._counts["requests"] += 1
        self._orders.put(order)

    def _cancel(self, call: int) -> None:
        with self._lock:
            answer = self._answers.pop(call, None)
            if answer is None and call not in self._expected:
                return  # it has just ended
            self._expected.discard(call)
            self._counts["cancelled"] += 1
        if answer is not None:
            answer.cancel()

    # --- the main thread ------------------------------------------------------------------------

    def serve(self) -> None:
        """Load the model that the first order names, then answer."""
        order = self._orders.get()
        if not isinstance(order, Load):
            raise FrameError("the first order must be to load a model")
        self.outbox.put(Loading(stage="starting transformers and torch"))
        if order.task == "embed":
            self._serve_embeddings(order)
        model, engine = self._load(order)
        while True:
            order = self._orders.get()
            if isinstance(order, Generate):
                self._generate(order, model, engine)
            elif isinstance(order, Count):
                self._count(order, model)

    def _tell(self, stage: str) -> None:
        self.outbox.put(Loading(stage=stage))

    def _load(self, order: Load) -> tuple[LoadedModel, Engine]:
        from .hf_start import start

        model, engine, loaded = start(order, self._tell)
        with self._lock:
            self._engine, self._probed = engine, engine.tokens
        self.outbox.put(loaded)
        return model, engine

    def _generate(self, order: Generate, model: LoadedModel, engine: Engine) -> None:
        from .hf_answer import Answer
        from .hf_prompt import prepare

        try:
            prepared = prepare(order.request, model)
            with self._lock:
                if order.call not in self._expected:
                    return  # cancelled meanwhile
                self._expected.discard(order.call)
                answer = Answer(
                    order.call, prepared, model, engine, emit=self.outbox.put, ended=self._ended
                )
                self._answers[order.call] = answer
            self.outbox.put(Begun(call=order.call))
            answer.start()
        except GenerateError as error:
            self._refuse(order.call, error)
        except Exception as error:
            # The asker sees it; other requests may well be fine.
            logger.exception("a request could not be begun")
            self._refuse(order.call, ProviderUnavailable(f"{type(error).__name__}: {error}"))

    def _count(self, order: Count, model: LoadedModel) -> None:
        from .hf_prompt import refuse_unsupported, tokenize

        try:
            refuse_unsupported(order.request, model)
            prompt, _ = tokenize(order.request, model)
            self.outbox.put(Counted(call=order.call, tokens=len(prompt)))
        except GenerateError as error:
            self.outbox.put(_failed(order.call, error))
        except Exception as error:
            # The asker sees it; other requests may well be fine.
            logger.exception("a prompt's tokens could not be counted")
            unavailable = ProviderUnavailable(f"{type(error).__name__}: {error}")
            self.outbox.put(_failed(order.call, unavailable))

    def _serve_embeddings(self, order: Load) -> NoReturn:
        from .hf_embed import start_embedder

        embedder, loaded = start_embedder(order, self._tell)
        self.outbox.put(loaded)
        while True:
            asked = self._orders.get()
            if isinstance(asked, Embed):
                self._embed(asked, embedder)

    def _embed(self, order: Embed, embedder: Embedder) -> None:
        tokens = 0
        try:
            for places, embeddings in embedder.embed(order.request):
                with self._lock:
                    if order.call not in self._expected:
                        return  # cancelled meanwhile
                tokens += sum(embedding.usage.prompt_tokens for embedding in embeddings)
                self.outbox.put(
                    Vectors(call=order.call, places=tuple(places), embeddings=tuple(embeddings))
                )
        except GenerateError as error:
            self._refuse(order.call, error)
        except Exception as error:
            # The asker sees it; other requests may well be fine.
            logger.exception("embeddings could not be made")
            self._refuse(order.call, ProviderUnavailable(f"{type(error).__name__}: {error}"))
        else:
            self._embedded(order.call, tokens)

    def _embedded(self, call: int, tokens: int) -> None:
        with self._lock:
            if call not in self._expected:
                return  # cancelled at the same moment
            self._expected.discard(call)
            self._counts["finished"] += 1
        self.outbox.put(
            Finished(call=call, reason="stop", prompt_tokens=tokens, completion_tokens=0)
        )

    def _refuse(self, call: int, error: GenerateError) -> None:
        with self._lock:
            if call not in self._expected and call not in self._answers:
                return
            self._expected.discard(call)
            self._answers.pop(call, None)
            self._counts["failed"] += 1
        self.outbox.put(_failed(call, error))

    # --- the engine's thread --------------------------------------------------------------------

    def _ended(self, answer: Answer, event: Event) -> None:
        with self._lock:
            if self._answers.pop(answer.call, None) is None:
                return  # cancelled at the same moment
            self._counts["finished" if isinstance(event, Finished) else "failed"] += 1
        self.outbox.put(event)


def _failed(call: int, error: GenerateError) -> Failed:
    return Failed(
        call=call,
        code=error.code,
        message=error.message,
        field=error.field,
        retry_after=error.retry_after,
    )


def take_streams() -> tuple[int, int]:
    """Keep standard input and output for the frames; what prints goes to standard error."""
    orders, events = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return orders, events


def failure(error: Exception) -> LoadFailed:
    """Why the model cannot be had, for a person."""
    install = "pip install 'promptmesh[hf]'"
    if isinstance(error, ModuleNotFoundError):
        return LoadFailed(reason=f"{error.name} is not installed", hint=install)
    if isinstance(error, ImportError):
        return LoadFailed(
            reason=f"torch or transformers cannot be used: {error}",
            hint=install.replace("install", "install --upgrade"),
        )
    # A `LoadError`, whose module may be what could not be imported.
    hint = getattr(error, "hint", None)
    if isinstance(hint, str):
        return LoadFailed(reason=str(error), hint=hint)
    logger.error("loading failed", exc_info=error)
    return LoadFailed(reason=f"{type(error).__name__}: {error}")


def main() -> None:
    """Serve one node until it is gone."""
    # A Ctrl-C in the terminal reaches all processes there; the node decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    orders, events = take_streams()
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s"
    )
    logging.getLogger("promptmesh").setLevel(logging.INFO)
    worker = Worker(events)
    threading.Thread(target=worker.read, args=(orders,), name="hf-orders", daemon=True).start()
    try:
        worker.serve()
    except Exception as error:
        # The node shows it in `check()` and tries again later.
        worker.outbox.put(failure(error))
        worker.outbox.close()
    # The library's threads are not daemons and would be waited for.
    os._exit(1)


if __name__ == "__main__":
    main()
