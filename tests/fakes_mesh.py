"""What the tests of the mesh share: a provider that does as told, and nodes over a network."""

from __future__ import annotations

import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import trio
import trio.testing
from fakes import MemoryNetwork, MemoryTransport

from promptmesh.mesh.adverts import Advert, ProviderAdvert
from promptmesh.mesh.asking import Deadlines
from promptmesh.mesh.backends import BackendManager
from promptmesh.mesh.candidates import LocalBackend
from promptmesh.mesh.frames import Known, Load
from promptmesh.mesh.network import Network
from promptmesh.mesh.peers import PeerTable
from promptmesh.mesh.route import Route
from promptmesh.mesh.serving import Services
from promptmesh.providers.base import (
    Answering,
    Asked,
    Chunk,
    Embedding,
    EmbedRequest,
    GenerateError,
    GenerateRequest,
    Health,
    Input,
    Message,
    ModelOffer,
    Origin,
    Policy,
    Text,
    Usage,
)


def asking(model: str = "m", text: str = "hi", **fields: Any) -> GenerateRequest:
    """A request of one message."""
    message = Message(role="user", content=(Text(text=text),))
    return GenerateRequest(model=model, messages=(message,), **fields)


def embedding_of(given: Input) -> Embedding:
    """Three numbers that differ from one input to another."""
    vector = struct.pack("<3f", len(given), zlib.crc32(repr(given).encode()) / 2**32, 0.1)
    return Embedding(vector=vector, usage=Usage(prompt_tokens=len(given)))


@dataclass
class FakeProvider:
    """Answers with `words`; `fail` is raised before, `fail_after` after so many of them."""

    name: str = "fake"
    offers: tuple[ModelOffer, ...] = (ModelOffer(id="m"),)
    words: Sequence[str] = ("one ", "two ", "three")
    #: Seconds before the first word, and before each further one.
    delay: float = 0.0
    gap: float = 0.0
    fail: Exception | None = None
    fail_after: tuple[int, Exception] | None = None
    #: It ends without its last chunk.
    cut: bool = False
    slots: int = 4
    running: int = 0
    served: int = 0
    cancelled: int = 0
    requests: list[GenerateRequest] = field(default_factory=list)
    #: What `embed` gives, whatever it is asked; None: a vector of three numbers for each input.
    embeddings: Sequence[Embedding] | None = None
    embed_requests: list[EmbedRequest] = field(default_factory=list)
    kind: str = "fake"
    health: Health = field(default_factory=Health)

    def models(self) -> Sequence[ModelOffer]:
        return self.offers

    async def check(self) -> Health:
        return self.health

    def load(self) -> Load:
        return Load(running=self.running, slots=self.slots)

    @asynccontextmanager
    async def open(self, request: GenerateRequest) -> AsyncIterator[Answering]:
        self.requests.append(request)
        self.running += 1
        try:
            await trio.sleep(self.delay)
            if self.fail is not None:
                raise self.fail
            origin = Origin(provider=self.name, model=request.model, engine="fake 1")
            yield Answering(origin, self._chunks())
            self.served += 1
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        self.embed_requests.append(request)
        self.running += 1
        try:
            await trio.sleep(self.delay)
            if self.fail is not None:
                raise self.fail
            if self.embeddings is not None:
                return self.embeddings
            return [embedding_of(given) for given in request.inputs]
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _chunks(self) -> AsyncIterator[Chunk]:
        for number, word in enumerate(self.words):
            if number and self.gap:  # without a gap it is all there at once
                await trio.sleep(self.gap)
            if self.fail_after is not None and number == self.fail_after[0]:
                raise self.fail_after[1]
            yield Chunk(text=word)
        if not self.cut:
            usage = Usage(prompt_tokens=1, completion_tokens=len(self.words))
            yield Chunk(finish_reason="stop", usage=usage, cid="bafy-fake")

    def backend(self, *, shared: bool = True) -> LocalBackend:
        return LocalBackend(
            provider=self,
            name=self.name,
            kind=self.kind,
            shared=shared,
            load=lambda priority: self.load(),
        )


async def _nothing(peer: str) -> None:
    await trio.lowlevel.checkpoint()


class Node:
    """A node of a test: a table, a backend manager and, while it is in the mesh, a network."""

    def __init__(
        self,
        network: MemoryNetwork,
        name: str,
        *providers: FakeProvider,
        policy: Policy = "round_robin",
        deadlines: Deadlines | None = None,
        epoch: int = 1,
        known: Mapping[str, Sequence[str]] | None = None,
        bootstrap: Sequence[str] = (),
        on_met: Callable[[str], Awaitable[None]] = _nothing,
    ) -> None:
        self.name = name
        self.providers = list(providers)
        self.shared = True
        self.transport: MemoryTransport = network.transport(name)
        self.peer_id = self.transport.peer_id
        self.table = PeerTable(self.peer_id)
        self.claims: list[tuple[str, bytes, str]] = []
        self.gossiped_claims: list[tuple[str, bytes]] = []
        self.blocks: dict[bytes, bytes] = {}
        self.proofs: list[bytes] = []
        self.batches: list[bytes] = []
        self.put: list[tuple[str, tuple[bytes, ...]]] = []
        self.saved: Mapping[str, Sequence[str]] = {}
        self.allowed = True
        #: How this node's own requests went, by their ids.
        self.routes: dict[str, Route] = {}
        self.manager = BackendManager(
            local=lambda: [p.backend(shared=self.shared) for p in self.providers],
            peers=self.table,
            policy=policy,
            peer_id=self.peer_id,
            node=name,
            rng=Random(1),
            deadlines=deadlines,
            on_claim=lambda *claim: self.claims.append(claim),
            on_route=self._keep_route,
        )
        self.network = Network(
            self.transport,
            self.table,
            self._services(),
            describe=self.describe,
            epoch=epoch,
            rng=Random(1),
            on_claims=self._hear_claims,
            on_met=on_met,
            bootstrap=bootstrap,
            known=known,
            save_known=self._save,
        )
        self.manager.attach(self.network)
        self.scope = trio.CancelScope()

    def describe(self) -> Advert:
        shared = self.providers if self.shared else []
        return Advert(
            node=self.name,
            version="0",
            providers=tuple(
                ProviderAdvert(
                    name=p.name,
                    models=p.offers,
                    slots=p.slots,
                    running=p.running,
                    state=p.health.state,
                )
                for p in shared
            ),
        )

    async def run(self) -> None:
        """Be in the mesh until `stop` or `kill`."""
        with self.scope:
            await self.network.run()

    async def kill(self) -> None:
        """As kill -9: the connections break, nobody is told."""
        self.scope.cancel()
        await self.transport.aclose()

    async def stop(self) -> None:
        """Say that it goes, and go."""
        await self.network.announce_leaving()
        await trio.sleep(0.01)
        await self.kill()

    async def ask(self, request: GenerateRequest | None = None) -> tuple[str, Origin]:
        """The whole text, and the origin as its last chunk tells it."""
        text = ""
        async with self.manager.open(request or asking()) as answering:
            origin = answering.origin
            async for chunk in answering.chunks:
                text += chunk.text
                origin = chunk.origin or origin
        return text, origin

    async def ask_raises(self, request: GenerateRequest | None = None) -> GenerateError:
        """The error that a request ends in."""
        try:
            text, _ = await self.ask(request)
        except GenerateError as error:
            return error
        raise AssertionError(f"it was answered: {text}")

    def state_of(self, other: Node) -> str:
        """How this node sees another one."""
        state = self.table.get(other.peer_id)
        return "gone" if state is None else state.state

    def _services(self) -> Services:
        return Services(
            answer=lambda request, peer: self.manager.open(request, local_only=True),
            block=self._block,
            claims=self._claims_since,
            put_claims=lambda envelopes, peer: self.put.append((peer, tuple(envelopes))),
            find_claims=lambda keys: [b"claim of " + key for key in keys],
            loads=self.manager.loads,
            claim_for=lambda cid: f"claim for {cid}".encode(),
            may_serve=lambda peer: self.allowed,
        )

    async def _block(self, cid: bytes, peer: str, proof: bytes) -> bytes | None:
        await trio.lowlevel.checkpoint()
        self.proofs.append(proof)
        return self.blocks.get(cid)

    def _claims_since(self, known: Mapping[str, Known]) -> Iterable[bytes]:
        """Batches numbered from 0; `known` ranges are taken to begin there."""
        _, ranges = known.get(self.peer_id, (0, ()))
        return self.batches[ranges[-1][1] + 1 if ranges else 0 :]

    def _hear_claims(self, peer: str, batch: bytes) -> bool:
        self.gossiped_claims.append((peer, batch))
        return True

    def _keep_route(self, request: Asked, local_only: bool, route: Route) -> None:
        if not local_only:
            self.routes[request.id] = route

    def _save(self, known: Mapping[str, Sequence[str]]) -> None:
        self.saved = known


async def mesh_of(nursery: trio.Nursery, *nodes: Node) -> None:
    """Run the nodes, connect each to each, and wait until all know each other."""
    for node in nodes:
        nursery.start_soon(node.run)
    await trio.testing.wait_all_tasks_blocked()
    for i, node in enumerate(nodes):
        for other in nodes[i + 1 :]:
            await node.transport.connect(other.peer_id, other.transport.addresses)
    await wait_until(
        lambda: all(
            (state := a.table.get(b.peer_id)) is not None and state.advert is not None
            for a in nodes
            for b in nodes
            if a is not b
        )
    )


async def wait_until(condition: Callable[[], bool], *, timeout: float = 60.0) -> float:
    """Wait (in the clock's seconds) until something holds; returns how long that took."""
    started = trio.current_time()
    with trio.fail_after(timeout):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await trio.sleep(0.01)
    return trio.current_time() - started
