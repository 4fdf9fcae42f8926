"""What the tests of the routers share: backends and members that do as told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio
from fakes_mesh import embedding_of

from promptmesh.cache.answer_rows import StoredAnswer
from promptmesh.cache.answers import AnswerCache
from promptmesh.cache.blocks import SqliteBlocks
from promptmesh.cache.database import Database
from promptmesh.mesh.embedding import closing
from promptmesh.node.ledger import Ledger
from promptmesh.node.node_database import NodeDatabase
from promptmesh.node.router import Backends as RealBackends
from promptmesh.node.router import Reuse, Router
from promptmesh.node.trace import Trace
from promptmesh.node.waiting_notes import WaitingNotes
from promptmesh.providers.base import (
    Answering,
    Asked,
    Chunk,
    Embedding,
    EmbedRequest,
    FinishReason,
    Input,
    ModelRequest,
    Origin,
    Ready,
    Usage,
)

Request = TypeVar("Request", bound=ModelRequest)

HERE, THERE = "12D3-here", "12D3-there"


@dataclass
class Backends:
    """Answers with the prompt and a number that rises, from the peer given."""

    peer: str = HERE
    origin: dict[str, Any] = field(default_factory=dict)
    finish: FinishReason | None = "stop"
    delay: float = 0
    embed: Callable[[Input], Embedding] = embedding_of
    asked: list[Any] = field(default_factory=list)
    local_only: list[bool] = field(default_factory=list)

    @asynccontextmanager
    async def open(
        self, request: Asked, *, local_only: bool = False, key: bytes = b""
    ) -> AsyncIterator[Answering]:
        self.asked.append(request)
        self.local_only.append(local_only)
        origin = Origin(
            peer=self.peer, node="n", provider="p", model="m", attempts=1, **self.origin
        )
        if isinstance(request, EmbedRequest):
            await trio.sleep(self.delay)
            yield Answering(origin, Ready([closing([self.embed(i) for i in request.inputs])]))
            return
        yield Answering(origin, self._chunks(request.messages[0].text, len(self.asked)))

    async def _chunks(self, prompt: str, number: int) -> AsyncIterator[Chunk]:
        yield Chunk(text=f"{prompt} ")
        await trio.sleep(self.delay)
        yield Chunk(text=str(number))
        if self.finish is not None:
            usage = Usage(prompt_tokens=5, completion_tokens=2)
            yield Chunk(finish_reason=self.finish, usage=usage)


@dataclass
class Shared:
    """Other members: they know the answer given, and remember what they are told."""

    knows: tuple[StoredAnswer, str] | None = None
    #: The same, by key.
    by_key: dict[bytes, tuple[StoredAnswer, str]] = field(default_factory=dict)
    asked: int = 0
    told: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    distrusted: set[str] = field(default_factory=set)

    async def find(
        self, key: bytes, request: Asked, tell: Callable[[str], None]
    ) -> tuple[StoredAnswer, str] | None:
        self.asked += 1
        found = self.by_key.get(key, self.knows)
        if found is None:
            tell("no peer claims to have one")
        return found

    def objection(self, key: bytes, request: Asked, stored: StoredAnswer) -> str:
        return "it is distrusted" if stored.source in self.distrusted else ""

    def announce(self, key: bytes, request: Asked, stored: StoredAnswer) -> None:
        self.told.append(stored.cid_text)
        self.sources.append(stored.source)


async def nowhere(request_id: str) -> None:
    """No request waits."""


class AsIs:
    def resolve(self, request: Request, tell: Callable[[str], None] = lambda why: None) -> Request:
        return request


@dataclass
class Setup:
    router: Router
    backends: Backends
    shared: Shared
    answers: AnswerCache
    ledger: Ledger
    #: Tells no stream that it waits: there are no queues.
    notes: WaitingNotes


@asynccontextmanager
async def setup(
    backends: RealBackends | None = None,
    *,
    reuse: Reuse = "deterministic",
    deadline: float = 60,
    min_agreement: int = 1,
    trace: Trace | None = None,
) -> AsyncIterator[Setup]:
    database = Database(None)
    answers = AnswerCache(database, SqliteBlocks(database), peer=HERE)
    fakes, shared = Backends(), Shared()
    node_database = NodeDatabase(None)
    ledger = Ledger(node_database, peer=HERE)
    async with trio.open_nursery() as nursery:
        router = Router(
            backends=backends or fakes,
            names=AsIs(),
            answers=answers,
            shared=shared,
            ledger=ledger,
            nursery=nursery,
            peer=HERE,
            node_of={HERE: "here", THERE: "there"}.__getitem__,
            reuse=reuse,
            deadline=deadline,
            min_agreement=min_agreement,
            trace=trace,
        )
        notes = WaitingNotes(nursery, waiting=nowhere, busy=lambda: False)
        asked = backends if isinstance(backends, Backends) else fakes
        yield Setup(router, asked, shared, answers, ledger, notes)
        nursery.cancel_scope.cancel()
    database.close()
    node_database.close()
