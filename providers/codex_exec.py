"""What `codex exec --json` writes becomes chunks: the answer at once, when it is whole. No I/O.

It is whole if the turn is completed, there is text, and the process says that all went well.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .base import Usage
from .codex_turn import CodexTurn, _Failure, _Turn


class _Item(msgspec.Struct):
    type: str = ""
    text: str | None = None


class _Usage(msgspec.Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None


class _Line(msgspec.Struct):
    type: str = ""
    item: _Item | None = None
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Line).decode
_QUIET = frozenset({"agent_message", "reasoning", "error"})


class CodexOutput(CodexTurn):
    """The decoder of one run."""

    _answer = ""
    _turn_over = False

    def event(self, name: str, data: bytes) -> None:
        """Take a line."""
        if self.failure is not None or self._turn_over:
            return
        try:
            line = _decode(data)
        except (ValueError, RecursionError):
            return  # what else a program writes: it shows by the missing end if that was one
        match line.type:
            case "item.completed" if line.item is not None:
                self._take(line.item)
            case "turn.completed":
                self._turn_over, self._usage = True, _counted(line.usage)
            case "turn.failed":
                self._turn_over = True
                self._fail_turn(line.error)

    def _take(self, item: _Item) -> None:
        if item.type not in _QUIET:
            self.failure = self.broken(f"the model called a tool ({item.type[:80]}), without any")
        elif item.type == "agent_message":
            self._answer = item.text or ""
        elif item.type == "reasoning" and item.text:
            self._think("", item.text)

    def _fail_turn(self, error: Any) -> None:
        message = error.get("message") if isinstance(error, dict) else None
        self._say("", self._answer)
        self._end(_Turn(status="failed", error=_Failure(message=str(message or ""))))

    def ended(self, code: int | None, errors: str, report: str) -> None:
        """Take the end of the run."""
        if self.failure is not None or self.finished:
            return
        if not self._turn_over:
            last = [line.strip() for line in errors.splitlines() if line.strip()][-1:]
            said = self._errors.redact(last[0][:300]) if last else "it ended without a result"
            self.failure = self.broken(f"{said} ({code})")
        elif code:
            self.failure = self.broken(f"it ended with code {code}")
        else:
            self._say("", self._answer)
            self._end(_Turn(status="completed"))


def _counted(usage: _Usage | None) -> Usage | None:
    if usage is None or usage.input_tokens is None or usage.output_tokens is None:
        return None
    return Usage(
        prompt_tokens=max(usage.input_tokens, 0), completion_tokens=max(usage.output_tokens, 0)
    )
