"""The loop in a thread: how it begins and ends, and what a fork does to it."""

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import trio

from promptmesh.node import loop_thread
from promptmesh.node.loop_thread import LoopThread


@asynccontextmanager
async def opens() -> AsyncIterator[None]:
    yield


@pytest.fixture
def thread() -> Iterator[LoopThread[None]]:
    found = LoopThread(opens, "a loop")
    yield found
    found.close()
    assert not [t for t in threading.enumerate() if t.name == "a loop"]


async def nothing(_: None) -> str:
    await trio.lowlevel.checkpoint()
    return "done"


def test_a_loop_that_cannot_be_opened_fails_what_it_was_begun_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However soon: here before whoever began it gets to run again."""

    @asynccontextmanager
    async def fails() -> AsyncIterator[None]:
        raise ValueError("the configuration is wrong")
        yield

    start = threading.Thread.start

    def start_and_end(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "a loop":
            thread.join()

    monkeypatch.setattr(threading.Thread, "start", start_and_end)
    thread = LoopThread(fails, "a loop")
    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"):
            thread.submit(nothing).future.result(60)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), KeyError("x")])
def test_what_work_raises_is_its_own_affair(thread: LoopThread[None], error: BaseException) -> None:
    begun, over = threading.Event(), trio.Event()

    async def other(_: None) -> str:
        begun.set()
        await over.wait()
        return "done"

    async def fail(_: None) -> None:
        over.set()
        raise error

    waits = thread.submit(other)
    assert begun.wait(60)
    with pytest.raises(type(error)):
        thread.submit(fail).future.result(60)
    assert waits.future.result(60) == "done"


def test_two_threads_fork_at_once(thread: LoopThread[None]) -> None:
    thread.submit(nothing).future.result(60)

    def fork() -> None:
        loop_thread._hold_all()
        loop_thread._release_all()

    loop_thread._hold_all()
    other = threading.Thread(target=fork)
    other.start()
    other.join(0.2)  # it can only wait
    assert other.is_alive()
    loop_thread._release_all()
    other.join(60)
    assert thread.submit(nothing).future.result(60) == "done"


def test_ctrl_c_comes_while_it_waits_to_fork(
    thread: LoopThread[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    thread.submit(nothing).future.result(30)

    def interrupt() -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop_thread, "time", SimpleNamespace(monotonic=interrupt))
        with pytest.raises(KeyboardInterrupt):
            loop_thread._hold_all()
    loop_thread._release_all()  # Python forks all the same
    assert thread.submit(nothing).future.result(30) == "done"


def test_it_is_closed_while_another_thread_forks(thread: LoopThread[None]) -> None:
    thread.submit(nothing).future.result(60)
    loop_thread._hold_all()
    other = threading.Thread(target=thread.close)
    other.start()
    other.join(0.2)
    loop_thread._release_all()
    other.join(60)
    assert not other.is_alive()
    assert not thread.running
