"""Server-sent events, read as they arrive."""

from __future__ import annotations

#: The longest event. One with a whole answer, or many log probabilities, stays far below it.
MAX_EVENT = 8 * 1024 * 1024


class EventTooLong(ValueError):
    """An event is longer than `MAX_EVENT`."""


class EventStream:
    """Bytes in, cut anywhere; whole events out, as (name, data). Comments are dropped.

    Lines end with LF or CRLF. The name of an event without an `event:` line is empty.
    """

    def __init__(self, max_event: int = MAX_EVENT) -> None:
        self._max_event = max_event
        #: The beginning of a line whose end has not come.
        self._held: list[bytes] = []
        self._name = ""
        self._data: list[bytes] = []
        #: Bytes in `_held` and `_data`.
        self._size = 0

    def feed(self, data: bytes) -> list[tuple[str, bytes]]:
        """Take what arrived. Raises `EventTooLong`."""
        self._size += len(data)
        if b"\n" not in data:
            self._held.append(data)
            self._check_size()
            return []
        if self._held:
            self._held.append(data)
            data = b"".join(self._held)
            self._held = []
        lines = data.split(b"\n")
        rest = lines.pop()
        events: list[tuple[str, bytes]] = []
        held = self._data
        for line in lines:
            # The usual event is one line of data and a blank one, once a token.
            if line.startswith(b"data: ") and not line.endswith(b"\r"):
                held.append(line[6:])
            elif not line and len(held) == 1 and not self._name:
                events.append(("", held.pop()))
            else:
                self._line(line, events)
        if rest:
            self._held.append(rest)
        self._size = len(rest) + sum(map(len, self._data))
        self._check_size()
        return events

    def end(self) -> list[tuple[str, bytes]]:
        """The event that the end of the stream cut off before its blank line, if there is one."""
        events: list[tuple[str, bytes]] = []
        self._line(b"".join(self._held), events)
        self._held = []
        self._line(b"", events)
        return events

    def _line(self, line: bytes, events: list[tuple[str, bytes]]) -> None:
        if line.endswith(b"\r"):
            line = line[:-1]
        if not line:
            if self._data:
                events.append((self._name, b"\n".join(self._data)))
                self._data.clear()
            self._name = ""
        elif line.startswith(b"data:"):
            self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
        elif line.startswith(b"event:"):
            self._name = line[6:].strip().decode("utf-8", "replace")

    def _check_size(self) -> None:
        if self._size > self._max_event:
            raise EventTooLong(f"an event of the stream is longer than {self._max_event} bytes")
