"""One answer in the worker: which events its tokens become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fakes_hf import END, chat, make_tiny_model
from tokenizers import Tokenizer, models

from promptmesh.providers.base import GenerateRequest, RequestRejected, Tool, ToolChoice
from promptmesh.providers.hf_answer import Answer, token_bytes
from promptmesh.providers.hf_engine import Delivery, Job
from promptmesh.providers.hf_frames import Event, Failed, Finished, Load, Piece
from promptmesh.providers.hf_load import LoadedModel, load
from promptmesh.providers.hf_prompt import prepare
from promptmesh.providers.hf_weights import Notebook

CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = make_tiny_model(tmp_path_factory.mktemp("hf") / "tiny", context=2048)
    order = Load(model=str(folder), device="cpu", dtype="auto", threads=1, max_batch=4)
    return replace(load(order, Notebook(None), lambda stage: None), tools=True)


class Silent:
    """An engine that makes no tokens of its own."""

    batches = True
    tokens = 0

    def __init__(self) -> None:
        self.cancelled: list[Job] = []
        self.on_submit: Callable[[], None] = lambda: None

    def submit(self, job: Job) -> None:
        self.on_submit()

    def cancel(self, job: Job) -> None:
        self.cancelled.append(job)

    def close(self) -> None: ...


class Made:
    """An answer to a request, and all it says."""

    def __init__(self, model: LoadedModel, request: GenerateRequest) -> None:
        self.model = model
        self.engine = Silent()
        self.events: list[Event] = []
        self.answer = Answer(
            5,
            prepare(request, model),
            model,
            self.engine,
            emit=self.events.append,
            ended=lambda answer, event: self.events.append(event),
        )

    def say(self, text: str, end: Any = "") -> None:
        """Deliver the tokens of a text one by one, with the end at the last."""
        tokens = self.model.encode(text, special=False)
        for left, token in zip(range(len(tokens) - 1, -1, -1), tokens, strict=True):
            if self.is_over:
                return
            self.answer.take(Delivery([token], "" if left else end))

    @property
    def is_over(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Finished | Failed)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))


def with_tools(**fields: Any) -> GenerateRequest:
    messages = chat("tiny", "Hello").messages
    return GenerateRequest(model="tiny", messages=messages, tools=(Tool(name="f"),), **fields)


def test_a_stop_string_ends_the_work_too(model: LoadedModel) -> None:
    made = Made(model, chat("tiny", "Hello", stop=("lazy",)))
    made.say("the lazy dog")
    assert made.text == "the "
    last = made.events[-1]
    assert isinstance(last, Finished)
    assert last.reason == "stop"
    assert last.completion_tokens < len(model.encode("the lazy dog", special=False))
    assert made.engine.cancelled == [made.answer.job]


def test_what_was_held_back_comes_at_the_limit(model: LoadedModel) -> None:
    made = Made(model, chat("tiny", "Hello", stop=("dogma",)))
    made.say("the lazy dog", end="length")
    assert made.text == "the lazy dog"
    last = made.events[-1]
    assert isinstance(last, Finished)
    assert last.reason == "length"
    assert last.completion_tokens == len(model.encode("the lazy dog", special=False))


def test_what_was_begun_is_among_its_tokens(model: LoadedModel) -> None:
    begun = "the lazy"
    before = len(model.encode(begun, special=False))
    made = Made(model, chat("tiny", "Hello", prefix=begun, begun=len(begun), max_tokens=99))
    assert made.answer.job.limit == 99 - before
    made.say(" dog", end="stop")
    rest = len(model.encode(" dog", special=False))
    assert made.events[-1] == Finished(
        call=5,
        reason="stop",
        prompt_tokens=len(prepare(chat("tiny", "Hello"), model).prompt),
        completion_tokens=before + rest,
    )


def test_what_was_begun_may_be_as_long_as_it_may_be(model: LoadedModel) -> None:
    begun = "the lazy dog"
    before = len(model.encode(begun, special=False))
    made = Made(model, chat("tiny", "Hello", prefix=begun, begun=len(begun), max_tokens=before))
    made.engine.on_submit = lambda: pytest.fail("there is nothing to compute")
    made.answer.start()
    (last,) = made.events
    assert isinstance(last, Finished)
    assert (last.reason, last.completion_tokens) == ("length", before)


def test_a_tool_call_is_no_text_and_the_reason_of_the_end(model: LoadedModel) -> None:
    made = Made(model, with_tools())
    made.say(f"Look: {CALL}")
    made.answer.take(Delivery([END], "stop"))
    assert made.text == "Look: "
    (call,) = [c for e in made.events if isinstance(e, Piece) for c in e.tool_calls]
    assert (call.name, call.arguments) == ("f", '{"a": 1}')
    assert isinstance(made.events[-1], Finished)
    assert made.events[-1].reason == "tool_calls"


def test_only_one_call_ends_the_work(model: LoadedModel) -> None:
    made = Made(model, with_tools(parallel_tool_calls=False))
    made.say(CALL + CALL)
    assert sum(len(e.tool_calls) for e in made.events if isinstance(e, Piece)) == 1
    assert isinstance(made.events[-1], Finished)
    assert made.events[-1].reason == "tool_calls"
    assert made.engine.cancelled


def test_no_calls_are_read_where_none_are_wanted(model: LoadedModel) -> None:
    for request in (chat("tiny", "Hello"), with_tools(tool_choice=ToolChoice(mode="none"))):
        made = Made(model, request)
        made.say(CALL, end="length")
        assert made.text == CALL


def test_a_call_cannot_be_forced(model: LoadedModel) -> None:
    with pytest.raises(RequestRejected) as caught:
        Made(model, with_tools(tool_choice=ToolChoice(mode="required")))
    assert caught.value.field == "tool_choice"


def test_a_failure_comes_after_the_text(model: LoadedModel) -> None:
    made = Made(model, chat("tiny", "Hello"))
    made.say("the")
    made.answer.take(Delivery([], "failed", "out of luck"))
    assert made.text == "the"
    failed = made.events[-1]
    assert isinstance(failed, Failed)
    assert (failed.code, failed.message) == ("provider_unavailable", "out of luck")


def test_a_cancelled_answer_says_nothing_more(model: LoadedModel) -> None:
    made = Made(model, chat("tiny", "Hello"))
    made.answer.cancel()
    made.say("the lazy dog", end="length")
    assert made.events == []
    assert made.engine.cancelled == [made.answer.job]


def test_a_cancellation_while_the_job_is_on_its_way_is_not_lost(model: LoadedModel) -> None:
    made = Made(model, chat("tiny", "Hello"))

    def cancel_now() -> None:
        made.answer.cancel()
        made.engine.cancelled.clear()  # the engine did not know the job yet

    made.engine.on_submit = cancel_now
    made.answer.start()
    assert made.engine.cancelled == [made.answer.job]


def test_the_bytes_of_a_part_of_a_character_are_told(model: LoadedModel) -> None:
    tokens = model.encode("🌍", special=False)
    assert len(tokens) > 1
    told: list[int] = []
    for token in tokens:
        part = token_bytes(token, model.raw.decode([token]), model)
        assert part is not None
        told += part
    assert bytes(told).decode() == "🌍"
    # A vocabulary that does not write bytes as symbols: they are not known.
    raw = Tokenizer(models.WordLevel(vocab={"▁½": 0}, unk_token="▁½"))
    assert token_bytes(0, "\ufffd", replace(model, raw=raw)) is None
