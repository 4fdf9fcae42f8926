"""The estimate of tokens, and who counts them for sure."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.providers.admission import Admission
from promptmesh.providers.base import (
    Asked,
    EmbedRequest,
    GenerateRequest,
    Image,
    Message,
    ModelNotFound,
    ProviderUnavailable,
    Text,
    Tool,
    ToolCall,
)
from promptmesh.providers.echo import Echo, EchoSettings
from promptmesh.providers.tokens import (
    TokenCount,
    count_tokens,
    estimate,
    estimated_usage,
    least_tokens,
    prompt_tokens,
    text_tokens,
)

PROSE = (
    "Everyone has the right to freedom of opinion and expression; this right includes freedom to "
    "hold opinions without interference and to seek, receive and impart information and ideas "
    "through any media and regardless of frontiers."
)
CODE = """\
def average(old: float | None, new: float) -> float:
    \"\"\"The moving average after one more.\"\"\"
    return new if old is None else old + WEIGHT * (new - old)
"""
#: What SmolLM2, GPT-4o (o200k) and the tokenizer that Anthropic published count.
COUNTED: dict[str, tuple[int, ...]] = {
    PROSE: (38, 39, 39),
    CODE: (44, 42, 44),
    "人人有权享有主张和发表意见的自由。" * 3: (81, 39, 54),
    "Каждый человек имеет право на свободу убеждений." * 3: (114, 33, 81),
    '{"id":17,"name":"user 17","score":0.2593,"tags":["a","b"],"active":true}': (34, 29, 27),
}


@pytest.mark.parametrize("text", COUNTED)
def test_the_estimate_lies_among_what_tokenizers_count(text: str) -> None:
    counted, found = COUNTED[text], text_tokens(text)
    assert 0.8 * min(counted) <= found <= 1.25 * max(counted)


@given(st.text(), st.text())
def test_any_text_has_an_estimate(one: str, other: str) -> None:
    assert (text_tokens(one) == 0) == (not one.strip(" "))
    both, apart = text_tokens(one + other), text_tokens(one) + text_tokens(other)
    # Put together, a word may go on where the first text ended.
    assert apart - 0.66 <= both <= apart + 0.01


def test_a_very_long_text_is_estimated_by_parts_of_it() -> None:
    text = (PROSE + CODE + " ") * 1000
    assert text_tokens(text) == pytest.approx(1000 * text_tokens(PROSE + CODE + " "), rel=0.02)


def test_half_of_a_character_is_no_fault() -> None:
    assert text_tokens("\ud83d") > 0


def of(*content: Text | Image, **fields: Any) -> GenerateRequest:
    return GenerateRequest(model="m", messages=(Message(role="user", content=content),), **fields)


def test_all_of_a_prompt_counts() -> None:
    plain = prompt_tokens(of(Text(text=PROSE)))
    assert plain == text_tokens(PROSE) + 4
    assert prompt_tokens(of(Text(text=PROSE), Image(url="data:"))) == plain + 1000
    assert prompt_tokens(of(Text(text=PROSE), prefix=CODE)) == plain + text_tokens(CODE)
    tools = (Tool(name="t", description=PROSE),)
    assert prompt_tokens(of(Text(text=PROSE), tools=tools)) > 2 * plain - 10
    call = ToolCall(id="1", name="f", arguments=PROSE)
    said = Message(role="assistant", tool_calls=(call,), reasoning=PROSE)
    assert prompt_tokens(GenerateRequest(model="m", messages=(said,))) > 2 * plain - 10
    inputs = EmbedRequest(model="m", inputs=(PROSE, (1, 2, 3)))
    assert prompt_tokens(inputs) == text_tokens(PROSE) + 3


@pytest.mark.parametrize(
    ("request_", "least"),
    [
        (of(Text(text="x" * 800)), 100),
        (EmbedRequest(model="m", inputs=("x" * 80, (1,) * 50)), 50),
    ],
)
def test_what_is_certain(request_: Asked, least: int) -> None:
    assert least_tokens(request_) == least


def test_a_usage_that_nobody_counted_says_so() -> None:
    usage = estimated_usage(of(Text(text=PROSE)), CODE)
    assert not usage.exact
    assert usage.completion_tokens == math.ceil(text_tokens(CODE))
    assert estimated_usage(of(Text(text=PROSE)), CODE, pieces=31).completion_tokens == 31


class Counting(Echo):
    """Counts, or says why not."""

    fault: Exception | None = None

    async def count_tokens(self, request: GenerateRequest) -> TokenCount:
        if self.fault is not None:
            raise self.fault
        return TokenCount(7, True)


async def test_who_can_count_is_asked() -> None:
    request = of(Text(text=PROSE))
    assert await count_tokens(Echo(EchoSettings(name="e")), request) == estimate(request)
    counting = Counting(EchoSettings(name="e"))
    admitted = Admission(counting, slots=1)
    assert await count_tokens(admitted, request) == (7, True)
    counting.fault = ProviderUnavailable("it is down")
    assert await count_tokens(admitted, request) == estimate(request)
    counting.fault = ModelNotFound("no such model")
    with pytest.raises(ModelNotFound):
        await count_tokens(admitted, request)
