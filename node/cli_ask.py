"""`promptmesh ask`: one prompt, its answer streamed to the terminal, and a line on who gave it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from typing import Any

from ..providers.base import (
    CacheControl,
    GenerateError,
    GenerateRequest,
    Message,
    Sampling,
    Text,
)
from .cli_mesh import home_of, typed
from .cli_output import fail, print_json, printable, read_input, say, warn
from .client import NodeClient, NodeError, NodeNotRunning
from .config import load_config
from .config_sections import Config
from .home import Home

#: As much as fits into a request's body by default.
MAX_PROMPT = 16 << 20
#: Seconds that the node gets beyond its own deadline to say that it passed.
GRACE = 10.0
#: What `--json` gives beside `text`, `usage` and `finish_reason`.
ORIGIN = ("model", "provider", "peer", "node", "cid", "cache", "attempts")


def ask(args: argparse.Namespace) -> int:
    """Ask, through the running node or in this process."""
    try:
        prompt = _prompt(args.prompt)
    except ValueError as error:
        fail(str(error))
        return 2
    home = home_of(args)
    config = load_config(home.path)
    show = _Show(quiet=args.json)
    started = time.monotonic()
    try:
        answer = _answer(args, prompt, config, home, show)
    except (NodeError, GenerateError) as error:
        code = _failed(show, str(error))
        if isinstance(error, NodeError) and error.request_id:
            say(f"why: `{typed(args, f'explain {error.request_id}')}`", "dim")
        return code
    finally:
        show.end()
    if args.json:
        print_json(answer)
    else:
        say(_summary(answer, time.monotonic() - started), "dim")
    return 0


def body_of(prompt: str) -> dict[str, Any]:
    """What `ask PROMPT` without flags asks, in the OpenAI dialect."""
    return {"model": "auto", "messages": [{"role": "user", "content": prompt}]}


def _prompt(given: str | None) -> str:
    """The prompt of the command line, or all of standard input. Raises `ValueError`."""
    if given is None and sys.stdin is not None and sys.stdin.isatty():
        prompt = ""
    else:
        prompt = read_input(MAX_PROMPT) if given in (None, "-") else given
    if not prompt.strip():
        raise ValueError("there is no prompt: give one as an argument, or on standard input")
    return prompt


def _failed(show: _Show, reason: str) -> int:
    show.end()
    if show.text:
        warn("the answer above is not complete")
    return fail(reason)


def _answer(
    args: argparse.Namespace, prompt: str, config: Config, home: Home, show: _Show
) -> dict[str, Any]:
    """The answer as `--json` gives it, shown while it comes."""
    running = home.running()
    if running is not None:
        try:
            client = NodeClient(running.http)
            return _through_node(client, _body(args, prompt), config.deadlines.whole, show)
        except NodeNotRunning:
            pass
    from .local import ask as ask_here  # the whole node, without its network

    say(f"no node runs here (`{typed(args, 'up')}`): this process answers itself", "dim")
    answer: dict[str, Any] = ask_here(config, home, _request(args, prompt), show.add)
    return answer


def _body(args: argparse.Namespace, prompt: str) -> dict[str, Any]:
    """The request in the OpenAI dialect."""
    system = [{"role": "system", "content": args.system}] if args.system else []
    who = {
        "provider": args.provider,
        "peer": args.peer,
        "policy": args.policy,
        "max_cost": args.max_cost,
    }
    fields = {
        "model": args.model,
        "messages": [*system, {"role": "user", "content": prompt}],
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        "promptmesh": {**_set(who), "cache": {"any_sample": True}},
    }
    return _set(fields)


def _set(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _request(args: argparse.Namespace, prompt: str) -> GenerateRequest:
    """The same request for this process."""
    messages = [Message(role="user", content=(Text(text=prompt),))]
    if args.system:
        messages.insert(0, Message(role="system", content=(Text(text=args.system),)))
    return GenerateRequest(
        model=args.model,
        messages=tuple(messages),
        sampling=Sampling(temperature=args.temperature, max_tokens=args.max_tokens),
        dialect="openai",
        provider=args.provider,
        peer=args.peer,
        policy=args.policy,
        cache=CacheControl(any_sample=True),
    )


def _through_node(
    client: NodeClient, body: dict[str, Any], deadline: float, show: _Show
) -> dict[str, Any]:
    """Stream it from the node. Raises `NodeError`, also if the answer does not come to its end."""
    origin: dict[str, Any] = {}
    usage: dict[str, Any] | None = None
    finish_reason = None
    path = "/v1/chat/completions"
    with client.stream(path, body, timeout=deadline + GRACE) as stream:
        for event in stream.events():
            # The last one that says who answers is right: another may have taken over.
            origin |= event.get("promptmesh") or {}
            usage = event.get("usage") or usage
            for choice in event.get("choices") or ():
                finish_reason = choice.get("finish_reason") or finish_reason
                show.add((choice.get("delta") or {}).get("content") or "")
    if finish_reason is None:
        cut = NodeError("the answer broke off before its end")
        cut.request_id = stream.request_id
        raise cut
    return {
        "text": show.text,
        **{name: origin.get(name) for name in ORIGIN},
        "usage": usage,
        "finish_reason": finish_reason,
    }


class _Show:
    """The answer so far; on stdout as it comes unless `quiet`."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._pieces: list[str] = []
        self._open_line = False

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def add(self, text: str) -> None:
        """The next piece."""
        if not text:
            return
        self._pieces.append(text)
        if not self._quiet:
            # A file gets the answer as it is; a terminal would obey what is in it.
            sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()
            self._open_line = not text.endswith("\n")

    def end(self) -> None:
        """Let what follows begin on a line of its own."""
        if self._open_line:
            self._open_line = False
            sys.stdout.write("\n")
            sys.stdout.flush()


def _summary(answer: Mapping[str, Any], seconds: float) -> str:
    """Who answered, and what it took."""
    usage = answer.get("usage") or {}
    about = "about " if usage.get("estimated") else ""
    tokens = f"{usage.get('prompt_tokens', 0)} + {usage.get('completion_tokens', 0)} tokens"
    reason = answer.get("finish_reason")
    parts = [
        answer.get("node") or answer.get("peer"),
        answer.get("provider"),
        answer.get("model"),
        answer.get("cache"),
        answer.get("cid"),
        about + tokens if usage else "",
        f"{seconds:.1f} s",
        "" if reason == "stop" else f"ended by {reason}",
    ]
    return " · ".join(str(part) for part in parts if part)
