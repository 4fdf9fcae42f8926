"""Stop strings, found in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Finds the first of some strings in text that comes in pieces.

    It holds back the end of the text only as long as that may be the beginning of a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""
        #: A stop string came: the text ended before it.
        self.found = False

    def feed(self, text: str) -> str:
        """Take more text; give what surely belongs to the answer."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found = True
            self._held = ""
            return text[: min(places)]
        keep = self._open_end(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _open_end(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0

    @property
    def held(self) -> str:
        """The text held back."""
        return self._held

    def flush(self) -> str:
        """The text held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held
