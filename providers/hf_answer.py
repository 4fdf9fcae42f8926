"""One answer in the worker: tokens from the engine in, events for the node out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .base import FinishReason, ProviderUnavailable
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
        self._draw = prepared.draw
        self._prompt_tokens = len(prepared.prompt)
        self._tokens = 0
        self.job = Job(prepared.prompt, prepared.limit, prepared.draw, self.take)

    def start(self) -> None:
        """Hand the job to the engine."""
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
                self._end("stop")
                if not delivery.end:
                    self._engine.cancel(self.job)
                return
        match delivery.end:
            case "":
                self._emit_text()
            case "failed":
                self._emit_text()
                self._ended(self, self._failure(delivery.error))
            case "stop" | "length" as reason:
                self._text.close()
                self._end(reason)

    def _failure(self, message: str) -> Failed:
        return Failed(
            call=self.call, code=ProviderUnavailable.code, message=message, retry_after=1.0
        )

    def _emit_text(self) -> None:
        text, logprobs = self._text.take()
        if text or logprobs:
            self._emit(Piece(call=self.call, text=text, logprobs=logprobs))

    def _end(self, reason: FinishReason) -> None:
        self._emit_text()
        self._ended(
            self,
            Finished(
                call=self.call,
                reason=reason,
                prompt_tokens=self._prompt_tokens,
                completion_tokens=self._tokens,
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
