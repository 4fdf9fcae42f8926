"""A trio loop in a thread of its own, for callers that are no part of one.

What lives in the loop outlives a call: connections, a model's process, the cache. A caller may be
a plain program, an asyncio or a trio task, a notebook: it submits a `Job`, and waits for it in its
own way. The thread starts with the first job, ends with `close` or the program, and is no part of
a forked child, which gets one of its own. While the program forks it stands still between two
steps, apart from its files: what it held in the middle of one, such as SQLite's lock over its
memory, nobody in the child would ever give back.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    suppress,
)
from typing import Any, Generic, TypeVar

import trio

T = TypeVar("T")
E = TypeVar("E")

#: Seconds that closing may take. A model's process is then killed by its own end of input.
CLOSING = 10.0
#: Seconds that a fork waits at most until a step is over. A step takes milliseconds.
STEP = 5.0


class Closed(RuntimeError):
    """The loop was closed before the work was done."""


class Job(Generic[T]):
    """Work in the loop, seen from outside. All methods may be called in any thread."""

    def __init__(self, work: Callable[[Any], Awaitable[T]]) -> None:
        self.future: Future[T] = Future()
        self._work = work
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None
        self._unwanted = False

    def cancel(self) -> None:
        """Nobody waits for it any more. Does nothing to one that is done."""
        self._unwanted = True
        if self._token is not None and not self.future.done():
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._scope.cancel)

    async def run(self, owner: object) -> None:
        """Do it, in the loop. Never raises but for a cancelled loop."""
        self._token = trio.lowlevel.current_trio_token()
        try:
            with self._scope:
                if self._unwanted:
                    self._scope.cancel()
                await trio.lowlevel.checkpoint()
                result = await self._work(owner)
                self.future.set_result(result)
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # Who submitted it sees it.
            self.future.set_exception(error)
        finally:
            self.fail(Closed("the work was cancelled"))

    def fail(self, error: Exception) -> None:
        """It will not be done, unless it is."""
        if not self.future.done():
            self.future.set_exception(error)


class LoopThread(Generic[E]):
    """The thread, with what `opens` gives open in it. See the module."""

    def __init__(
        self,
        opens: Callable[[], AbstractAsyncContextManager[E]],
        name: str,
        *,
        apart: Callable[[E], AbstractContextManager[None]] = lambda owner: nullcontext(),
    ) -> None:
        """`apart` is entered in the loop while the program forks."""
        self._make: Callable[[Job[Any]], _Loop[E]] = lambda job: _Loop(opens, name, apart, job)
        self._lock = threading.Lock()
        self._loop: _Loop[E] | None = None
        with _threads_lock:
            _threads.add(self)

    def submit(self, work: Callable[[E], Awaitable[T]]) -> Job[T]:
        """Begin work, with what is open in the loop. Raises `RuntimeError` in the loop itself."""
        job = Job(work)
        with self._lock:
            if self._loop is None or not self._loop.add(job):
                _close_at_the_end()
                self._loop = self._make(job)
        return job

    @property
    def running(self) -> bool:
        """Was it begun, and not closed?"""
        return self._loop is not None

    def close(self) -> None:
        """Cancel all work and end the thread. The next `submit` begins another."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            loop.close()

    def abandon(self) -> None:
        """The same without waiting: for a finalizer, which may run in any thread."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.stop()

    @contextmanager
    def still(self) -> Iterator[None]:
        """Around a fork: it stands still, and nobody begins or closes one."""
        with self._lock, nullcontext() if self._loop is None else self._loop.still():
            yield

    def forget(self) -> None:
        """In a forked child: the thread is the parent's, and so is all that is open in it."""
        if self._loop is not None:
            # Kept for ever: to finalize it would touch the parent's files and processes.
            _inherited.append(self._loop)
        self._lock = threading.Lock()
        self._loop = None


class _Loop(Generic[E]):
    """One run of the thread."""

    def __init__(
        self,
        opens: Callable[[], AbstractAsyncContextManager[E]],
        name: str,
        apart: Callable[[E], AbstractContextManager[None]],
        job: Job[Any],
    ) -> None:
        """Begins with that job."""
        self._opens = opens
        self._apart_of = apart
        #: What it does around a fork.
        self._apart: Callable[[], AbstractContextManager[None]] = nullcontext
        #: Over all below. A finalizer that stops it may run wherever the lock is held.
        self._lock = threading.RLock()
        #: What waits to be begun; None: the loop takes no more.
        self._jobs: deque[Job[Any]] | None = deque([job])
        #: Makes the loop begin what waits; None: it has not come so far.
        self._begin: Callable[[], None] | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop = trio.CancelScope()
        self._stopping = False
        # A daemon, as Python waits for others before it calls what `atexit` knows.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, job: Job[Any]) -> bool:
        """Take a job; False if it is too late. Raises `RuntimeError` in the loop itself."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("this would wait for itself: it was called in the router's own loop")
        with self._lock:
            if self._jobs is None or self._stopping:
                return False
            self._jobs.append(job)
            if self._token is not None and self._begin is not None:
                self._token.run_sync_soon(self._begin)
        return True

    def stop(self) -> None:
        """Cancel all, without waiting."""
        with self._lock:
            self._stopping = True
            if self._token is not None:
                with suppress(trio.RunFinishedError):
                    self._token.run_sync_soon(self._stop.cancel)

    def close(self) -> None:
        """Cancel all, and wait until the thread has ended."""
        self.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSING)

    @contextmanager
    def still(self) -> Iterator[None]:
        """While inside it stands still between two steps, or has not begun or has ended."""
        with self._lock:
            if self._token is None:
                yield  # it does not begin without the lock
                return
        held, go_on = threading.Event(), threading.Event()

        def stand_still() -> None:
            if go_on.is_set():
                return  # too late: a step took long
            with self._apart():
                held.set()
                go_on.wait()

        try:
            if threading.current_thread() is not self._thread:
                self._wait(stand_still, held)
            yield
        finally:
            go_on.set()

    def _wait(self, step: Callable[[], None], done: threading.Event) -> None:
        """Have the step taken, and wait until it is done, or cannot be."""
        assert self._token is not None
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(step)
            until = time.monotonic() + STEP
            while not done.wait(0.01) and self._thread.is_alive() and time.monotonic() < until:
                pass

    def _run(self) -> None:
        failure: Exception = Closed("the router was closed")
        try:
            trio.run(self._main)
        except Exception as error:  # Who waits for a job sees it.
            failure = only(error)
        finally:
            for job in self._end():
                job.fail(failure)

    async def _main(self) -> None:
        with self._lock:
            self._token = trio.lowlevel.current_trio_token()
            if self._stopping:
                self._stop.cancel()
        with self._stop:
            async with self._opens() as owner, trio.open_nursery() as nursery:
                self._apart = lambda: self._apart_of(owner)
                try:
                    with self._lock:
                        self._begin = lambda: self._start_all(nursery, owner)
                    self._start_all(nursery, owner)
                    await trio.sleep_forever()
                finally:
                    for job in self._end():
                        job.fail(Closed("the router was closed"))

    def _start_all(self, nursery: trio.Nursery, owner: E) -> None:
        with self._lock:
            while self._jobs:
                nursery.start_soon(self._jobs.popleft().run, owner)

    def _end(self) -> deque[Job[Any]]:
        """Take no more; gives what was not begun."""
        with self._lock:
            left, self._jobs = self._jobs, None
        return left or deque()


def only(error: Exception) -> Exception:
    """What was raised, out of the groups of the nurseries around it."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


# --- processes ----------------------------------------------------------------------------------

_threads: weakref.WeakSet[LoopThread[Any]] = weakref.WeakSet()
#: Held while the program forks, once at a time, and while `_threads` is read or changed.
_threads_lock = threading.Lock()
_inherited: list[object] = []
#: Does `multiprocessing` know of the end?
_is_told = False
#: What stands still while the program forks.
_held = ExitStack()


def _close_all() -> None:
    with _threads_lock:
        threads = list(_threads)
    for thread in threads:
        thread.close()


def _close_at_the_end() -> None:
    """Have all closed by `multiprocessing`, too: what it forked ends without calling `atexit`.

    Asked for with each process's first loop, as a fork forgets what its parent asked for.
    """
    global _is_told
    util = sys.modules.get("multiprocessing.util")
    if util is not None and not _is_told:
        _is_told = True
        util.Finalize(None, _close_all, exitpriority=-1)


def _hold_all() -> None:
    _threads_lock.acquire()
    for thread in list(_threads):
        _held.enter_context(thread.still())


def _release_all() -> None:
    _held.close()
    _threads_lock.release()


def _forget_all() -> None:
    global _threads_lock, _is_told, _held
    # Kept for ever, as what it would let go on is the parent's.
    _inherited.append(_held)
    _threads_lock, _is_told, _held = threading.Lock(), False, ExitStack()
    for thread in list(_threads):
        thread.forget()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold_all, after_in_parent=_release_all, after_in_child=_forget_all)
