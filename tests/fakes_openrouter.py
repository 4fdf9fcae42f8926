"""A server of the OpenAI dialect in a thread, for programs and tests that are not trio's."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ports import free_port


@dataclass
class Vendor:
    """Answers each prompt with its words backwards, or with `status`."""

    url: str = ""
    status: int = 200
    #: Sends some words, and then nothing more until `go_on`.
    hang: bool = False
    cut: bool = False
    #: Requests it is answering.
    open: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)
    #: A client left before its answer was whole.
    left: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


def _event(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


class _Handler(BaseHTTPRequestHandler):
    vendor: Vendor

    def log_message(self, format: str, *args: object) -> None: ...

    def do_GET(self) -> None:
        self._whole(200, {"data": [{"id": "openai/gpt-4o-mini"}]})

    def do_POST(self) -> None:
        with self.vendor.lock:
            self.vendor.open += 1
        try:
            self._answer()
        except OSError:
            self.vendor.left.set()
        finally:
            with self.vendor.lock:
                self.vendor.open -= 1

    def _answer(self) -> None:
        vendor = self.vendor
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        vendor.bodies.append(body)
        vendor.headers.append({name.lower(): value for name, value in self.headers.items()})
        if vendor.status != 200:
            self._whole(vendor.status, {"error": {"message": "no", "code": vendor.status}})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        words = body["messages"][-1]["content"].split()[::-1]
        for word in words:
            self.wfile.write(_event(word + " "))
        vendor.begun.set()
        if vendor.hang:
            self._wait()
        if not vendor.cut:
            self.wfile.write(_event("", "stop") + b"data: [DONE]\n\n")

    def _wait(self) -> None:
        """Until told to go on, or the client has left."""
        self.connection.settimeout(0.05)
        while not self.vendor.go_on.is_set():
            try:
                if not self.connection.recv(1):
                    self.vendor.left.set()
                    return
            except TimeoutError:
                continue
            except OSError:
                self.vendor.left.set()
                return

    def _whole(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def vendor() -> Iterator[Vendor]:
    """Such a server while inside."""
    state = Vendor()
    handler = type("Handler", (_Handler,), {"vendor": state})
    server = ThreadingHTTPServer(("127.0.0.1", free_port()), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/api/v1"
    try:
        yield state
    finally:
        state.go_on.set()
        server.shutdown()
        thread.join(60)
        server.server_close()
