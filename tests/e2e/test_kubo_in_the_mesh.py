"""A real Kubo in the private network of real daemons: what it reads, what it does not, and back."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio
from daemons import ECHO, Daemon, mesh, until
from kubo import Kubo, kubo, needs_kubo

from promptmesh.cache.cid import cid_text
from promptmesh.cache.records import links

pytestmark = [needs_kubo, pytest.mark.e2e]

#: A Kubo that is not given a block waits for it: so long (s) it is watched.
NOT_GIVEN_S = 3


@asynccontextmanager
async def daemon_and_kubo(folder: Path) -> AsyncIterator[tuple[Daemon, Kubo]]:
    """A node that echoes, and a Kubo with its `swarm.key` that dialled it."""
    async with mesh(folder, {"a": ECHO}) as (a,), kubo_of(a, folder / "kubo") as peer:
        assert await peer.connect(await address_of(a))
        yield a, peer


def kubo_of(daemon: Daemon, folder: Path) -> AbstractAsyncContextManager[Kubo]:
    """A Kubo with the `swarm.key` of that node."""
    return kubo(folder, swarm_key=(daemon.home / "swarm.key").read_text())


async def address_of(daemon: Daemon) -> str:
    address: str = (await daemon.json("/mesh/v1/status"))["addresses"][0]
    return address


async def ask(daemon: Daemon, prompt: str, **control: object) -> str:
    """Have it answered; returns the CID of the answer."""
    answer = await daemon.chat(prompt, "echo", temperature=0, promptmesh={"cache": control})
    assert answer.status_code == 200, answer.text
    cid: str = answer.json()["promptmesh"]["cid"]
    return cid


async def raw(daemon: Daemon, cid: str) -> tuple[int, bytes]:
    """What the gateway of a node gives."""
    response = await daemon.get(f"/ipfs/{cid}", params={"format": "raw"})
    return response.status_code, response.content


@pytest.mark.parametrize("words", [5, 20_000], ids=["one block", "with leaves"])
async def test_kubo_keeps_an_answer_when_its_node_is_gone(tmp_path: Path, words: int) -> None:
    async with daemon_and_kubo(tmp_path) as (a, peer):
        cid = await ask(a, f"keep this [[echo n={words}]]")
        assert await peer.pin(cid)
        status, root = await raw(a, cid)
        leaves = links(root)
        assert (status, len(leaves) > 1) == (200, words > 5)
        link = json.loads(await a.cli("invite", "--json"))["link"]
        await a.stop()
        # Another node of the mesh, which never met the first, reads it from the Kubo.
        b = Daemon(tmp_path / "b", "b", f'bootstrap = ["{peer.address}"]')
        try:
            await b.cli("join", link)
            await b.start()
            await meets_kubo(b)
            assert await raw(b, cid) == (200, root)
            for leaf in leaves:
                assert (await raw(b, cid_text(leaf)))[0] == 200
        finally:
            await b.aclose()


async def meets_kubo(daemon: Daemon) -> None:
    async def met() -> bool:
        rows = (await daemon.json("/mesh/v1/peers"))[1:]
        return any(r["ipfs"].startswith("kubo/") and r["state"] == "connected" for r in rows)

    await until(met, f"{daemon.name} knows the Kubo for what it is; {daemon.log}")


async def test_what_only_kubo_has_is_read_and_kept(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": ECHO}) as (a,):
        content = os.urandom(100_000)
        async with kubo_of(a, tmp_path / "kubo") as peer:
            assert await peer.connect(await address_of(a))
            cid = await peer.add(content)
            status, block = await raw(a, cid)
            assert status == 200
            assert content in block
        # The Kubo is gone, and the block is here.
        assert await raw(a, cid) == (200, block)


async def test_an_answer_that_may_not_leave_is_not_given(tmp_path: Path) -> None:
    async with daemon_and_kubo(tmp_path) as (a, peer):
        secret = await ask(a, "a secret", scope="local")
        club = await ask(a, "of the club", namespace="club")
        assert await peer.pin(await ask(a, "for all"))
        async with (
            kubo_of(a, tmp_path / "other") as other,
            trio.open_nursery() as nursery,
        ):
            assert await other.connect(await address_of(a))
            for asking, cid in ((peer, secret), (other, club)):
                nursery.start_soon(is_not_given, asking, cid)


async def is_not_given(peer: Kubo, cid: str) -> None:
    with trio.move_on_after(NOT_GIVEN_S) as waiting:
        await peer.call("pin", cid)
    assert waiting.cancelled_caught


async def test_a_kubo_is_no_trouble(tmp_path: Path) -> None:
    """It is shown for what it is, members find each other beside it, and the logs stay quiet."""
    async with mesh(tmp_path, {"a": ECHO, "b": ""}) as (a, b):
        async with kubo_of(a, tmp_path / "kubo") as peer:
            for daemon in (a, b):
                assert await peer.connect(await address_of(daemon))
            await meets_kubo(a)
            await meets_kubo(b)
            assert "kubo/0.22.0 (ipfs)" in await a.cli("peers")
            await b.wait_for_model("echo")
            answer = await b.chat("hello", "echo")
            assert answer.headers["x-promptmesh-node"] == "a"

        async def gone() -> bool:
            rows = (await a.json("/mesh/v1/peers"))[1:]
            return all(r["state"] != "connected" for r in rows if r["peer"] == peer.peer_id)

        await until(gone, "a notices that the Kubo is gone")
        assert await a.stop() == 0
        log = a.log.read_text()
        assert log.count(peer.peer_id) <= 4, log
        assert "WARNING" not in log, log
        assert "ERROR" not in log, log


async def test_a_member_is_asked_for_a_block_like_a_kubo(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": ECHO, "b": ""}) as (a, b):
        await b.wait_for_peers("a")
        cid = await ask(a, "by its CID")
        secret = await ask(a, "a secret", scope="local")
        assert await raw(b, cid) == await raw(a, cid)
        assert (await raw(b, secret))[0] == 404
