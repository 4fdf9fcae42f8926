"""Real hosts on loopback, some of which cannot be dialled."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from promptmesh.mesh.host import HostSettings, Libp2pTransport, open_host
from promptmesh.mesh.transport import Stream

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
KEY = b"k" * 32
ECHO, TOPIC = "/test/echo/1", "/test/topic"
#: A peer that is not there.
STRANGER = "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB"
#: Seconds after which something hangs.
SOON = 60.0


@asynccontextmanager
async def host(
    name: str, *, listens: bool = True, offers: bool = False, key: bytes | None = KEY
) -> AsyncIterator[Libp2pTransport]:
    """A host that echoes. One that does not listen cannot be dialled."""
    settings = HostSettings(
        seed=name.encode().ljust(32, b"."),
        listen=(LOOPBACK,) if listens else (),
        psk=key,
        topics=frozenset({TOPIC}),
        relay=offers,
    )
    async with open_host(settings) as transport:
        assert isinstance(transport, Libp2pTransport)
        transport.handle(ECHO, echo)
        yield transport


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def says(a: Libp2pTransport, b: Libp2pTransport, data: bytes = b"hello") -> bytes:
    """What b echoes to a."""
    stream = await a.open_stream(b.peer_id, ECHO)
    received = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, data)
        while len(received) < len(data):
            received += await stream.receive_some()
    await stream.aclose()
    return received


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(SOON):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await trio.sleep(0.01)


async def meet(a: Libp2pTransport, b: Libp2pTransport) -> None:
    await a.connect(b.peer_id, b.addresses)


def port_of(transport: Libp2pTransport) -> int:
    """Where it listens."""
    return int(transport.addresses[0].split("/")[4])


async def reserve(node: Libp2pTransport, *relays: Libp2pTransport) -> None:
    """Have a place at each of them."""
    for each in relays:
        await meet(node, each)
    await until(lambda: len(node.addresses) == len(relays))


def circuits(node: Libp2pTransport) -> int:
    assert node.traversal.relay is not None
    return node.traversal.relay.circuits
