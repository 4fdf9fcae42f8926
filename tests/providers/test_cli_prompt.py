"""A chat for a program that takes one prompt: what it becomes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.providers.base import (
    ContextTooLong,
    GenerateError,
    GenerateRequest,
    Image,
    Message,
    ProviderUnavailable,
    RequestRejected,
    ResponseFormat,
    Sampling,
    Text,
    Tool,
    ToolCall,
)
from promptmesh.providers.cli_prompt import check_text, cli_prompt


def said(role: str, text: str) -> Message:
    return Message(role=role, content=(Text(text=text),))  # type: ignore[arg-type]


def request(*messages: Message, **fields: Any) -> GenerateRequest:
    return GenerateRequest(model="m", messages=messages or (said("user", "hi"),), **fields)


#: What looks like an order to one program or another, and is only text.
INJECTIONS = ["@/etc/hostname", "/help", "/compact now", "--help $(x) `y`", "-", "!ls", "# note"]


@pytest.mark.parametrize("text", INJECTIONS)
def test_one_message_is_the_prompt_as_it_is(text: str) -> None:
    assert cli_prompt(request(said("user", text)), "p") == ("", text)


@given(st.text().filter(lambda text: bool(text.strip()) and "\0" not in text))
def test_any_text_stays_as_it_is(text: str) -> None:
    assert cli_prompt(request(said("user", text)), "p").text == text


def test_a_chat_tells_who_said_what_and_its_system_text_stands_apart() -> None:
    prompt = cli_prompt(
        request(
            said("system", "Be brief."),
            said("user", "hi"),
            said("assistant", "hello"),
            said("developer", "In French."),
            said("user", "again"),
        ),
        "p",
    )
    assert prompt.system == "Be brief.\n\nIn French."
    assert prompt.text == "user: hi\n\nassistant: hello\n\nuser: again"
    assert prompt.size == len(prompt.system) + len(prompt.text)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (request(tools=(Tool(name="t"),)), "tools"),
        (request(said("user", "x"), Message(role="tool", tool_call_id="1")), "calls of tools"),
        (
            request(
                Message(role="assistant", tool_calls=(ToolCall(id="1", name="t", arguments="{}"),))
            ),
            "calls of tools",
        ),
        (request(Message(role="user", content=(Image(url="data:,"),))), "images"),
        (request(response_format=ResponseFormat(type="json_object")), "JSON"),
        (request(sampling=Sampling(logprobs=True)), "log probabilities"),
        (request(sampling=Sampling(logit_bias={"1": 1.0})), "single tokens"),
        (request(prefix="He"), "continue"),
    ],
)
def test_what_it_cannot_do_it_is_not_asked(asked: GenerateRequest, words: str) -> None:
    with pytest.raises(ProviderUnavailable, match=f"^p cannot .*{words}"):
        cli_prompt(asked, "p")


def test_the_form_text_and_other_sampling_are_taken() -> None:
    sampling = Sampling(temperature=0.2, max_tokens=5, stop=("x",), seed=1)
    asked = request(response_format=ResponseFormat(), sampling=sampling)
    assert cli_prompt(asked, "p").text == "hi"


@pytest.mark.parametrize("messages", [(), (said("user", " \n"),), (said("system", "x"),)])
def test_a_chat_without_text_is_refused(messages: tuple[Message, ...]) -> None:
    with pytest.raises(RequestRejected, match="nothing to answer"):
        cli_prompt(GenerateRequest(model="m", messages=messages), "p")


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("a\0b", ProviderUnavailable, "zero character"),
        ("ab\ud800", RequestRejected, "character 2"),
        ("x" * 11, ContextTooLong, "11 characters, and p takes at most 10"),
        ("ä" * 8, ContextTooLong, "16 bytes, and p takes at most 15"),
    ],
)
def test_what_would_not_arrive_is_refused(text: str, kind: type[GenerateError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        check_text(text, "p", most_characters=10, most_bytes=15)
    assert type(caught.value) is kind
    for role in ("system", "user"):
        asked = request(said(role, text), said("user", "x"))
        with pytest.raises(kind):
            cli_prompt(asked, "p", most_characters=10, most_bytes=15)


def test_ten_megabytes_are_refused_at_once() -> None:
    with pytest.raises(ContextTooLong, match="10485760"):
        cli_prompt(request(said("user", "x" * (10 << 20))), "p", most_characters=1 << 20)
