"""All commands of the Kubo RPC, over the parts of a node."""

from __future__ import annotations

from pathlib import Path

from ..cache.pins import Pins
from .api_kubo import KuboApi
from .api_kubo_blocks import BlockCommands
from .api_kubo_dags import DagCommands
from .api_kubo_files import FileCommands
from .api_kubo_node import NodeCommands, Swarm
from .api_kubo_pins import PinCommands
from .parts import Parts, version


def kubo_api(
    parts: Parts, swarm: Swarm, *, cache_path: Path | None, max_bytes: int, max_body: int
) -> KuboApi:
    """The RPC. `max_bytes` of the cache may be pinned; a request has at most `max_body` bytes."""
    permissions = parts.permissions
    blocks = parts.blocks
    pins = PinCommands(
        pins=Pins(parts.database, max_bytes=max_bytes, tell=blocks.tell), permissions=permissions
    )
    about_blocks = BlockCommands(
        blocks=blocks,
        answers=parts.answers,
        permissions=permissions,
        pins=pins,
        path=cache_path,
    )
    commands = {
        **NodeCommands(peer=parts.peer, version=version(), swarm=swarm).commands(),
        **about_blocks.commands(),
        **pins.commands(),
        **DagCommands(pins=pins, max_body=max_body).commands(),
        **FileCommands(pins=pins).commands(),
    }
    return KuboApi(parts.reading, commands)
