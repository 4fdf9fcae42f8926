"""Child programs: how they are started, heard, and ended with all that they started."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import trio

from promptmesh.providers import child as child_module
from promptmesh.providers.child import (
    KEPT_ERRORS,
    Child,
    ChildError,
    open_child,
    run_briefly,
)
from promptmesh.providers.private_folder import KILL_GRACE, TERMINATE_GRACE, private_folder

BARE: Mapping[str, str] = {"PATH": os.environ["PATH"]}
#: Seconds after which something does not come.
PATIENCE = 60.0


def program(source: str) -> list[str]:
    """A child that is only a few lines of Python."""
    return [sys.executable, "-I", "-S", "-c", textwrap.dedent(source)]


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No descriptor and no folder outlives a test; folders are made in one of its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc") else []
    yield
    after = os.listdir("/proc/self/fd") if os.path.isdir("/proc") else []
    assert len(after) <= len(before)
    assert list(tmp_path.glob("promptmesh-*")) == []


def is_there(pid: int) -> bool:
    """Does it run, or wait to be asked for (a zombie)? One that this process started."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def runs(pid: int) -> bool:
    """Does it run? Of a grandchild, whose end its new parent asks for at some time."""
    try:
        return child_module._runs_in(str(pid), os.getpgid(pid))
    except ProcessLookupError:
        return False


async def is_over(pid: int) -> None:
    with trio.fail_after(PATIENCE):
        while runs(pid):  # noqa: ASYNC110 (it is no child of this process)
            await trio.sleep(0.01)


async def told(child: Child) -> bytes:
    with trio.fail_after(PATIENCE):
        line = await child.line()
    assert line is not None
    return line


async def test_it_gets_its_text_and_gives_lines() -> None:
    upper = program("import sys\nfor line in sys.stdin: print(line.strip().upper())")
    async with (
        private_folder() as folder,
        open_child(upper, BARE, folder, text="a\nä\nz".encode()) as child,
    ):
        assert [line async for line in child] == [b"A", "Ä".encode(), b"Z"]
        assert await child.ended() == 0
        assert await child.line() is None
    assert not is_there(child.pid)


async def test_one_that_stays_is_sent_line_after_line() -> None:
    echo = program("import sys\nfor line in sys.stdin: print(line, end='', flush=True)")
    async with private_folder() as folder, open_child(echo, BARE, folder) as child:
        for number in range(20):
            child.send(b"%d\n" % number)
            assert await told(child) == b"%d" % number
        child.close_input()
        with trio.fail_after(PATIENCE):
            assert await child.line() is None
            assert await child.ended() == 0
        child.send(b"to nobody\n")


async def test_it_gets_that_environment_and_an_empty_place() -> None:
    looks = program("""
        import os
        print(sorted(os.environ.items()), os.listdir("."), os.getcwd(), sep="\\n")
        print(os.getsid(0) == os.getpid(), oct(os.stat("..").st_mode & 0o777))
    """)
    given = {"PATH": "/bin:/usr/bin", "KEY": "secret", "LC_CTYPE": "C.UTF-8"}
    async with private_folder() as folder, open_child(looks, given, folder) as child:
        had = {**given, "TMPDIR": str(folder.temporary)}
        assert (await told(child)).decode() == str(sorted(had.items()))
        assert await told(child) == b"[]"
        assert Path((await told(child)).decode()) == folder.work.resolve()
        assert await told(child) == b"True 0o700"
        assert folder.write("a/system.txt", "a\r\n").read_bytes() == b"a\r\n"


@pytest.mark.parametrize("text", [b"", b"\0\xff\n" * 700_000])
async def test_any_bytes_arrive(text: bytes) -> None:
    digest = program("""
        import hashlib, sys
        print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())
    """)
    import hashlib

    async with private_folder() as folder, open_child(digest, BARE, folder, text=text) as child:
        assert await told(child) == hashlib.sha256(text).hexdigest().encode()


DEAF = """
    import os, signal, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("up", flush=True)
    time.sleep(1000)
"""
#: A child and a grandchild, both deaf; it tells who the grandchild is.
FAMILY = """
    import os, signal, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    number = os.fork()
    if number:
        print(number, flush=True)
    time.sleep(1000)
"""


async def test_one_that_ignores_everything_is_gone_within_3_s() -> None:
    with trio.fail_after(PATIENCE):
        async with private_folder() as folder, open_child(program(DEAF), BARE, folder) as child:
            assert await told(child) == b"up"
            started = trio.current_time()
    assert trio.current_time() - started > TERMINATE_GRACE - 0.1
    assert not is_there(child.pid)
    assert TERMINATE_GRACE + KILL_GRACE < 3


async def test_its_whole_family_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "TERMINATE_GRACE", 0.05)
    async with private_folder() as folder, open_child(program(FAMILY), BARE, folder) as child:
        grandchild = int(await told(child))
        assert is_there(grandchild)
    assert not is_there(child.pid)
    await is_over(grandchild)


async def test_what_a_child_leaves_behind_is_ended_with_it() -> None:
    leaves = program("""
        import os, sys, time
        number = os.fork()
        if number:
            print(number, flush=True)
            sys.exit(7)
        time.sleep(1000)
    """)
    async with private_folder() as folder, open_child(leaves, BARE, folder) as child:
        grandchild = int(await told(child))
        with trio.fail_after(PATIENCE):
            assert await child.line() is None  # the grandchild held the pipe
            assert await child.ended() == 7
    await is_over(grandchild)


async def test_a_pipe_that_is_held_elsewhere_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(child_module, "LAST_WORDS", 0.1)
    escapes = program("""
        import os, time
        here, there = os.pipe()
        if os.fork() == 0:
            os.setsid()
            print(os.getpid(), flush=True)
            os.close(there)
            time.sleep(1000)
        os.close(there)
        os.read(here, 1)
        print("bye", flush=True)
        os.read(0, 1)
    """)
    async with private_folder() as folder, open_child(escapes, BARE, folder) as child:
        other = int(await told(child))
        try:
            with trio.fail_after(PATIENCE):
                assert await child.line() == b"bye"
                child.send(b"x")
                assert await child.line() is None
        finally:
            os.kill(other, signal.SIGKILL)
    await is_over(other)


async def test_a_slow_reader_loses_nothing_of_one_that_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(child_module, "LAST_WORDS", 0.0)
    talks = program("for number in range(1000): print(number)")
    async with private_folder() as folder, open_child(talks, BARE, folder, text=b"") as child:
        with trio.fail_after(PATIENCE):
            await child._process.wait()
        monkeypatch.setattr(child_module, "LAST_WORDS", PATIENCE)
        assert [int(line) async for line in child] == list(range(1000))


async def test_one_that_closes_its_output_early_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(child_module, "LAST_WORDS", 0.1)
    closes = program("import os, time\nos.close(1)\ntime.sleep(1000)")
    with trio.fail_after(PATIENCE):
        async with private_folder() as folder, open_child(closes, BARE, folder) as child:
            assert await child.line() is None
            assert await child.ended() is None
    assert not is_there(child.pid)


async def test_floods_are_bounded() -> None:
    floods = program("""
        import os, threading
        def pour(where):
            while True:
                os.write(where, b"x" * 65536)
        threading.Thread(target=pour, args=(2,), daemon=True).start()
        pour(1)
    """)
    with trio.fail_after(PATIENCE):
        async with (
            private_folder() as folder,
            open_child(floods, BARE, folder, max_line=200_000) as child,
        ):
            with pytest.raises(ChildError, match="200000 bytes"):
                await child.line()
            assert len(child._buffer) < 400_000
            while len(child.errors) < KEPT_ERRORS:  # noqa: ASYNC110 (it is no event)
                await trio.sleep(0.01)
            assert child.errors == "x" * KEPT_ERRORS
    assert not is_there(child.pid)


async def test_a_long_line_that_arrives_with_its_end_is_too_long_all_the_same() -> None:
    async with (
        private_folder() as folder,
        open_child(program("print('y' * 10, 'x' * 11, sep='\\n')"), BARE, folder, max_line=10) as c,
    ):
        assert await told(c) == b"y" * 10
        with pytest.raises(ChildError):
            await told(c)


async def test_one_that_never_reads_is_told_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "MAX_QUEUED", 1 << 20)
    with trio.fail_after(PATIENCE):
        async with (
            private_folder() as folder,
            open_child(program("import time; time.sleep(1000)"), BARE, folder) as child,
        ):
            child.send(bytes(1 << 20))
            with pytest.raises(ChildError, match="does not read"):
                child.send(b"more")
    assert not is_there(child.pid)


async def test_the_end_of_its_complaints_is_kept() -> None:
    complains = program("""
        import sys
        print("first", "x" * 70000, "last ä", file=sys.stderr, flush=True)
        sys.stderr.buffer.write(b"\\xff")
    """)
    async with private_folder() as folder, open_child(complains, BARE, folder) as child:
        with trio.fail_after(PATIENCE):
            assert await child.line() is None
            assert await child.ended() == 0
    assert "first" not in child.errors
    assert child.errors.endswith("last ä\n\ufffd")


@pytest.mark.parametrize("phase", ["starting", "sending", "reading", "ending"])
async def test_cancelling_at_any_time_leaves_nothing(
    phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "TERMINATE_GRACE", 0.05)
    pids = []
    with trio.CancelScope() as scope:
        if phase == "starting":
            scope.cancel()
        text = bytes(1 << 20) if phase == "sending" else None
        async with (
            private_folder() as folder,
            open_child(program(FAMILY), BARE, folder, text=text) as child,
        ):
            pids.append(child.pid)
            pids.append(int(await told(child)))
            if phase == "reading":
                scope.cancel()
            if phase != "ending":
                scope.deadline = min(scope.deadline, trio.current_time() + 0.05)
                await child.line()
            scope.deadline = trio.current_time() + 0.02
    assert scope.cancel_called
    for pid in pids:
        await is_over(pid)


async def test_what_goes_wrong_inside_is_told_as_it_is() -> None:
    with pytest.raises(ValueError, match=r"^mine$"):
        async with private_folder() as folder, open_child(program(DEAF), BARE, folder):
            raise ValueError("mine")


async def test_one_that_cannot_be_started_is_an_os_error() -> None:
    async with private_folder() as folder:
        with pytest.raises(FileNotFoundError):
            async with open_child(["/no/such/program"], BARE, folder):
                pass


async def test_many_at_once_leave_nothing() -> None:
    async def one() -> None:
        with trio.move_on_after(0.1):
            async with (
                private_folder() as folder,
                open_child(["/bin/sh", "-c", "sleep 1000 & sleep 1000"], BARE, folder) as child,
            ):
                pids.append(child.pid)
                await child.line()

    pids: list[int] = []
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(one)
    assert not any(map(is_there, pids))


async def test_a_short_command_is_run_to_its_end() -> None:
    command = program("import sys; print('1.2'); print('!', file=sys.stderr); sys.exit(3)")
    assert await run_briefly(command, BARE) == (3, "1.2\n", "!\n")
    endless = program("while True: print('x' * 1000)")
    with trio.fail_after(PATIENCE):
        code, output, _ = await run_briefly(endless, BARE)
    assert code is None
    assert KEPT_ERRORS < len(output) < 2 * KEPT_ERRORS


async def test_it_gives_bytes_that_are_counted_and_not_ended() -> None:
    wrote = program("import sys; sys.stdout.write('5\\nab\\ncd7\\nrest')")
    async with private_folder() as folder, open_child(wrote, BARE, folder, text=b"") as child:
        with trio.fail_after(PATIENCE):
            assert await child.line() == b"5"
            assert await child.exactly(5) == b"ab\ncd"
            assert await child.line() == b"7"
            with pytest.raises(ChildError, match="3 bytes too early"):
                await child.exactly(7)
