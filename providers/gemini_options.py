"""What a request may say to Gemini beside what it says to all providers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from .base import GenerateRequest

Effort = Literal["none", "minimal", "low", "medium", "high"]
Level = Literal["minimal", "low", "medium", "high"]
Safety = Literal[
    "off", "block_none", "block_only_high", "block_medium_and_above", "block_low_and_above"
]

#: Tokens of thought that an effort is: the figures of Google's own OpenAI dialect. Models that know
#: levels take a budget too.
_BUDGETS: dict[Effort, int] = {
    "none": 0,
    "minimal": 1024,
    "low": 1024,
    "medium": 8192,
    "high": 24576,
}
#: Tokens of an answer that leave no room for thoughts, and the fewest tokens of thought of those
#: models that cannot do without.
SHORT, LEAST_OF_PRO = 1024, 128
#: What can be judged in a text.
_CATEGORIES = ("HARASSMENT", "HATE_SPEECH", "SEXUALLY_EXPLICIT", "DANGEROUS_CONTENT")


class GeminiOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of one request. They need HTTP: the command has no flag for any of them."""

    #: Tokens of thought before the answer, of `max_tokens`; 0: none, -1: as the model likes.
    thinking_budget: Annotated[int, msgspec.Meta(ge=-1, le=65536)] | None = None
    #: The same in words, for models from Gemini 3 on.
    thinking_level: Level | None = None
    #: The same in the words of the OpenAI dialect.
    reasoning_effort: Effort | None = None
    #: Show a summary of the thoughts as the answer's reasoning.
    include_thoughts: bool = False
    #: From which degree on a text is blocked, in each category.
    safety: Safety | None = None

    def __post_init__(self) -> None:
        said = (self.thinking_budget, self.thinking_level, self.reasoning_effort)
        if sum(value is not None for value in said) > 1:
            raise ValueError("thinking_budget, thinking_level and reasoning_effort say the same")


def least_thoughts(request: GenerateRequest) -> int | None:
    """The budget where a request says nothing of thoughts and would have no room for them: Gemini
    takes them off `max_tokens`, thinks for a thousand tokens about anything, and would say nothing.
    None: there is room."""
    limit = request.sampling.max_tokens
    if limit is None or limit >= SHORT:
        return None
    return LEAST_OF_PRO if "-pro" in request.model else 0


def thinking_config(options: GeminiOptions, least: int | None = None) -> dict[str, Any]:
    """The field `thinkingConfig`; empty: as the model likes. Models that cannot think refuse it.

    `least` is the budget where the options say nothing.
    """
    budget = options.thinking_budget
    if options.reasoning_effort is not None:
        budget = _BUDGETS[options.reasoning_effort]
    if budget is None and options.thinking_level is None and not options.include_thoughts:
        budget = least
    fields = {
        "thinkingBudget": budget,
        "thinkingLevel": options.thinking_level and options.thinking_level.upper(),
        "includeThoughts": options.include_thoughts or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def safety_settings(options: GeminiOptions) -> list[dict[str, str]]:
    """The field `safetySettings`; empty: as Google likes."""
    if options.safety is None:
        return []
    threshold = options.safety.upper()
    return [
        {"category": f"HARM_CATEGORY_{category}", "threshold": threshold}
        for category in _CATEGORIES
    ]
