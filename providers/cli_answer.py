"""An answer of a program that is started for it: one process, its lines, and their chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import trio

from .base import Answering, Chunk, GenerateError, Origin, ProviderUnavailable
from .child import MAX_LINE, Child, ChildError, open_child
from .private_folder import Folder, private_folder
from .tokens import estimated_usage
from .turn_chunks import UntilStop

#: A file that a program leaves behind is read so far, in bytes.
MAX_REPORT = 1 << 20


class Launch(NamedTuple):
    """How a program is started for one answer."""

    command: Sequence[str]
    environment: Mapping[str, str]
    #: All of its input.
    text: bytes
    max_line: int = MAX_LINE
    #: What it writes at its end, of what its output does not tell.
    report: Path | None = None
    #: Called in a thread when it has ended, before its folder is removed.
    after: Callable[[], None] = lambda: None


class Decoder(Protocol):
    """Understands the output of one run: a `StreamDecoder` whose events are lines."""

    failure: GenerateError | None
    finished: bool

    @property
    def text(self) -> str: ...

    def broken(self, reason: str) -> GenerateError: ...

    def event(self, name: str, data: bytes) -> None: ...

    def take(self) -> list[Chunk]: ...

    def ended(self, code: int | None, errors: str, report: str) -> None:
        """It has ended, with that exit code, the end of its standard error and its report: the
        answer is whole now (`finished`), or has failed (`failure`)."""
        ...


class CliAnswer:
    """One answer: entered when its process runs, left when the process and its folder are gone."""

    __slots__ = ("_chunks", "_decoder", "_name", "_origin", "_prepare", "_stack", "_stop")

    def __init__(
        self,
        origin: Origin,
        prepare: Callable[[Folder], Launch],
        decoder: Decoder,
        stop: Sequence[str] = (),
    ) -> None:
        """`prepare` is called in a thread, and may write into the folder, and raise a
        `GenerateError` or an `OSError`. `stop` are strings that the program itself does not know.
        """
        self._origin = origin
        self._prepare = prepare
        self._decoder = decoder
        self._stop = stop

    async def __aenter__(self) -> Answering:
        async with AsyncExitStack() as stack:
            try:
                folder = await stack.enter_async_context(private_folder())
                launch = await trio.to_thread.run_sync(self._prepare, folder)
                stack.push_async_callback(_in_thread, launch.after)
                opened = open_child(
                    launch.command,
                    launch.environment,
                    folder,
                    text=launch.text,
                    max_line=launch.max_line,
                )
                child = await stack.enter_async_context(opened)
            except OSError as error:
                reason = error.strerror or str(error)
                raise ProviderUnavailable(
                    f"{self._origin.provider} cannot be started: {reason}"
                ) from error
            self._stack = stack.pop_all()
        chunks = _Chunks(child, self._decoder, launch, self._stop)
        return Answering(self._origin, chunks)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.__aexit__(kind, error, traceback)


async def _in_thread(work: Callable[[], None]) -> None:
    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(work)


class _Chunks:
    """The chunks of a run."""

    __slots__ = ("_child", "_decoder", "_launch", "_until")

    def __init__(self, child: Child, decoder: Decoder, launch: Launch, stop: Sequence[str]) -> None:
        self._child = child
        self._decoder = decoder
        self._launch = launch
        self._until = UntilStop(stop, lambda: estimated_usage(launch.text.decode(), decoder.text))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        until = self._until
        while not until.ready:
            if until.over:
                raise StopAsyncIteration
            if self._decoder.failure is not None:
                raise self._decoder.failure
            await self._read()
            for chunk in self._decoder.take():
                until.take(chunk)
        return until.ready.popleft()

    async def _read(self) -> None:
        """Take the next line, or the end."""
        try:
            line = await self._child.line()
        except ChildError as error:
            raise self._decoder.broken(str(error)) from None
        if line is not None:
            self._decoder.event("", line)
            if self._decoder.finished or self._decoder.failure is not None:
                self._child.kill()  # before it asks for more, which some do
            return
        code = await self._child.ended()
        report = await trio.to_thread.run_sync(_read_report, self._launch.report)
        self._decoder.ended(code, self._child.errors, report)


def _read_report(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            return file.read(MAX_REPORT).decode("utf-8", "replace")
    except OSError:  # it did not come to write one: what that means its decoder knows
        return ""
