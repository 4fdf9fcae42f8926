"""What holds for every program that is kept and asked by JSON-RPC."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, Self

import msgspec
import pytest
import trio

from promptmesh.providers.base import ProviderUnavailable
from promptmesh.providers.child import ChildError
from promptmesh.providers.codex_server import CodexServer
from promptmesh.providers.copilot_runtime import CopilotRuntime
from promptmesh.providers.copilot_wire import frame
from promptmesh.providers.kept_process import KeptProcess
from promptmesh.providers.openai_errors import ErrorReader


class Deaf:
    """A child that reads nothing, and writes `output` when it is let."""

    errors = ""

    def __init__(self, output: bytes) -> None:
        self._output = io.BytesIO(output)
        self.full = False
        self.let = trio.Event()

    def send(self, data: bytes) -> None:
        if self.full:
            raise ChildError("it does not read")

    async def line(self) -> bytes | None:
        await self.let.wait()
        return self._output.readline().rstrip(b"\n") or None

    async def exactly(self, size: int) -> bytes:
        return self._output.read(size)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        line = await self.line()
        if line is None:
            raise StopAsyncIteration
        return line

    async def ended(self) -> int | None:
        await trio.sleep_forever()
        return None


QUESTION = {"id": "q", "method": "may/i", "params": {}}


@pytest.mark.parametrize(
    ("kind", "output"),
    [(CodexServer, msgspec.json.encode(QUESTION) + b"\n"), (CopilotRuntime, frame(QUESTION))],
)
async def test_one_that_asks_and_reads_nothing_is_ended(
    kind: Callable[..., KeptProcess[Any]], output: bytes, autojump_clock: trio.abc.Clock
) -> None:
    child = Deaf(output)
    process = kind(child, ErrorReader("p", ()), "/", 9.0)
    call = process.begin("hello", {})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.read)
        child.full = True
        child.let.set()
        with pytest.raises(ProviderUnavailable, match=r"p: the \w+ was ended") as told:
            await process.answer_to(call)
    assert told.value.again
    assert not process.usable
