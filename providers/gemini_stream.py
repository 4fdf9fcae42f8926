"""The Gemini dialect, inwards: the body of `:streamGenerateContent?alt=sse` becomes chunks.

No I/O. There is no event that says the end: it is the end of the body, and the answer is whole if a
finish reason came before it. Older servers send one with every event, so none of them ends it.
"""

from __future__ import annotations

import secrets
from typing import Any

import msgspec

from .base import ContentFiltered, FinishReason, ProviderUnavailable, ToolCallDelta, Usage
from .gemini_messages import Signatures
from .openai_errors import ErrorReader
from .stream_decoder import StreamDecoder

_NO_ARGUMENTS = msgspec.Raw(b"{}")


class _FunctionCall(msgspec.Struct, gc=False):
    name: str
    id: str | None = None
    args: msgspec.Raw = _NO_ARGUMENTS


class _Part(msgspec.Struct, gc=False, rename="camel"):
    text: str | None = None
    thought: bool | None = None
    thought_signature: str | None = None
    function_call: _FunctionCall | None = None
    inline_data: Any = None
    file_data: Any = None


class _Content(msgspec.Struct, gc=False):
    parts: list[_Part] | None = None


class _Token(msgspec.Struct, gc=False, rename="camel"):
    token: str = ""
    log_probability: float = 0.0


class _Top(msgspec.Struct, gc=False):
    candidates: list[_Token] | None = None


class _Logprobs(msgspec.Struct, gc=False, rename="camel"):
    chosen_candidates: list[_Token] | None = None
    top_candidates: list[_Top] | None = None


class _Candidate(msgspec.Struct, gc=False, rename="camel"):
    index: int | None = None
    content: _Content | None = None
    finish_reason: str | None = None
    finish_message: str | None = None
    logprobs_result: _Logprobs | None = None


class _Feedback(msgspec.Struct, gc=False, rename="camel"):
    block_reason: str | None = None
    block_reason_message: str | None = None


class _Usage(msgspec.Struct, gc=False, rename="camel"):
    prompt_token_count: int | None = None
    tool_use_prompt_token_count: int | None = None
    candidates_token_count: int | None = None
    thoughts_token_count: int | None = None


class _Reply(msgspec.Struct, gc=False, rename="camel"):
    candidates: list[_Candidate] | None = None
    prompt_feedback: _Feedback | None = None
    usage_metadata: _Usage | None = None
    error: Any = None


_decode_reply = msgspec.json.Decoder(_Reply).decode

#: An answer that ended for another reason was broken off.
_FINISH: dict[str, FinishReason] = {
    "STOP": "stop",
    "MAX_TOKENS": "length",
    "SAFETY": "content_filter",
    "RECITATION": "content_filter",
    "LANGUAGE": "content_filter",
    "BLOCKLIST": "content_filter",
    "PROHIBITED_CONTENT": "content_filter",
    "SPII": "content_filter",
}


class GeminiDecoder(StreamDecoder):
    """The decoder of one answer, which remembers in `signatures` how its tool calls are signed."""

    def __init__(self, errors: ErrorReader, signatures: Signatures) -> None:
        super().__init__(errors)
        self._signatures = signatures
        self._reason = ""
        self._thoughts = 0
        self._called = 0

    def event(self, name: str, data: bytes) -> None:
        if self.finished or self.failure is not None:
            return
        try:
            reply = _decode_reply(data)
        except (ValueError, RecursionError) as error:
            self.failure = self.broken(f"the server sent what cannot be read: {error}")
            return
        if reply.error:
            self._fail(data)
            return
        if reply.usage_metadata is not None:
            self._count_tokens(reply.usage_metadata)
        feedback = reply.prompt_feedback
        if feedback is not None and feedback.block_reason:
            self._blocked(feedback.block_reason, feedback.block_reason_message)
        elif reply.candidates:
            self._candidate(reply.candidates[0])

    def _count_tokens(self, told: _Usage) -> None:
        """The figures of an event count all before it, too."""
        self._thoughts = max(told.thoughts_token_count or 0, 0)
        prompt = (told.prompt_token_count or 0) + (told.tool_use_prompt_token_count or 0)
        self._usage = Usage(
            prompt_tokens=max(prompt, 0),
            completion_tokens=max(told.candidates_token_count or 0, 0) + self._thoughts,
        )

    def _candidate(self, candidate: _Candidate) -> None:
        if candidate.index:
            return  # One answer was asked for.
        for part in (candidate.content and candidate.content.parts) or ():
            self._part(part)
        if candidate.logprobs_result is not None:
            self._logprobs += _openai_logprobs(candidate.logprobs_result)
        if candidate.finish_reason and self.failure is None:
            self._end_by(candidate.finish_reason, candidate.finish_message)

    def _part(self, part: _Part) -> None:
        if part.function_call is not None:
            self._call(part.function_call, part.thought_signature)
        elif part.inline_data is not None or part.file_data is not None:
            self.failure = self.broken("a part of the answer is no text")
        elif part.text and part.thought:
            self._add_reasoning(part.text)
        elif part.text:
            self._add_text(part.text)

    def _call(self, call: _FunctionCall, signature: str | None) -> None:
        """A tool call, which is never cut in pieces."""
        call_id = call.id or f"call_{secrets.token_hex(8)}"
        if signature:
            self._signatures.keep(call_id, signature)
        arguments = bytes(call.args).decode()
        if arguments == "null":
            arguments = "{}"
        self._add_call(
            ToolCallDelta(index=self._called, id=call_id, name=call.name, arguments=arguments)
        )
        self._called += 1

    def _end_by(self, reason: str, message: str | None) -> None:
        self._reason = reason
        found = _FINISH.get(reason)
        if reason.startswith(("IMAGE_", "NO_IMAGE")):
            found = "content_filter"
        if found is None:
            said = f": {message[:200]}" if message else ""
            self.failure = self.broken(f"the server ended it by {reason[:80]!r}{said}")
            return
        self._finish = "tool_calls" if found == "stop" and self._called else found

    def _blocked(self, reason: str, message: str | None) -> None:
        said = f": {message[:200]}" if message else ""
        text = f"{self._errors.name} blocked the prompt ({reason[:80]}){said}"
        self.failure = ContentFiltered(self._errors.redact(text), partial=self.text)

    def _close(self) -> None:
        """The answer is over: one without content is none."""
        if self._finish is not None and not self.pieces and self.failure is None:
            self.failure = self._empty()
        super()._close()

    def _empty(self) -> ContentFiltered | ProviderUnavailable:
        name = self._errors.name
        if self._finish == "content_filter":
            return ContentFiltered(f"{name} filtered the answer ({self._reason})")
        if self._finish == "length" and self._thoughts:
            return ProviderUnavailable(
                f"{name} spent max_tokens on {self._thoughts} tokens of thought and wrote nothing: "
                "raise max_tokens, or ask with a smaller thinking_budget"
            )
        return ProviderUnavailable(f"{name} gave an empty answer ({self._reason})")


def _openai_logprobs(result: _Logprobs) -> list[dict[str, Any]]:
    """The log probabilities of some tokens in the OpenAI form."""
    chosen = result.chosen_candidates or []
    tops = result.top_candidates or []
    return [
        {
            **_token(token),
            "top_logprobs": [
                _token(t) for t in (tops[i].candidates if i < len(tops) else None) or ()
            ],
        }
        for i, token in enumerate(chosen)
    ]


def _token(token: _Token) -> dict[str, Any]:
    encoded = token.token.encode("utf-8", "replace")
    return {"token": token.token, "logprob": token.log_probability, "bytes": list(encoded)}
