"""The provider in the node, with a worker that only plays a model."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from fakes_hf import chat, read

from promptmesh.providers import hf_process, local_hf
from promptmesh.providers.base import (
    ContextTooLong,
    Health,
    ModelNotFound,
    ModelOffer,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
    Usage,
)
from promptmesh.providers.local_hf import LocalHF, LocalHFSettings

#: Plays a model: the user's message says what to do. It speaks frames as the real worker does.
ACTOR = """
    import os, sys, time
    from promptmesh.providers.base import ModelOffer
    from promptmesh.providers.hf_frames import *

    def tell(*events):
        os.write(1, encode(list(events)))

    def orders():
        buffer = FrameBuffer()
        while data := os.read(0, 65536):
            for body in buffer.feed(data):
                yield decode_order(body)

    def answer(call, text):
        done = Finished(call=call, reason="stop", prompt_tokens=2, completion_tokens=3)
        if text == "too long":
            tell(Failed(call=call, code="context_too_long", message="no", field="messages"))
            return
        if text == "never begin":
            return
        tell(Begun(call=call))
        if text == "die at once":
            os._exit(3)
        tell(Piece(call=call, text="Hel"), Piece(call=call, text="lo"))
        if text == "die":
            os.kill(os.getpid(), 9)
        if text == "fail":
            tell(Failed(call=call, code="provider_unavailable", message="no luck"))
        elif text != "hang":
            tell(done, Counters(requests=1, finished=1, tokens=3))

    incoming = orders()
    load = next(incoming)
    %s
    tell(Loading(stage="warming up"))
    tell(Loaded(offer=ModelOffer(id="m", repeatable=True, engine="e/1"), about="an actor"))
    for order in incoming:
        if isinstance(order, Cancel):
            tell(Counters(requests=1, cancelled=1))
        else:
            answer(order.call, order.request.messages[0].text)
"""


def actor(before_loading: str = "") -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(ACTOR % before_loading)]


def settings(**fields: Any) -> LocalHFSettings:
    return LocalHFSettings(**{"model": "m", "environment": dict(os.environ), **fields})


@asynccontextmanager
async def running(command: list[str] | None = None, **fields: Any) -> AsyncIterator[LocalHF]:
    provider = LocalHF(settings(**fields), command=command or actor())
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(provider.run)
            await trio.testing.wait_all_tasks_blocked()
            yield provider
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process brings about."""
    while not condition():  # noqa: ASYNC110 - no event tells of it
        await trio.sleep(0.01)


async def state(provider: LocalHF) -> str:
    return (await provider.check()).state


async def reason(provider: LocalHF) -> str:
    return (await provider.check()).reason


async def until_state(provider: LocalHF, wanted: str) -> Health:
    while (health := await provider.check()).state != wanted:  # noqa: ASYNC110 - as above
        await trio.sleep(0.01)
    return health


async def test_a_request_that_comes_while_it_loads_is_answered() -> None:
    async with running() as provider:
        assert provider.models() == ()
        assert await state(provider) == "starting"
        pieces, builder = await read(provider, chat("m", "hello"))
        assert "".join(pieces) == "Hello"
        completion = builder.completion()
        assert completion.finish_reason == "stop"
        assert completion.usage == Usage(prompt_tokens=2, completion_tokens=3)
        assert provider.models() == (ModelOffer(id="m", repeatable=True, engine="e/1"),)
        assert await provider.check() == Health()
        assert provider.progress == ""


async def test_who_answers_is_known_before_the_first_chunk() -> None:
    async with running() as provider, provider.open(chat("m", "hello")) as answering:
        origin = answering.origin
        assert (origin.provider, origin.model, origin.engine) == ("local_hf", "m", "e/1")
        assert [chunk.text async for chunk in answering.chunks] == ["Hello", ""]
        # Read once: after its end there is nothing.
        with pytest.raises(StopAsyncIteration):
            await anext(answering.chunks)


def draws(bar: str, after: Path) -> str:
    """For an actor: a progress bar, once that file is there."""
    waits = f"while not os.path.exists({str(after)!r}): time.sleep(0.01)"
    return f"exec({waits!r}); print({bar!r}, file=sys.stderr, flush=True)"


async def test_loading_can_be_watched(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.INFO)
    seen = tmp_path / "seen"
    bars = [draws("weights:  50%|##  | 1/2", tmp_path), draws("weights: 100%|####| 2/2", seen)]
    async with running(actor("; ".join(bars))) as provider:
        while not re.match(r"loading m \(weights: 50% 1/2\), \d+ s", await reason(provider)):  # noqa: ASYNC110 - as above
            await trio.sleep(0.01)
        seen.touch()
        await until_state(provider, "ready")
    assert "loading m: warming up" in caplog.text
    assert "ready after" in caplog.text
    assert "an actor" in caplog.text


async def test_a_model_it_does_not_have_is_not_found() -> None:
    async with running() as provider:
        with pytest.raises(ModelNotFound):
            await read(provider, chat("other", "hello"))


async def test_a_refusal_keeps_its_kind_and_field() -> None:
    async with running() as provider:
        with pytest.raises(ContextTooLong) as caught:
            await read(provider, chat("m", "too long"))
        assert caught.value.field == "messages"


async def test_what_has_no_frame_is_rejected() -> None:
    async with running() as provider:
        with pytest.raises(RequestRejected, match="passed on"):
            await read(provider, chat("m", "hello", seed=2**70))
        assert (await read(provider, chat("m", "hello")))[1].finished


async def test_a_failure_after_some_text_carries_it() -> None:
    async with running() as provider:
        with pytest.raises(StreamInterrupted, match="no luck") as caught:
            await read(provider, chat("m", "fail"))
        assert caught.value.partial == "Hello"


async def test_a_dying_worker_is_an_error_to_those_who_wait_and_the_next_request_works() -> None:
    async with running() as provider:
        errors: list[Exception] = []
        texts: list[str] = []

        async def ask(text: str) -> None:
            try:
                async with provider.open(chat("m", text)) as answering:
                    async for chunk in answering.chunks:
                        texts.append(chunk.text)
            except (StreamInterrupted, ProviderUnavailable) as error:
                errors.append(error)

        await read(provider, chat("m", "hello"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "hang")
            nursery.start_soon(ask, "never begin")
            await until(lambda: len(texts) == 1)
            nursery.start_soon(ask, "die")
        assert sorted(type(error).__name__ for error in errors) == [
            "ProviderUnavailable",
            "StreamInterrupted",
            "StreamInterrupted",
        ]
        for error in errors:
            assert "want of memory" in str(error)
            assert isinstance(error, ProviderUnavailable | StreamInterrupted)
            assert error.retry_after == 1.0
        # It is still offered: the next request waits until it is there again.
        assert len(provider.models()) == 1
        assert await state(provider) == "starting"
        assert (await read(provider, chat("m", "hello")))[1].text == "Hello"
        stats = provider.stats()
        assert (stats["restarts"], stats["failed"], stats["finished"]) == (1, 3, 2)


async def test_a_death_before_any_text_is_unavailable() -> None:
    async with running() as provider:
        with pytest.raises(ProviderUnavailable, match="code 3"):
            await read(provider, chat("m", "die at once"))


async def test_a_worker_that_dies_again_and_again_is_started_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_hf, "FIRST_DELAY", 0.02)
    async with running(actor("os._exit(5)")) as provider:
        began = trio.current_time()
        await until(lambda: provider.stats()["restarts"] >= 4)
        assert trio.current_time() - began >= 0.02 * (1 + 2 + 4 + 8)
        assert "loading m" in (await provider.check()).reason


async def test_leaving_an_answer_cancels_it() -> None:
    async with running() as provider:
        async with provider.open(chat("m", "hang")) as answering:
            assert (await anext(answering.chunks)).text == "Hello"
        await until(lambda: provider.stats()["cancelled"] == 1)
        # Also before it has begun.
        with trio.move_on_after(0.05):
            await read(provider, chat("m", "never begin"))
        assert (await read(provider, chat("m", "hello")))[1].text == "Hello"


async def test_too_many_requests_are_refused_at_once() -> None:
    async with running(max_batch=1, max_waiting=1) as provider, trio.open_nursery() as nursery:
        reached = 0

        async def hang() -> None:
            nonlocal reached
            async with provider.open(chat("m", "hang")):
                reached += 1
                await trio.sleep_forever()

        nursery.start_soon(hang)
        nursery.start_soon(hang)
        await until(lambda: reached == 2)
        with pytest.raises(ProviderUnavailable, match="too many") as caught:
            await read(provider, chat("m", "hello"))
        assert caught.value.retry_after == 1.0
        nursery.cancel_scope.cancel()


FAILS = "tell(LoadFailed(reason='no such thing', hint='get one')); sys.exit(1)"


async def test_a_model_that_cannot_be_loaded_says_why_and_is_not_offered() -> None:
    async with running(actor(FAILS)) as provider:
        health = await until_state(provider, "unavailable")
        assert (health.reason, health.hint) == ("no such thing", "get one")
        assert provider.models() == ()
        with pytest.raises(ProviderUnavailable, match="no such thing") as caught:
            await read(provider, chat("m", "hello"))
        assert caught.value.retry_after is not None
        assert caught.value.retry_after > 30


async def test_a_model_that_could_not_be_loaded_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(local_hf, "FAILED_DELAY", 0.05)
    mark = tmp_path / "tried"
    once = f"if not os.path.exists({str(mark)!r}): open({str(mark)!r}, 'w'); {FAILS}"
    async with running(actor(once)) as provider:
        assert (await read_when_there(provider)) == "Hello"


async def read_when_there(provider: LocalHF) -> str:
    while True:
        try:
            return (await read(provider, chat("m", "hello")))[1].text
        except ProviderUnavailable:
            await trio.sleep(0.02)


async def test_loading_without_a_sign_of_life_is_given_up() -> None:
    async with running(actor("time.sleep(100)"), load_timeout=0.3) as provider:
        health = await until_state(provider, "unavailable")
        assert "no progress" in health.reason


async def test_a_sign_of_life_extends_the_loading(
    mock_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    *marks, done = (tmp_path / str(number) for number in range(5))
    bars = [draws(f"{mark.name}%|", after=mark) for mark in (*marks, done)]
    async with running(actor("; ".join(bars)), load_timeout=10) as provider:
        for mark in marks:
            mock_clock.jump(9)
            mark.touch()
            while f"({mark.name}%|)" not in await reason(provider):
                # No time passes meanwhile, but for the other process.
                await trio.testing.wait_all_tasks_blocked(0.01)
        done.touch()
        assert (await read(provider, chat("m", "hello")))[1].text == "Hello"


async def test_a_request_waits_only_so_long_for_the_loading() -> None:
    async with running(actor("time.sleep(100)"), start_wait=0.1) as provider:
        with pytest.raises(ProviderUnavailable, match="loading m"):
            await read(provider, chat("m", "hello"))


async def test_a_program_that_cannot_be_started_is_told() -> None:
    async with running(["/no/such/program"]) as provider:
        health = await until_state(provider, "unavailable")
        assert "no process can be started" in health.reason


async def test_nothing_is_answered_before_and_after_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    idle = LocalHF(settings(start_wait=0.1), command=actor())
    with pytest.raises(ProviderUnavailable, match="not started"):
        await read(idle, chat("m", "hello"))
    monkeypatch.setattr(hf_process, "KILL_GRACE", math.inf)
    provider = LocalHF(settings(), command=actor())
    caught: list[Exception] = []

    async def hang() -> None:
        try:
            await read(provider, chat("m", "hang"))
        except StreamInterrupted as error:
            caught.append(error)

    with trio.fail_after(60):
        async with trio.open_nursery() as outer, trio.open_nursery() as nursery:
            nursery.start_soon(provider.run)
            await trio.testing.wait_all_tasks_blocked()
            outer.start_soon(hang)
            await until(lambda: provider.stats()["restarts"] == 0 and bool(provider._calls))
            await read(provider, chat("m", "hello"))
            pid = provider.pid
            nursery.cancel_scope.cancel()
    assert "stops" in str(caught[0])
    assert await state(provider) == "unavailable"
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(ProviderUnavailable, match="stopped"):
        await read(provider, chat("m", "hello"))


def test_threads_are_chosen() -> None:
    assert LocalHFSettings(model="m", threads=3).effective_threads == 3
    one = LocalHFSettings(model="m", environment={"OMP_NUM_THREADS": "1"})
    assert one.effective_threads == 1
    odd = LocalHFSettings(model="m", environment={"OMP_NUM_THREADS": "x"})
    assert odd.effective_threads == len(os.sched_getaffinity(0))


def test_a_model_is_called_by_its_folder_or_its_id(tmp_path: Any) -> None:
    (tmp_path / "Smol").mkdir()
    assert LocalHFSettings(model=f"{tmp_path}/Smol/").model_id == "Smol"
    assert LocalHFSettings(model="owner/name").model_id == "owner/name"


def test_settings_do_not_show_the_environment() -> None:
    assert "t0ken" not in repr(LocalHFSettings(model="m", environment={"HF_TOKEN": "t0ken"}))


def test_the_node_needs_neither_torch_nor_transformers() -> None:
    seen = "import sys, promptmesh.providers.local_hf as x; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", seen], capture_output=True, text=True, timeout=120
    )
    loaded = set(modules.stdout.split())
    assert "promptmesh.providers.hf_process" in loaded
    assert not loaded & {"torch", "transformers", "tokenizers", "huggingface_hub"}
