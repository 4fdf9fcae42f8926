"""From an order to a model that answers: load, try out, measure, and say what it is."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from .base import ModelOffer
from .hf_engine import BatchEngine, Engine
from .hf_frames import Load, Loaded
from .hf_load import LoadedModel, LoadError, load
from .hf_probe import ProbeFailed, check_runs, is_repeatable
from .hf_sequential import SequentialEngine
from .hf_weights import Notebook

logger = logging.getLogger(__name__)


def start(order: Load, tell: Callable[[str], None]) -> tuple[LoadedModel, Engine, Loaded]:
    """Load a model and start its engine. Raises `LoadError`; `tell` hears what is being done."""
    notebook = Notebook(order.cache_dir)
    model = load(order, notebook, tell)
    tell("trying it out")
    engine = working_engine(model, order.max_batch)
    repeatable = measured(engine, model, order, notebook, tell)
    offer = ModelOffer(
        id=model.id,
        context_length=model.context_length,
        tools=model.tools,
        can_continue=True,
        counts_begun=True,
        weights=model.weights,
        engine=model.engine,
        numerics=numerics(model, engine, repeatable),
        repeatable=repeatable,
    )
    about = (
        f"{model.id}: {offer.numerics}, {order.threads} threads, a context of "
        f"{model.context_length} tokens, a cache of {model.cache_tokens}"
    )
    return model, engine, Loaded(offer=offer, about=about)


def working_engine(model: LoadedModel, max_batch: int) -> Engine:
    """The batch engine if this model runs in it, else the sequential one. Raises `LoadError`."""
    attention = model.attention
    engine = BatchEngine(model, max_batch=max_batch)
    try:
        check_runs(engine, model)
        return engine
    except Exception as error:
        # Continuous batching is young: which models it cannot run shows only by trying. The log
        # has the reason; the model still answers.
        engine.close()
        reason = engine.fatal or error
    if isinstance(reason, MemoryError | torch.OutOfMemoryError):
        raise LoadError(
            f"the cache does not fit into the memory: {reason}",
            "give less by `memory` or `max_context`, or take a smaller model",
        )
    if model.attention != attention:
        # A manager that could not be made leaves behind what it had changed.
        model.model.set_attn_implementation(attention)
    logger.warning("%s cannot be batched (%s): it answers one at a time", model.id, reason)
    sequential = SequentialEngine(model)
    try:
        check_runs(sequential, model)
    except ProbeFailed as error:
        raise LoadError(f"{model.id} does not run: {error}") from error
    return sequential


def measured(
    engine: Engine,
    model: LoadedModel,
    order: Load,
    notebook: Notebook,
    tell: Callable[[str], None],
) -> bool:
    """Whether greedy answers are the same alone and in a batch; remembered for these weights."""
    key = " ".join(
        ("repeatable", model.weights, model.engine, model.dtype, model.device, str(order.threads))
    )
    known = notebook.recall(key)
    if isinstance(known, bool):
        return known
    tell("measuring whether a batch changes answers")
    try:
        repeatable = is_repeatable(engine, model)
    except ProbeFailed as error:
        raise LoadError(f"{model.id} does not run: {error}") from error
    notebook.note(key, repeatable)
    return repeatable


def numerics(model: LoadedModel, engine: Engine, repeatable: bool) -> str:
    """The numerics class: what decides the last bits of a number here."""
    if not engine.batches:
        batch = "unbatched"
    else:
        batch = "batch-invariant" if repeatable else "batch-dependent"
    device = model.device.partition(":")[0]
    return f"{model.dtype}/{device}/{model.attention}/{batch}"
