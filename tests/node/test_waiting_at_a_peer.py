"""Waiting for a slot of a peer: whole nodes over a network in memory, in virtual time."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import trio
import trio.testing
from fakes import MemoryNetwork
from fakes_mesh import FakeProvider, Node, asking, mesh_of, wait_until
from fakes_router import AsIs, Shared

from promptmesh.cache.answers import AnswerCache
from promptmesh.cache.blocks import SqliteBlocks
from promptmesh.cache.database import Database
from promptmesh.mesh import frames
from promptmesh.mesh.candidates import LocalBackend
from promptmesh.mesh.serving import Services
from promptmesh.node.ledger import Ledger
from promptmesh.node.node_database import NodeDatabase
from promptmesh.node.router import Router
from promptmesh.providers.admission import Admission
from promptmesh.providers.base import (
    Answering,
    Asked,
    DeadlineExceeded,
    GenerateError,
    GenerateRequest,
    Priority,
    ProviderBusy,
    Sampling,
)

#: A test names the clock itself: it works only for who does.
Clock = trio.testing.MockClock


class Slotted(FakeProvider):
    """Answers one at a time; two may wait."""

    def __init__(self, delay: float) -> None:
        super().__init__(delay=delay, slots=1)
        self.admission = Admission(self, slots=1, max_waiting=2)

    def told(self, priority: Priority) -> frames.Load:
        """Its load as a request of that priority sees it."""
        load = self.admission.slots.load(priority)
        return frames.Load(running=load.running, waiting=load.waiting, slots=1, wait=load.wait)

    def backend(self, *, shared: bool = True) -> LocalBackend:
        return LocalBackend(
            provider=self.admission, name=self.name, kind="fake", shared=shared, load=self.told
        )


class RoutingNode(Node):
    """A node whose programs and peers are answered by a router."""

    def __init__(
        self, network: MemoryNetwork, nursery: trio.Nursery, name: str, *providers: Slotted
    ) -> None:
        super().__init__(network, name, *providers)
        self._slotted = providers
        self.database = Database(None)
        self.router = Router(
            backends=self.manager,
            names=AsIs(),
            answers=AnswerCache(self.database, SqliteBlocks(self.database), peer=self.peer_id),
            shared=Shared(),
            ledger=Ledger(NodeDatabase(None), peer=self.peer_id),
            nursery=nursery,
            peer=self.peer_id,
            node_of=lambda peer: peer,
            deadline=600,
        )

    def _services(self) -> Services:
        return dataclasses.replace(super()._services(), answer=self._answer, place=self._place)

    def _place(self, request_id: str, peer: str) -> frames.Place | None:
        found = (p.admission.slots.waiting(request_id) for p in self._slotted)
        waiting = next((w for w in found if w is not None), None)
        if waiting is None:
            return None
        return frames.Place(place=waiting.place, of=waiting.of, wait=waiting.wait)

    def _answer(self, request: Asked, peer: str) -> AbstractAsyncContextManager[Answering]:
        assert isinstance(request, GenerateRequest)
        return self.router.open(request, local_only=True)

    async def text(self, request: GenerateRequest) -> str:
        """The whole answer."""
        async with self.router.open(request) as answering:
            return (await answering.completion()).text

    async def error(self, request: GenerateRequest) -> GenerateError:
        """What it ends in."""
        with pytest.raises(GenerateError) as raised:
            await self.text(request)
        return raised.value


@pytest.fixture
async def pair(nursery: trio.Nursery) -> AsyncIterator[tuple[RoutingNode, RoutingNode, Slotted]]:
    """A node that asks, and one with a provider that takes 10 s for each answer."""
    network, provider = MemoryNetwork(nursery, latency=0.01), Slotted(10.0)
    asker = RoutingNode(network, nursery, "asker")
    server = RoutingNode(network, nursery, "server", provider)
    await mesh_of(nursery, asker, server)
    yield asker, server, provider
    for node in (asker, server):
        node.database.close()


@asynccontextmanager
async def busy(server: RoutingNode, provider: Slotted) -> AsyncIterator[None]:
    """While the node works for its owner."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.text, asking(text="own"))
        await wait_until(lambda: provider.admission.slots.load().running == 1)
        yield
        nursery.cancel_scope.cancel()


async def test_who_would_wait_in_vain_is_refused_at_once(
    autojump_clock: Clock, pair: tuple[RoutingNode, RoutingNode, Slotted]
) -> None:
    asker, server, provider = pair
    assert await asker.text(asking()) == "one two three"
    async with busy(server, provider):
        started = trio.current_time()
        error = await asker.error(asking(deadline=5.0))
        assert trio.current_time() - started < 1
        assert type(error) is ProviderBusy
        assert "its turn would come too late" in error.message
        assert error.retry_after == pytest.approx(10, abs=0.5)
        # It is no fault of the peer: one that has the time is answered by it.
        assert await asker.text(asking(deadline=25.0)) == "one two three"
        assert trio.current_time() - started == pytest.approx(20, abs=0.5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_one_whose_time_is_over_leaves_the_queue_of_the_peer(
    autojump_clock: Clock,
    pair: tuple[RoutingNode, RoutingNode, Slotted],
    temperature: float,
) -> None:
    """Nothing was measured yet, so nobody could know. With 0 it waits in a shared flight."""
    asker, server, provider = pair
    sampling = Sampling(temperature=temperature)
    async with busy(server, provider):
        started = trio.current_time()
        error = await asker.error(asking(deadline=5.0, sampling=sampling))
        assert type(error) is DeadlineExceeded
        assert trio.current_time() - started == pytest.approx(5, abs=0.1)
        await trio.sleep(0.1)  # until the reset is there
        assert provider.admission.slots.load().waiting == 0
        assert provider.admission.slots.load().running == 1


async def test_a_full_queue_of_the_peer_is_told_and_own_requests_still_go_first(
    autojump_clock: Clock, pair: tuple[RoutingNode, RoutingNode, Slotted]
) -> None:
    asker, server, provider = pair
    order: list[str] = []

    async def ask(node: RoutingNode, text: str) -> None:
        try:
            await node.text(asking(text=text))
            order.append(text)
        except ProviderBusy as error:
            order.append(f"{text} refused, again in {error.retry_after:.0f} s")

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(ask, asker, f"guest {number}")
            await trio.sleep(0.1)
        assert provider.admission.slots.load().waiting == 2
        assert provider.told("own").waiting == 0
        nursery.start_soon(ask, server, "own")
    assert order == [
        "guest 3 refused, again in 1 s",
        "guest 2 refused, again in 1 s",
        "guest 0",
        "own",
        "guest 1",
    ]
    assert provider.admission.slots.load().running == 0


async def test_the_peer_says_where_a_request_stands(
    autojump_clock: Clock, pair: tuple[RoutingNode, RoutingNode, Slotted]
) -> None:
    asker, server, provider = pair

    async def ask(number: int) -> None:
        await asker.text(asking(text=f"{number}", id=f"req-{number}"))

    async def place(number: int) -> frames.Place | None:
        route = asker.routes[f"req-{number}"]
        return await asker.manager.place_at_peer(f"req-{number}", route)

    async with trio.open_nursery() as nursery, busy(server, provider):
        assert not asker.manager.peers_busy()
        for number in (1, 2):
            nursery.start_soon(ask, number)
            await trio.sleep(0.1)
        assert provider.admission.slots.load().waiting == 2
        for number in (1, 2):
            told = await place(number)
            assert told is not None
            assert (told.place, told.of) == (number, 2)
        assert asker.manager.peers_busy()
        nursery.cancel_scope.cancel()
    assert await place(1) is None  # it is asked nowhere any more
