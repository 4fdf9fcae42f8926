"""Starts the process that holds a model, talks to it in frames, and ends it for sure."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial

import trio

from .child import insist
from .hf_frames import Event, FrameBuffer, FrameError, Order, decode_events, encode

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "promptmesh.providers.local_hf_worker")
#: Seconds a worker gets to end after its input ended, and then after SIGTERM. The first is for a
#: large model whose memory takes a moment to give back.
CLOSE_GRACE = 1.0
TERMINATE_GRACE = 0.5
#: Seconds after SIGKILL in which the process must be gone; one stuck in the kernel is left to it.
KILL_GRACE = 1.0
#: Longest line of its output that is kept, in bytes, and how many lines.
MAX_LINE = 2000
KEPT_LINES = 20

#: A progress bar, as `tqdm` draws it for downloads and weights.
_PROGRESS = re.compile(r"\d%\||[\d?][kMG]?(B|it)/s")
#: What is drawn of it beside its words and numbers: the bar itself, and moves of the cursor.
_DRAWN = re.compile(r"(\|[^|]*\||\x1b\[\w+|\s)+")
_LEVEL = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) (.*)", re.DOTALL)

#: Variables with such a word in their name may hold a key that is not the model's business.
_SECRET = re.compile(
    r"(^|_)(\w*KEY|KEYS|TOKEN|TOKENS|AUTH|PAT)(_|$)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL"
)
#: The hub's own, which downloads need, and where it is kept.
_NEEDED = frozenset({"HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"})


def worker_environment(environment: Mapping[str, str], threads: int) -> dict[str, str]:
    """The node's environment without what looks like a key, and with the number of threads."""
    kept = {
        name: value
        for name, value in environment.items()
        if name in _NEEDED or not _SECRET.search(name.upper())
    }
    # Read by OpenMP when torch is imported; setting it later leaves some of its threads.
    kept["OMP_NUM_THREADS"] = str(threads)
    # The node and its clients work on the same processors. Beside one other busy program, threads
    # that spin while they wait for one another made a fifteenth of the tokens; waiting asleep costs
    # up to a quarter of them on an idle machine.
    kept.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The hub draws its progress bars for a pipe only if told by this.
    kept.setdefault("TQDM_POSITION", "-1")
    # A fork of the tokenizer's threads is not planned; without this it warns of one.
    kept.setdefault("TOKENIZERS_PARALLELISM", "false")
    return kept


class WorkerProcess:
    """A running worker. Made by `open_worker`."""

    def __init__(self, process: trio.Process, on_progress: Callable[[str], None]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._process = process
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, process.stderr
        self._on_progress = on_progress
        # Not bounded here: the provider bounds the requests, and a request is at most a frame.
        self._outgoing, self._to_send = trio.open_memory_channel[bytes](float("inf"))
        self._buffer = FrameBuffer()
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, order: Order) -> None:
        """Send an order, soon; to a process that ends it is lost. Raises `FrameError` for one that
        is too long."""
        data = encode(order)
        with contextlib.suppress(trio.ClosedResourceError):
            self._outgoing.send_nowait(data)

    async def receive(self) -> list[Event] | None:
        """What it tells next; None once its output has ended, or makes no sense."""
        try:
            data = await self._stdout.receive_some(1 << 16)
            bodies = list(self._buffer.feed(data))
            events = [event for body in bodies for event in decode_events(body)]
        except (trio.BrokenResourceError, FrameError) as error:
            logger.error("the model's process cannot be understood: %s", error)
            return None
        return events if data else None

    async def obituary(self) -> str:
        """Why it ended, for a person. Its output has ended, so it is ending."""
        with trio.move_on_after(CLOSE_GRACE):
            await self._process.wait()
        code = self._process.returncode
        if code is None:
            return "it closed its output"
        if code == -signal.SIGKILL:
            # Also what the kernel does when memory runs out; it tells nobody else.
            return "it was killed (SIGKILL), perhaps for want of memory"
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            return f"it died of {name}"
        return f"it ended with code {code}"

    @property
    def last_lines(self) -> tuple[str, ...]:
        """The last lines it printed."""
        return tuple(self._lines)

    async def run_pipes(self) -> None:
        """Send what was ordered and read what is printed, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send)
            nursery.start_soon(self._read_lines)

    async def _send(self) -> None:
        async for data in self._to_send:
            try:
                await self._stdin.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return  # it has died, which whoever reads its events sees

    async def _read_lines(self) -> None:
        pending = b""
        while data := await self._stderr.receive_some(1 << 14):
            # A progress bar draws itself again and again on one line.
            *lines, pending = (pending + data).replace(b"\r", b"\n").split(b"\n")
            pending = pending[:MAX_LINE]
            for line in lines:
                self._printed(line[:MAX_LINE].decode(errors="replace").strip())

    def _printed(self, line: str) -> None:
        if not line:
            return
        if _PROGRESS.search(line):
            self._on_progress(_DRAWN.sub(" ", line).strip())
            return
        self._lines.append(line)
        if match := _LEVEL.fullmatch(line):
            logger.log(logging.getLevelNamesMapping()[match[1]], "%s", match[2])
        else:
            logger.debug("%s", line)

    async def end(self) -> None:
        """End it: close its input, then SIGTERM, then SIGKILL."""
        self._outgoing.close()
        await trio.aclose_forcefully(self._stdin)
        steps = (
            (CLOSE_GRACE, self._process.terminate),
            (TERMINATE_GRACE, self._process.kill),
            (KILL_GRACE, partial(logger.error, "process %d does not end", self.pid)),
        )
        await insist(self._process.wait, steps)
        await trio.aclose_forcefully(self._stdout)
        await trio.aclose_forcefully(self._stderr)


@contextlib.asynccontextmanager
async def open_worker(
    command: Sequence[str], environment: Mapping[str, str], on_progress: Callable[[str], None]
) -> AsyncIterator[WorkerProcess]:
    """Start a worker; leaving the block ends it, within about 2 s. `on_progress` gets the progress
    bars it draws. Raises `OSError` where no process can be started."""
    with trio.CancelScope(shield=True):  # a process must not start and be forgotten
        process = await trio.lowlevel.open_process(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environment),
        )
        worker = WorkerProcess(process, on_progress)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.run_pipes)
            yield worker
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await worker.end()
