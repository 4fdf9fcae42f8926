"""The ledger by HTTP: `GET /mesh/v1/usage`; and from the file, where no node runs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import msgspec

from ..mesh.transport import PeerId
from .http_server import Request, Responder
from .ledger import KEPT_DAYS, Counts, Ledger
from .node_database import DatabaseError, NodeDatabase
from .routes import Routes, send_problem

#: Days that are told where nobody says how many.
DAYS = 30
_EPOCH = date(1970, 1, 1)


class UsageApi:
    """The handler of `/mesh/v1/usage`."""

    def __init__(self, ledger: Ledger, node_of: Callable[[PeerId], str]) -> None:
        self._ledger = ledger
        self._node_of = node_of

    def add_to(self, routes: Routes) -> None:
        """Answer the path."""
        routes.add("GET", "/mesh/v1/usage", self.usage)

    async def usage(self, request: Request, responder: Responder) -> None:
        """`GET /mesh/v1/usage?days=N`."""
        given = request.query.get("days", [str(DAYS)])[0]
        if not given.isdecimal() or not 0 < int(given[:9]) <= KEPT_DAYS:
            await send_problem(responder, 400, f"days: expected a number from 1 to {KEPT_DAYS}")
            return
        try:
            report = usage_report(self._ledger, int(given), self._node_of)
        except DatabaseError as error:
            await send_problem(responder, 500, f"the ledger cannot be read: {error}")
            return
        await responder.send(200, msgspec.json.encode(report), content_type="application/json")


def usage_report(ledger: Ledger, days: int, node_of: Callable[[PeerId], str]) -> dict[str, Any]:
    """What was used in the last so many days, by day, asker, answerer and model.

    `own` are the requests of this machine's programs, `served` those of members. Raises
    `DatabaseError`.
    """
    totals = {bool(by["served"]): counts for by, counts in ledger.sums("served", days=days)}
    spent = ledger.spent()
    return {
        "since": _date(spent.day - days + 1),
        "until": _date(spent.day),
        "own": _fields(totals.get(False, Counts())),
        "served": _fields(totals.get(True, Counts())),
        "spent_today": spent.all,
        "spent_today_by_members": spent.members,
        "by_day": [
            {"day": _date(by["day"]), "served": bool(by["served"]), **_fields(counts)}
            for by, counts in ledger.sums("day", "served", days=days)
        ],
        "by_peer": [
            {
                "asker": by["asker"],
                "asker_node": node_of(by["asker"]),
                "peer": by["peer"],
                "node": node_of(by["peer"]),
                **_fields(counts),
            }
            for by, counts in ledger.sums("asker", "peer", days=days)
        ],
        "by_model": [
            {**by, "node": node_of(by["peer"]), **_fields(counts)}
            for by, counts in ledger.sums("peer", "provider", "model", days=days)
        ],
        "by_cache": [
            {"served": bool(by["served"]), "cache": by["cache"], **_fields(counts)}
            for by, counts in ledger.sums("served", "cache", days=days)
        ],
    }


def report_offline(path: Path, days: int, peer: PeerId, node: str) -> dict[str, Any]:
    """The same of a node that does not run. Raises `DatabaseError` or `HomeError`."""
    database = NodeDatabase(path)
    try:
        names = {peer: node}
        return usage_report(Ledger(database, peer=peer), days, lambda p: names.get(p, ""))
    finally:
        database.close()


def _fields(counts: Counts) -> dict[str, Any]:
    return msgspec.structs.asdict(counts)


def _date(day: int) -> str:
    return (_EPOCH + timedelta(days=day)).isoformat()
