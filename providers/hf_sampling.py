"""How one request draws its tokens, in a batch of requests that each draw their own way.

transformers' continuous batching knows temperature, top_k and top_p for a request, and sorts the
whole vocabulary for each of them, greedy or not: a quarter of the time of a step on a CPU. Here a
request that is greedy costs nothing, one that is not costs its own row, and seeds, penalties,
biases and log probabilities work in a batch too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
)

#: A nucleus is looked for among so many of the likeliest tokens before all are sorted.
HEAD = 512
#: Below this a temperature is greedy: the numbers would leave the range of a float32.
COLDEST = 1e-4


class TokenLogprobs(NamedTuple):
    """A drawn token, its log probability under the model, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Draw:
    """How one request draws its tokens. One thread draws; another takes `entries`.

    A seed makes the numbers drawn the same again; the answer is the same again where the model's
    own numbers are (`ModelOffer.repeatable`).
    """

    def __init__(
        self,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        bias: dict[int, float] | None = None,
        logprobs: int | None = None,
        prompt_length: int = 0,
    ) -> None:
        self.greedy = temperature < COLDEST or top_k == 1 or top_p <= 0
        self._temperature = temperature
        self._top_p = top_p
        self._top_k = top_k
        self._random = random.Random(seed)
        self._presence = presence_penalty
        self._frequency = frequency_penalty
        self._bias = bias or {}
        self._logprobs = logprobs
        self.prompt_length = prompt_length
        #: One for each token drawn, where they were asked for.
        self.entries: list[TokenLogprobs] = []
        #: What went wrong while drawing; the answer cannot be trusted.
        self.error: Exception | None = None

    def __deepcopy__(self, memo: object) -> Draw:
        """The scheduler copies a request that it puts off; the copy draws on where this stopped."""
        return self

    @property
    def plain(self) -> bool:
        """The likeliest token, nothing else: the row needs no work."""
        return self.greedy and not (
            self._presence or self._frequency or self._bias or self._logprobs is not None
        )

    @property
    def needs_history(self) -> bool:
        """`pick` wants the tokens generated so far."""
        return bool(self._presence or self._frequency)

    def pick(self, logits: Tensor, history: Sequence[int]) -> int:
        """The next token, of one row of float32 logits and the tokens generated so far."""
        scores = self._adjusted(logits, history)
        token = int(scores.argmax()) if self.greedy else self._sample(scores / self._temperature)
        if self._logprobs is not None:
            self._note(logits, token, self._logprobs)
        return token

    def _adjusted(self, logits: Tensor, history: Sequence[int]) -> Tensor:
        if not self._bias and not self.needs_history:
            return logits
        scores = logits.clone()
        if self.needs_history and history:
            counts = torch.bincount(
                torch.tensor(history, device=logits.device), minlength=len(scores)
            )
            counts = counts[: len(scores)].to(scores.dtype)
            scores -= self._presence * (counts > 0) + self._frequency * counts
        for token, bias in self._bias.items():
            scores[token] += bias
        return scores

    def _sample(self, scores: Tensor) -> int:
        tokens, weights = candidates(scores, self._top_p, self._top_k)
        sums = weights.cumsum(0)
        point = sums[-1:] * self._random.random()
        place = int(torch.searchsorted(sums, point, right=True))
        return int(tokens[min(place, len(tokens) - 1)])

    def _note(self, logits: Tensor, token: int, count: int) -> None:
        logs = logits.float().log_softmax(-1)
        top: tuple[tuple[int, float], ...] = ()
        if count:
            values, tokens = logs.topk(min(count, len(logs)))
            top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
        self.entries.append(TokenLogprobs(token, float(logs[token]), top))


def candidates(scores: Tensor, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Tokens that may be drawn, in the order of the vocabulary, and the weight of each.

    top_k first, then the smallest set of likeliest tokens with at least `top_p` of what is left, as
    `generate` does it. In vocabulary order a seed's draw does not hang on which of two almost
    equally likely tokens comes first.
    """
    size = len(scores)
    limited = 0 < top_k < size
    if not limited and top_p >= 1:
        return torch.arange(size, device=scores.device), scores.double().softmax(0)
    values, tokens = scores.topk(top_k if limited else min(HEAD, size))
    total = (values if limited else scores).logsumexp(0)
    weights = (values - total).double().exp()
    if not limited and float(weights.sum()) < top_p:
        values, tokens = scores.sort(descending=True)
        weights = (values - total).double().exp()
    keep = weights.cumsum(0) - weights < top_p
    keep[0] = True
    tokens, weights = tokens[keep], weights[keep]
    order = tokens.argsort()
    return tokens[order], weights[order]


class DrawEachRow(ContinuousBatchingLogitsProcessor):
    """Lets each request of a batch draw by its own `Draw`.

    The manager then takes the likeliest token of each row, so a row that was drawn leaves only the
    drawn token possible.
    """

    def __init__(self) -> None:
        self.supported_kwargs = {"draw": Draw}
        self.ignored_kwargs = ()
        self._rows: list[Any] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Called just before the step whose rows these are: steps do not overlap here."""
        self._rows = [request.state for request in requests_with_new_token]
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        for row, state in enumerate(self._rows):
            draw = state.logit_processor_kwargs["draw"]
            if not draw.plain and draw.error is None:
                draw_row(draw, scores[row], generated_tokens(state, draw))
        return scores


def generated_tokens(state: Any, draw: Draw) -> Sequence[int]:
    """What a request has generated. A request that was put off carries the first part of it at the
    end of its prompt."""
    if not draw.needs_history:
        return ()
    tokens: list[int] = state.initial_tokens[draw.prompt_length :] + state.generated_tokens
    return tokens


def draw_row(draw: Draw, row: Tensor, history: Sequence[int]) -> None:
    """Leave only the drawn token possible in a row of logits."""
    try:
        token = draw.pick(row, history)
    except Exception as error:
        # Out of here it would end the answers of the whole batch. The engine reads it and fails
        # this request.
        draw.error = error
        return
    row.fill_(-math.inf)
    row[token] = 0.0


class DrawOne(LogitsProcessor):
    """The same for `generate` with a single row."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._draw.plain:
            scores = scores.clone()
            draw_row(self._draw, scores[0], input_ids[0, self._draw.prompt_length :].tolist())
        return scores
