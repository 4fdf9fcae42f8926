"""Tokens to text, piece by piece: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from .stop_strings import StopScanner


class AnswerText:
    """The text of one answer while its tokens come.

    A character whose bytes are spread over several tokens comes out when it is whole; one that is
    still incomplete where the answer ends is dropped, streamed or not. `primer` are the tokens
    before the answer that it continues (their text is not repeated): some tokenizers drop the space
    before the first word of a text, and only there.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], primer: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # All that matters is that there is text before: a short end is enough.
        self._stream = DecodeStream(ids=list(primer[-8:]), skip_special_tokens=True)
        self._scanner = StopScanner(stops)
        self._decoded = 0
        self._emitted = 0
        self._pending: deque[tuple[int, int, dict[str, Any]]] = deque()
        self._ready: list[str] = []

    @property
    def stopped(self) -> bool:
        """A stop string was found: the answer is over."""
        return self._scanner.found

    def push(self, token: int, logprobs: dict[str, Any] | None = None) -> None:
        """Take the next token, with its entry for the log probabilities."""
        text = self._step(token)
        start = self._decoded
        self._decoded += len(text)
        if logprobs is not None:
            self._pending.append((start, self._decoded, logprobs))
        self._put(self._scanner.feed(text))

    def _step(self, token: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception:
            # The library gives up on some rare sequences ("Invalid prefix encountered"). A new
            # stream decodes the rest; nobody needs to see this.
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._tokenizer, token) or ""

    def _put(self, text: str) -> None:
        if text:
            self._emitted += len(text)
            self._ready.append(text)

    def close(self) -> None:
        """The last token was pushed: what was held back is text after all."""
        self._put(self._scanner.flush())

    def take(self) -> tuple[str, tuple[dict[str, Any], ...]]:
        """The text that is ready, and the entries of the tokens that made it."""
        text = "".join(self._ready)
        self._ready.clear()
        entries = []
        while self._pending:
            start, end, entry = self._pending[0]
            # Of a token that reaches into a stop string, the part before it is in the answer.
            if end > self._emitted and not (self.stopped and start < self._emitted):
                break
            entries.append(entry)
            self._pending.popleft()
        return text, tuple(entries)
