"""What a peer says of itself to the library's host."""

import pytest
from hosts import host, says

from promptmesh.mesh.transport import Stream, TransportError


@pytest.mark.parametrize(
    ("said", "agent"),
    [
        (b"\x0a\x32\x08kubo/0.1", "kubo/0.1"),
        (b"\x0a\x32\x08kubo\x1b[2m", "kubo[2m"),
        (b"\x00", ""),
        (b"\x04\x32\x02\xff\xfe", None),
        (b"\x0a\x32\x08kubo", None),
        (b"\xff\xff\xff\x7f" + bytes(100_000), None),
        (b"\x80" * 20, None),
    ],
    ids=["name", "control characters", "nothing", "no text", "cut", "too long", "no length"],
)
async def test_what_a_peer_says_of_itself_is_bounded(said: bytes, agent: str | None) -> None:
    async def identify(stream: Stream) -> None:
        await stream.send_all(said)

    async with host("a") as a, host("b") as b:
        b.handle("/ipfs/id/1.0.0", identify)
        await a.connect(b.peer_id, b.addresses)
        if agent is None:
            with pytest.raises(TransportError):
                await a.agent(b.peer_id)
        else:
            assert await a.agent(b.peer_id) == agent
        assert await says(a, b) == b"hello"
