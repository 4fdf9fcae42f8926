"""Records what the real runtime of Copilot's SDK tells of a session, in each case of the matrix
(`scripts/record-clis copilot_sdk`). `tests/recorded/copilot_sdk/CASE.jsonl` has its events.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from cli_matrix import ENDLESS, MATRIX
from cli_programs import KEY, MODEL, PROGRAMS
from recordings import RECORDED, Normal, Recording
from vendors import VendorServer

from promptmesh.providers.base import GenerateError, GenerateRequest, Message, Text
from promptmesh.providers.copilot_runtime import CopilotRuntime
from promptmesh.providers.copilot_sdk import CopilotSdk
from promptmesh.providers.copilot_settings import CopilotSettings
from promptmesh.providers.copilot_wire import SessionEvent
from promptmesh.providers.json_rpc import Incoming, read

#: What a session tells of that bears on its answer. The others say how it came about.
TOLD = ("assistant.", "session.idle", "session.error", "model.call_failure", "abort")
#: How an answer ends that is ended by our provider.
CUT = ("length", "content_filter")
#: Seconds that an endless case has for what it says.
LONG = 3.0


async def record_sessions(server: VendorServer, folder: Path) -> None:
    """Renew them all, with `folder` for a user who has nothing."""
    for case in MATRIX:
        normal = Normal([(str(folder), "/home/user")])
        told = until_it_is_ended(await _told(case, server, str(folder)))
        lines = tuple(("out", normal(json.dumps(event)) + "\n") for event in told)
        path = RECORDED / "copilot_sdk" / f"{case}.jsonl"
        path.write_text(Recording((), lines, None).dump())
        print("copilot_sdk", case, told[-1]["type"], file=sys.stderr)


async def _told(case: str, server: VendorServer, cache: str) -> list[SessionEvent]:
    """The events of one session."""
    seen: list[SessionEvent] = []
    hear = CopilotRuntime._hear

    def note(self: CopilotRuntime, message: Incoming) -> None:
        if message.method == "session.event":
            seen.append(read(message.params, SessionEvent))
        hear(self, message)

    settings = CopilotSettings(
        name="copilot_sdk",
        command=str(PROGRAMS["copilot_sdk"].path),
        environment={"PATH": os.environ["PATH"], "HOME": cache},
        cache_dir=cache,
        base_url=server.base(case) + "/v1",
        api_key=KEY,
        models=(MODEL,),
    )
    provider = CopilotSdk(settings)
    text = Text(text="Tell me a tale.")
    request = GenerateRequest(model=MODEL, messages=(Message(role="user", content=(text,)),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CopilotRuntime, "_hear", note)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(provider.run)
            try:
                async with provider.open(request) as answering:
                    with trio.move_on_after(LONG if case in ENDLESS else 60):
                        async for _ in answering.chunks:
                            pass
            except GenerateError:
                pass
            nursery.cancel_scope.cancel()
    return seen


def until_it_is_ended(told: list[SessionEvent]) -> list[dict[str, Any]]:
    """What it told before our provider ended it."""
    kept = []
    for event in (each.event for each in told if each.event.type.startswith(TOLD)):
        data = event.data
        if event.type == "abort" or data.get("aborted"):
            break
        kept.append({"type": event.type, "data": data})
        if event.type == "model.call_failure" or data.get("finishReason") in CUT:
            break
    return kept
