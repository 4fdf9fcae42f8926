"""Tool calls in a model's text, in the form most open models were trained to write::

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>

A chat template that asks for this form says so; models of other forms are offered without tools.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from .base import ToolCall, ToolCallDelta
from .stop_strings import StopScanner

OPEN, CLOSE = "<tool_call>", "</tool_call>"
#: Templates of this form name it to the model in these words.
_SAID_BY_TEMPLATE = "<args-json-object>"


def asks_for_tool_calls(template: object) -> bool:
    """Does a chat template know tools, in the form that is read here?"""
    return isinstance(template, str) and OPEN in template and _SAID_BY_TEMPLATE in template


class ToolCallScanner:
    """Separates text that comes in pieces into text and tool calls.

    A call comes out when it is whole. What looks like one and is none stays text. The ids of calls
    follow from what is called, so that the same answer is the same again; `turn` (the length of
    the prompt) tells those of one conversation apart.
    """

    def __init__(self, turn: int, *, single: bool) -> None:
        self._turn = turn
        self._single = single
        self._outside = StopScanner((OPEN,))
        self._inside: str | None = None
        #: Calls found so far.
        self.calls = 0

    @property
    def stopped(self) -> bool:
        """Only one call was wanted, and it came."""
        return self._single and self.calls > 0

    def feed(self, text: str) -> tuple[str, tuple[ToolCallDelta, ...]]:
        """Take more text; give what is text, and the calls that are whole."""
        texts: list[str] = []
        found: list[ToolCallDelta] = []
        while text and not self.stopped:
            if self._inside is None:
                text = self._outer(text, texts)
            else:
                text = self._inner(text, texts, found)
        return self._without_gaps(texts), tuple(found)

    def _outer(self, text: str, texts: list[str]) -> str:
        """Up to the next call; gives what follows its opening."""
        whole = self._outside.held + text
        texts.append(self._outside.feed(text))
        if not self._outside.found:
            return ""
        self._outside = StopScanner((OPEN,))
        self._inside = ""
        return whole.partition(OPEN)[2]

    def _inner(self, text: str, texts: list[str], found: list[ToolCallDelta]) -> str:
        """Up to the end of the call; gives what follows its closing."""
        body, closing, rest = ((self._inside or "") + text).partition(CLOSE)
        if not closing:
            self._inside = body
            return ""
        self._inside = None
        if (call := self._read(body)) is not None:
            found.append(call)
        else:
            texts.append(OPEN + body + CLOSE)
        return rest

    def close(self) -> tuple[str, tuple[ToolCallDelta, ...]]:
        """The text has ended. A last call may lack its closing: the end of the answer is one."""
        if self.stopped:
            return "", ()
        if self._inside is None:
            return self._without_gaps([self._outside.flush()]), ()
        body, self._inside = self._inside, None
        call = self._read(body)
        return ("", (call,)) if call is not None else (OPEN + body, ())

    def _without_gaps(self, texts: Sequence[str]) -> str:
        text = "".join(texts)
        return "" if self.calls and not text.strip() else text

    def _read(self, body: str) -> ToolCallDelta | None:
        call = read_call(body)
        if call is None:
            return None
        index, self.calls = self.calls, self.calls + 1
        told = f"{self._turn} {index} {call.name} {call.arguments}"
        name = hashlib.sha256(told.encode()).hexdigest()[:20]
        return ToolCallDelta(
            index=index, id=f"call_{name}", name=call.name, arguments=call.arguments
        )


def read_call(body: str) -> ToolCall | None:
    """The call that a model wrote, without an id; None where it is none."""
    try:
        value = json.loads(body)
    except ValueError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    # Some models write the arguments as text that holds JSON.
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(id="", name=value["name"], arguments=text)
