"""The command `usage`: who asked and answered, what it cost, and what the cache saved."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from .cli_mesh import home_of
from .cli_output import Column, duration, fail, print_json, print_table, say
from .cli_tables import NOTHING, short_peer
from .client import NodeClient
from .config import load_config

#: Days that are shown where nobody says how many.
DAYS = 30
_COUNTS = (
    Column("ANSWERS", right=True),
    Column("UNFINISHED", right=True),
    Column("TOKENS IN", right=True),
    Column("OUT", right=True),
    Column("MONEY", right=True),
    Column("SAVED", right=True),
)


def usage(args: argparse.Namespace) -> int:
    """The ledger of the last days."""
    home = home_of(args)
    running = home.running()
    if running is not None:
        report = NodeClient(running.http).get(f"/mesh/v1/usage?days={args.days}")
    else:
        from .api_usage import report_offline  # the database, which a running node has open itself
        from .node_database import DatabaseError

        node = load_config(home.path).node.name
        try:
            report = report_offline(home.database_path, args.days, home.peer_id(), node)
        except DatabaseError as error:
            return fail(f"the ledger cannot be read: {error}")
    if args.json:
        print_json(report)
    else:
        _show(report)
    return 0


def _show(report: Mapping[str, Any]) -> None:
    rows = [("asked here", report["own"]), ("asked by members", report["served"])]
    _table((Column("ALL"),), [((name,), row) for name, row in rows])
    by_day = report["by_day"]
    if not by_day:
        say("Nothing was asked in this time.")
        return
    print()
    _table(
        (Column("DAY (UTC)"), Column("ASKED BY")),
        [((row["day"], "members" if row["served"] else "own"), row) for row in by_day],
    )
    print()
    _table(
        (Column("ASKED BY", shrink=True), Column("ANSWERED BY", shrink=True)),
        [((_asker(row), _peer(row["node"], row["peer"])), row) for row in report["by_peer"]],
    )
    print()
    _table(
        (Column("ANSWERED BY", shrink=True), Column("MODEL", shrink=True)),
        [((_provider(row), row["model"] or NOTHING), row) for row in report["by_model"]],
    )
    saved = sum(report[part]["seconds_saved"] for part in ("own", "served"))
    say(
        f"{report['since']} to {report['until']}. The cache saved {duration(saved)} and "
        f"{_money(sum(report[part]['money_saved'] for part in ('own', 'served')))}; this node's "
        f"providers cost {_money(report['spent_today'])} today, "
        f"{_money(report['spent_today_by_members'])} of it for members.",
        "dim",
    )


def _table(
    columns: Sequence[Column], rows: Sequence[tuple[Sequence[str], Mapping[str, Any]]]
) -> None:
    print_table((*columns, *_COUNTS), [(*names, *_counts(row)) for names, row in rows])


def _counts(row: Mapping[str, Any]) -> Sequence[str]:
    return (
        str(row["requests"]),
        str(row["unfinished"]),
        str(row["prompt_tokens"]),
        str(row["completion_tokens"]),
        _money(row["money"]),
        str(row["tokens_saved"]),
    )


def _money(dollars: float) -> str:
    return f"${dollars:.4f}" if dollars else "$0"


def _asker(row: Mapping[str, Any]) -> str:
    return _peer(row["asker_node"], row["asker"]) if row["asker"] else "this machine"


def _peer(node: str, peer: str) -> str:
    return node or (short_peer(peer) if peer else "nobody")


def _provider(row: Mapping[str, Any]) -> str:
    return f"{_peer(row['node'], row['peer'])}:{row['provider']}".rstrip(":")
