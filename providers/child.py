"""Starts a program made for a terminal, talks with it in lines, and ends it for sure.

A child gets exactly the environment it is given, an empty private folder to work in, and a session
of its own, so that one signal reaches all that it started in turn. What it writes is bounded: a
line, and what is kept of its complaints. Leaving the block ends the whole group and waits until it
is gone, also where the caller was cancelled.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Self

import trio

from .private_folder import KILL_GRACE, LOOK, TERMINATE_GRACE, Folder, private_folder

logger = logging.getLogger(__name__)

#: Seconds that output may still come after the child itself has ended: what it left behind in a
#: session of its own may hold the pipe open for ever.
LAST_WORDS = 1.0
#: The end of its standard error that is kept, in bytes.
KEPT_ERRORS = 64 * 1024
#: The longest line of output, in bytes, where its caller names no other.
MAX_LINE = 1 << 20
#: Bytes that may wait until the child reads them.
MAX_QUEUED = 64 << 20


class ChildError(Exception):
    """A child that does not keep to what was agreed: its line is too long, or it never reads."""


async def insist(
    ended: Callable[[], Awaitable[object]], steps: Iterable[tuple[float, Callable[[], object]]]
) -> None:
    """Wait until it has ended; each time that takes longer than a step's seconds, take the step."""
    for patience, step in steps:
        with trio.move_on_after(patience) as scope:
            await ended()
        if not scope.cancelled_caught:
            return
        step()


class Child:
    """A running child. Made by `open_child`."""

    def __init__(self, process: trio.Process, max_line: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._process = process
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, process.stderr
        self._max_line = max_line
        # Bounded by `send`, in bytes.
        self._outgoing, self._to_send = trio.open_memory_channel[bytes](float("inf"))
        self._queued = 0
        self._buffer = bytearray()
        #: So much of it holds no end of a line.
        self._searched = 0
        self._errors = bytearray()
        self._errors_ended = trio.Event()
        #: It has ended itself; what it left behind may not have.
        self._over = False
        self._receiving = trio.CancelScope()

    @property
    def pid(self) -> int:
        """Its process id, which is its group's as well."""
        return self._process.pid

    @property
    def errors(self) -> str:
        """The end of what it wrote to standard error."""
        return self._errors.decode("utf-8", "replace")

    def send(self, data: bytes) -> None:
        """Write to its input, soon; to a child that ends it is lost.

        Raises `ChildError` where it has not read what was sent before.
        """
        if self._queued + len(data) > MAX_QUEUED:
            raise ChildError(f"it does not read: more than {MAX_QUEUED} bytes wait for it")
        with contextlib.suppress(trio.ClosedResourceError):
            self._outgoing.send_nowait(data)
            self._queued += len(data)

    def close_input(self) -> None:
        """Let its input end after what was sent."""
        self._outgoing.close()

    async def line(self) -> bytes | None:
        """Its next line of output, without its end; None after the last. Raises `ChildError`."""
        while True:
            end = self._buffer.find(b"\n", self._searched)
            if end > self._max_line or (end < 0 and len(self._buffer) > self._max_line):
                raise ChildError(f"it wrote a line of more than {self._max_line} bytes")
            if end >= 0:
                return self._take(end, 1)
            self._searched = len(self._buffer)
            data = await self._receive()
            if not data:
                return self._take(self._searched, 0) if self._buffer else None
            self._buffer += data

    async def exactly(self, size: int) -> bytes:
        """Its next `size` bytes of output. Raises `ChildError` where it ends before."""
        while len(self._buffer) < size:
            data = await self._receive()
            if not data:
                raise ChildError(f"its output ended {size - len(self._buffer)} bytes too early")
            self._buffer += data
        return self._take(size, 0)

    def _take(self, size: int, end: int) -> bytes:
        line = bytes(self._buffer[:size])
        del self._buffer[: size + end]
        self._searched = 0
        return line

    async def _receive(self) -> bytes:
        with trio.CancelScope() as self._receiving:
            self._hurry()
            return bytes(await self._stdout.receive_some(1 << 16))
        return b""

    def _hurry(self) -> None:
        """What has ended is not waited for much longer."""
        if self._over:
            self._receiving.deadline = trio.current_time() + LAST_WORDS

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        line = await self.line()
        if line is None:
            raise StopAsyncIteration
        return line

    async def ended(self) -> int | None:
        """Its exit code (below 0: a signal), once its output has ended, when `errors` are whole;
        None: it runs on."""
        with trio.move_on_after(LAST_WORDS):
            await self._errors_ended.wait()
            await self._process.wait()
        return self._process.returncode

    # --- beside its caller

    async def run(self) -> None:
        """Keep its pipes moving, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send)
            nursery.start_soon(self._read_errors)
            nursery.start_soon(self._watch)

    async def _send(self) -> None:
        async with self._stdin:
            async for data in self._to_send:
                try:
                    await self._stdin.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return  # it reads no more; what comes of that its output shows
                self._queued -= len(data)

    async def _read_errors(self) -> None:
        while data := await self._stderr.receive_some(1 << 14):
            self._errors += data
            del self._errors[:-KEPT_ERRORS]
        self._errors_ended.set()

    async def _watch(self) -> None:
        """Once it has ended: so must all that it left behind."""
        await self._process.wait()
        _signal(self.pid, signal.SIGKILL)
        self._over = True
        self._hurry()

    def kill(self) -> None:
        """Let its group do nothing more, without a grace; `end` waits until it is gone."""
        if self._process.returncode is None:
            _signal(self.pid, signal.SIGKILL)

    async def end(self) -> None:
        """End its group: SIGTERM, then SIGKILL. Returns when it is gone."""
        # Not where all is over: the number might be another's by now.
        if self._process.returncode is None or _lives(self.pid):
            _signal(self.pid, signal.SIGTERM)
            steps = (
                (TERMINATE_GRACE, partial(_signal, self.pid, signal.SIGKILL)),
                (KILL_GRACE, partial(logger.error, "the group %d does not end", self.pid)),
            )
            await insist(self._gone, steps)

    async def close(self) -> None:
        """Close its pipes, when nothing uses them any more."""
        for stream in (self._stdin, self._stdout, self._stderr):
            await trio.aclose_forcefully(stream)

    async def _gone(self) -> None:
        await self._process.wait()
        while _lives(self.pid):  # noqa: ASYNC110 (no event tells)
            await trio.sleep(LOOK)


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _lives(group: int) -> bool:
    """Does any process of a group run? One that has ended and that nobody asked for does not."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # what macOS says of a group that only holds such
        return False
    try:
        numbers = [name for name in os.listdir("/proc") if name.isdecimal()]
    except FileNotFoundError:
        return True
    return any(_runs_in(number, group) for number in numbers)


def _runs_in(number: str, group: int) -> bool:
    try:
        with open(f"/proc/{number}/stat", "rb") as file:
            # Its name stands in brackets and may hold anything; state, parent and group follow.
            state, _, own = file.read().rpartition(b")")[2].split()[:3]
    except (OSError, ValueError):  # it has just gone
        return False
    return int(own) == group and state not in (b"Z", b"X")


@contextlib.asynccontextmanager
async def open_child(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Folder,
    *,
    text: bytes | None = None,
    max_line: int = MAX_LINE,
) -> AsyncIterator[Child]:
    """Start a child in `folder.work`; leaving the block ends it, within 3 s.

    It gets that environment and a TMPDIR, nothing else. With a `text` that is all of its input;
    without one its input stays open for `Child.send`. Raises `OSError` where it cannot be started.
    """
    with trio.CancelScope(shield=True):  # a process must not start and be forgotten
        process = await trio.lowlevel.open_process(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder.work,
            env={**environment, "TMPDIR": str(folder.temporary)},
            start_new_session=True,
        )
    child = Child(process, max_line)
    if text is not None:
        child.send(text)
        child.close_input()
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.run)
            try:
                yield child
            except BaseException as error:  # raised again below: the nursery would wrap it
                failure = error
            with trio.CancelScope(shield=True):
                await child.end()
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await child.close()
    if failure is not None:
        raise failure


class Outcome(NamedTuple):
    """What a short command did: its exit code, and the beginnings of what it wrote."""

    code: int | None
    output: str
    errors: str


async def run_briefly(command: Sequence[str], environment: Mapping[str, str]) -> Outcome:
    """Run a command such as `--version`, without input, to its end. Raises `OSError`.

    Where it writes more than a few lines, or `ChildError`, the rest is left out.
    """
    async with (
        private_folder() as folder,
        open_child(command, environment, folder, text=b"", max_line=KEPT_ERRORS) as child,
    ):
        output, code = bytearray(), None
        with contextlib.suppress(ChildError):
            async for line in child:
                output += line + b"\n"
                if len(output) > KEPT_ERRORS:
                    break
            else:
                code = await child.ended()
        return Outcome(code, output.decode("utf-8", "replace"), child.errors)
