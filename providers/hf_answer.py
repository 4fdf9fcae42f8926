"""One answer in the worker: tokens from the engine in, events for the node out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from .base import ProviderUnavailable, ToolCallDelta
from .hf_engine import Delivery, Engine, Job
from .hf_frames import Event, Failed, Finished, Piece
from .hf_load import LoadedModel
from .hf_prompt import Prepared
from .hf_sampling import TokenLogprobs
from .hf_text import AnswerText


class Answer:
    """One answer under way. The engine's thread calls `take`; any thread may `cancel`."""

    def __init__(
        self,
        call: int,
        prepared: Prepared,
        model: LoadedModel,
        engine: Engine,
        *,
        emit: Callable[[Event], None],
        ended: Callable[[Answer, Event], None],
    ) -> None:
        self.call = call
        self.cancelled = False
        self._model = model
        self._engine = engine
        self._emit = emit
        self._ended = ended
        self._text = AnswerText(model.raw, prepared.stops, prepared.primer)
        self._tools = prepared.tools
        self._draw = prepared.draw
        #: Tokens of the answer that were there before.
        self._begun = prepared.begun
        self._prompt_tokens = len(prepared.prompt) - prepared.begun
        self._tokens = 0
        self.job = Job(prepared.prompt, prepared.limit, prepared.draw, self.take)

    def start(self) -> None:
        """Hand the job to the engine."""
        if self.job.limit == 0:  # what was begun is as long as it may be
            self._end("length")
            return
        self._engine.submit(self.job)
        if self.cancelled:
            # It came while the job was on its way and found nothing to cancel.
            self._engine.cancel(self.job)

    def cancel(self) -> None:
        """Nobody wants the answer any more."""
        self.cancelled = True
        self._engine.cancel(self.job)

    def take(self, delivery: Delivery) -> None:
        """More tokens."""
        if self.cancelled:
            return
        for token in delivery.tokens:
            self._tokens += 1
            if token not in self._model.ends:
                self._text.push(token, self._logprobs_of(self._tokens - 1))
            if self._text.stopped:
                break
        self._emit_text()
        if delivery.end == "failed":
            self._ended(self, self._failure(delivery.error))
        elif self._text.stopped or (self._tools is not None and self._tools.stopped):
            # The engine does not know of these ends.
            self._engine.cancel(self.job)
            self._end("stop")
        elif delivery.end:
            self._text.close()
            self._end(delivery.end)

    def _failure(self, message: str) -> Failed:
        return Failed(
            call=self.call, code=ProviderUnavailable.code, message=message, retry_after=1.0
        )

    def _emit_text(self, *, last: bool = False) -> None:
        text, logprobs = self._text.take()
        calls: tuple[ToolCallDelta, ...] = ()
        if self._tools is not None:
            text, calls = self._tools.feed(text)
            if last:
                end, more = self._tools.close()
                text, calls = text + end, calls + more
        if text or logprobs or calls:
            self._emit(Piece(call=self.call, text=text, logprobs=logprobs, tool_calls=calls))

    def _end(self, reason: Literal["stop", "length"]) -> None:
        self._emit_text(last=True)
        calls = self._tools is not None and self._tools.calls > 0
        self._ended(
            self,
            Finished(
                call=self.call,
                reason="tool_calls" if calls and reason == "stop" else reason,
                prompt_tokens=self._prompt_tokens,
                completion_tokens=self._begun + self._tokens,
            ),
        )

    def _logprobs_of(self, index: int) -> dict[str, Any] | None:
        if index >= len(self._draw.entries):
            return None
        return openai_logprobs(self._draw.entries[index], self._model)


def openai_logprobs(entry: TokenLogprobs, model: LoadedModel) -> dict[str, Any]:
    """A token's log probabilities in the OpenAI form."""
    return {
        **_named(entry.token, entry.logprob, model),
        "top_logprobs": [_named(token, logprob, model) for token, logprob in entry.top],
    }


def _named(token: int, logprob: float, model: LoadedModel) -> dict[str, Any]:
    text = model.raw.decode([token], skip_special_tokens=False)
    return {"token": text, "logprob": logprob, "bytes": token_bytes(token, text, model)}


def token_bytes(token: int, text: str, model: LoadedModel) -> list[int] | None:
    """The bytes of a token; None where only a part of a character is known to be in it."""
    if "\ufffd" not in text:
        return list(text.encode())
    symbols = model.raw.id_to_token(token) or ""
    try:
        return [BYTE_OF_SYMBOL[symbol] for symbol in symbols]
    except KeyError:
        return None


def _byte_symbols() -> dict[str, int]:
    """The printable symbol that byte-level vocabularies write for each byte (as GPT-2 began)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    symbols.update((chr(256 + i), byte) for i, byte in enumerate(others))
    return symbols


BYTE_OF_SYMBOL = _byte_symbols()
