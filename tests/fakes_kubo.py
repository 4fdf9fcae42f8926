"""A Kubo that says what a test wants: at its socket, and as a store."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio
from ports import listener_on_loopback

from promptmesh.cache.blocks import MemoryBlocks
from promptmesh.cache.kubo import KuboError

Answer = Callable[[trio.SocketStream], Awaitable[None]]


class ScriptedKubo:
    """An RPC that reads each request whole, and answers it as `script` says by its command.

    An answer is what is sent, or what sends it.
    """

    def __init__(self, script: dict[str, bytes | Answer]) -> None:
        self.script = script
        self.asked: list[str] = []
        #: The multiaddr of the RPC, once it runs.
        self.api = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            listener = await listener_on_loopback()
            self.api = f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}"
            nursery.start_soon(trio.serve_listeners, self._serve, [listener])
            yield
            nursery.cancel_scope.cancel()

    async def _serve(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                while head := await _read_request(stream):
                    await self._answer(head, stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # one of both has had enough

    async def _answer(self, head: str, stream: trio.SocketStream) -> None:
        _, target, *_ = [*head.split(), "", ""]
        if not target.startswith("/api/v0/"):
            # Another test looks for what had this port before.
            await stream.send_all(reply(b"", 404))
            return
        self.asked.append(target)
        answer = self.script[target.removeprefix("/api/v0/").partition("?")[0]]
        if isinstance(answer, bytes):
            await stream.send_all(answer)
        else:
            await answer(stream)


async def _read_request(stream: trio.SocketStream) -> str:
    """The head of a request, when all of it has come; empty at the end."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = await stream.receive_some()
        if not more:
            return ""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    # The library sends what it puts in chunks, and nothing else.
    while b"chunked" in head and not body.endswith(b"\r\n0\r\n\r\n"):
        body += await stream.receive_some()
    return head.decode()


def reply(body: bytes, status: int = 200, kind: str = "application/json") -> bytes:
    """An answer of HTTP."""
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def json_reply(value: object, status: int = 200) -> bytes:
    return reply(json.dumps(value).encode(), status)


NOT_FOUND = json_reply({"Message": "block was not found locally", "Code": 0, "Type": "error"}, 500)


class FakeKubo(MemoryBlocks):
    """A further store in memory, which can fail and be public."""

    url = "http://127.0.0.1:5001"

    def __init__(self) -> None:
        super().__init__()
        self.problem = ""
        #: While this is set, everything fails.
        self.fault = ""
        #: What shows that it is public.
        self.public = ""
        self.calls: list[tuple[str, bytes]] = []

    def _fails(self, what: str, cid: bytes = b"") -> bool:
        self.calls.append((what, cid))
        self.problem = self.fault
        return bool(self.fault)

    async def put(self, cid: bytes, block: bytes) -> bool:
        return not self._fails("put", cid) and await super().put(cid, block)

    async def get(self, cid: bytes) -> bytes | None:
        return None if self._fails("get", cid) else await super().get(cid)

    async def has(self, cid: bytes) -> bool:
        return not self._fails("has", cid) and await super().has(cid)

    async def delete(self, cid: bytes) -> bool:
        return not self._fails("delete", cid) and await super().delete(cid)

    async def pin(self, cid: bytes, pinned: bool = True) -> bool:
        fails = self._fails("pin" if pinned else "unpin", cid)
        return not fails and await super().pin(cid, pinned)

    async def exposure(self) -> str:
        if self._fails("exposure"):
            raise KuboError(self.fault)
        return self.public
