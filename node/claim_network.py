"""The mesh as the sharing of answers sees it, which may come and go."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ..cache.homes import Size
from ..mesh.frames import Known
from ..mesh.transport import PeerId

#: Which batches are known: peer -> (epoch, ranges of numbers).
Versions = Mapping[PeerId, Known]


class ClaimNetwork(Protocol):
    """What sharing needs of the mesh (`mesh.network.Network`)."""

    def members(self) -> int: ...

    def member_ids(self) -> Sequence[PeerId]: ...

    def connected(self) -> Sequence[PeerId]: ...

    async def fetch_block(self, peer: PeerId, cid: bytes, proof: bytes) -> bytes | None: ...

    async def ask_claims(self, peer: PeerId, known: Versions) -> Sequence[bytes]: ...

    async def find_claims(self, peer: PeerId, keys: Sequence[bytes]) -> Sequence[bytes]: ...

    async def put_claims(self, peer: PeerId, envelopes: Sequence[bytes]) -> None: ...

    async def announce_claims(self, message: bytes) -> None: ...


class Link:
    """What all parts of the sharing have in common: the network, this node's id, the clock."""

    def __init__(self, peer: PeerId, *, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives the seconds since 1970, in which claims count."""
        self.peer = peer
        self.clock = clock
        #: None while the node is alone.
        self.network: ClaimNetwork | None = None
        self._size = Size()

    def by_homes(self) -> bool:
        """Do claims go to the homes of their keys, and not to everybody?"""
        if self.network is None:
            return False
        return self._size.observe(self.network.members(), self.clock())
