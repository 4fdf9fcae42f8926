"""What the worker tells the node: events from any thread, frames from one."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable

from .hf_frames import Counters, Event, Piece, encode

#: Seconds after which counters are told that changed without an event.
COUNTERS_EVERY = 1.0
#: Most events of a frame. It bounds the frame where the node did not read for a while.
MOST_EVENTS = 512


class Outbox:
    """Events that are ready together leave in one frame, the pieces of one answer joined.

    It holds what the node has not read yet: at most the rest of the answers that are running, as
    each of them has a limit.
    """

    def __init__(self, fd: int, counters: Callable[[], Counters]) -> None:
        self._fd = fd
        self._counters = counters
        self._told = Counters()
        self._queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="hf-outbox", daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        """Send an event, soon. Never blocks."""
        self._queue.put(event)

    def close(self) -> None:
        """Send what is left and end."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            events, last = self._ready()
            counters = self._counters()
            if counters != self._told:
                self._told = counters
                events.append(counters)
            if events:
                self._write(encode(events))
            if last:
                return

    def _ready(self) -> tuple[list[Event], bool]:
        """The events that wait now, at least one if any comes soon; and whether that is all."""
        events: list[Event] = []
        timeout = COUNTERS_EVERY
        while len(events) < MOST_EVENTS:
            try:
                event = self._queue.get(timeout=timeout)
            except queue.Empty:
                break
            if event is None:
                return merged(events), True
            events.append(event)
            timeout = 0
        return merged(events), False

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError:
            # The node is gone, and with it the reason to be here.
            os._exit(0)


def merged(events: list[Event]) -> list[Event]:
    """The same events with neighbouring pieces of one answer joined."""
    result: list[Event] = []
    last_piece: dict[int, int] = {}
    for event in events:
        if not isinstance(event, Piece):
            result.append(event)
            continue
        place = last_piece.get(event.call)
        earlier = None if place is None else result[place]
        if place is None or not isinstance(earlier, Piece):
            last_piece[event.call] = len(result)
            result.append(event)
            continue
        # Between the two there are only other answers' events: an answer's own end comes last.
        result[place] = Piece(
            call=event.call,
            text=earlier.text + event.text,
            logprobs=earlier.logprobs + event.logprobs,
            tool_calls=earlier.tool_calls + event.tool_calls,
        )
    return result
