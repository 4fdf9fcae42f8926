"""What Codex tells of a turn becomes chunks. No I/O.

An answer is whole if its turn is `completed` and there is text in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from .base import (
    ContentFiltered,
    ContextTooLong,
    GenerateError,
    ProviderRefused,
    RequestRejected,
    StreamInterrupted,
    Usage,
)
from .openai_errors import ErrorReader, ServerError, blames_key
from .stream_decoder import StreamDecoder

#: Seconds after which an account whose plan is used up is asked again.
PLAN_USED_UP = 900.0
#: Codex's words for a failure -> the HTTP status that means the same.
_STATUSES = {
    "rateLimitExceeded": 429,
    "flexUnavailable": 503,
    "serverOverloaded": 503,
    "policyCapacityUnavailable": 503,
    "internalServerError": 500,
    "modelNotFound": 404,
    "unauthorized": 401,
    "badRequest": 400,
}
_REFUSALS = frozenset({"cyberPolicy", "misalignmentPolicyViolation", "inferenceHookDenied"})
#: What Codex puts around the message of a server.
_AROUND = re.compile(r"^unexpected status (\d{3}) [^:]{0,60}: (.*?)(?:, url: .*)?$", re.DOTALL)
#: What it says of a failure whose word it does not tell.
_WORDS = (
    ("ran out of room", "contextWindowExceeded"),
    ("Quota exceeded", "usageLimitExceeded"),
    ("usage limit", "usageLimitExceeded"),
    ("rate limit exceeded", "rateLimitExceeded"),
    ("high demand", "internalServerError"),
    ("does not exist", "modelNotFound"),
)
_LAST_STATUS = re.compile(r"last status: (\d{3})\b")
_BROKEN = "stream disconnected before completion: "
_WAIT = re.compile(r"try again in (\d{1,9}(?:\.\d+)?)\s*s", re.IGNORECASE)
#: Things a turn may hold in a chat without tools.
_ITEMS = frozenset({"userMessage", "agentMessage", "reasoning", "error"})


class _Item(msgspec.Struct, rename="camel"):
    type: str = ""
    id: str = ""
    text: str | None = None
    #: What is said before the answer, to those who watch, is `commentary`.
    phase: str | None = None
    summary: list[Any] | None = None


class _Failure(msgspec.Struct, rename="camel"):
    message: str = ""
    codex_error_info: Any = None


class _Turn(msgspec.Struct, rename="camel"):
    id: str = ""
    status: str = ""
    error: _Failure | None = None


class _Counts(msgspec.Struct, rename="camel"):
    input_tokens: int | None = None
    output_tokens: int | None = None


class _TokenUsage(msgspec.Struct):
    total: _Counts | None = None


class _Params(msgspec.Struct, rename="camel"):
    """Of all notifications that matter, what matters of them."""

    item: _Item | None = None
    item_id: str = ""
    delta: str = ""
    turn: _Turn | None = None
    token_usage: _TokenUsage | None = None
    will_retry: bool = False
    from_model: str = ""
    to_model: str = ""


_decode = msgspec.json.Decoder(_Params).decode


class CodexTurn(StreamDecoder):
    """The decoder of one turn."""

    def __init__(
        self, errors: ErrorReader, refused: Callable[[str], None] = lambda reason: None
    ) -> None:
        """`refused` is told where the login, or the key, is not taken."""
        super().__init__(errors)
        self._refused = refused
        #: Its id, once known: by it a turn is ended.
        self.turn = ""
        #: Codex has told its end.
        self.over = False
        self._commentary: set[str] = set()
        self._told: set[str] = set()
        self._has_text = False

    def event(self, name: str, data: bytes) -> None:
        """Take a notification: its method and parameters."""
        try:
            params = _decode(data)
        except (ValueError, RecursionError) as error:
            self.failure = self.failure or self.broken(f"Codex sent what cannot be read: {error}")
            return
        if params.turn is not None:
            self.turn = params.turn.id or self.turn
            self.over = self.over or name == "turn/completed"
        if self.failure is not None or self.finished:
            return
        match name:
            case "item/agentMessage/delta":
                self._say(params.item_id, params.delta)
            case "item/reasoning/summaryTextDelta" | "item/reasoning/textDelta":
                self._think(params.item_id, params.delta)
            case "item/started" if params.item is not None:
                self._begin(params.item)
            case "item/completed" if params.item is not None:
                self._complete(params.item)
            case "thread/tokenUsage/updated" if params.token_usage is not None:
                self._usage = _usage(params.token_usage.total)
            case "model/rerouted":
                said = f"it asked {params.to_model[:80]!r} instead of {params.from_model[:80]!r}"
                self.failure = self.broken(said)
            case "error" if params.will_retry:
                self.failure = self.broken("Codex wanted to try again by itself")
            case "turn/completed" if params.turn is not None:
                self._end(params.turn)

    def asked(self, what: str) -> None:
        """Codex asks its user something, which has no answer here."""
        self.failure = self.failure or self.broken(f"the model asked for {what[:80]!r}")

    def _begin(self, item: _Item) -> None:
        if item.type not in _ITEMS:
            self.failure = self.broken(f"the model called a tool ({item.type[:80]}), without any")
        if item.phase == "commentary":
            self._commentary.add(item.id)

    def _complete(self, item: _Item) -> None:
        """What was not told in pieces is told now."""
        self._begin(item)
        if item.id in self._told:
            return
        if item.type == "agentMessage":
            self._say(item.id, item.text or "")
        elif item.type == "reasoning":
            parts = [part for part in item.summary or () if isinstance(part, str)]
            self._think(item.id, "\n\n".join(parts))

    def _say(self, item: str, text: str) -> None:
        if item in self._commentary:
            self._think(item, text)
        elif text:
            self._told.add(item)
            self._has_text = True
            self._add_text(text)

    def _think(self, item: str, text: str) -> None:
        if text:
            self._told.add(item)
            self._add_reasoning(text)

    def _end(self, turn: _Turn) -> None:
        failure = turn.error or _Failure()
        if turn.status == "completed":
            self._finish = "stop"
        elif "reason: max_output_tokens" in failure.message:
            self._finish = "length"
        elif "reason: content_filter" in failure.message and self._has_text:
            self._finish = "content_filter"
        if self._finish is None:
            self.failure = self._failed(turn, failure)
        elif not self._has_text:
            self._finish, self.failure = None, self.broken("an empty answer")
        else:
            self._close()

    def _failed(self, turn: _Turn, said: _Failure) -> GenerateError:
        if turn.status == "interrupted":
            return self.broken("it was ended")
        failure = self._read(said)
        if self.pieces and not isinstance(failure, RequestRejected | StreamInterrupted):
            failure = StreamInterrupted(failure.message, retry_after=failure.retry_after)
        failure.partial = self.text
        return failure

    def _read(self, said: _Failure) -> GenerateError:
        """The failure in our words."""
        info = said.codex_error_info
        if info in (None, "other"):
            info = next((kind for words, kind in _WORDS if words in said.message), info)
        kind, status = _kind_and_status(info)
        if around := _AROUND.match(said.message):
            status, text = int(around[1]), around[2]
        else:
            text = said.message.removeprefix(_BROKEN)
            last = _LAST_STATUS.search(text)
            status = status or (int(last[1]) if last else 0)
        error = self._errors.read(text.encode("utf-8", "replace"))
        if text.startswith("{") and not status:
            status = 400  # such an answer it passes on as it is
        return self._classified(kind, status, error)

    def _classified(self, kind: str, status: int, error: ServerError) -> GenerateError:
        name, message = self._errors.name, error.message
        if kind == "contextWindowExceeded":
            return ContextTooLong(f"{name}: {message}")
        if kind in _REFUSALS or "reason: content_filter" in message:
            return ContentFiltered(f"{name}: {message}")
        if kind in ("usageLimitExceeded", "sessionBudgetExceeded"):
            return ProviderRefused(f"{name}: {message}", retry_after=PLAN_USED_UP)
        if not status:
            return self.broken(message or "it failed, and does not say why")
        if wait := _WAIT.search(message):
            error = msgspec.structs.replace(error, retry_after=float(wait[1]))
        failure = self._errors.reply(status, {}, error, 0.0)
        if blames_key(status, error):
            self._refused(failure.message)
        return failure


def _kind_and_status(info: Any) -> tuple[str, int]:
    """Codex's word for a failure, and the HTTP status, if there was one."""
    if isinstance(info, str):
        return info, _STATUSES.get(info, 0)
    if isinstance(info, dict) and info:
        kind, details = next(iter(info.items()))
        status = details.get("httpStatusCode") if isinstance(details, dict) else None
        if isinstance(status, int) and 400 <= status < 600:
            return str(kind), status
        return str(kind), 0
    return "", 0


def _usage(counts: _Counts | None) -> Usage | None:
    if counts is None or counts.input_tokens is None or counts.output_tokens is None:
        return None
    return Usage(
        prompt_tokens=max(counts.input_tokens, 0), completion_tokens=max(counts.output_tokens, 0)
    )
