"""What each peer may, by HTTP and, where no node runs, on the file: `/mesh/v1/peers/PEER/...`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import unquote

import msgspec

from ..mesh.identity import is_peer_id
from ..mesh.peers import PeerTable
from ..mesh.transport import PeerId
from .http_server import Request, Responder
from .node_database import DatabaseError, NodeDatabase
from .rights import RIGHTS, Restricted, Right, Rights, UnknownPeer, find_peer
from .routes import ANY, Routes, send_other_method, send_problem

Action = Literal["allow", "deny", "block"]
PATH = "/mesh/v1/peers/"


class Change(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a change: which rights. `block` is about all of them."""

    rights: Annotated[tuple[Right, ...], msgspec.Meta(min_length=1, max_length=8)] = RIGHTS


class RightsApi:
    """The handlers of `/mesh/v1/peers/PEER/...`."""

    def __init__(
        self,
        rights: Rights,
        *,
        peer: PeerId,
        node: str,
        peers: PeerTable,
        changed: Callable[[PeerId], Awaitable[None]],
    ) -> None:
        """`changed` is told of each peer whose rights have changed, and sees to its connection."""
        self._rights = rights
        self._own = peer, node
        self._peers = peers
        self._changed = changed

    def add_to(self, routes: Routes) -> None:
        """Answer the paths."""
        routes.add_below(ANY, PATH, self.change)

    async def change(self, request: Request, responder: Responder, rest: str) -> None:
        """`POST /mesh/v1/peers/PEER/allow`, `deny`, `block`."""
        text, _, action = rest.partition("/")
        if action not in get_args(Action):
            await send_problem(responder, 404, f"there is no {request.path} here")
            return
        if request.method != "POST":
            await send_other_method(request, responder, ["POST"])
            return
        try:
            change = msgspec.json.decode(request.body or b"{}", type=Change)
            names = {peer.peer: peer.node for peer in self._peers}
            done = apply(self._rights, action, unquote(text), change, names, self._own)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            await send_problem(responder, 400, f"the body is wrong: {error}")
        except UnknownPeer as error:
            await send_problem(responder, 404, str(error))
        except DatabaseError as error:
            await send_problem(responder, 500, f"nothing was changed: {error}")
        else:
            await self._changed(done["peer"])
            await responder.send(200, msgspec.json.encode(done), content_type="application/json")


def apply(
    rights: Rights,
    action: str,
    text: str,
    change: Change,
    names: Mapping[PeerId, str],
    own: tuple[PeerId, str],
) -> dict[str, Any]:
    """Change what the peer may that `text` means, and say what it may now.

    `names` are the peers that are known, with the names of their nodes; `own` is this node.
    Raises `UnknownPeer` or `DatabaseError`.
    """
    known = {peer: restricted.node for peer, restricted in rights.restricted().items()}
    known |= {peer: node or known.get(peer, "") for peer, node in names.items()}
    known[own[0]] = own[1]
    peer = find_peer(text, known, own=own[0], is_id=is_peer_id(text))
    node = known.get(peer, "")
    if action == "allow":
        now = rights.allow(peer, change.rights)
    elif action == "deny":
        now = rights.deny(peer, change.rights, node=node)
    else:
        now = rights.block(peer, node=node)
    return {"peer": peer, "node": node, **rights_fields(now)}


def rights_fields(restricted: Restricted) -> dict[str, Any]:
    """What is taken from a peer, as the routes say it."""
    denied = [right for right in RIGHTS if right in restricted.denied]
    return {"denied": denied, "blocked": restricted.blocked}


def change_offline(
    path: Path,
    action: str,
    text: str,
    rights: tuple[Right, ...],
    names: Mapping[PeerId, str],
    own: tuple[PeerId, str],
) -> dict[str, Any]:
    """The same on the file of a node that does not run.

    Raises `UnknownPeer`, `DatabaseError`, or `HomeError`.
    """
    database = NodeDatabase(path)
    try:
        return apply(Rights(database), action, text, Change(rights), names, own)
    finally:
        database.close()
