"""How tokens are drawn: against transformers' own, by seed, with penalties, in a batch."""

from __future__ import annotations

import copy
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from promptmesh.providers import hf_sampling
from promptmesh.providers.hf_sampling import Draw, DrawEachRow, DrawOne, candidates


def logits(size: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


@settings(deadline=None)  # the first call of a kernel is slow
@given(
    size=st.integers(2, 900),
    seed=st.integers(0, 1000),
    spread=st.floats(0.01, 10),
    top_p=st.floats(0.01, 1.0),
    top_k=st.integers(0, 1000),
)
def test_the_candidates_are_those_of_generate(
    size: int, seed: int, spread: float, top_p: float, top_k: int
) -> None:
    scores = logits(size, seed, spread)
    warpers = LogitsProcessorList()
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    no_ids: Any = torch.zeros(1, 1, dtype=torch.long)
    expected = warpers(no_ids, scores[None].clone())[0].softmax(0)
    tokens, weights = candidates(scores, top_p, top_k)
    shares = torch.zeros(size, dtype=torch.float64)
    shares[tokens] = weights / weights.sum()
    # At the rim of the nucleus rounding may decide about one token.
    assert float((shares - expected.double()).abs().max()) < 0.02 * float(shares.max()) + 1e-4
    assert tokens.tolist() == sorted(tokens.tolist())


def test_a_nucleus_larger_than_the_head_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = logits(300)
    whole = candidates(scores, 0.9, 0)
    monkeypatch.setattr(hf_sampling, "HEAD", 4)
    small_head = candidates(scores, 0.9, 0)
    assert torch.equal(whole[0], small_head[0])
    assert len(whole[0]) > 4


def drawn(draw: Draw, count: int = 40) -> list[int]:
    return [draw.pick(logits(50, seed=step), ()) for step in range(count)]


def test_a_seed_draws_the_same_again_and_none_does_not() -> None:
    assert drawn(Draw(temperature=1.0, seed=3)) == drawn(Draw(temperature=1.0, seed=3))
    assert drawn(Draw(temperature=1.0, seed=3)) != drawn(Draw(temperature=1.0, seed=4))
    assert drawn(Draw(temperature=1.0)) != drawn(Draw(temperature=1.0))


def test_a_seed_draws_the_same_from_numbers_that_differ_by_rounding() -> None:
    one, other = (Draw(temperature=0.9, top_p=0.95, seed=5) for _ in range(2))
    for step in range(200):
        scores = logits(500, seed=step)
        noise = logits(500, seed=1000 + step) * 1e-6
        assert one.pick(scores, ()) == other.pick(scores + noise, ())


def test_what_is_drawn_follows_the_probabilities() -> None:
    scores = torch.tensor([0.665, 0.245, 0.09]).log()
    draw = Draw(temperature=1.0, seed=1)
    counts = Counter(draw.pick(scores, ()) for _ in range(4000))
    assert [round(counts[token] / 4000, 2) for token in range(3)] == pytest.approx(
        [0.665, 0.245, 0.09], abs=0.03
    )
    cold = Draw(temperature=0.25, seed=1)
    assert Counter(cold.pick(scores, ()) for _ in range(500))[0] > 470


@pytest.mark.parametrize(
    "draw",
    [Draw(temperature=0), Draw(temperature=1, top_k=1), Draw(temperature=1, top_p=0)],
    ids=["temperature 0", "top_k 1", "top_p 0"],
)
def test_greedy_takes_the_likeliest(draw: Draw) -> None:
    assert draw.plain
    assert draw.pick(torch.tensor([0.0, 2.0, 1.9]), ()) == 1


def test_a_bias_forces_and_forbids() -> None:
    scores = torch.tensor([0.0, 5.0, 1.0])
    assert Draw(bias={0: 100.0}).pick(scores, ()) == 0
    assert Draw(bias={1: -100.0}).pick(scores, ()) == 2


def test_penalties_count_what_was_generated() -> None:
    scores = torch.tensor([5.0, 4.0, 3.0])
    presence = Draw(presence_penalty=1.5)
    assert presence.pick(scores, []) == 0
    assert presence.pick(scores, [0]) == 1
    # Once is as much as often, ...
    assert presence.pick(scores, [0, 0, 0, 1]) == 0
    # ... other than with the frequency.
    frequency = Draw(frequency_penalty=0.6)
    assert frequency.pick(scores, [0]) == 0
    assert frequency.pick(scores, [0, 0]) == 1
    assert torch.equal(scores, torch.tensor([5.0, 4.0, 3.0]))  # the caller's row stays


def test_log_probabilities_are_the_models_own() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0])
    expected = scores.log_softmax(0)
    draw = Draw(bias={0: 100.0}, logprobs=2)
    draw.pick(scores, ())
    (entry,) = draw.entries
    assert entry.token == 0
    assert entry.logprob == pytest.approx(float(expected[0]))
    assert [token for token, _ in entry.top] == [1, 2]
    assert entry.top[0][1] == pytest.approx(float(expected[1]))


class Refuses(Draw):
    """A request whose numbers cannot be drawn from."""

    def pick(self, logits: Any, history: Any) -> int:
        raise ZeroDivisionError("no numbers")


def row(draw: Draw, *, prompt: list[int], generated: list[int]) -> Any:
    """A row of a batch, as the manager describes it."""
    state = SimpleNamespace(
        logit_processor_kwargs={"draw": draw}, initial_tokens=prompt, generated_tokens=generated
    )
    return SimpleNamespace(state=state)


def test_each_row_draws_its_own_way_and_a_failing_one_fails_alone() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0]] * 4)
    refuses = Refuses(temperature=1.0)
    # The third was put off once: a part of its answer is at the end of its prompt.
    rows = [
        row(Draw(), prompt=[1], generated=[]),
        row(Draw(bias={2: 100.0}), prompt=[1], generated=[]),
        row(Draw(presence_penalty=9, prompt_length=1), prompt=[9, 0], generated=[1]),
        row(refuses, prompt=[1], generated=[]),
    ]
    processor = DrawEachRow()
    processed = processor(scores.clone(), processor.prepare_tensor_args(rows))
    assert processed.argmax(-1).tolist() == [0, 2, 2, 0]
    assert torch.equal(processed[0], scores[0])
    assert processed[1].tolist() == [-math.inf, -math.inf, 0.0]
    assert isinstance(refuses.error, ZeroDivisionError)


def test_a_request_that_is_put_off_draws_on() -> None:
    draw = Draw(temperature=1.0, seed=3)
    assert copy.deepcopy({"draw": draw})["draw"] is draw


def test_generate_draws_the_same_way() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0]])
    ids = torch.tensor([[9, 9, 0]])
    assert int(DrawOne(Draw(presence_penalty=9, prompt_length=2))(ids, scores).argmax()) == 1
    assert int(DrawOne(Draw(presence_penalty=9, prompt_length=3))(ids, scores).argmax()) == 0
    assert DrawOne(Draw())(ids, scores) is scores
