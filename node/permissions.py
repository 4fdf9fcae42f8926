"""Who may have a block: the one guard of the mesh's requests, bitswap, the gateway and the RPC.

A block goes out if it belongs to an answer that is shared with the mesh, or if a program put it. An
answer in a named namespace goes only to peers that prove that they know the namespace. A block that
the index says nothing of goes nowhere: also one that is still here because it is pinned.

Programs of this machine (`peer` is None) come through the gateway and the RPC, whose readers prove
nothing. What stays behind this guard, its owner reads by `promptmesh cache get`.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Protocol

from ..cache.answer_rows import Reach
from ..cache.keys import block_proof
from ..cache.namespaces import Namespaces
from ..mesh.transport import PeerId

#: What a gateway says of a block that it does not give out; it says the same of one it lacks.
WITHHELD = (
    "this node does not hold {cid}, or does not give it out here: answers of scope `local` or of a "
    "namespace are read with `promptmesh cache get {cid}`"
)


class Reaches(Protocol):
    """Knows how far a block may go (`cache.answers.AnswerCache`)."""

    async def reach(self, cid: bytes) -> Reach: ...


class Permissions:
    """Decides who may have a block. See the module."""

    def __init__(
        self,
        *,
        answers: Reaches,
        namespaces: Namespaces,
        may_use_cache: Callable[[PeerId], bool] = lambda peer: True,
    ) -> None:
        self._answers = answers
        self._namespaces = namespaces
        self._may_use_cache = may_use_cache

    async def may_serve(self, peer: PeerId | None, cid: bytes, proof: bytes = b"") -> bool:
        """May that peer, or a program of this machine (None), have the block with that CID?

        `proof` is `block_proof` under the secret of the block's namespace; empty: none is given.
        """
        if peer is not None and not self._may_use_cache(peer):
            return False
        reach = await self._answers.reach(cid)
        if reach.put or "" in reach.namespaces:
            return True
        if peer is None or not proof:
            return False
        return any(self._proves(peer, cid, proof, name) for name in reach.namespaces)

    def _proves(self, peer: PeerId, cid: bytes, proof: bytes, name: str) -> bool:
        namespace = self._namespaces.of(name)
        return namespace is not None and hmac.compare_digest(
            proof, block_proof(namespace.secret, cid, peer)
        )
