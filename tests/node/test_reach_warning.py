"""What `promptmesh peers` says of how this node is reached."""

from dataclasses import dataclass

import pytest

from promptmesh.mesh.transport import Reach
from promptmesh.node.api_mesh import reach_warning

DIRECT = "/ip4/10.0.0.2/tcp/7412/p2p/12D3KooWMe"
CIRCUIT = "/ip4/203.0.113.1/tcp/7412/p2p/12D3KooWRelay/p2p-circuit/p2p/12D3KooWMe"


@dataclass
class Reached:
    """How a node is reached."""

    reachability: Reach
    addresses: list[str]


@pytest.mark.parametrize(
    ("reach", "addresses", "expected"),
    [
        ("unknown", [DIRECT], ""),
        ("reachable", [DIRECT], ""),
        ("unreachable", [DIRECT, CIRCUIT], "they reach it through a relay"),
        ("unreachable", [DIRECT], "none of them relays for it"),
    ],
)
def test_the_owner_is_told(reach: Reach, addresses: list[str], expected: str) -> None:
    said = reach_warning(Reached(reach, addresses))
    assert expected in said
    assert bool(said) == (reach == "unreachable")
