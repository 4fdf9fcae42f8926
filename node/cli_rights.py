"""The commands `peers allow`, `deny` and `block`: what a peer may."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from .cli_mesh import home_of
from .cli_output import fail, print_json, say
from .client import NodeClient
from .config import load_config
from .rights import RIGHTS, UnknownPeer


def right(text: str) -> str:
    """One of the rights. Raises `ArgumentTypeError`."""
    if text not in RIGHTS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(RIGHTS)}")
    return text


def allow(args: argparse.Namespace) -> int:
    """Give rights back to a peer."""
    return _change(args, "allow")


def deny(args: argparse.Namespace) -> int:
    """Take rights away from a peer."""
    return _change(args, "deny")


def block(args: argparse.Namespace) -> int:
    """Have nothing to do with a peer."""
    return _change(args, "block")


def _change(args: argparse.Namespace, action: str) -> int:
    rights = tuple(getattr(args, "rights", ())) or RIGHTS
    running = home_of(args).running()
    if running is not None:
        path = f"/mesh/v1/peers/{quote(args.peer, safe='')}/{action}"
        now = NodeClient(running.http).post(path, {"rights": rights})
    else:
        from .node_database import DatabaseError

        try:
            now = _offline(args, action, rights)
        except UnknownPeer as error:
            return fail(f"{error}; no node runs here, which would know the names of its peers")
        except DatabaseError as error:
            return fail(f"nothing was changed: {error}")
    if args.json:
        print_json(now)
    else:
        _say(now)
    return 0


def _offline(args: argparse.Namespace, action: str, rights: Any) -> dict[str, Any]:
    from .api_rights import change_offline

    home = home_of(args)
    own = home.peer_id(), load_config(home.path).node.name
    names = dict.fromkeys(home.known_peers().peers, "")
    return change_offline(home.database_path, action, args.peer, rights, names, own)


def _say(now: Mapping[str, Any]) -> None:
    name = f"{now['node']} " if now["node"] else ""
    say(f"{name}({now['peer']}): {rights_text(now) or 'may everything'}")


def rights_text(row: Mapping[str, Any]) -> str:
    """What a peer may not; "" if it may everything."""
    if row.get("blocked"):
        return "blocked"
    denied = row.get("denied") or ()
    return f"denied: {', '.join(denied)}" if denied else ""
