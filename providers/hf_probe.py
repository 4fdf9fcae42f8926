"""Tries a model out before it is offered: does it run, and does a batch change its answers?"""

from __future__ import annotations

import queue

from .hf_engine import Delivery, Engine, Job
from .hf_load import LoadedModel
from .hf_sampling import Draw, TokenLogprobs

#: Beginnings of different length, so that the rows of the batch are at different places.
PROBES = (
    "The capital of France is",
    "Once upon a time there was a small village by the sea, and in it lived",
    "def add(a, b):\n    return",
    "1, 2, 3, 4,",
)
#: Tokens of each answer. The numbers differ from the first one on, if they differ at all.
LENGTH = 8
#: Largest difference of a token's log probability, alone and in a batch, that counts as none. In
#: float32 it is about 0.0001; in bfloat16 about 0.3, which changes every second answer somewhere.
TOLERANCE = 0.001
#: Seconds in which a probe must have its answer.
PATIENCE = 600.0


class ProbeFailed(RuntimeError):
    """The engine gave no answer to the simplest question."""


def answers(engine: Engine, jobs: list[Job], results: queue.SimpleQueue[Delivery]) -> None:
    """Run jobs together to their ends. Raises `ProbeFailed`."""
    for job in jobs:
        engine.submit(job)
    left = len(jobs)
    while left:
        try:
            delivery = results.get(timeout=PATIENCE)
        except queue.Empty:
            raise ProbeFailed(f"no token in {PATIENCE:.0f} s") from None
        if delivery.end == "failed":
            raise ProbeFailed(delivery.error)
        left -= delivery.end != ""


def probe(engine: Engine, prompts: list[list[int]]) -> list[list[TokenLogprobs]]:
    """The tokens that greedily follow the prompts, run together, with log probabilities."""
    results: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    draws = [Draw(logprobs=0, prompt_length=len(prompt)) for prompt in prompts]
    jobs = [
        Job(prompt, LENGTH, draw, results.put) for prompt, draw in zip(prompts, draws, strict=True)
    ]
    answers(engine, jobs, results)
    return [draw.entries for draw in draws]


def probe_prompts(model: LoadedModel) -> list[list[int]]:
    """The probes as tokens, as far as they fit into the context."""
    room = max(1, model.context_length - LENGTH)
    return [model.encode(text, special=True)[:room] for text in PROBES]


def check_runs(engine: Engine, model: LoadedModel) -> None:
    """Let the engine make a few tokens. Raises `ProbeFailed`."""
    probe(engine, probe_prompts(model)[:1])


def is_repeatable(engine: Engine, model: LoadedModel) -> bool:
    """Measure whether greedy answers are the same alone and in a batch. Raises `ProbeFailed`."""
    prompts = probe_prompts(model)
    alone = [probe(engine, [prompt])[0] for prompt in prompts]
    together = probe(engine, prompts)
    return all(map(same_answer, alone, together))


def same_answer(one: list[TokenLogprobs], other: list[TokenLogprobs]) -> bool:
    """The same tokens, and by a margin that leaves no doubt about the next prompt's."""
    return len(one) == len(other) and all(
        a.token == b.token and abs(a.logprob - b.logprob) <= TOLERANCE
        for a, b in zip(one, other, strict=True)
    )
