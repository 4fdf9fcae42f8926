"""Replies of Gemini, as they really look, cut anywhere."""

import contextlib
import json
from typing import Any

import pytest
from fakes_gemini import USAGE, answer, calls, detail, error, reply, thought
from fakes_http import event
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.providers.base import (
    Chunk,
    Completion,
    CompletionBuilder,
    ContentFiltered,
    FinishReason,
    GenerateError,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
    ToolCall,
    Usage,
)
from promptmesh.providers.gemini_messages import Signatures
from promptmesh.providers.gemini_stream import GeminiDecoder
from promptmesh.providers.openai_errors import ErrorReader

KEY = "AIza-0123456789"


def decoder(signatures: Signatures | None = None) -> GeminiDecoder:
    return GeminiDecoder(ErrorReader("gemini", [KEY]), signatures or Signatures())


def read(*pieces: bytes, signatures: Signatures | None = None) -> list[Chunk]:
    """The chunks of a whole body. Raises what the body ends in."""
    reader = decoder(signatures)
    chunks = [chunk for piece in pieces for chunk in reader.feed(piece)]
    if reader.failure is None:
        chunks += reader.end()
    if reader.failure is not None:
        raise reader.failure
    assert reader.finished
    return chunks


def completion(chunks: list[Chunk]) -> Completion:
    builder = CompletionBuilder()
    for chunk in chunks:
        assert not builder.finished
        builder.add(chunk)
    return builder.completion()


def failure(*pieces: bytes) -> GenerateError:
    with pytest.raises(GenerateError) as caught:
        read(*pieces)
    return caught.value


def test_an_answer() -> None:
    assert read(answer("hel", "lo")) == [
        Chunk(text="hello"),
        Chunk(finish_reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=2)),
    ]


def test_chunks_come_with_their_events() -> None:
    reader = decoder()
    assert reader.feed(event(reply("hel"))) == [Chunk(text="hel")]
    assert reader.feed(event(reply("lo", finish="STOP"))) == [Chunk(text="lo")]
    assert not reader.finished  # older servers say STOP with every event
    assert reader.feed(event(reply("!", finish="STOP"))) == [Chunk(text="!")]
    assert reader.end() == [Chunk(finish_reason="stop")]
    assert reader.finished


def test_thoughts_count_and_are_reasoning() -> None:
    usage = {"promptTokenCount": 4, "candidatesTokenCount": 2, "thoughtsTokenCount": 7}
    found = completion(read(event(reply(thought("hm"), "yes", finish="STOP", usageMetadata=usage))))
    assert found == Completion(
        text="yes",
        reasoning="hm",
        finish_reason="stop",
        usage=Usage(prompt_tokens=4, completion_tokens=9),
    )


def test_tool_calls() -> None:
    signatures = Signatures()
    events = [
        reply("I look."),
        reply(calls("weather", "signed", id="c1", args={"city": "Rome"})),
        reply(calls("now", id="c2"), finish="STOP"),
    ]
    found = completion(read(*map(event, events), signatures=signatures))
    assert found.text == "I look."
    assert found.finish_reason == "tool_calls"
    assert found.tool_calls == (
        ToolCall(id="c1", name="weather", arguments='{"city": "Rome"}'),
        ToolCall(id="c2", name="now", arguments="{}"),
    )
    assert (signatures.of("c1"), signatures.of("c2")) == ("signed", None)


def test_tool_calls_without_ids_get_some() -> None:
    found = completion(read(event(reply(calls("now"), calls("now"), finish="STOP"))))
    first, second = found.tool_calls
    assert first.id.startswith("call_")
    assert first.id != second.id


def test_log_probabilities() -> None:
    result = {
        "chosenCandidates": [{"token": "ja", "tokenId": 1, "logProbability": -0.1}],
        "topCandidates": [
            {"candidates": [{"token": "ja", "logProbability": -0.1}, {"token": "né"}]},
        ],
    }
    body = reply("ja", finish="STOP")
    body["candidates"][0]["logprobsResult"] = result
    (found,) = completion(read(event(body))).logprobs
    assert found == {
        "token": "ja",
        "logprob": -0.1,
        "bytes": [106, 97],
        "top_logprobs": [
            {"token": "ja", "logprob": -0.1, "bytes": [106, 97]},
            {"token": "né", "logprob": 0.0, "bytes": [110, 195, 169]},
        ],
    }


def test_an_answer_that_is_not_streamed() -> None:
    body = json.dumps(reply("hello", finish="STOP", usageMetadata=USAGE)).encode()
    assert completion(read(body)).text == "hello"


# --- how it ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("STOP", "stop"),
        ("MAX_TOKENS", "length"),
        ("SAFETY", "content_filter"),
        ("RECITATION", "content_filter"),
        ("PROHIBITED_CONTENT", "content_filter"),
        ("SPII", "content_filter"),
        ("IMAGE_SAFETY", "content_filter"),
    ],
)
def test_finish_reasons(reason: str, expected: FinishReason) -> None:
    assert completion(read(answer("some", finish=reason))).finish_reason == expected


@pytest.mark.parametrize("reason", ["OTHER", "MALFORMED_FUNCTION_CALL", "SOMETHING_NEW"])
def test_an_answer_that_ended_badly(reason: str) -> None:
    error = failure(answer("some", finish=reason))
    assert isinstance(error, StreamInterrupted)
    assert reason in error.message
    assert error.partial == "some"
    assert type(failure(answer(finish=reason))) is ProviderUnavailable


def test_nothing_is_no_answer() -> None:
    assert type(failure(answer())) is ProviderUnavailable
    filtered = failure(answer(finish="SAFETY"))
    assert type(filtered) is ContentFiltered
    assert filtered.message == "gemini filtered the answer (SAFETY)"


def test_all_tokens_spent_on_thoughts() -> None:
    usage = {"promptTokenCount": 4, "thoughtsTokenCount": 250}
    found = failure(event(reply(finish="MAX_TOKENS", usageMetadata=usage)))
    assert type(found) is ProviderUnavailable
    assert "250 tokens of thought" in found.message
    assert "thinking_budget" in found.message


def test_a_blocked_prompt() -> None:
    body = {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": USAGE}
    found = failure(event(body))
    assert type(found) is ContentFiltered
    assert found.message == "gemini blocked the prompt (PROHIBITED_CONTENT)"


def test_a_part_that_is_no_text() -> None:
    picture = {"inlineData": {"mimeType": "image/png", "data": "AAAA"}}
    assert type(failure(event(reply(picture, finish="STOP")))) is ProviderUnavailable
    assert type(failure(event(reply("look:", picture, finish="STOP")))) is StreamInterrupted


def test_an_error_in_the_stream() -> None:
    body = event(
        error(503, f"overloaded, {KEY}", "UNAVAILABLE", detail("RetryInfo", retryDelay="3s"))
    )
    first = failure(body)
    assert type(first) is ProviderUnavailable
    assert first.message == "gemini reported an error: overloaded, ***"
    assert first.retry_after == 3.0
    later = failure(event(reply("some")), body)
    assert type(later) is StreamInterrupted
    assert later.partial == "some"


def test_an_error_of_the_request_in_the_stream() -> None:
    body = event(error(400, "temperature is out of range", "INVALID_ARGUMENT"))
    assert type(failure(body)) is RequestRejected


def test_a_cut_stream() -> None:
    whole = event(reply("some"))
    error = failure(whole)
    assert type(error) is StreamInterrupted
    assert error.partial == "some"


# --- cut anywhere --------------------------------------------------------------------------------

STREAM = (
    b": comment\r\n\r\n"
    + event(reply(thought("hm")))
    + event(reply("gr\u00fc\u00df "))
    + event(reply("dich"))
    + event(reply(calls("now", "s", id="c1", args={"a": "\u00e9"})))
    + event(reply(finish="STOP", usageMetadata=USAGE))
)
WHOLE = Completion(
    text="gr\u00fc\u00df dich",
    reasoning="hm",
    tool_calls=(ToolCall(id="c1", name="now", arguments='{"a": "\\u00e9"}'),),
    finish_reason="tool_calls",
    usage=Usage(prompt_tokens=3, completion_tokens=2),
)


def test_cut_in_two_at_every_byte() -> None:
    for cut in range(len(STREAM) + 1):
        assert completion(read(STREAM[:cut], STREAM[cut:])) == WHOLE


def test_ended_at_every_byte() -> None:
    """What misses its end is never taken for a whole answer."""
    last = STREAM.rindex(b"data:")
    for cut in range(last):
        assert isinstance(failure(STREAM[:cut]), StreamInterrupted | ProviderUnavailable)
    for cut in range(last, len(STREAM)):
        with contextlib.suppress(StreamInterrupted):
            assert completion(read(STREAM[:cut])).finish_reason == "tool_calls"


@given(st.lists(st.binary(max_size=60), max_size=6), st.booleans())
def test_any_bytes_end_in_an_answer_or_an_error(pieces: list[bytes], framed: bool) -> None:
    if framed:
        pieces = [b"data: " + piece + b"\n\n" for piece in pieces]
    with contextlib.suppress(GenerateError):
        completion(read(*pieces))


json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = ["candidates", "content", "parts", "text", "thought", "functionCall", "name", "args"]
NAMES += ["finishReason", "index", "usageMetadata", "promptTokenCount", "promptFeedback", "error"]
shaped: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["STOP", "a", "SAFETY"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.lists(json_values | shaped, max_size=4))
def test_any_json_ends_in_an_answer_or_an_error(values: list[Any]) -> None:
    with contextlib.suppress(GenerateError):
        completion(read(*map(event, values)))
