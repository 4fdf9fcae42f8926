"""Keeps a vendor's process: started when an answer needs it, replaced when it must be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from typing import Any, ClassVar, Generic, TypeVar

import trio

from .base import ProviderUnavailable
from .child import open_child
from .kept_process import KeptProcess
from .openai_errors import ErrorReader
from .private_folder import Folder, private_folder

P = TypeVar("P", bound=KeptProcess[Any])


class Keeper(ABC, Generic[P]):
    """See the module. `run` must run beside its users."""

    #: The longest line that a process writes, in bytes.
    MAX_LINE: ClassVar[int]

    def __init__(self, kind: type[P], errors: ErrorReader, idle: float) -> None:
        """`idle`: the seconds after which a process ends that nobody asks."""
        self._kind = kind
        self._errors = errors
        self._idle = idle
        self._nursery: trio.Nursery | None = None
        self._running = trio.Event()
        self._starting = trio.Lock()
        self._process: P | None = None
        self._began_with: object = None

    # --- what a vendor says

    def _state(self) -> object:
        """What a process has from its start: where that is another now, so must the process be."""
        return None

    @abstractmethod
    def _launch(self, folder: Folder) -> tuple[list[str], dict[str, str]]:
        """The command and its environment; called in a thread.

        Raises `ProviderUnavailable`, `OSError`.
        """

    @abstractmethod
    async def _prepare(self, process: P) -> None:
        """What is asked first of one that was greeted. Raises `ProviderUnavailable`."""

    # --- the process

    async def run(self) -> None:
        """Keep the process, from when it is needed, until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                self._running.set()
                await trio.sleep_forever()
        finally:
            self._nursery, self._process, self._running = None, None, trio.Event()

    async def runs(self, patience: float) -> bool:
        """Is there somebody who runs it, or will there be within so many seconds?"""
        with trio.move_on_after(patience):
            await self._running.wait()
        return self._nursery is not None

    async def process(self) -> P:
        """The process, started if it must be. Raises `ProviderUnavailable`."""
        async with self._starting:
            state = self._state()
            if self._process is None or not self._process.usable or state != self._began_with:
                self._process, self._began_with = await self._start(), state
            return self._process

    async def _start(self) -> P:
        """Raises `ProviderUnavailable`."""
        if self._nursery is None:
            raise ProviderUnavailable(f"{self._errors.name} does not run")
        process: P = await self._nursery.start(self._serve)
        try:
            await process.greet()
            await self._prepare(process)
        except BaseException:
            process.scope.cancel()
            raise
        process.rest()
        return process

    async def _serve(self, *, task_status: Any) -> None:
        """Run one process to its end. Raises `ProviderUnavailable` where it cannot be started."""
        async with AsyncExitStack() as stack:
            try:
                folder = await stack.enter_async_context(private_folder())
                command, seen = await trio.to_thread.run_sync(self._launch, folder)
                opened = open_child(command, seen, folder, max_line=self.MAX_LINE)
                child = await stack.enter_async_context(opened)
            except OSError as error:
                reason = error.strerror or str(error)
                text = f"{self._errors.name} cannot be started: {reason}"
                raise ProviderUnavailable(text) from error
            process = self._kind(child, self._errors, str(folder.work), self._idle)
            task_status.started(process)
            await process.read()
