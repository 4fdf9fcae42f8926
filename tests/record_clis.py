"""Records what the vendors' real CLIs say (`scripts/record-clis`).

Of those that are kept what they tell of one answer is recorded elsewhere (`record_turns`,
`record_sessions`).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import trio
from cli_matrix import MATRIX
from cli_programs import CLIS, KEY, MODEL, PROGRAMS
from cli_real import recorded_programs
from record_sessions import record_sessions
from record_turns import record_turns
from recordings import RECORDED, recording_program
from vendors import VendorServer, vendors

from promptmesh.providers.base import GenerateError, GenerateRequest, Message, Provider, Text
from promptmesh.providers.registry import build

#: Seconds after which a program that says nothing has said all it will.
LONG = 30.0
#: Seconds that it has for what it says before it waits for more, once it has asked.
FIRST = 2.0


#: Those that are kept.
KEPT = {"codex": record_turns, "copilot_sdk": record_sessions}


async def main(names: list[str]) -> None:
    """Record those programs, or all."""
    known = [*recorded_programs(), *KEPT]
    for name in names or known:
        if name not in known:
            sys.exit(f"promptmesh: there are no recordings of {name}, but of {', '.join(known)}")
        with tempfile.TemporaryDirectory() as made:
            async with vendors() as server:
                await KEPT.get(name, partial(record_runs, name))(server, Path(made))


async def record_runs(name: str, server: VendorServer, folder: Path) -> None:
    """Renew the recordings of a program that is started for each answer."""
    await record(name, server, folder)
    shutil.copytree(folder / "recorded", RECORDED / name, dirs_exist_ok=True)


async def record(name: str, server: VendorServer, folder: Path) -> None:
    """All cases of one program, into `folder`/recorded."""
    program = PROGRAMS[name]
    (folder / "recorded").mkdir()
    (folder / "user").mkdir()
    path = recording_program(folder, program.path, folder / "recorded")
    place = {"PATH": f"{CLIS}/bin:/usr/bin:/bin", "HOME": str(folder / "user")}
    for case in (*MATRIX, "echo"):
        settings = program.settings(str(path), server.base(case))
        table = {"models": [MODEL], "api_key": KEY, "environment": place, **settings}
        provider = build(program.kind, name, table)
        await provider.check()
        text = Text(text="Tell me a tale.")
        request = GenerateRequest(model=MODEL, messages=(Message(role="user", content=(text,)),))
        print(name, case, await outcome(provider, request, server, case), file=sys.stderr)


async def outcome(
    provider: Provider, request: GenerateRequest, server: VendorServer, case: str
) -> str:
    """Ask, and say what came of it."""
    said = "it was ended"
    with trio.move_on_after(LONG) as limit:
        async with trio.open_nursery() as nursery:
            if case in ("hang", "stall"):
                nursery.start_soon(leave, server, case, limit)
            try:
                async with provider.open(request) as answering:
                    completion = await answering.completion()
                said = f"{completion.finish_reason}: {completion.text!r}"
            except GenerateError as error:
                said = repr(error)
            nursery.cancel_scope.cancel()
    return said


async def leave(server: VendorServer, case: str, limit: trio.CancelScope) -> None:
    """End it soon after it has asked."""
    await server.asked(case)
    limit.deadline = trio.current_time() + FIRST


if __name__ == "__main__":
    trio.run(main, sys.argv[1:])
