"""What a streaming client is told while it waits for a slot, in virtual time."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio
import trio.testing
from fakes_mesh import FakeProvider
from fakes_router import setup

from promptmesh.mesh.embedding import answer_of
from promptmesh.node.api_openai import OpenAIApi
from promptmesh.node.http_server import HttpServer
from promptmesh.node.router import Router
from promptmesh.node.routes import Routes
from promptmesh.node.waiting_notes import EVERY, WaitingNotes, comment
from promptmesh.providers.admission import Admission
from promptmesh.providers.base import Answering, Asked, ProviderUnavailable
from promptmesh.providers.slots import Waiting

#: A test names the clock itself: it works only for who does.
Clock = trio.testing.MockClock


class World:
    """The route over a provider with one slot, which answers in 8 s."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.provider = FakeProvider(delay=8.0)
        self.admission = Admission(self.provider, slots=1)

    def serve(self, router: Router) -> None:
        """Answer by that router."""
        names: Any = None  # only `GET /v1/models` needs them
        notes = WaitingNotes(
            self.nursery, waiting=self._waiting, busy=lambda: not self.admission.slots.free
        )
        routes = Routes()
        routes.add("POST", "/", OpenAIApi(router, names, notes).chat_completions)
        self.server = HttpServer(routes)

    async def _waiting(self, request_id: str) -> Waiting | None:
        await trio.lowlevel.checkpoint()
        return self.admission.slots.waiting(request_id)

    def open(
        self, request: Asked, *, local_only: bool = False, key: bytes = b""
    ) -> AbstractAsyncContextManager[Answering]:
        return answer_of(self.admission, request)

    async def ask(self) -> trio.abc.HalfCloseableStream:
        """A client that has sent its request."""
        near, far = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self.server.serve_connection, far)
        fields = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        body = json.dumps(fields)
        head = (
            "POST / HTTP/1.1",
            "host: localhost",
            "connection: close",
            f"content-length: {len(body)}",
        )
        await near.send_all("\r\n".join((*head, "", body)).encode())
        await trio.testing.wait_all_tasks_blocked()
        return near


@pytest.fixture
async def world(nursery: trio.Nursery) -> AsyncIterator[World]:
    world = World(nursery)
    async with setup(world) as made:
        world.serve(made.router)
        yield world


async def all_of(client: trio.abc.ReceiveStream) -> tuple[str, list[str]]:
    """The head of an answer, and the events of its body, which must be whole."""
    data = b"".join([piece async for piece in client])
    head, _, rest = data.partition(b"\r\n\r\n")
    body = b""
    while rest and b"transfer-encoding: chunked" in head:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return head.decode(), body.decode().split("\n\n")[:-1]


def comments(events: list[str]) -> list[str]:
    return [event for event in events if event.startswith(":")]


async def test_who_waits_is_told_its_place_until_it_is_answered(
    autojump_clock: Clock, world: World
) -> None:
    clients = [await world.ask() for _ in range(4)]
    answers = [await all_of(client) for client in clients]
    told = [comments(events) for _, events in answers]
    assert told[0] == []
    assert told[1] == [": waiting, 1st of 3", ": its turn has come", ": its turn has come"]
    # One that is nearly over, or over its time, is expected to take 0.3 of it still.
    assert told[2][:3] == [
        ": waiting, 2nd of 3",
        ": waiting, 1st of 2, about 6 s",
        ": waiting, 1st of 2, about 2 s",
    ]
    for head, events in answers:
        assert head.startswith("HTTP/1.1 200 ")
        assert "x-promptmesh-request-id: req-" in head
        assert events[-1] == "data: [DONE]"
        objects = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
        text = "".join(o["choices"][0]["delta"].get("content", "") for o in objects)
        assert text == "one two three"
    assert "x-promptmesh-provider" in answers[0][0]
    assert "x-promptmesh-provider" not in answers[1][0]  # nobody knew it yet


async def test_what_fails_after_all_is_an_event(autojump_clock: Clock, world: World) -> None:
    clients = [await world.ask() for _ in range(2)]
    world.provider.fail = ProviderUnavailable("no more", retry_after=3)
    (first, _), (second, events) = [await all_of(client) for client in clients]
    assert first.startswith("HTTP/1.1 503 ")
    assert "retry-after: 3" in first
    assert second.startswith("HTTP/1.1 200 ")
    assert comments(events)
    assert json.loads(events[-1][6:])["error"]["message"] == "no more"


async def test_a_client_that_leaves_is_told_nothing_more(
    autojump_clock: Clock, world: World
) -> None:
    _, client = [await world.ask() for _ in range(2)]
    await trio.sleep(EVERY + 1)
    assert world.admission.slots.load().waiting == 1
    await client.aclose()
    await trio.testing.wait_all_tasks_blocked()
    assert world.admission.slots.load().waiting == 0


class Told:
    """A responder that remembers what is written."""

    def __init__(self) -> None:
        self.started = False
        self.written: list[bytes] = []

    async def start(self, status: int, **_: object) -> None:
        self.started = True

    async def write(self, data: bytes) -> None:
        self.written.append(data)


async def test_nothing_is_told_once_it_is_stopped(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    for _ in range(20):  # the order of the two tasks is drawn by lot
        known = trio.Event()

        async def waiting(request_id: str, known: trio.Event = known) -> Waiting:
            await known.wait()
            return Waiting(place=1, of=1, wait=None)

        responder: Any = Told()
        notes = WaitingNotes(nursery, waiting=waiting, busy=lambda: True)
        async with notes.told(responder, "req-1") as answered:
            await trio.sleep(EVERY + 1)
            known.set()
            await answered()
            await trio.testing.wait_all_tasks_blocked()
            assert (responder.started, responder.written) == (False, [])


@pytest.mark.parametrize(
    ("place", "text"),
    [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (23, "23rd")],
)
def test_a_comment(place: int, text: str) -> None:
    told = comment(Waiting(place=place, of=30, wait=12.4))
    assert told == f": waiting, {text} of 30, about 12 s\n\n".encode()
