"""Requests that wait for the one slot of a real daemon, and what their clients see of it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import openai
import pytest
import trio
from daemons import Daemon, mesh, until

pytestmark = pytest.mark.e2e

ONE_SLOT = '[[providers]]\nkind = "echo"\nname = "echo"\nslots = 1\nmax_waiting = 2\n'


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Daemon]:
    daemon = Daemon(tmp_path, "alpha", ONE_SLOT)
    try:
        yield await daemon.start()
    finally:
        await daemon.aclose()


async def load(node: Daemon, running: int, waiting: int) -> None:
    """Until so many run and wait, as `promptmesh providers` shows."""

    async def reached() -> bool:
        (provider,) = await node.json("/mesh/v1/providers")
        return (provider["running"], provider["waiting"]) == (running, waiting)

    await until(reached, f"{running} run and {waiting} wait; {node.log}")


@asynccontextmanager
async def busy(node: Daemon) -> AsyncIterator[None]:
    """The slot is taken."""
    async with node.stream("[[echo hang]]", "echo"):
        await load(node, 1, 0)
        yield


async def test_an_own_request_overtakes_what_nobody_waits_for(node: Daemon) -> None:
    order: list[str] = []

    async def ask(name: str, priority: str, does: str = "") -> None:
        answer = await node.chat(f"{name} {does}", "echo", promptmesh={"priority": priority})
        order.append(f"{name}: {answer.status_code}")

    async with trio.open_nursery() as nursery:
        async with busy(node):
            for number, name in enumerate(("slow 1", "slow 2")):
                nursery.start_soon(ask, name, "background", "[[echo hang]]")
                await load(node, 1, number + 1)
            nursery.start_soon(ask, "own", "own")
            await until_told(order, "slow 2: 503")  # its place is taken
        await until_told(order, "own: 200")  # nothing passes by the other, once it has begun
        await load(node, 1, 0)
        nursery.cancel_scope.cancel()
    assert order == ["slow 2: 503", "own: 200"]
    await load(node, 0, 0)
    table = await node.cli("providers")
    assert "0/1" in table


async def until_told(order: list[str], what: str) -> None:
    async def told() -> bool:
        return what in order

    await until(told, what)


async def test_a_full_queue_is_503_and_a_client_that_leaves_makes_room(node: Daemon) -> None:
    async with trio.open_nursery() as nursery, busy(node):
        leaving = trio.CancelScope()

        async def ask_and_leave() -> None:
            with leaving:
                async with node.stream("first", "echo") as events:
                    await anext(events)

        nursery.start_soon(ask_and_leave)
        await load(node, 1, 1)
        nursery.start_soon(node.chat, "second", "echo")
        await load(node, 1, 2)
        full = await node.chat("third", "echo")
        assert full.status_code == 503
        assert int(full.headers["retry-after"]) >= 1
        error = full.json()["error"]
        assert error["code"] == "provider_busy"
        assert "1 are running and 2 wait, and it would be number 3" in error["message"]
        leaving.cancel()
        await load(node, 1, 1)
    await load(node, 0, 0)


async def test_who_waits_long_is_told_so_and_the_openai_client_reads_on(node: Daemon) -> None:
    def ask() -> list[str]:
        with openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(
                model="echo", messages=[{"role": "user", "content": "after all"}], stream=True
            )
            return [chunk.choices[0].delta.content or "" for chunk in stream]

    got: list[str] = []

    async def run() -> None:
        got.extend(await trio.to_thread.run_sync(ask))

    async with trio.open_nursery() as nursery, busy(node):
        nursery.start_soon(run)
        await load(node, 1, 1)
        # The third shares the computation of the second.
        async with (
            node.stream("told", "echo", temperature=0) as first,
            node.stream("told", "echo", temperature=0) as second,
        ):
            told = [await first.comment(), await second.comment()]
            requests = await node.json("/mesh/v1/requests?limit=4")
        assert told == [": waiting, 2nd of 2"] * 2
        places = [request["waiting"] and request["waiting"]["place"] for request in requests]
        assert places == [2, 2, 1, None]
    assert "".join(got) == "after all"


async def test_where_a_request_stands_that_waits_at_a_peer(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": "", "b": ONE_SLOT + "share = true\n"}) as (a, b):
        await a.wait_for_model("echo")
        async with trio.open_nursery() as nursery, busy(b):
            nursery.start_soon(a.chat, "guest", "echo")
            await load(b, 1, 1)

            async def told() -> bool:
                (why,) = await a.json("/mesh/v1/requests?limit=1")
                waiting = why["waiting"]
                return waiting is not None and (waiting["place"], waiting["of"]) == (1, 1)

            await until(told, "its place is told")
            nursery.cancel_scope.cancel()
