"""Records what the real Codex tells of a turn (`scripts/record-clis codex`).

`tests/codex_turns/CASE.jsonl` has the notifications of one turn, with the method and parameters of
each. Of the two that are tested the newer one is recorded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from cli_matrix import ENDLESS, MATRIX
from cli_programs import CLIS, KEY, MODEL, PROGRAMS
from recordings import Normal
from vendors import VendorServer

from promptmesh.providers.base import GenerateError, GenerateRequest, Message, Text
from promptmesh.providers.codex_turn import CodexTurn
from promptmesh.providers.registry import Runs, build

TURNS = Path(__file__).parent / "codex_turns"
PROGRAM = PROGRAMS["codex-npm"]
#: What is another one as far as a turn can tell, or depends on when it is ended.
SAME = ("badkey", "e403", "e429-7", "reset", *ENDLESS)
#: A turn that its asker leaves.
LEFT = "interrupted"
CASES = (*(case for case in MATRIX if case not in SAME), LEFT)


async def record_turns(server: VendorServer, folder: Path) -> None:
    """Renew them all, with `folder` for a user who has nothing."""
    for case in CASES:
        turn = await turn_now(case, server, folder)
        (TURNS / f"{case}.jsonl").write_text(turn)
        print("codex", case, turn.count("\n"), file=sys.stderr)


async def turn_now(case: str, server: VendorServer, folder: Path) -> str:
    """One turn, as the text of its file."""
    normal = Normal([(str(folder), "/home/user")])
    told = await _told(case, server, folder)
    return "".join(normal(json.dumps(each, ensure_ascii=False)) + "\n" for each in told)


async def _told(case: str, server: VendorServer, folder: Path) -> list[dict[str, Any]]:
    """The notifications of one turn."""
    told: list[dict[str, Any]] = []
    hear = CodexTurn.event

    def note(self: CodexTurn, method: str, params: bytes) -> None:
        told.append({"method": method, "params": json.loads(params)})
        hear(self, method, params)

    mode = "hang" if case == LEFT else case
    place = {"PATH": f"{CLIS}/bin:/usr/bin:/bin", "HOME": str(folder)}
    settings = PROGRAM.settings(str(PROGRAM.path), server.base(mode))
    table = {"models": [MODEL], "api_key": KEY, "environment": place, **settings}
    provider = build(PROGRAM.kind, "codex", table)
    assert isinstance(provider, Runs)
    text = Text(text="Tell me a tale.")
    request = GenerateRequest(model=MODEL, messages=(Message(role="user", content=(text,)),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CodexTurn, "event", note)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(provider.run)
            try:
                async with provider.open(request) as answering:
                    if case == LEFT:
                        await server.asked(mode)
                    else:
                        await answering.completion()
            except GenerateError:
                pass
            nursery.cancel_scope.cancel()
    return told
