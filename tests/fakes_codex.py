"""A program that stands for `codex`: a few lines of Python that do as the test wants.

What a turn does its prompt says: `say X` answers X, `die` ends the process, `deaf` hangs and takes
no interrupt, `hang` takes one, `ask` asks the user, `refuse` refuses the turn, `401` the login; any
other is echoed.
Its folder gets `seen.jsonl`: arguments, environment and messages of each process.
"""

from __future__ import annotations

import sys
from pathlib import Path

_SOURCE = """
import json, os, sys, time
folder, version, models = {folder!r}, {version!r}, {models!r}

def note(what):
    with open(os.path.join(folder, "seen.jsonl"), "a") as file:
        file.write(json.dumps(what) + "\\n")

def tell(**message):
    print(json.dumps(message), flush=True)

def on_turn(thread, text):
    turn = {{"id": "u-" + thread, "status": "inProgress"}}
    tell(method="turn/started", params={{"threadId": thread, "turn": turn}})
    if text == "die":
        print("fatal: out of luck", file=sys.stderr, flush=True)
        os._exit(9)
    if text in ("hang", "deaf"):
        return
    if text == "401":
        end(thread, "failed", {{"message": "no", "codexErrorInfo": "unauthorized"}})
        return
    if text == "ask":
        tell(id="q", method="item/tool/requestUserInput", params={{"threadId": thread}})
        return
    answer = text.removeprefix("say ")
    for piece in (answer[:2], answer[2:]):
        params = {{"threadId": thread, "itemId": "m", "delta": piece}}
        tell(method="item/agentMessage/delta", params=params)
    end(thread, "completed")

def end(thread, status, error=None):
    turn = {{"id": "u-" + thread, "status": status, "error": error}}
    tell(method="turn/completed", params={{"threadId": thread, "turn": turn}})

def serve():
    deaf, count = set(), 0
    for line in sys.stdin:
        message = json.loads(line)
        note(message)
        number, method = message.get("id"), message.get("method")
        params = message.get("params") or {{}}
        if method == "thread/start":
            count += 1
            tell(id=number, result={{"thread": {{"id": "t%d" % count}}}})
        elif method == "model/list":
            data = [{{"model": m, "hidden": m == "h", "isDefault": m == "best"}} for m in models]
            tell(id=number, result={{"data": data}})
        elif method == "turn/start":
            text = params["input"][0]["text"]
            if text == "refuse":
                data = {{"input_error_code": "input_too_large"}}
                tell(id=number, error={{"code": 1, "message": "too large", "data": data}})
                continue
            if text == "deaf":
                deaf.add(params["threadId"])
            tell(id=number, result={{"turn": {{"id": "u-" + params["threadId"]}}}})
            on_turn(params["threadId"], text)
        elif method == "turn/interrupt":
            tell(id=number, result={{}})
            if params["threadId"] not in deaf:
                end(params["threadId"], "interrupted")
        elif number is not None and method:
            tell(id=number, result={{}})

note({{"argv": sys.argv[1:], "environment": dict(os.environ), "pid": os.getpid()}})
if sys.argv[1:] == ["--version"]:
    print("codex-cli", version)
elif sys.argv[1:] == ["login", "status"]:
    sys.exit(1)
elif sys.argv[1] == "app-server":
    serve()
elif sys.argv[1] == "exec":
    text = sys.stdin.read()
    item = {{"type": "agent_message", "text": text}}
    tell(type="item.completed", item=item)
    tell(type="turn.completed", usage={{"input_tokens": 1, "output_tokens": 1}})
"""


def fake_codex(folder: Path, version: str = "9.0.0", models: tuple[str, ...] = ()) -> Path:
    """The program, in that folder."""
    folder.mkdir(exist_ok=True)
    source = folder / "codex.py"
    source.write_text(_SOURCE.format(folder=str(folder), version=version, models=models))
    path = folder / "codex"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{source}" "$@"\n')
    path.chmod(0o755)
    return path
