"""Waiting for work in the loop of another thread: in a plain program, in trio and in asyncio."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import trio

from .loop_thread import Job

T = TypeVar("T")


def wait(job: Job[Any], future: Future[T]) -> T:
    """What the future gives, in a thread that may block. Who is interrupted cancels the job."""
    try:
        return future.result()
    finally:
        if not future.done():
            job.cancel()


async def wait_async(job: Job[Any], future: Future[T]) -> T:
    """The same in a task of trio or asyncio."""
    try:
        if _in_trio():
            await _wait_trio(future)
        else:
            await _wait_asyncio(future)
    finally:
        if not future.done():
            job.cancel()
    return future.result()


def _in_trio() -> bool:
    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        return False
    return True


async def _wait_trio(future: Future[Any]) -> None:
    token, done = trio.lowlevel.current_trio_token(), trio.Event()

    def tell(_: Future[Any]) -> None:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(done.set)

    future.add_done_callback(tell)
    await done.wait()


async def _wait_asyncio(future: Future[Any]) -> None:
    import asyncio

    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def tell(_: Future[Any]) -> None:
        with suppress(RuntimeError):  # that loop is closed
            loop.call_soon_threadsafe(done.set)

    future.add_done_callback(tell)
    await done.wait()
