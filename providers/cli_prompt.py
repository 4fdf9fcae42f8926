"""A chat as what a program for a terminal takes: system text, and one prompt.

What such a program cannot do it is not asked: the request then goes to another provider, and no
part of it is left out silently. Only `sampling` is: a program without a flag for the temperature
draws its tokens as it likes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .base import (
    ContextTooLong,
    GenerateRequest,
    Image,
    Message,
    ProviderUnavailable,
    RequestRejected,
)

#: Who the model is where a request does not say. A program's own text, which makes an agent of it,
#: would be sent otherwise.
PLAIN_SYSTEM = "You are a helpful assistant."
#: Who says what stands above the others' turns.
_ABOVE = ("system", "developer")


class CliPrompt(NamedTuple):
    """What a program is told: who it is, and what is wanted of it."""

    system: str
    text: str

    @property
    def size(self) -> int:
        """Characters of both."""
        return len(self.system) + len(self.text)


def cli_prompt(
    request: GenerateRequest,
    name: str,
    *,
    most_characters: int | None = None,
    most_bytes: int | None = None,
) -> CliPrompt:
    """The prompt for the provider `name`, whose program takes so much of it.

    Raises `ProviderUnavailable` for what no such program can do, and what `check_text` raises.
    """
    refuse_the_impossible(request, name)
    above = [message.text for message in request.messages if message.role in _ABOVE]
    turns = [message for message in request.messages if message.role not in _ABOVE]
    prompt = CliPrompt("\n\n".join(above), turns_text(turns))
    if not prompt.text.strip():
        raise RequestRejected("there is nothing to answer: the chat has no text", field="messages")
    for text in prompt:
        check_text(text, name, most_characters=most_characters, most_bytes=most_bytes)
    return prompt


def turns_text(messages: Iterable[Message]) -> str:
    """A chat as one text: a single message as it is, several with who said them."""
    turns = list(messages)
    if len(turns) == 1:
        return turns[0].text
    return "\n\n".join(f"{turn.role}: {turn.text}" for turn in turns)


def refuse_the_impossible(request: GenerateRequest, name: str) -> None:
    """Raises `ProviderUnavailable` for a request that a program for a terminal cannot do."""
    form, sampling = request.response_format, request.sampling
    cannot = {
        "use tools": bool(request.tools),
        "take up calls of tools": any(
            message.tool_calls or message.role == "tool" for message in request.messages
        ),
        "look at images": any(
            isinstance(part, Image) for message in request.messages for part in message.content
        ),
        "promise an answer in JSON": form is not None and form.type != "text",
        "tell log probabilities": sampling.logprobs or bool(sampling.top_logprobs),
        "weigh single tokens": bool(sampling.logit_bias),
        "continue an answer": bool(request.prefix),
    }
    for what, wanted in cannot.items():
        if wanted:
            raise ProviderUnavailable(f"{name} cannot {what}")


def check_text(
    text: str, name: str, *, most_characters: int | None = None, most_bytes: int | None = None
) -> None:
    """Raises a `GenerateError` for a text that would not arrive as it is.

    One with a zero character is nothing for a program, though a server may take it
    (`ProviderUnavailable`); one with half a character is no text at all (`RequestRejected`).
    """
    if "\0" in text:
        raise ProviderUnavailable(f"{name} cannot take a prompt with a zero character (NUL) in it")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise RequestRejected(
            f"the prompt is not valid text: half a surrogate pair at character {error.start}",
            field="messages",
        ) from None
    if most_characters is not None and len(text) > most_characters:
        raise ContextTooLong(
            f"the prompt has {len(text)} characters, and {name} takes at most {most_characters}"
        )
    if most_bytes is not None and size > most_bytes:
        raise ContextTooLong(f"the prompt has {size} bytes, and {name} takes at most {most_bytes}")
