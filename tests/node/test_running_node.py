"""The running node as a provider of this process."""

from pathlib import Path
from typing import Any

import pytest
import trio

from promptmesh.node import running_node
from promptmesh.node.home import Home
from promptmesh.node.running_node import RunningNode


class Client:
    """Connections to one address."""

    def __init__(self, url: str, *_: Any, **__: Any) -> None:
        self.url = url
        self.open = True

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self.open = False


async def test_a_node_that_moved_is_asked_by_new_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same ones for all calls, and none is left open."""
    made: list[Client] = []

    def opened(*args: Any, **kwargs: Any) -> Client:
        made.append(Client(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(running_node, "open_client", opened)
    node = RunningNode(Home(tmp_path))
    await node._client_of("127.0.0.1:1")
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(node._client_of, "127.0.0.1:2")
    assert [(client.url, client.open) for client in made] == [
        ("http://127.0.0.1:1/v1", False),
        ("http://127.0.0.1:2/v1", True),
    ]
    await node.aclose()
    assert not made[-1].open
