"""The commands about the stored answers: `promptmesh cache ...`.

They ask the node that runs on the folder; where none runs, they use its `cache.sqlite` themselves.
A CID may be given by its beginning, as long as only one answer's begins so.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

from .cli_mesh import home_of
from .cli_output import (
    Column,
    byte_size,
    duration,
    print_json,
    print_table,
    printable,
    say,
)
from .client import NodeClient, NodeRefused, error_message
from .config import load_config

#: Seconds for the commands that go through all answers.
PATIENCE = 600.0
#: Characters of a CID that a terminal shows at least: 8 more than all of them have in common.
SHORT_CID = 15
#: Columns of a terminal from which on it shows whole ones.
WIDE = 120
#: Answers that `ls` shows unless it is told otherwise.
LISTED = 100


def ls(args: argparse.Namespace) -> int:
    """The stored answers."""
    rows = _ask(args, "GET", "", limit=args.limit, **_filters(args))
    if args.json:
        print_json(rows)
        return 0
    if not rows:
        say("No such answer is stored." if _filters(args) else "No answer is stored yet.")
        return 0
    shown = _shown(rows)
    columns = (
        Column("CID"),
        Column("MODEL", shrink=True),
        Column("SIZE", right=True),
        Column("AGE", right=True),
        Column("LEFT", right=True),
        Column("HITS", right=True),
        Column("TEXT", shrink=True),
    )
    now = time.time()
    print_table(columns, [_row(row, now, shown) for row in rows])
    if len(rows) == args.limit:
        say(f"The first {args.limit}; --limit N shows more.", "dim")
    return 0


def _row(row: Mapping[str, Any], now: float, shown: int | None) -> Sequence[str]:
    return (
        row["cid"][:shown],
        row["model"],
        byte_size(row["bytes"]),
        duration(now - row["stored_at"]),
        _left(row, now),
        str(row["hits"]),
        row["text"],
    )


def _left(row: Mapping[str, Any], now: float) -> str:
    """How long it is kept."""
    return "pinned" if row["pinned"] else duration(row["expires_at"] - now)


def _shown(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """How many characters of the CIDs are shown: in a narrow terminal, what tells them apart."""
    if not sys.stdout.isatty() or shutil.get_terminal_size().columns >= WIDE:
        return None
    size = SHORT_CID
    while len({row["cid"][:size] for row in rows}) < len({row["cid"] for row in rows}):
        size += 1
    return size


def get(args: argparse.Namespace) -> int:
    """A stored answer: its text or numbers, its record, or all answers to its question."""
    if args.alternatives:
        return _alternatives(args)
    if args.json:
        print(_reply(args, "GET", _path(args.cid)).decode())
        return 0
    answer = _ask(args, "GET", _path(args.cid, "answer"))
    text = answer.get("text") or "\n".join(map(repr, answer.get("embedding", ())))
    if text:
        print(printable(text) if sys.stdout.isatty() else text)
    else:
        say("The answer has no text; --json shows what it has.")
    say(f"{answer['model']} · {answer['cid']}", "dim")
    return 0


def _alternatives(args: argparse.Namespace) -> int:
    rows = _ask(args, "GET", _path(args.cid, "alternatives"))
    if args.json:
        print_json(rows)
        return 0
    shown = _shown(rows)
    columns = (
        Column("CID"),
        Column("COMPUTED BY"),
        Column("AGE", right=True),
        Column("TEXT", shrink=True),
    )
    print_table(columns, [_alternative_row(row, shown) for row in rows])
    claims = [_claim_row(row, claim, shown) for row in rows for claim in row["claims"]]
    if claims:
        print()
        columns = (Column("CID"), Column("NODE"), Column("CLAIM"), Column("COUNTS", shrink=True))
        print_table(columns, claims)
    if len(rows) == 1:
        say("There is no other answer to the same question, as far as this node knows.", "dim")
    return 0


def _alternative_row(row: Mapping[str, Any], shown: int | None) -> Sequence[str]:
    cid = row["cid"][:shown]
    if not row["here"]:
        return cid, "", "", "(not here, but claimed)"
    source = "this node" if row["own"] else _peer(row["source"])
    return cid, source, duration(row["age"]), row["text"]


def _claim_row(
    row: Mapping[str, Any], claim: Mapping[str, Any], shown: int | None
) -> Sequence[str]:
    if claim["reason"]:
        counts = f"no: {claim['reason']}"
    else:
        counts = "yes" if claim["kind"] == "computed" else "as a source"
    return row["cid"][:shown], claim["node"] or _peer(claim["peer"]), claim["kind"], counts


def _peer(peer: str) -> str:
    return f"…{peer[-8:]}"


def stat(args: argparse.Namespace) -> int:
    """What is held, how requests were answered, and what that saved."""
    found = _ask(args, "GET", "stat")
    if args.json:
        print_json(found)
        return 0
    without = found["hits"] + found["coalesced"]
    asked = without + found["misses"] + found["bypassed"]
    share = f", {without / asked:.0%} of them answered without computing" if asked else ""
    lines = (
        ("answers", f"{found['answers']}, {found['pinned']} of them pinned"),
        ("size", f"{byte_size(found['bytes'])} of {byte_size(found['max_bytes'])}"),
        ("requests", f"{asked}{share}"),
        ("  hits here", f"{found['hits_local']}"),
        ("  hits in the mesh", f"{found['hits_mesh']}"),
        ("  shared a computation", f"{found['coalesced']}"),
        ("  misses", f"{found['misses']}"),
        ("  bypassed", f"{found['bypassed']}"),
        ("tokens saved", f"{found['tokens_saved']}"),
        ("time saved", duration(found["seconds_saved"])),
        ("money saved", f"${found['money_saved']:.4f}"),
    )
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    return 0


def pin(args: argparse.Namespace) -> int:
    """Keep an answer for ever."""
    return _done(args, _ask(args, "PUT", _path(args.cid, "pin")), "pinned {cid}")


def unpin(args: argparse.Namespace) -> int:
    """Let an answer expire and be evicted again."""
    return _done(args, _ask(args, "DELETE", _path(args.cid, "pin")), "unpinned {cid}")


def rm(args: argparse.Namespace) -> int:
    """Forget an answer, or those of a model or a namespace."""
    filters = _filters(args)
    if bool(args.cid) == bool(filters):
        say("promptmesh: say either a CID, or --model or --namespace", "red")
        return 2
    if args.cid:
        return _done(args, _ask(args, "DELETE", _path(args.cid)), "removed {cid}")
    gone = _ask(args, "DELETE", "", **filters)
    pinned = f"; {gone['pinned']} pinned ones stay (`cache unpin`)" if gone["pinned"] else ""
    return _done(args, gone, f"{gone['removed']} answers removed{pinned}")


def gc(args: argparse.Namespace) -> int:
    """Remove what has expired, and what is too much, now."""
    gone = _ask(args, "POST", "gc")
    return _done(
        args,
        gone,
        f"{gone['expired']} answers expired, {gone['evicted']} blocks evicted, "
        f"{byte_size(gone['freed'])} freed",
    )


def _done(args: argparse.Namespace, value: Mapping[str, Any], sentence: str) -> int:
    if args.json:
        print_json(value)
    else:
        print(sentence.format_map(value))
    return 0


# --- asking -------------------------------------------------------------------------------------


def _filters(args: argparse.Namespace) -> dict[str, str]:
    given = {"model": args.model, "namespace": args.namespace}
    return {name: value for name, value in given.items() if value is not None}


def _path(cid: str, action: str = "") -> str:
    return f"{quote(cid, safe='')}/{action}".rstrip("/")


def _ask(args: argparse.Namespace, method: str, rest: str, **query: object) -> Any:
    """The JSON of `METHOD /mesh/v1/cache/REST`. Raises `NodeError`."""
    return json.loads(_reply(args, method, rest, **query))


def _reply(args: argparse.Namespace, method: str, rest: str, **query: object) -> bytes:
    """The body, from the node or, where none runs, from the file. Raises `NodeError`."""
    home = home_of(args)
    running = home.running()
    asked = urlencode(query)
    if running is not None:
        path = f"/mesh/v1/cache/{rest}".rstrip("/") + (f"?{asked}" if asked else "")
        return NodeClient(running.http).ask(method, path, timeout=PATIENCE)
    from urllib.parse import parse_qs, unquote

    from .api_cache import reply_offline  # the database, which a running node has open itself

    max_bytes = load_config(home.path).cache.max_bytes
    fields = parse_qs(asked, keep_blank_values=True)
    reply = reply_offline(home.cache_path, max_bytes, method, unquote(rest), fields)
    if reply.status >= 400:
        raise NodeRefused(error_message(reply.body), reply.status)
    return reply.body
