"""For the tests of the command line: a node that answers as told, and a way to run commands."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ports import free_port

from promptmesh.node.cli import main
from promptmesh.node.home import Home

#: Gives the events of a stream; what it raises cuts the stream.
Events = Callable[[], Iterator[bytes]]


@dataclass(frozen=True)
class Problem:
    """An error that the node answers with."""

    status: int
    message: str
    request_id: str = ""


@dataclass(frozen=True)
class Asked:
    """A request that came in."""

    method: str
    path: str
    body: Any


class FakeNode:
    """A real HTTP server in a thread; `answers` maps `GET /path` to JSON, an error or events."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self.answers = dict(answers)
        self.asked: list[Asked] = []
        #: Set when a client leaves in the middle of a stream.
        self.left = threading.Event()
        node = self

        class Handler(_Handler):
            fake = node

        self._server = ThreadingHTTPServer(("127.0.0.1", free_port()), Handler)
        self.http = f"127.0.0.1:{self._server.server_address[1]}"

    @contextlib.contextmanager
    def running(self, home: Home | None = None) -> Iterator[FakeNode]:
        """While inside, it answers; with a home it is announced there."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        thread.start()
        try:
            with home.announced(self.http) if home else contextlib.nullcontext():
                yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeNode

    def log_message(self, format: str, *args: object) -> None:
        """Tests print nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        data = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.fake.asked.append(Asked(self.command, self.path, json.loads(data) if data else None))
        missing = Problem(404, f"there is no {self.path} here")
        answer = self.fake.answers.get(f"{self.command} {self.path}", missing)
        # A list of answers is given one after the other; the last one stays.
        if isinstance(answer, Turns):
            answer = answer.take()
        if isinstance(answer, Problem):
            self._send(answer.status, {"error": {"message": answer.message}}, answer.request_id)
        elif callable(answer):
            self._stream(answer)
        else:
            self._send(200, answer)

    def _send(self, status: int, value: Any, request_id: str = "") -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        if request_id:
            self.send_header("x-promptmesh-request-id", request_id)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, events: Events) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("x-promptmesh-request-id", "req-1")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        try:
            for event in events():
                self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        except Cut:
            return
        except OSError:
            self.fake.left.set()


class Cut(Exception):
    """Raised by events: the connection ends here."""


class Turns:
    """Several answers, one after the other; the last one stays."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)

    def take(self) -> Any:
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str


class _Terminal(io.StringIO):
    """Says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def run(home: Path, *arguments: str, stdin: str | None = "", tty: bool = False, **env: str) -> Ran:
    """Run a command in this process. `stdin` None: a terminal where nobody types."""
    streams = (sys.stdin, sys.stdout, sys.stderr)
    environ = dict(os.environ)
    out, err = (_Terminal(), _Terminal()) if tty else (io.StringIO(), io.StringIO())
    for name in environ:
        if name.startswith(("PROMPTMESH_", "IPFS_ACCELERATE_PY_", "NO_COLOR")):
            del os.environ[name]
    os.environ.update({"TERM": "xterm", "PROMPTMESH_LOCAL_SERVERS_ENABLED": "false", **env})
    sys.stdin, sys.stdout, sys.stderr = (
        _Terminal() if stdin is None else io.StringIO(stdin),
        out,
        err,
    )
    try:
        code = main(["--home", str(home), *arguments])
    except SystemExit as error:  # argparse says so that the usage is wrong
        code = int(error.code or 0)
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
        os.environ.clear()
        os.environ.update(environ)
    return Ran(code, out.getvalue(), err.getvalue())


def made(folder: Path) -> Home:
    """A home that is complete."""
    home = Home(folder)
    home.make("")
    return home
