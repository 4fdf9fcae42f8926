"""The process that holds a model: how it is started, heard, and ended."""

from __future__ import annotations

import logging
import math
import os
import sys
import textwrap

import pytest
import trio

from promptmesh.providers import hf_process
from promptmesh.providers.hf_frames import Cancel, Event, Loading, encode
from promptmesh.providers.hf_process import (
    CLOSE_GRACE,
    KEPT_LINES,
    MAX_LINE,
    TERMINATE_GRACE,
    WorkerProcess,
    open_worker,
    worker_environment,
)


def program(source: str) -> list[str]:
    """A worker that is only a few lines of Python."""
    return [sys.executable, "-S", "-c", textwrap.dedent(source)]


def ignore(bar: str) -> None:
    pass


ECHO = program("""
    import sys
    while data := sys.stdin.buffer.raw.read(100):
        sys.stdout.buffer.raw.write(data)
""")
DEAF = program("""
    import signal, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdout.buffer.raw.write(b"up")
    while True:
        time.sleep(100)
""")


async def heard(worker: WorkerProcess) -> list[Event]:
    """All it tells until its output ends."""
    events: list[Event] = []
    with trio.fail_after(60):
        while (more := await worker.receive()) is not None:
            events += more
    return events


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_worker_ends_when_its_input_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_process, "CLOSE_GRACE", math.inf)  # else it is told to end
    async with open_worker(ECHO, {}, ignore) as worker:
        assert is_there(worker.pid)
    assert not is_there(worker.pid)
    worker.send(Cancel(call=1))  # to nobody: it is lost


async def test_a_worker_that_listens_to_nothing_is_killed_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hf_process, "KILL_GRACE", math.inf)
    with trio.fail_after(60):
        async with open_worker(DEAF, {}, ignore) as worker:
            await worker._stdout.receive_some(2)
            started = trio.current_time()
    elapsed = trio.current_time() - started
    assert elapsed >= CLOSE_GRACE + TERMINATE_GRACE - 0.1
    assert not is_there(worker.pid)


async def test_cancelling_ends_the_worker_too() -> None:
    pid = 0
    with trio.CancelScope() as scope:
        async with open_worker(ECHO, {}, ignore) as worker:
            pid = worker.pid
            scope.cancel()
            await trio.sleep_forever()
    assert pid
    assert not is_there(pid)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import os; os.kill(os.getpid(), 9)", "want of memory"),
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("import sys; sys.exit(3)", "code 3"),
    ],
)
async def test_why_it_ended_is_told(source: str, words: str) -> None:
    async with open_worker(program(source), {}, ignore) as worker:
        assert await heard(worker) == []
        assert words in await worker.obituary()


async def test_nonsense_from_a_worker_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    nonsense = program("import sys; sys.stdout.buffer.raw.write(b'x' * 100); sys.stdin.read()")
    async with open_worker(nonsense, {}, ignore) as worker:
        assert await heard(worker) == []
        assert "closed its output" in await worker.obituary()
    assert "cannot be understood" in caplog.text


async def test_frames_arrive_whole_however_they_are_cut() -> None:
    events: list[Event] = [Loading(stage="é" * 40)]
    data = encode(events) * 3
    slow = program(f"""
        import os, time
        for byte in {data!r}:
            os.write(1, bytes((byte,)))
    """)
    async with open_worker(slow, {}, ignore) as worker:
        assert await heard(worker) == events * 3


async def test_what_it_prints_is_logged_and_its_last_lines_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, logger="promptmesh.providers.hf_process")
    talks = program(f"""
        import sys
        print("WARNING mind the gap", file=sys.stderr)
        sys.stderr.write("load:  50%|###  | 1/2\\rload: 100%|#####| 2/2\\x1b[A\\n")
        sys.stderr.write("model: 12.0MB [00:03, 4.0MB/s]\\r")
        for number in range(30):
            print("line", number, file=sys.stderr)
        print("y" * {MAX_LINE * 3}, file=sys.stderr)
    """)
    bars: list[str] = []
    async with open_worker(talks, {}, bars.append) as worker:
        await heard(worker)
        with trio.fail_after(60):
            while len(worker.last_lines[-1:]) == 0 or not worker.last_lines[-1].startswith("y"):
                await trio.lowlevel.checkpoint()
        assert len(worker.last_lines) == KEPT_LINES
        assert len(worker.last_lines[-1]) <= MAX_LINE
    assert bars == [
        "load: 50% 1/2",
        "load: 100% 2/2",
        "model: 12.0MB [00:03, 4.0MB/s]",
    ]
    levels = {record.getMessage(): record.levelname for record in caplog.records}
    assert levels["mind the gap"] == "WARNING"
    assert levels["line 29"] == "DEBUG"


def test_no_other_service_s_key_reaches_the_worker() -> None:
    names = (
        "OPENAI_API_KEY AWS_SECRET_ACCESS_KEY GITHUB_TOKEN PGPASSWORD GITLAB_PAT "
        "GOOGLE_APPLICATION_CREDENTIALS PROMPTMESH_OPENAI_APIKEY anthropic_auth_token"
    )
    secret = dict.fromkeys(names.split(), "s")
    needed = {
        "HF_TOKEN": "t",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "PATH": "/bin",
        "KEYBOARD": "de",
        "HOME": "/root",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    made = worker_environment({**secret, **needed, "OMP_NUM_THREADS": "7"}, 2)
    added = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "TQDM_POSITION": "-1"}
    assert made == {**needed, **added}
    assert worker_environment({}, 1)["TOKENIZERS_PARALLELISM"] == "false"
    active = worker_environment({"OMP_WAIT_POLICY": "ACTIVE"}, 1)
    assert active["OMP_WAIT_POLICY"] == "ACTIVE"
