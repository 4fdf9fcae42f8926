"""One process for one answer: what it says, how it ends, and what is left."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import trio

from promptmesh.providers.base import (
    Chunk,
    ContextTooLong,
    GenerateError,
    Origin,
    ProviderUnavailable,
    StreamInterrupted,
    ToolCallDelta,
)
from promptmesh.providers.cli_answer import CliAnswer, Launch
from promptmesh.providers.openai_errors import ErrorReader
from promptmesh.providers.private_folder import Folder
from promptmesh.providers.stream_decoder import StreamDecoder

ORIGIN = Origin(provider="tool", model="m")


class Words(StreamDecoder):
    """Each line is a piece of text; `!` a failure; the report says how it ended."""

    def __init__(self) -> None:
        super().__init__(ErrorReader("tool", []))
        self.told: tuple[int | None, str, str] | None = None

    def event(self, name: str, data: bytes) -> None:
        if data == b"!":
            self.failure = self.broken("it said so")
        elif data == b"call":
            self._add_call(ToolCallDelta(index=0, id="c", name="f"))
        else:
            self._add_text(data.decode())

    def ended(self, code: int | None, errors: str, report: str) -> None:
        self.told = (code, errors, report)
        self._finish = "length" if report == "length" else "stop"
        self._close()


class Run:
    """A shell program as an answer."""

    def __init__(self, script: str, stop: Iterable[str] = (), **launch: Any) -> None:
        self.decoder = Words()
        self.folder: Path | None = None
        self.after = 0
        self._script, self._launch = script, launch
        self.answer = CliAnswer(ORIGIN, self._prepare, self.decoder, tuple(stop))

    def _prepare(self, folder: Folder) -> Launch:
        self.folder = folder.path
        environment = {"PATH": "/usr/bin:/bin", "REPORT": str(folder.path / "report")}
        values: dict[str, Any] = {"text": b"in", "report": folder.path / "report"}
        values |= {"after": self._after, **self._launch}
        return Launch(("sh", "-c", self._script), environment, **values)

    def _after(self) -> None:
        assert self.folder is not None
        assert self.folder.exists()
        self.after += 1

    async def chunks(self) -> list[Chunk]:
        with trio.fail_after(120):
            async with self.answer as answering:
                assert answering.origin == ORIGIN
                found = [chunk async for chunk in answering.chunks]
        self.check_gone()
        return found

    def check_gone(self) -> None:
        """Its folder was removed, and it was told of that before."""
        assert self.folder is not None
        assert not self.folder.exists()
        assert self.after == 1


async def test_an_answer_with_its_report() -> None:
    run = Run("cat; echo; echo two; printf length >$REPORT; echo oh >&2; exit 3")
    *texts, last = await run.chunks()
    assert "".join(chunk.text for chunk in texts) == "intwo"
    assert last.finish_reason == "length"
    assert last.usage is not None
    assert not last.usage.exact
    assert run.decoder.told == (3, "oh\n", "length")


async def test_without_a_report() -> None:
    run = Run("echo one", report=None)
    assert (await run.chunks())[-1].finish_reason == "stop"
    assert (await Run("echo one").chunks())[-1].finish_reason == "stop"


async def test_stop_strings_over_lines() -> None:
    run = Run("echo one tw; echo oo three; echo four; sleep 60", stop=("twoo", "never"))
    *texts, last = await run.chunks()
    assert "".join(chunk.text for chunk in texts) == "one "
    assert last.finish_reason == "stop"


async def test_what_looked_like_a_stop_string_is_said_at_the_end() -> None:
    *texts, last = await Run("echo one tw", stop=("twoo",)).chunks()
    assert "".join(chunk.text for chunk in texts) == "one tw"
    assert last.finish_reason == "stop"


async def test_what_is_no_text_passes() -> None:
    found = await Run("echo call; echo one", stop=("x",)).chunks()
    assert [bool(chunk.tool_calls) for chunk in found] == [True, False, False]


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        ("echo '!'; sleep 60", ProviderUnavailable),
        ("echo one; echo '!'; sleep 60", StreamInterrupted),
        ("head -c 3000 /dev/zero | tr '\\0' x; sleep 60", ProviderUnavailable),
    ],
)
async def test_a_failure_ends_it_at_once(script: str, kind: type[GenerateError]) -> None:
    run = Run(script, max_line=1000)
    with pytest.raises(GenerateError) as caught:
        await run.chunks()
    assert type(caught.value) is kind
    assert run.after == 1


async def test_who_leaves_ends_it() -> None:
    run = Run("echo one; sleep 60")
    with trio.fail_after(120):
        async with run.answer as answering:
            assert (await anext(answering.chunks)).text == "one"
    run.check_gone()


async def test_who_is_cancelled_ends_it() -> None:
    run = Run("echo one; sleep 60")
    with trio.fail_after(120):
        async with trio.open_nursery() as nursery, run.answer as answering:
            await anext(answering.chunks)
            nursery.cancel_scope.cancel()
            await anext(answering.chunks)
    run.check_gone()


async def test_what_cannot_be_started() -> None:
    def refuse(folder: Folder) -> Launch:
        raise ContextTooLong("too long")

    def missing(folder: Folder) -> Launch:
        return Launch(("/nowhere/tool",), {}, b"")

    def unwritable(folder: Folder) -> Launch:
        raise OSError(28, "No space left on device")

    for prepare, kind, said in (
        (refuse, ContextTooLong, "too long"),
        (missing, ProviderUnavailable, "tool cannot be started: No such file"),
        (unwritable, ProviderUnavailable, "tool cannot be started: No space left"),
    ):
        with pytest.raises(kind, match=said):
            await CliAnswer(ORIGIN, prepare, Words()).__aenter__()


async def test_an_error_of_its_reader_is_the_readers() -> None:
    """Also an `OSError`, which is not taken for one of its start."""
    with pytest.raises(OSError, match="of the reader"):
        async with Run("sleep 60").answer:
            raise OSError("of the reader")
