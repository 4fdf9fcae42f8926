"""Requests to tokens, and what is refused with the field at fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes_hf import chat, make_tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers

from promptmesh.providers.base import (
    ContextTooLong,
    GenerateRequest,
    Image,
    Message,
    RequestRejected,
    ResponseFormat,
    Text,
    Tool,
    ToolCall,
    ToolChoice,
)
from promptmesh.providers.hf_frames import Load
from promptmesh.providers.hf_load import (
    LoadedModel,
    LoadError,
    OwnSampling,
    find,
    load,
    own_sampling,
)
from promptmesh.providers.hf_prompt import OPEN_END, answer_limit, prepare, template_message
from promptmesh.providers.hf_weights import Notebook


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = make_tiny_model(tmp_path_factory.mktemp("hf") / "tiny")
    order = Load(model=str(folder), device="cpu", dtype="auto", threads=1, max_batch=4)
    return load(order, Notebook(None), lambda stage: None)


def message(role: Any, *content: Any, **fields: Any) -> Message:
    return Message(role=role, content=content, **fields)


def test_the_prompt_is_the_template_s(model: LoadedModel) -> None:
    prepared = prepare(chat("tiny", "Hello 🌍"), model)
    assert model.raw.decode(prepared.prompt, skip_special_tokens=False) == (
        "<|start|>user\nHello 🌍<|end|>\n<|start|>assistant\n"
    )
    assert prepared.limit == model.context_length - len(prepared.prompt)
    assert prepared.draw.prompt_length == len(prepared.prompt)


def test_a_developer_is_the_system_to_a_template() -> None:
    assert template_message(message("developer", Text(text="x"))) == {
        "role": "system",
        "content": "x",
    }


def test_tool_calls_and_results_are_told_as_templates_want_them() -> None:
    calls = (ToolCall(id="c1", name="f", arguments='{"a": 1}'),)
    form = template_message(message("assistant", tool_calls=calls))
    assert form["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    form = template_message(message("tool", Text(text="2"), tool_call_id="c1", name="f"))
    assert (form["tool_call_id"], form["name"], form["content"]) == ("c1", "f", "2")
    broken = (ToolCall(id="c1", name="f", arguments="{"),)
    form = template_message(message("assistant", tool_calls=broken))
    assert form["tool_calls"][0]["function"]["arguments"] == "{"


REFUSED: list[tuple[str, Callable[[], GenerateRequest]]] = [
    (
        "response_format",
        lambda: GenerateRequest(
            model="m",
            messages=(message("user", Text(text="x")),),
            response_format=ResponseFormat(type="json_object"),
        ),
    ),
    (
        "tools",
        lambda: GenerateRequest(
            model="m", messages=(message("user", Text(text="x")),), tools=(Tool(name="f"),)
        ),
    ),
    (
        "messages",
        lambda: GenerateRequest(model="m", messages=(message("user", Image(url="data:,x")),)),
    ),
    ("messages", lambda: GenerateRequest(model="m", messages=())),
    # The template raises for this one.
    (
        "messages",
        lambda: GenerateRequest(model="m", messages=(message("tool", Text(text="x")),)),
    ),
    ("temperature", lambda: chat("m", "x", temperature=-0.1)),
    ("temperature", lambda: chat("m", "x", temperature=float("nan"))),
    ("top_p", lambda: chat("m", "x", top_p=1.5)),
    ("top_k", lambda: chat("m", "x", top_k=-2)),
    ("max_tokens", lambda: chat("m", "x", max_tokens=0)),
    ("stop", lambda: chat("m", "x", stop=("",))),
    ("stop", lambda: chat("m", "x", stop=("s" * 1001,))),
    ("stop", lambda: chat("m", "x", stop=tuple("abcdefghijklmnopq"))),
    ("logit_bias", lambda: chat("m", "x", logit_bias={"400": 1.0})),
    ("logit_bias", lambda: chat("m", "x", logit_bias={"-1": 1.0})),
    ("logit_bias", lambda: chat("m", "x", logit_bias={"1": float("inf")})),
    ("top_logprobs", lambda: chat("m", "x", logprobs=True, top_logprobs=21)),
    ("presence_penalty", lambda: chat("m", "x", presence_penalty=float("nan"))),
    ("frequency_penalty", lambda: chat("m", "x", frequency_penalty=1000.0)),
]


@pytest.mark.parametrize(("field", "make"), REFUSED)
def test_a_refusal_names_the_field(
    model: LoadedModel, field: str, make: Callable[[], GenerateRequest]
) -> None:
    with pytest.raises(RequestRejected) as caught:
        prepare(make(), model)
    assert caught.value.field == field
    assert not isinstance(caught.value, ContextTooLong)


def test_text_is_a_response_format_like_none(model: LoadedModel) -> None:
    request = chat("m", "x")
    with_format = GenerateRequest(
        model="m",
        messages=request.messages,
        response_format=ResponseFormat(),
        tool_choice=ToolChoice(mode="none"),
    )
    assert prepare(with_format, model).prompt == prepare(request, model).prompt


def test_a_prompt_that_does_not_fit_is_too_long(model: LoadedModel) -> None:
    with pytest.raises(ContextTooLong) as caught:
        prepare(chat("tiny", "word " * 300), model)
    assert caught.value.field == "messages"
    # So long that it is not even tokenized.
    with pytest.raises(ContextTooLong, match="characters"):
        prepare(chat("tiny", "x" * 10_000_000), model)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "context", "limit"),
    [(10, 5, 100, 5), (10, 90, 100, 90), (10, None, 100, 90), (10, None, 99_999, OPEN_END)],
)
def test_the_limit_of_an_answer(
    prompt: int, max_tokens: int | None, context: int, limit: int
) -> None:
    assert answer_limit(prompt, max_tokens, context) == limit


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "field"),
    [(100, None, "messages"), (10, 91, "max_tokens"), (100, 1, "messages")],
)
def test_more_than_the_context_holds_is_too_long(
    prompt: int, max_tokens: int | None, field: str
) -> None:
    with pytest.raises(ContextTooLong) as caught:
        answer_limit(prompt, max_tokens, 100)
    assert caught.value.field == field


def test_a_prefix_follows_the_prompt(model: LoadedModel) -> None:
    bare = prepare(chat("tiny", "Hello"), model)
    prepared = prepare(chat("tiny", "Hello", prefix="Once upon"), model)
    assert prepared.prompt == bare.prompt + prepared.primer
    assert model.raw.decode(prepared.primer) == "Once upon"
    # What the model said itself comes back as the tokens it said.
    assert prepared.primer == model.encode("Once upon", special=False)


def test_what_was_begun_is_counted_among_the_answer_s_tokens(model: LoadedModel) -> None:
    bare = prepare(chat("tiny", "Hello", max_tokens=9), model)
    for text in ("Once", "Once upon a time"):
        request = chat("tiny", "Hello", max_tokens=9, prefix=text, begun=len(text))
        prepared = prepare(request, model)
        assert prepared.begun == len(prepared.primer) == len(model.encode(text, special=False))
        assert prepared.limit == 9 - prepared.begun
        assert prepared.prompt[: len(bare.prompt)] == bare.prompt
    # A part of the prefix was there before the answer.
    request = chat("tiny", "Hello", max_tokens=9, prefix="Once upon", begun=len(" upon"))
    prepared = prepare(request, model)
    assert 0 < prepared.begun < len(prepared.primer)
    text = "Once upon a time, and so on, and so on, and so on"
    assert prepare(chat("tiny", "Hello", max_tokens=3, prefix=text, begun=49), model).limit == 0


def test_what_is_left_of_the_context_is_that_of_the_whole_answer(model: LoadedModel) -> None:
    room = model.context_length - len(prepare(chat("tiny", "Hello"), model).prompt)
    request = chat("tiny", "Hello", max_tokens=room, prefix="Once upon", begun=9)
    prepared = prepare(request, model)
    assert len(prepared.prompt) + prepared.limit == model.context_length
    with pytest.raises(ContextTooLong):
        prepare(chat("tiny", "Hello", max_tokens=room + 1, prefix="Once upon", begun=9), model)


def test_the_prompt_s_tokens_stay_where_the_prefix_would_change_them(model: LoadedModel) -> None:
    # A tokenizer that merges the template's last newline with one of the prefix.
    merging = Tokenizer(models.BPE(vocab={"a": 0, "\n": 1, "\n\n": 2}, merges=[("\n", "\n")]))
    template = "{% for m in messages %}a{% endfor %}\n"
    fake = SimpleNamespace(
        chat_template=template,
        apply_chat_template=lambda messages, **rest: "a" * len(messages) + "\n",
    )
    other = replace(model, raw=merging, tokenizer=fake, longest_token=2)
    assert merging.encode("a\n\n").ids == [0, 2]
    prepared = prepare(chat("m", "x", prefix="\na"), other)
    assert prepared.prompt == [0, 1, 1, 0]
    assert prepared.primer == [1, 0]


def test_the_first_word_of_a_prefix_is_one_inside_a_text(model: LoadedModel) -> None:
    # As with SentencePiece: a text alone gets a space before its first word.
    spaced = Tokenizer(models.WordLevel(vocab={"▁b": 0, "a": 1, "b": 2, "▁a": 3}, unk_token="a"))
    spaced.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split("b", "isolated"),
        ]
    )
    fake = SimpleNamespace(chat_template="t", apply_chat_template=lambda messages, **rest: "a")
    other = replace(model, raw=spaced, tokenizer=fake, longest_token=2)
    assert spaced.encode("ab").tokens == ["▁a", "b"]
    assert prepare(chat("m", "x", prefix="b"), other).prompt == [3, 2]


def test_a_base_model_gets_the_bare_text(model: LoadedModel) -> None:
    other = replace(model, tokenizer=SimpleNamespace(chat_template=None))
    request = GenerateRequest(
        model="m",
        messages=(message("system", Text(text="a")), message("user", Text(text="b"))),
    )
    assert other.raw.decode(prepare(request, other).prompt) == "a\nb"


def test_what_a_request_leaves_open_is_the_model_s_own(model: LoadedModel) -> None:
    own = replace(model, sampling=OwnSampling(temperature=0.7, top_p=0.9, top_k=0))
    assert not prepare(chat("m", "x"), own).draw.plain
    assert prepare(chat("m", "x", temperature=0), own).draw.plain
    # Without one the likeliest token is taken.
    assert prepare(chat("m", "x"), model).draw.plain
    assert not prepare(chat("m", "x", temperature=0.5), model).draw.plain


def test_the_makers_recommendation_counts_where_they_recommend_sampling() -> None:
    recommended = SimpleNamespace(do_sample=True, temperature=0.6, top_p=None, top_k=20)
    assert own_sampling(recommended) == OwnSampling(0.6, 1.0, 20)
    silent = SimpleNamespace(do_sample=False, temperature=0.6, top_p=0.1, top_k=2)
    assert own_sampling(silent) == OwnSampling()


def test_paths_and_ids_are_told_apart(tmp_path: Path) -> None:
    assert find("owner/name") == "owner/name"
    assert find("gpt2") == "gpt2"
    for missing in ("./no", "/no/such", "~/no/such", "a/b/c"):
        with pytest.raises(LoadError, match="no model folder"):
            find(missing)
    with pytest.raises(LoadError, match=r"config\.json"):
        find(str(tmp_path))
