"""The engines: many jobs at once, or one after another, with the same tokens."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes_hf import END, make_tiny_model

from promptmesh.providers.hf_engine import BatchEngine, Delivery, Engine, EngineStopped, Job
from promptmesh.providers.hf_frames import Load
from promptmesh.providers.hf_load import PAGE, LoadedModel, LoadError, load
from promptmesh.providers.hf_probe import ProbeFailed, check_runs, is_repeatable, same_answer
from promptmesh.providers.hf_sampling import Draw, TokenLogprobs
from promptmesh.providers.hf_sequential import SequentialEngine
from promptmesh.providers.hf_start import numerics, working_engine
from promptmesh.providers.hf_weights import Notebook

#: Seconds after which a token that does not come is an error. Milliseconds are usual.
PATIENCE = 120

#: Tokens of an answer that is not done when the test comes to it, however late that is.
LONG = 1900


def loaded(folder: Path, **fields: Any) -> LoadedModel:
    order = Load(model=str(folder), device="cpu", dtype="auto", threads=1, max_batch=4, **fields)
    return load(order, Notebook(None), lambda stage: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("hf") / "tiny", context=2048)


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return loaded(folder)


@pytest.fixture
def engine(model: LoadedModel) -> Iterator[BatchEngine]:
    engine = BatchEngine(model, max_batch=4)
    yield engine
    engine.close()


@pytest.fixture(params=["batch", "sequential"])
def either(model: LoadedModel, request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine: Engine = (
        BatchEngine(model, max_batch=4) if request.param == "batch" else SequentialEngine(model)
    )
    yield engine
    engine.close()


class Asked:
    """A job and what came of it."""

    def __init__(
        self, engine: Engine, prompt: list[int], limit: int = 8, draw: Draw | None = None
    ) -> None:
        self.deliveries: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        draw = draw or Draw(prompt_length=len(prompt))
        self.job = Job(prompt, limit, draw, self.deliveries.put)
        self.tokens: list[int] = []
        engine.submit(self.job)

    def next(self) -> Delivery:
        delivery = self.deliveries.get(timeout=PATIENCE)
        self.tokens += delivery.tokens
        return delivery

    def ended(self) -> Delivery:
        while not (delivery := self.next()).end:
            pass
        return delivery


PROMPTS = [[40 + i, 50, 60 + i, *range(70, 75 + i)] for i in range(6)]


def test_both_engines_find_the_same_tokens(model: LoadedModel) -> None:
    answers = []
    engines: tuple[Engine, ...] = (BatchEngine(model, max_batch=4), SequentialEngine(model))
    for engine in engines:
        with closing(engine):
            asked = [Asked(engine, prompt, limit=10) for prompt in PROMPTS]
            assert [one.ended().end for one in asked] == ["length"] * 6
            answers.append([one.tokens for one in asked])
            assert engine.tokens == 60
    assert answers[0] == answers[1]
    assert len({tuple(tokens) for tokens in answers[0]}) > 3  # the prompts do matter


def test_tokens_come_one_by_one(either: Engine) -> None:
    asked = Asked(either, PROMPTS[0], limit=5)
    deliveries = [asked.next() for _ in range(5)]
    assert [len(delivery.tokens) for delivery in deliveries] == [1] * 5
    assert [delivery.end for delivery in deliveries] == ["", "", "", "", "length"]


def test_an_end_token_ends_an_answer_and_is_its_last(either: Engine) -> None:
    asked = Asked(either, PROMPTS[0], limit=5, draw=Draw(bias={END: 1000.0}))
    assert asked.next() == Delivery([END], "stop")


def test_a_seed_repeats_in_company(either: Engine) -> None:
    def seeded(prompt: list[int]) -> Asked:
        return Asked(either, prompt, limit=10, draw=Draw(temperature=1.5, seed=11))

    alone = seeded(PROMPTS[0])
    alone.ended()
    company = [seeded(prompt) for prompt in PROMPTS]
    for one in company:
        one.ended()
    assert company[0].tokens == alone.tokens
    assert company[1].tokens != alone.tokens


def test_penalties_see_what_was_generated(either: Engine) -> None:
    draw = Draw(bias=dict.fromkeys((90, 91, 92), 500.0), frequency_penalty=100.0, prompt_length=3)
    asked = Asked(either, [90, 91, 92], limit=6, draw=draw)
    asked.ended()
    # The prompt's own do not count; each is used before one comes again.
    assert sorted(asked.tokens[:3]) == [90, 91, 92]
    assert sorted(asked.tokens) == [90, 90, 91, 91, 92, 92]


def test_a_cancelled_job_hears_nothing_more_and_makes_nothing_more(either: Engine) -> None:
    asked = Asked(either, PROMPTS[0], limit=LONG)
    asked.next()
    either.cancel(asked.job)
    heard = asked.deliveries.qsize()
    # When others have been answered it would have gone on for long.
    for prompt in PROMPTS:
        Asked(either, prompt, limit=20).ended()
    assert asked.deliveries.qsize() == heard
    # The loop may be ahead of what is handed over.
    assert either.tokens < 6 * 20 + heard + LONG / 4
    either.cancel(asked.job)  # again, to no effect


def test_a_job_may_be_cancelled_by_its_own_taker(either: Engine) -> None:
    taken: queue.SimpleQueue[Delivery] = queue.SimpleQueue()

    def take(delivery: Delivery) -> None:
        taken.put(delivery)
        either.cancel(job)

    job = Job(PROMPTS[0], 50, Draw(), take)
    either.submit(job)
    taken.get(timeout=PATIENCE)
    Asked(either, PROMPTS[1]).ended()
    assert taken.empty()


def test_a_job_that_waits_can_be_cancelled(model: LoadedModel) -> None:
    with closing(BatchEngine(model, max_batch=1)) as engine:
        running = Asked(engine, PROMPTS[0], limit=LONG)
        running.next()
        waiting = Asked(engine, PROMPTS[1], limit=100)
        after = Asked(engine, PROMPTS[2], limit=2)
        engine.cancel(waiting.job)
        assert running.next().end == ""
        engine.cancel(running.job)
        assert after.ended().end == "length"
        assert waiting.deliveries.empty()


def test_what_cannot_fit_is_refused_and_harms_nobody(either: Engine, model: LoadedModel) -> None:
    running = Asked(either, PROMPTS[0], limit=50)
    with pytest.raises(ValueError, match="do not fit"):
        Asked(either, [40] * model.context_length, limit=1)
    assert running.ended().end == "length"


def test_more_than_the_cache_holds_together_is_recomputed(folder: Path) -> None:
    small = loaded(folder, max_context=96, memory=10_000_000)
    small = replace(small, cache_tokens=4 * PAGE)
    prompts = [[40 + i] * 30 for i in range(6)]
    with closing(BatchEngine(small, max_batch=4)) as engine:
        asked = [Asked(engine, prompt, limit=50) for prompt in prompts]
        assert [one.ended().end for one in asked] == ["length"] * 6
    with closing(SequentialEngine(small)) as sequential:
        for prompt, one in zip(prompts, asked, strict=True):
            alone = Asked(sequential, prompt, limit=50)
            alone.ended()
            assert one.tokens == alone.tokens


def kill_loop(engine: BatchEngine) -> None:
    """What a prompt larger than the cache does to the manager, if nobody checks."""
    manager = engine._manager
    prompt = [40] * (engine._model.cache_tokens + PAGE)
    manager.add_request(prompt, request_id="killer", max_new_tokens=5, draw=Draw())


def test_a_loop_that_dies_fails_its_jobs_and_the_next_one_works(engine: BatchEngine) -> None:
    Asked(engine, PROMPTS[0], limit=2).ended()
    kill_loop(engine)
    # Sent while it dies, or after: either way there is an end, and soon an answer.
    for _ in range(200):
        end = Asked(engine, PROMPTS[1], limit=3).ended()
        assert end.end in ("length", "failed")
        if engine.fatal is not None:
            break
    assert engine.fatal is not None
    assert Asked(engine, PROMPTS[1], limit=3).ended().end == "length"


class Unlucky(Draw):
    def pick(self, logits: Any, history: Any) -> int:
        raise ZeroDivisionError("no luck")


def test_a_row_that_cannot_be_drawn_fails_alone(either: Engine) -> None:
    other = Asked(either, PROMPTS[0], limit=30)
    other.next()
    end = Asked(either, PROMPTS[1], draw=Unlucky(temperature=1.0)).ended()
    assert end.end == "failed"
    assert "no luck" in end.error
    assert other.ended().end == "length"


def test_a_closed_engine_fails_what_runs_and_takes_no_more(either: Engine) -> None:
    running = Asked(either, PROMPTS[0], limit=LONG)
    running.next()
    either.close()
    assert running.ended().end == "failed"
    with pytest.raises(EngineStopped):
        Asked(either, PROMPTS[0])


# --- trying a model out -------------------------------------------------------------------------


def test_a_batch_changes_nothing_in_float32(either: Engine, model: LoadedModel) -> None:
    assert is_repeatable(either, model)
    assert numerics(model, either, True).startswith("float32/cpu/sdpa/")
    assert numerics(model, either, True).endswith(
        "batch-invariant" if either.batches else "unbatched"
    )


def test_an_answer_that_is_the_same_by_luck_is_not_the_same() -> None:
    one = [TokenLogprobs(5, -0.2, ())]
    assert same_answer(one, [TokenLogprobs(5, -0.20005, ())])
    assert not same_answer(one, [TokenLogprobs(5, -0.25, ())])
    assert not same_answer(one, [TokenLogprobs(6, -0.2, ())])
    assert not same_answer(one, [])


class Batchy:
    """An engine whose answers change with the batch, and whose every answer can be made to fail."""

    batches = True
    tokens = 0
    error = ""

    def __init__(self) -> None:
        self.waiting: list[Job] = []

    def submit(self, job: Job) -> None:
        """Draws at once; that of a second waiting job comes out differently."""
        job.draw.entries.append(TokenLogprobs(1, -float(self.tokens >= 4), ()))
        self.tokens += 1
        job.take(Delivery([], "failed" if self.error else "length", self.error))

    def cancel(self, job: Job) -> None: ...

    def close(self) -> None: ...


def test_a_batch_that_changes_answers_is_noticed(model: LoadedModel) -> None:
    assert not is_repeatable(Batchy(), model)
    assert numerics(model, Batchy(), False) == "float32/cpu/sdpa/batch-dependent"


def test_an_engine_that_cannot_answer_is_noticed(model: LoadedModel) -> None:
    broken = Batchy()
    broken.error = "out of luck"
    with pytest.raises(ProbeFailed, match="out of luck"):
        check_runs(broken, model)


def test_a_model_without_attention_answers_one_at_a_time(tmp_path: Path) -> None:
    mamba = loaded(make_tiny_model(tmp_path / "mamba", kind="mamba"))
    with closing(working_engine(mamba, 4)) as engine:
        assert isinstance(engine, SequentialEngine)
        assert numerics(mamba, engine, True) == "float32/cpu/eager/unbatched"
        assert Asked(engine, PROMPTS[0], limit=3).ended().end == "length"


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **fields: Any) -> Any:
        raise error

    return fail


def test_a_cache_without_memory_is_no_reason_to_go_one_at_a_time(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model.model), "init_continuous_batching", failing(MemoryError("2 GB")))
    with pytest.raises(LoadError, match="2 GB"):
        working_engine(model, 4)
