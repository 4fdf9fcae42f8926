"""What each peer may: use this node's providers, be asked, share answers, be connected at all.

Every member of the mesh may everything until its right is taken away. What that means:

- `serve`: it may use this node's providers. Without it, its requests are refused.
- `ask`: requests of this node may go to it. Without it, it is no candidate.
- `cache`: it may read the answers stored here, also as answers to its requests; and its claims, and
  the answers that it computed, are used here. What gossip spreads is keyed hashes, and reaches all.
- `block` takes all three, and closes and refuses every connection with it.

A right belongs to a peer id: names are chosen by those who bear them. The rights are kept in memory
as well, as they are asked at every request; only those that were taken away are written down.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Literal, get_args

import msgspec

from ..mesh.transport import PeerId
from ..providers.base import Asked, CacheOnlyMiss

if TYPE_CHECKING:
    # Who only names the rights, as the command line, needs no database.
    from .node_database import NodeDatabase

Right = Literal["serve", "ask", "cache"]
RIGHTS: tuple[Right, ...] = get_args(Right)


class Restricted(msgspec.Struct, frozen=True):
    """What is taken from one peer; `node` was the name of its node when that was said."""

    node: str = ""
    denied: frozenset[Right] = frozenset()
    blocked: bool = False

    def __str__(self) -> str:
        if self.blocked:
            return "blocked"
        return f"denied: {', '.join(right for right in RIGHTS if right in self.denied)}"


_FREE = Restricted()


class Rights:
    """The rights of all peers. See the module."""

    def __init__(self, database: NodeDatabase) -> None:
        """Raises `DatabaseError`."""
        self._database = database
        self._peers = dict(_read(database))

    # --- asking

    def of(self, peer: PeerId) -> Restricted:
        """What is taken from that peer."""
        return self._peers.get(peer, _FREE)

    def restricted(self) -> Mapping[PeerId, Restricted]:
        """The peers that may not everything."""
        return self._peers

    def may(self, peer: PeerId, right: Right) -> bool:
        """Has it that right?"""
        return right not in self._peers.get(peer, _FREE).denied

    def may_serve(self, peer: PeerId) -> bool:
        return self.may(peer, "serve")

    def may_cache(self, peer: PeerId) -> bool:
        return self.may(peer, "cache")

    def may_connect(self, peer: PeerId) -> bool:
        return not self._peers.get(peer, _FREE).blocked

    def why_not_ask(self, peer: PeerId) -> str:
        """Why requests of this node may not go to it; "" if they may."""
        restricted = self._peers.get(peer)
        if restricted is None or "ask" not in restricted.denied:
            return ""
        how = "it is blocked" if restricted.blocked else "it may not be asked"
        return f"{how} by this node's owner (`promptmesh peers allow`)"

    # --- changing; each raises `DatabaseError`, and then nothing has changed

    def allow(self, peer: PeerId, rights: Collection[Right] = RIGHTS) -> Restricted:
        """Give these back; with any of them a block ends, as it would leave no use of them."""
        before = self.of(peer)
        return self._set(peer, Restricted(before.node, before.denied.difference(rights)))

    def deny(
        self, peer: PeerId, rights: Collection[Right] = RIGHTS, *, node: str = ""
    ) -> Restricted:
        """Take these away. `node` is the name of its node now."""
        before = self.of(peer)
        return self._set(
            peer, Restricted(node or before.node, before.denied.union(rights), before.blocked)
        )

    def block(self, peer: PeerId, *, node: str = "") -> Restricted:
        """Have nothing to do with it."""
        return self._set(peer, Restricted(node or self.of(peer).node, frozenset(RIGHTS), True))

    def _set(self, peer: PeerId, now: Restricted) -> Restricted:
        with self._database.transaction() as connection:
            if now.denied:
                allowed = tuple(right not in now.denied for right in RIGHTS)
                connection.execute(
                    "INSERT OR REPLACE INTO peer (id, node, serve, ask, cache, blocked)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    (peer, now.node, *allowed, now.blocked),
                )
            else:
                connection.execute("DELETE FROM peer WHERE id = ?", (peer,))
        if now.denied:
            self._peers[peer] = now
        else:
            self._peers.pop(peer, None)
        return now


def _read(database: NodeDatabase) -> Iterator[tuple[PeerId, Restricted]]:
    for peer, node, *allowed, blocked in database.rows(
        "SELECT id, node, serve, ask, cache, blocked FROM peer"
    ):
        denied = (right for right, has in zip(RIGHTS, allowed, strict=True) if not has)
        yield peer, Restricted(node, frozenset(denied), bool(blocked))


def unstored(request: Asked) -> Asked:
    """The request of a peer without the right `cache`: no stored answer is one to it.

    Raises `CacheOnlyMiss` if it wants nothing else.
    """
    if request.cache.mode == "only":
        raise CacheOnlyMiss("its owner does not let this node read stored answers")
    if request.cache.mode != "use":
        return request
    cache = msgspec.structs.replace(request.cache, mode="refresh")
    return msgspec.structs.replace(request, cache=cache)


# --- which peer is meant --------------------------------------------------------------------------


class UnknownPeer(ValueError):
    """No peer, or more than one, goes by that."""


def find_peer(text: str, names: Mapping[PeerId, str], *, own: PeerId, is_id: bool) -> PeerId:
    """The peer that is meant by a node's name, an id, or a part of an id at its beginning or end.

    `names` are the peers that are known, with the names of their nodes; `is_id`: the text is a
    whole peer id, which is meant though it is not known. Raises `UnknownPeer`.
    """
    if text in names or is_id:
        found = [text]
    else:
        part = text.strip("…")
        found = [peer for peer, node in names.items() if text and node == text] or [
            peer for peer in names if part and (peer.startswith(part) or peer.endswith(part))
        ]
    if len(found) > 1:
        listed = ", ".join(sorted(f"{names[peer] or '-'} ({peer})" for peer in found[:10]))
        raise UnknownPeer(f"{text!r} may be any of {len(found)} peers: {listed}; say the id")
    if found == [own]:
        raise UnknownPeer(f"{text!r} is this node itself")
    if not found:
        known = ", ".join(sorted({node for node in names.values() if node})[:20])
        raise UnknownPeer(
            f"no peer is known as {text!r}"
            + (f"; there are {known}" if known else "; say its whole id")
        )
    return found[0]
