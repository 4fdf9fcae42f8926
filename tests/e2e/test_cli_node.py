"""A node that has a vendor's program: HTTP in, the program's answer out, also over the mesh."""

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import trio
from cli_matrix import expected
from cli_programs import CLIS, KEY, KEY_VARIABLE, MODEL, PROGRAMS
from cli_real import real_programs
from daemons import Daemon, mesh, until
from faults import PARTIAL, WHOLE
from vendors import VendorServer, vendors_in_a_thread

pytestmark = pytest.mark.e2e

#: Modes of the vendors' stub, by which their providers are called, too.
MODES = ("ok", "truncate", "e401", "e429-7", "drop", "hang")


class Has(NamedTuple):
    """A program, the configuration of the node that has it, and whom it asks."""

    name: str
    tables: str
    server: VendorServer


@pytest.fixture(params=real_programs())
def has(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Has]:
    program = PROGRAMS[request.param]
    (tmp_path / "user").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("PATH", f"{CLIS}/bin:/usr/bin:/bin")
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with vendors_in_a_thread() as server:
        tables = (program.table(m, program.path, server.base(m), share=True) for m in MODES)
        yield Has(request.param, "\n".join(tables), server)


@asynccontextmanager
async def two_nodes(tmp_path: Path, tables: str) -> AsyncIterator[tuple[Daemon, Daemon]]:
    """One that has the program, and another member."""
    async with mesh(tmp_path, {"has": tables, "asks": ""}) as (has, asks):
        await has.wait_for_model(MODEL)
        await asks.wait_for_model(MODEL, *(f"has:{mode}" for mode in MODES))
        yield has, asks


async def test_over_http_and_over_the_mesh(has: Has, tmp_path: Path) -> None:
    async with two_nodes(tmp_path, has.tables) as nodes:
        for node in nodes:
            await _answers(node)
        await _failures(nodes[1], expected(has.name, "drop").text)
        for node in nodes:
            assert KEY not in node.log.read_text()
            assert KEY not in await node.cli("providers", check=False)


@pytest.mark.interop  # `test_private_folder` has it in every run
async def test_what_a_killed_node_left_is_removed_by_the_next(has: Has, tmp_path: Path) -> None:
    async with aclosing(Daemon(tmp_path / "node", "node", has.tables)) as node:
        await node.start()
        await node.wait_for_model(MODEL)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_ask_in_vain, node)
            await until(partial(_is_asked, has.server), "the program asks its vendor")
            await node.kill()
        left = node.temporary()
        assert left
        await node.start()
        await until(partial(_are_gone, left, node), "what the killed one left is gone")


async def _ask_in_vain(node: Daemon) -> None:
    with pytest.raises(httpx.TransportError):
        await node.chat("Tell me a tale.", f"hang/{MODEL}")


async def _is_asked(server: VendorServer) -> bool:
    return bool(server.of("hang"))


async def _are_gone(left: set[str], node: Daemon) -> bool:
    return not left & node.temporary()


async def _answers(node: Daemon) -> None:
    for mode, text, reason in (("ok", WHOLE, "stop"), ("truncate", PARTIAL, "length")):
        reply = await node.chat("Tell me a tale.", f"{mode}/{MODEL}")
        assert reply.status_code == 200, reply.text
        (choice,) = reply.json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, reason)
        async with node.stream("Tell me another tale.", f"{mode}/{MODEL}") as events:
            deltas = [choice async for event in events for choice in event["choices"]]
        assert "".join(choice["delta"].get("content") or "" for choice in deltas) == text
        assert deltas[-1]["finish_reason"] == reason


async def _failures(node: Daemon, partial: str) -> None:
    """`partial`: what the program shows of an answer that is cut."""
    refused = await node.chat("Tell me a tale.", "e401/" + MODEL)
    assert (refused.status_code, KEY in refused.text) == (502, False)
    often = await node.chat("Tell me a tale.", "e429-7/" + MODEL)
    assert (often.status_code, "retry-after" in often.headers) == (503, True)
    cut = await node.chat("Tell me a tale.", "drop/" + MODEL)
    assert (cut.status_code, cut.json()["error"].get("partial", "")) == (502, partial)
    if partial:
        async with node.stream("Tell me a tale.", "drop/" + MODEL) as events:
            assert "error" in (await events.until_error())[-1]
