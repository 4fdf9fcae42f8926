"""What a stub of a vendor says, before a dialect puts it into its words."""

from __future__ import annotations

import json
from typing import Any, Literal, NamedTuple, Protocol

from fakes_http import Received

Finish = Literal["stop", "length", "filter"]

#: What each answer of a stub is said to have cost.
PROMPT_TOKENS = 11
COMPLETION_TOKENS = 5

MESSAGES = {
    400: "the request has a field that is wrong",
    401: "Incorrect API key provided",
    402: "Insufficient credits",
    403: "this key may not use this model",
    404: "The model `stub-model` does not exist",
    429: "Rate limit reached",
    500: "the server had an error",
    503: "the service is not available",
    529: "Overloaded",
}
CONTEXT_MESSAGE = "prompt is too long: 250000 tokens > 200000 maximum context length"
#: What a stream says that breaks off with an error.
FAILED = "the engine has died"


class Said(NamedTuple):
    """An answer."""

    #: As they are streamed, one at a time. A stream that is cut has sent the first.
    pieces: tuple[str, ...]
    finish: Finish = "stop"
    reasoning: str = ""
    usage: bool = True

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Streamed(NamedTuple):
    """The events of an answer."""

    #: Until its first piece has been said.
    begun: list[bytes]
    rest: list[bytes]


class Dialect(Protocol):
    """How a vendor puts it."""

    name: str

    def wants_stream(self, request: Received) -> bool: ...

    def last_text(self, body: Any) -> str:
        """The last text part of the last message of the user."""

    def whole(self, said: Said) -> Any:
        """A reply that is not streamed, as JSON."""

    def events(self, said: Said) -> Streamed: ...

    def failed(self) -> bytes:
        """The event with which a stream says that it has failed."""

    def error(self, status: int, message: str, code: str, retry_after: int | None) -> Any:
        """The body of an error. `code` is `context`, `key` or nothing, where the status leaves more
        to say."""


def named_event(value: dict[str, Any]) -> bytes:
    """A server-sent event whose name is its `type`."""
    return b"event: %s\ndata: %s\n\n" % (value["type"].encode(), json.dumps(value).encode())


def last_text_of(messages: list[Any], content: str = "content") -> str:
    """The last text part of the last message whose role is the user's."""
    said = [m for m in messages if m.get("role") == "user"][-1][content]
    return said if isinstance(said, str) else str([p for p in said if "text" in p][-1]["text"])
