"""A membership that ends and begins anew, without a mesh to be in."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import trio
import trio.testing

from promptmesh.mesh.peers import PeerTable
from promptmesh.node.config_sections import MeshConfig
from promptmesh.node.home import Home
from promptmesh.node.membership import Membership


async def test_several_that_have_it_begin_anew_at_once_all_see_it(
    autojump_clock: trio.testing.MockClock, tmp_path: Path, nursery: trio.Nursery
) -> None:
    nothing: Any = None  # only a node that is in a mesh needs these
    membership = Membership(
        config=MeshConfig(enabled=False),
        home=Home(tmp_path),
        table=PeerTable("me"),
        backends=nothing,
        sharing=nothing,
        reading=nothing,
        services=nothing,
        describe=nothing,
        rng=Random(1),
    )
    await nursery.start(membership.run)
    with trio.fail_after(60):
        async with trio.open_nursery() as askers:
            askers.start_soon(membership.reload)
            askers.start_soon(membership.leave)
            askers.start_soon(membership.reload)
    assert membership.problem == ""
