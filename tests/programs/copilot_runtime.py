"""Stands in for the runtime of Copilot's SDK: tells of each session what the real one told.

`copilot_runtime.py FOLDER ARGUMENT...`; the case is that of the address in its environment. Some
prompts make it behave as no real one should: `die`, `deaf` (it heeds neither an abort nor SIGTERM),
`ask` (it asks its client something first), `say TEXT` (one event after it, cut anywhere).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from recordings import case_of, load

VERSION = 3


def send(message: dict[str, Any]) -> None:
    body = json.dumps({"jsonrpc": "2.0", **message}).encode()
    sys.stdout.buffer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    sys.stdout.buffer.flush()


def tell(session: str, kind: str, data: Any) -> None:
    params = {"sessionId": session, "event": {"type": kind, "data": data}}
    send({"method": "session.event", "params": params})


class Runtime:
    def __init__(self, folder: str, case: str) -> None:
        recording = load((Path(folder) / f"{case}.jsonl").read_text())
        self.events = [json.loads(line) for _, line in recording.lines]
        self.deaf = False
        #: What was asked, for the test.
        self.log = Path(os.environ["COPILOT_HOME"]).parent / "asked.jsonl"

    def take(self, message: dict[str, Any]) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(message) + "\n")
        if "method" not in message:
            return
        params = message["params"]
        name = message["method"].replace(".", "_")
        result = getattr(self, f"do_{name}")(params)
        if result is not None:
            send({"id": message["id"], **result})
        if name == "session_send":
            self.turn(params["sessionId"], params["prompt"])

    def do_connect(self, params: dict[str, Any]) -> dict[str, Any]:
        version = int(os.environ.get("COPILOT_API_URL", VERSION))
        return {"result": {"ok": True, "protocolVersion": version, "version": "1.0.102"}}

    def do_auth_getStatus(self, params: dict[str, Any]) -> dict[str, Any]:
        token = os.environ.get("COPILOT_SDK_AUTH_TOKEN", "")
        known = token != "github_pat_revoked" and (bool(token) or self.saved())
        return {"result": {"isAuthenticated": known}}

    def saved(self) -> bool:
        return (Path(os.environ["COPILOT_HOME"]) / "config.json").exists()

    def do_models_list(self, params: dict[str, Any]) -> dict[str, Any]:
        limits = {"max_context_window_tokens": 128_000, "max_prompt_tokens": 64_000}
        models = [
            {"id": "auto", "capabilities": {}},
            {"id": "gpt-x", "capabilities": {"limits": limits}, "policy": {"state": "enabled"}},
            {"id": "gpt-off", "capabilities": {"limits": limits}, "policy": {"state": "disabled"}},
        ]
        return {"result": {"models": models}}

    def do_session_create(self, params: dict[str, Any]) -> dict[str, Any]:
        if params["model"] == "gpt-none":
            said = 'Request session.create failed with message: Model "gpt-none" is not available.'
            return {"error": {"code": -32603, "message": said}}
        tell(params["sessionId"], "session.start", {"contextTier": None})
        return {"result": {"sessionId": params["sessionId"]}}

    def do_session_options_update(self, params: dict[str, Any]) -> dict[str, Any]:
        return {"result": {"success": True}}

    def do_session_delete(self, params: dict[str, Any]) -> dict[str, Any]:
        return {"result": {"success": True}}

    def do_session_send(self, params: dict[str, Any]) -> dict[str, Any]:
        return {"result": {"messageId": "1"}}

    def do_session_abort(self, params: dict[str, Any]) -> dict[str, Any] | None:
        if self.deaf:
            return None
        tell(params["sessionId"], "session.idle", {"aborted": True})
        return {"result": {"success": True}}

    def turn(self, session: str, prompt: str) -> None:
        if prompt == "die":
            print("it is out of memory", file=sys.stderr)
            os._exit(3)
        if prompt == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.deaf = True
            tell(session, "assistant.message_delta", {"messageId": "m", "deltaContent": "Once"})
            return
        if prompt == "ask":
            send({"id": "q1", "method": "userInput.request", "params": {"question": "why?"}})
        if prompt.startswith("garbage "):
            sys.stdout.buffer.write(bytes.fromhex(prompt.removeprefix("garbage ")))
            sys.stdout.buffer.flush()
            return
        if prompt.startswith("event "):
            kind, _, data = prompt.removeprefix("event ").partition(" ")
            tell(session, kind, json.loads(data))
        for event in self.events:
            tell(session, event["type"], event["data"])


def main() -> None:
    folder, *argv = sys.argv[1:]
    runtime = Runtime(
        folder, case_of(argv, os.environ) if "COPILOT_OFFLINE" in os.environ else "ok"
    )
    while header := sys.stdin.buffer.readline():
        length = int(header.split(b":")[1])
        sys.stdin.buffer.readline()
        runtime.take(json.loads(sys.stdin.buffer.read(length)))


main()
