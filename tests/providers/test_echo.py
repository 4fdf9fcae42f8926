"""The echo provider: what it says, and what it does wrong when told to."""

import math
import struct
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from promptmesh.providers.base import (
    Completion,
    ContentFiltered,
    ContextTooLong,
    DeadlineExceeded,
    Embedding,
    EmbedRequest,
    GenerateError,
    GenerateRequest,
    Message,
    ModelNotFound,
    Origin,
    Provider,
    ProviderUnavailable,
    RequestRejected,
    Sampling,
    StreamInterrupted,
    Text,
    Usage,
)
from promptmesh.providers.echo import Echo, EchoSettings, EchoStats, words


def message(text: str, role: Any = "user") -> Message:
    return Message(role=role, content=(Text(text=text),))


def request(text: str = "one two three", **fields: Any) -> GenerateRequest:
    sampling = Sampling(**fields.pop("sampling", {}))
    return GenerateRequest(model="echo", messages=(message(text),), sampling=sampling, **fields)


async def ask(echo: Provider, request: GenerateRequest) -> Completion:
    async with echo.open(request) as answering:
        return await answering.completion()


async def test_it_repeats_the_last_user_message_word_by_word() -> None:
    asked = GenerateRequest(
        model="echo",
        messages=(
            message("be brief", "system"),
            message("no"),
            message("say", "assistant"),
            message("  hello,\n wide world "),
            message("done", "tool"),
        ),
    )
    async with Echo().open(asked) as answering:
        assert answering.origin == Origin(provider="echo", model="echo")
        chunks = [chunk async for chunk in answering.chunks]
    assert [chunk.text for chunk in chunks] == ["  hello,", "\n wide", " world", " ", ""]
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].usage == Usage(prompt_tokens=9, completion_tokens=4)


@given(st.text())
def test_words_are_the_text_again(text: str) -> None:
    assert "".join(words(text)) == text


async def test_nothing_to_repeat() -> None:
    assert (await ask(Echo(), request(""))).text == ""
    nobody = GenerateRequest(model="echo", messages=(message("hi", "system"),))
    assert (await ask(Echo(), nobody)).text == ""


async def test_models() -> None:
    echo = Echo(EchoSettings(name="e", models=("a", "b"), context_length=7))
    assert echo.name == "e"
    assert [(m.id, m.context_length, m.can_continue) for m in echo.models()] == [
        ("a", 7, True),
        ("b", 7, True),
    ]
    assert (await echo.check()).state == "ready"
    with pytest.raises(ModelNotFound):
        await ask(echo, request())


@pytest.mark.parametrize(
    ("sampling", "text", "reason"),
    [
        ({"max_tokens": 2}, "one two", "length"),
        ({"max_tokens": 3}, "one two three", "stop"),
        ({"max_tokens": 0}, "", "length"),
        ({"stop": ("two",)}, "one ", "stop"),
        ({"stop": ("e t", "w")}, "on", "stop"),
        ({"stop": ("four", "")}, "one two three", "stop"),
        ({"stop": ("three",), "max_tokens": 1}, "one", "length"),
    ],
)
async def test_limits(sampling: dict[str, Any], text: str, reason: str) -> None:
    got = await ask(Echo(), request(sampling=sampling))
    assert (got.text, got.finish_reason) == (text, reason)


@pytest.mark.parametrize(
    ("prefix", "rest"),
    [("one", " two three"), ("one t", "wo three"), ("one two three", ""), ("no", "one two three")],
)
async def test_continuing_after_a_prefix(prefix: str, rest: str) -> None:
    got = await ask(Echo(), request(prefix=prefix))
    assert got.text == rest
    assert got.usage.completion_tokens == len(words(rest))


@pytest.mark.parametrize("most", [1, 2, 3, 4])
@pytest.mark.parametrize("cut", range(len("one two three") + 1))
async def test_what_was_begun_is_among_the_words_that_it_may_have(most: int, cut: int) -> None:
    whole = await ask(Echo(), request(sampling={"max_tokens": most}))
    prefix = whole.text[:cut]
    limits = {"max_tokens": most}
    rest = await ask(Echo(), request(prefix=prefix, begun=len(prefix), sampling=limits))
    assert (prefix + rest.text, rest.finish_reason) == (whole.text, whole.finish_reason)
    assert rest.usage == whole.usage


async def test_context_length() -> None:
    echo = Echo(EchoSettings(context_length=5))
    assert (await ask(echo, request(sampling={"max_tokens": 2}))).text == "one two"
    with pytest.raises(ContextTooLong):
        await ask(echo, request(sampling={"max_tokens": 3}))
    with pytest.raises(ContextTooLong):
        await ask(echo, request("a b c d e f"))


async def test_delays(autojump_clock: MockClock) -> None:
    for echo, text in (
        (Echo(EchoSettings(first_s=5, gap_s=2)), "a b c"),
        (Echo(), "a [[echo first_s=5 gap_s=2]] b c"),
        (Echo(EchoSettings(first_s=9, gap_s=2)), "[[echo first_s=5]]a b c"),
    ):
        times = []
        began = trio.current_time()
        async with echo.open(request(text)) as answering:
            async for _chunk in answering.chunks:
                times.append(trio.current_time() - began)
        assert times == pytest.approx([5, 7, 9, 11])


async def test_directive_is_not_part_of_the_answer() -> None:
    got = await ask(Echo(), request("say [[echo gap_s=0]] this"))
    assert got.text == "say this"


@pytest.mark.parametrize(("n", "text"), [(0, ""), (2, "a b"), (5, "a b a b a")])
async def test_number_of_words(n: int, text: str) -> None:
    assert (await ask(Echo(), request(f"a b [[echo n={n}]]"))).text == text
    assert (await ask(Echo(EchoSettings(n=n)), request("a b"))).text == text


async def test_number_of_words_from_nothing() -> None:
    assert (await ask(Echo(), request("[[echo n=2]]"))).text == "echo echo"


FAILURES = [
    ("unavailable", ProviderUnavailable),
    ("rejected", RequestRejected),
    ("context", ContextTooLong),
    ("filtered", ContentFiltered),
    ("model", ModelNotFound),
    ("deadline", DeadlineExceeded),
    ("interrupted", StreamInterrupted),
]


@pytest.mark.parametrize(("fail", "kind"), FAILURES)
async def test_failing_before_the_first_word(fail: Any, kind: type[GenerateError]) -> None:
    for echo, text in (
        (Echo(EchoSettings(fail=fail, retry_after=2)), "a"),
        (Echo(), f"a [[echo fail={fail} retry_after=2]]"),
    ):
        with pytest.raises(GenerateError) as caught:
            await ask(echo, request(text))
        assert type(caught.value) is kind
        assert (caught.value.retry_after, caught.value.partial) == (2, "")
        assert echo.stats() == EchoStats(started=1, failed=1)


@pytest.mark.parametrize(
    ("directive", "kind"),
    [("after=2", StreamInterrupted), ("after=2 fail=unavailable", ProviderUnavailable)],
)
async def test_failing_after_some_words(directive: str, kind: type[GenerateError]) -> None:
    async with Echo().open(request(f"a b c [[echo {directive}]]")) as answering:
        chunks = aiter(answering.chunks)
        assert (await anext(chunks)).text == "a"
        assert (await anext(chunks)).text == " b"
        with pytest.raises(GenerateError) as caught:
            await anext(chunks)
    assert type(caught.value) is kind
    assert caught.value.partial == "a b"


async def test_failure_that_the_answer_is_too_short_for() -> None:
    assert (await ask(Echo(), request("a b [[echo after=9]]"))).text == "a b"


@pytest.mark.parametrize(("directive", "given"), [("hang", []), ("hang after=1", ["a"])])
async def test_hanging(directive: str, given: list[str], autojump_clock: MockClock) -> None:
    echo = Echo()
    texts = []
    with trio.move_on_after(1000) as scope:
        async with echo.open(request(f"a b [[echo {directive}]]")) as answering:
            async for chunk in answering.chunks:
                texts.append(chunk.text)
    assert scope.cancelled_caught
    assert texts == given
    assert echo.stats() == EchoStats(started=1, cancelled=1, tokens=len(given))


@pytest.mark.parametrize(
    "directive", ["n=-1", "n=x", "n=9999999", "fail=badly", "speed=3", "first_s=-1", "first_s=nan"]
)
async def test_directive_that_is_wrong(directive: str) -> None:
    with pytest.raises(RequestRejected, match="echo"):
        await ask(Echo(), request(f"a [[echo {directive}]]"))


async def test_counters() -> None:
    echo = Echo()
    await ask(echo, request("a b"))
    async with echo.open(request("a b")) as answering:
        await anext(aiter(answering.chunks))
        assert echo.stats() == EchoStats(started=2, finished=1, running=1, tokens=3)
    assert echo.stats() == EchoStats(started=2, finished=1, cancelled=1, tokens=3)


async def test_nothing_follows_the_closing_chunk() -> None:
    async with Echo().open(request("a")) as answering:
        assert len([chunk async for chunk in answering.chunks]) == 2
        assert [chunk async for chunk in answering.chunks] == []


# --- embeddings -----------------------------------------------------------------------------------

EMBEDS = EchoSettings(embedding_models=("words",))


def embedding(*inputs: Any, **fields: Any) -> EmbedRequest:
    return EmbedRequest(model="words", inputs=inputs, **fields)


def numbers(vector: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(vector) // 4}f", vector)


def nearness(one: Embedding, other: Embedding) -> float:
    """The cosine of two vectors of length 1."""
    pairs = zip(numbers(one.vector), numbers(other.vector), strict=True)
    return sum(a * b for a, b in pairs)


async def test_its_vectors_are_the_same_everywhere() -> None:
    request = embedding("one two two", dimensions=4)
    (found,) = await Echo(EMBEDS).embed(request)
    assert found == (await Echo(EMBEDS).embed(request))[0]
    assert found.usage == Usage(prompt_tokens=3)
    assert found.vector == struct.pack("<4f", -1 / 5**0.5, -2 / 5**0.5, 0, 0)


async def test_texts_with_the_same_words_are_near_each_other() -> None:
    cat, kitten, tax = await Echo(EMBEDS).embed(
        embedding("the cat sat on the mat", "a cat sat on a mat", "income tax return forms")
    )
    assert nearness(cat, cat) == pytest.approx(1)
    assert nearness(cat, kitten) > nearness(cat, tax) + 0.2


@given(
    st.lists(st.text(max_size=20) | st.lists(st.integers(0, 9), min_size=1).map(tuple), min_size=1)
)
def test_any_input_has_a_vector_of_length_one(inputs: list[Any]) -> None:
    found = trio.run(Echo(EMBEDS).embed, embedding(*(i for i in inputs), dimensions=8))
    assert len(found) == len(inputs)
    for one in found:
        assert math.hypot(*numbers(one.vector)) == pytest.approx(1) or one.usage.prompt_tokens > 1


async def test_its_models_are_each_for_one_task() -> None:
    echo = Echo(EMBEDS)
    assert {offer.id: offer.tasks for offer in echo.models()} == {
        "echo": ("generate",),
        "words": ("embed",),
    }
    with pytest.raises(ModelNotFound):
        await echo.embed(EmbedRequest(model="echo", inputs=("hi",)))
    with pytest.raises(ModelNotFound):
        await ask(echo, GenerateRequest(model="words", messages=(message("hi"),)))


async def test_embeddings_fail_and_wait_as_told(autojump_clock: MockClock) -> None:
    echo = Echo(EMBEDS)
    with pytest.raises(ProviderUnavailable) as raised:
        await echo.embed(embedding("a", "b [[echo fail=unavailable retry_after=3]]"))
    assert raised.value.retry_after == 3
    started = trio.current_time()
    await echo.embed(embedding("a [[echo first_s=2]]"))
    assert trio.current_time() - started == pytest.approx(2)
    with trio.move_on_after(5):
        await echo.embed(embedding("a [[echo hang]]"))
    assert echo.stats() == EchoStats(started=3, finished=1, failed=1, cancelled=1)
