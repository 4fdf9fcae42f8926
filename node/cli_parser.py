"""The commands and their flags. What a command does is a function in a `cli_*` module."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TypeAlias, get_args

from ..providers.base import Policy
from . import (
    cli_ask,
    cli_cache,
    cli_explain,
    cli_mesh,
    cli_rights,
    cli_share,
    cli_tables,
    cli_usage,
)

#: What `add_subparsers` gives, and what a command is.
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_Run: TypeAlias = Callable[[argparse.Namespace], int]

EPILOG = (
    "The node's folder is --home, else PROMPTMESH_HOME, else the platform's place for such. "
    "`promptmesh COMMAND --help` explains a command."
)


def parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    top = argparse.ArgumentParser(
        prog="promptmesh",
        description="A peer-to-peer LLM inference mesh: one local endpoint to every model on your "
        "machines.",
        epilog=EPILOG,
        parents=[_home_flag()],
        allow_abbrev=False,
    )
    top.add_argument("-V", "--version", action="store_true", help="say the version")
    top.set_defaults(run=lambda args: _no_command(top, args), home=None)
    commands = top.add_subparsers(title="commands", metavar="COMMAND")
    _add_node_commands(commands)
    _add_mesh_commands(commands)
    _add_tables(commands)
    return top


def _no_command(top: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.version:
        return cli_tables.version(args)
    top.print_help(sys.stderr)
    return 2


def _home_flag() -> argparse.ArgumentParser:
    """`--home`, which may stand before and after the command."""
    flag = argparse.ArgumentParser(add_help=False)
    flag.add_argument("--home", metavar="DIR", default=argparse.SUPPRESS, help="the node's folder")
    return flag


def _command(
    commands: _Commands, name: str, run: _Run, summary: str, more: str = ""
) -> argparse.ArgumentParser:
    made = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {more}".strip(),
        parents=[_home_flag()],
        allow_abbrev=False,
    )
    made.set_defaults(run=run)
    return made


def _json_flag(command: argparse.ArgumentParser, what: str = "print one JSON value") -> None:
    command.add_argument("--json", action="store_true", help=what)


def _add_node_commands(commands: _Commands) -> None:
    init = _command(
        commands,
        "init",
        cli_mesh.init,
        "make a node and a new mesh",
        "Writes the node's folder: identity, mesh secret and configuration, each only if it is "
        "missing.",
    )
    init.add_argument("--name", metavar="NAME", help="the node's name, into the configuration")
    init.add_argument(
        "--model", metavar="MODEL", help="the model it runs itself: a transformers id or a folder"
    )
    init.add_argument("--quiet", action="store_true", help="say nothing when all is well")

    up = _command(
        commands,
        "up",
        cli_mesh.up,
        "run the node in the foreground",
        "Makes the node's folder if it is missing. Ctrl-C stops it.",
    )
    up.add_argument("--http", metavar="HOST:PORT", help="where programs reach it (http.listen)")
    up.add_argument(
        "--listen",
        metavar="MULTIADDR",
        action="append",
        help="where peers reach it; may be repeated (mesh.listen)",
    )
    up.add_argument(
        "--no-mdns", action="store_true", help="do not look for peers on the local network"
    )
    up.add_argument("--name", metavar="NAME", help="the node's name (node.name)")
    up.add_argument("--json-logs", action="store_true", help="write the log as JSON lines")
    _add_ask(commands)


def _add_ask(commands: _Commands) -> None:
    ask = _command(
        commands,
        "ask",
        cli_ask.ask,
        "ask one prompt, and show the answer as it comes",
        "Goes through the running node, else answers in this process. A stored answer to the same "
        "question is reused.",
    )
    ask.add_argument("prompt", nargs="?", metavar="PROMPT", help="`-` or left out: standard input")
    ask.add_argument(
        "-m",
        "--model",
        metavar="MODEL",
        default="auto",
        help="MODEL, PROVIDER/MODEL, PEER-NAME:PROVIDER/MODEL or auto (the default)",
    )
    ask.add_argument("--provider", metavar="P", help="ask only this provider")
    ask.add_argument("--peer", metavar="P", help="ask only this peer (its name or id)")
    ask.add_argument("--policy", metavar="P", choices=get_args(Policy), help=_policies())
    ask.add_argument(
        "--max-cost",
        metavar="USD",
        type=float,
        help="answer only if that is expected to cost at most so many US dollars",
    )
    ask.add_argument("--system", metavar="TEXT", help="the system message")
    ask.add_argument("--max-tokens", metavar="N", type=int, help="end the answer after N tokens")
    ask.add_argument("--temperature", metavar="T", type=float, help="0 for the same answer always")
    _json_flag(ask, "print one JSON value with the answer and who gave it")


def _policies() -> str:
    return f"how one of several is chosen: {', '.join(get_args(Policy))}"


def _add_mesh_commands(commands: _Commands) -> None:
    invite = _command(
        commands,
        "invite",
        cli_mesh.invite,
        "print the link by which another machine joins this mesh",
        "The link holds the secret of the mesh: whoever has it is a member.",
    )
    _json_flag(invite, 'print {"link": ...}')
    join = _command(commands, "join", cli_mesh.join, "join the mesh of a link")
    join.add_argument("link", metavar="LINK", help="what `invite` printed; `-`: standard input")
    join.add_argument(
        "--replace", action="store_true", help="leave the mesh this node is in, and forget it"
    )
    _command(
        commands,
        "leave",
        cli_mesh.leave,
        "leave the mesh",
        "Tells the peers, forgets them, and makes a new mesh of this node alone. To come back "
        "takes a join link.",
    )


def _add_tables(commands: _Commands) -> None:
    peers = _command(
        commands,
        "peers",
        cli_tables.peers,
        "show who is in the mesh, and how loaded",
        "Its commands say what a peer may. Every member may everything until it is denied.",
    )
    peers.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="each peer in detail: its address, what it claims, what this node measured",
    )
    _json_flag(peers)
    _add_rights(peers)
    tables: tuple[tuple[str, _Run, str], ...] = (
        ("models", cli_tables.models, "show what can be asked"),
        ("providers", cli_tables.providers, "show what works here, and what does not and why"),
        ("config", cli_tables.config, "show every setting and where it comes from"),
    )
    for name, run, summary in tables:
        _json_flag(_command(commands, name, run, summary))
    _add_explain(commands)
    usage = _command(
        commands, "usage", cli_usage.usage, "show who asked and answered, and what that cost"
    )
    usage.add_argument(
        "--days",
        metavar="N",
        type=int,
        default=cli_usage.DAYS,
        help=f"how many, today among them ({cli_usage.DAYS})",
    )
    _json_flag(usage)
    _add_cache(commands)
    _add_share(commands)
    _command(commands, "version", cli_tables.version, "say the version")


def _add_rights(peers: argparse.ArgumentParser) -> None:
    actions = peers.add_subparsers(title="commands", metavar="COMMAND")
    some: tuple[tuple[str, _Run, str, str], ...] = (
        ("allow", cli_rights.allow, "give a peer back what was taken from it", "It ends a block."),
        ("deny", cli_rights.deny, "take something away from a peer, at once", ""),
    )
    for name, run, summary, more in some:
        command = _command(actions, name, run, summary, more)
        _peer(command)
        command.add_argument(
            "rights",
            metavar="RIGHT",
            nargs="*",
            type=cli_rights.right,
            help="`serve`: it may use this node's providers; `ask`: requests may go to it; "
            "`cache`: it may read stored answers, and its own are used. None named: all",
        )
        _json_flag(command)
    command = _command(
        actions, "block", cli_rights.block, "deny a peer everything, and refuse its connections"
    )
    _peer(command)
    _json_flag(command)


def _peer(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "peer", metavar="PEER", help="the name of its node, or its id, or a part of that at an end"
    )


def _add_explain(commands: _Commands) -> None:
    explain = _command(
        commands,
        "explain",
        cli_explain.explain,
        "show why a request went where it went",
        "What the cache said, who could answer and who not and why, what the policy expected of "
        "each, and how each attempt ended. The node remembers its last 512 requests.",
    )
    explain.add_argument(
        "id",
        nargs="?",
        metavar="ID",
        help="as the header x-promptmesh-request-id has it; left out: the last request",
    )
    explain.add_argument(
        "--last", metavar="N", type=int, help="list the last N requests instead of explaining one"
    )
    _json_flag(explain)


def _add_share(commands: _Commands) -> None:
    share = _command(
        commands,
        "share",
        cli_share.share,
        "write an answer into a CAR file, which may leave the mesh",
        "The file holds the answer and the signed claims for it, and your node signs it. `open` "
        "verifies it anywhere, without a network.",
    )
    share.add_argument("cid", metavar="CID", help="the answer, as `cache ls` shows it")
    share.add_argument(
        "-o", "--output", metavar="FILE", help="instead of CID.car; `-`: standard output"
    )
    share.add_argument("--force", action="store_true", help="write over a file that is there")
    share.add_argument(
        "--with-request",
        action="store_true",
        help="put in the question as well, which is read from standard input: no node stores it",
    )
    share.add_argument(
        "--request",
        metavar="FILE",
        help="put in the question from this file: a prompt as `ask` sent it, or the JSON body of "
        "a chat completion",
    )
    share.add_argument(
        "--no-claims", action="store_true", help="leave out the claims, which name other answers"
    )
    share.add_argument(
        "--private", action="store_true", help="also what has the scope `local`, or a namespace"
    )
    share.add_argument(
        "--pin", action="store_true", help="no file: put it into the Kubo of kubo.api, and pin it"
    )
    _json_flag(share)
    opened = _command(
        commands,
        "open",
        cli_share.open_share,
        "verify a share, and show it",
        "Every block against its CID, every signature, and the keys where the question is there. "
        "A file needs no node and no network; a CID is read through the running node.",
    )
    opened.add_argument("source", metavar="FILE-or-CID", help="`-`: standard input")
    _json_flag(opened)


def _add_cache(commands: _Commands) -> None:
    cache = _command(commands, "cache", lambda args: _no_cache_command(cache), "the stored answers")
    actions = cache.add_subparsers(title="commands", metavar="COMMAND")
    listing = _command(actions, "ls", cli_cache.ls, "list the stored answers")
    _cache_filters(listing)
    listing.add_argument(
        "--limit",
        metavar="N",
        type=int,
        default=cli_cache.LISTED,
        help=f"how many at most ({cli_cache.LISTED}); those used last come first",
    )
    _json_flag(listing)
    get = _command(actions, "get", cli_cache.get, "print a stored answer")
    _cid(get)
    get.add_argument(
        "--alternatives",
        action="store_true",
        help="list the answers to the same question, and who claims them",
    )
    _json_flag(get, "print the record as `ipfs dag get` does")
    _json_flag(_command(actions, "stat", cli_cache.stat, "show what is held and what it saved"))
    simple: tuple[tuple[str, _Run, str], ...] = (
        ("pin", cli_cache.pin, "keep an answer for ever"),
        ("unpin", cli_cache.unpin, "let an answer expire again"),
    )
    for name, run, summary in simple:
        command = _command(actions, name, run, summary)
        _cid(command)
        _json_flag(command)
    remove = _command(
        actions,
        "rm",
        cli_cache.rm,
        "forget answers",
        "One by its CID, pinned or not; or all of a model or a namespace but the pinned ones.",
    )
    _cid(remove, nargs="?")
    _cache_filters(remove)
    _json_flag(remove)
    collect = _command(actions, "gc", cli_cache.gc, "remove what expired or is too much, now")
    _json_flag(collect)


def _cid(command: argparse.ArgumentParser, nargs: str | None = None) -> None:
    command.add_argument(
        "cid", metavar="CID", nargs=nargs, help="as `cache ls` shows it; its beginning is enough"
    )


def _cache_filters(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", metavar="M", help="those of this model")
    command.add_argument(
        "--namespace", metavar="N", help="those of this namespace ('': the default one)"
    )


def _no_cache_command(cache: argparse.ArgumentParser) -> int:
    cache.print_help(sys.stderr)
    return 2
