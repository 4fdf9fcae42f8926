"""The commands that make a node and its mesh: init, up, invite, join, leave."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Iterable
from typing import Any

from .addresses import best_for_others, dialable
from .cli_output import fail, print_json, read_input, say, warn
from .client import NodeClient, NodeNotRunning
from .config import home_path, load_config
from .config_loading import Flag
from .config_sections import Config
from .config_template import starting_config
from .home import Home, KnownPeers
from .join_link import MAX_ADDRESSES, MAX_LINK, JoinLink, decode, encode

#: Seconds. `join` waits so long for the first peer, `invite` for a node that has just started.
JOIN_WAIT, START_WAIT = 10.0, 5.0
POLL = 0.2
#: The node closes and opens its network meanwhile.
RELOAD_TIMEOUT = 20.0


def home_of(args: argparse.Namespace) -> Home:
    """The node's folder that the command line and the environment name."""
    return Home(home_path(args.home))


def typed(args: argparse.Namespace, command: str) -> str:
    """A command as it must be typed to reach the node that this one is about."""
    home = f"--home {shlex.quote(args.home)} " if args.home else ""
    return f"promptmesh {home}{command}"


def init(args: argparse.Namespace) -> int:
    """Make what is missing, and say what to do next."""
    home = home_of(args)
    # Before anything is written: a wrong name or model must not get into the file.
    load_config(home.path, _given({"node.name": ("--name", args.name)}))
    load_config(home.path, _given({"local_hf.model": ("--model", args.model)}))
    made = home.make(starting_config(name=args.name or "", model=args.model or ""))
    config = load_config(home.path)
    for warning in (*config.warnings, *home.warnings()):
        warn(warning)
    _say_if_not_taken(home, "node.name", args.name, config.node.name, quiet=args.quiet)
    # A node that has no model while one was given deserves a word even when quiet.
    quiet = args.quiet and bool(config.local_hf.model)
    _say_if_not_taken(home, "local_hf.model", args.model, config.local_hf.model, quiet=quiet)
    if not args.quiet:
        _say_what_is_next(args, home, config, made)
    return 0


def _say_if_not_taken(home: Home, key: str, given: str | None, now: str, *, quiet: bool) -> None:
    if given and given != now and not quiet:
        warn(
            f"{home.config_path} was there and is not changed: {key} is {now!r}. Set it to "
            f"{given!r} in that file if you want that"
        )


def _say_what_is_next(
    args: argparse.Namespace, home: Home, config: Config, made: list[str]
) -> None:
    say(f"made {', '.join(made)} in {home.path}" if made else f"{home.path} is complete")
    say(f"  node   {config.node.name}  {home.peer_id()}")
    say(f"  model  {config.local_hf.model or 'none of its own (local_hf.model)'}")
    from .finding_servers import find_now, found_tables  # trio and an HTTP client

    found = find_now(config)
    for table, server in zip(found_tables(found, config), found, strict=True):
        models = f"{len(server.models)} models" if len(server.models) != 1 else server.models[0]
        say(f"  found  {table.name} at 127.0.0.1:{server.port} ({models})")
    say("next")
    say(f"  {typed(args, 'up')}         start the node")
    say(f"  {typed(args, 'invite')}     print the link by which other machines join")
    say(f"  {typed(args, 'join LINK')}  join another mesh instead")


def up(args: argparse.Namespace) -> int:
    """Run the node until it is told to stop."""
    home = home_of(args)
    home.make(starting_config())
    config = load_config(home.path, _up_flags(args))
    for warning in (*config.warnings, *home.warnings()):
        warn(warning)
    from .daemon import run  # libp2p and all the rest

    with home.lock():
        return run(config, home)


def _up_flags(args: argparse.Namespace) -> dict[str, Flag]:
    return _given(
        {
            "http.listen": ("--http", args.http),
            "mesh.listen": ("--listen", args.listen),
            "mesh.mdns": ("--no-mdns", False if args.no_mdns else None),
            "node.name": ("--name", args.name),
            "node.json_logs": ("--json-logs", args.json_logs or None),
        }
    )


def _given(flags: dict[str, Flag]) -> dict[str, Flag]:
    """The flags that are on the command line."""
    return {key: flag for key, flag in flags.items() if flag[1] is not None}


def invite(args: argparse.Namespace) -> int:
    """Print a join link."""
    home = home_of(args)
    config = load_config(home.path)
    key = home.swarm_key()
    if not config.mesh.enabled:
        return fail("this node takes no part in a mesh: mesh.enabled is false")
    addresses = best_for_others(_own_addresses(args, home, config), MAX_ADDRESSES)
    if not addresses:
        return fail(
            "nobody could reach this node: its address is not known before it runs "
            f"(`{typed(args, 'up')}`), or it listens nowhere (mesh.listen)"
        )
    link = encode(JoinLink(key, addresses))
    if args.json:
        print_json({"link": link})
    else:
        print(link)
    say("This link holds the secret of the mesh: give it only to whom you would give a key.", "dim")
    return 0


def _told_addresses(node: NodeClient) -> list[str]:
    """Where the node is reached, as soon as it is in its mesh. Raises `NodeError`."""
    until = time.monotonic() + START_WAIT
    while True:
        addresses = node.get("/mesh/v1/status")["addresses"]
        if addresses or time.monotonic() >= until:
            return [str(address) for address in addresses]
        time.sleep(POLL)


def _own_addresses(args: argparse.Namespace, home: Home, config: Config) -> Iterable[str]:
    running = home.running()
    if running is not None:
        try:
            return _told_addresses(NodeClient(running.http))
        except NodeNotRunning:
            pass
    say(
        "The node does not run: the link has its configured addresses. Start it: "
        + typed(args, "up")
    )
    return dialable(config.mesh.listen, home.peer_id())


def join(args: argparse.Namespace) -> int:
    """Take the secret and the addresses of a link, and connect."""
    try:
        link = decode(read_input(2 * MAX_LINK) if args.link == "-" else args.link)
    except ValueError as error:
        return fail(str(error))
    home = home_of(args)
    home.make(starting_config())
    config = load_config(home.path)
    if link.peers == {home.peer_id()}:
        return fail("this link was made by this node itself: use it on another machine")
    same = link.key == home.swarm_key()
    known = home.known_peers()
    if known and not same and not args.replace:
        return fail(
            f"this node is in another mesh, with {_count(_peers_of(known), 'known peer')}. "
            f"`{typed(args, 'leave')}` leaves it; `join --replace` leaves it and joins this one"
        )
    home.write_known_peers(_joined(known if same else KnownPeers(), link))
    home.write_swarm_key(link.key)
    if not config.mesh.enabled:
        warn("mesh.enabled is false: this node will not connect before that is changed")
    return _connect(args, home)


def _joined(known: KnownPeers, link: JoinLink) -> KnownPeers:
    """What is known, with the link's addresses before it."""
    bootstrap = tuple(dict.fromkeys((*link.addresses, *known.bootstrap)))
    return KnownPeers(bootstrap=bootstrap, peers=known.peers)


def _peers_of(known: KnownPeers) -> int:
    return len({address.rpartition("/")[2] for address in known.bootstrap} | set(known.peers))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _connect(args: argparse.Namespace, home: Home) -> int:
    """Make a running node join at once, and say who is there."""
    client = _tell_node(home, "/mesh/v1/reload")
    if client is None:
        say(f"joined. Now run: {typed(args, 'up')}")
        return 0
    names = _wait_for_peers(client)
    if not names:
        return fail(
            f"no peer answered within {JOIN_WAIT:.0f} s. The node keeps trying; "
            f"`{typed(args, 'peers')}` shows why it does not work. Does the node that made the "
            "link run, and does a firewall let its mesh port through?"
        )
    say(f"joined: connected to {', '.join(names)}")
    return 0


def _tell_node(home: Home, path: str) -> NodeClient | None:
    """POST to the running node; None if there is none. Raises `NodeError` if it cannot do it."""
    running = home.running()
    if running is None:
        return None
    client = NodeClient(running.http)
    try:
        client.post(path, timeout=RELOAD_TIMEOUT)
    except NodeNotRunning:
        return None
    return client


def _wait_for_peers(client: NodeClient) -> list[str]:
    """The connected peers as soon as there are any, by name if one says it in time."""
    end = time.monotonic() + JOIN_WAIT
    while True:
        # The first is this node.
        peers: list[dict[str, Any]] = client.get("/mesh/v1/peers")[1:]
        found = [peer for peer in peers if is_connected(peer)]
        # A name comes with the peer's advert, a moment after the connection.
        if any(peer["node"] for peer in found) or time.monotonic() >= end:
            return [str(peer["node"] or peer["peer"]) for peer in found]
        time.sleep(POLL)


def is_connected(peer: dict[str, Any]) -> bool:
    """Is that row of `/mesh/v1/peers` a peer that can be asked now?"""
    return peer.get("state") == "connected"


def leave(args: argparse.Namespace) -> int:
    """Tell the peers, forget them, and be a mesh of one."""
    home = home_of(args)
    home.swarm_key()  # a folder that is no node's has nothing to leave
    told = _tell_node(home, "/mesh/v1/leave")
    home.forget_mesh()
    if told is not None:
        _tell_node(home, "/mesh/v1/reload")
    say(
        "left the mesh. This node is now alone in a new one; "
        f"`{typed(args, 'join LINK')}` joins another."
    )
    return 0
