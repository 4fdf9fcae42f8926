"""The ledger: who asked, who answered, how many tokens, what it cost and what the cache saved.

Requests are added up by day (UTC), asker, answerer, provider, model and how the cache dealt with
them, in memory, and written to `node.sqlite` every few seconds: no request waits for the disk. So
a kill loses the counts of those seconds, and an orderly end loses none.

What is kept is bounded: a day has some `MAX_ROWS` rows, beyond which members, providers and models
are not told apart any more, and days are kept for `KEPT_DAYS`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import trio

from ..mesh.transport import PeerId
from .node_database import DatabaseError, NodeDatabase

logger = logging.getLogger(__name__)

#: Seconds between two writes: what a kill loses at most.
WRITE_PERIOD = 3.0
DAY = 86_400
KEPT_DAYS = 400
#: Rows of one day. Each has some 200 bytes.
MAX_ROWS = 1000
#: What stands for names in a day of more rows.
OTHERS = "(others)"
#: Characters of a name that are kept: a peer chose it.
MAX_NAME = 200


class Pair(NamedTuple):
    """What a row is about: one who asked and one who answered, in one way, on one day."""

    #: Days since 1970, UTC.
    day: int
    #: The member whose request it was; "": a program of this machine.
    asker: PeerId
    #: Who answered; "": nobody.
    peer: PeerId
    provider: str
    model: str
    #: How the cache dealt with it (`CacheStatus`); "": it had no answer.
    cache: str


class Counts(msgspec.Struct):
    """What is added up. The names are those of the columns."""

    #: Whole answers; requests that ended without one, by an error or because the asker left.
    requests: int = 0
    unfinished: int = 0
    #: Of the whole answers, computed for them or not.
    prompt_tokens: int = 0
    completion_tokens: int = 0
    #: US dollars that computing cost, also of answers that were not finished.
    money: float = 0.0
    #: What need not be computed, as the cache had it or an equal request was in flight.
    tokens_saved: int = 0
    seconds_saved: float = 0.0
    money_saved: float = 0.0

    def add(self, more: Counts) -> None:
        """Add the others to these."""
        for name in NAMES:
            setattr(self, name, getattr(self, name) + getattr(more, name))


NAMES = Counts.__struct_fields__
_COLUMNS = ", ".join((*Pair._fields, *NAMES))
_ADD = (
    f"INSERT INTO usage ({_COLUMNS}) VALUES ({', '.join('?' * (len(Pair._fields) + len(NAMES)))})"
    f" ON CONFLICT ({', '.join(Pair._fields)}) DO UPDATE SET "
    + ", ".join(f"{name} = {name} + excluded.{name}" for name in NAMES)
)
_SUMS = ", ".join(f"sum({name})" for name in NAMES)


class Spent(msgspec.Struct):
    """US dollars that this node's own providers cost on a day: in all, and for members."""

    day: int
    all: float = 0.0
    members: float = 0.0

    def add(self, money: float, asker: PeerId) -> None:
        """So much more was spent for that asker ("": a program of this machine)."""
        self.all += money
        if asker:
            self.members += money


class Ledger:
    """Adds up requests. See the module."""

    def __init__(
        self, database: NodeDatabase, *, peer: PeerId, clock: Callable[[], float] = time.time
    ) -> None:
        """`peer` is this node. Raises `DatabaseError`."""
        self._database = database
        self._peer = peer
        self._clock = clock
        self._pending: dict[Pair, Counts] = {}
        #: The rows of the present day, to bound them.
        self._rows: set[Pair] = set()
        self._spent = Spent(self._today())
        self._faulty = False
        self._read()

    # --- counting

    def add(
        self,
        counts: Counts,
        *,
        asker: PeerId,
        peer: PeerId = "",
        provider: str = "",
        model: str = "",
        cache: str = "",
    ) -> None:
        """Count a request, or money that was spent for one."""
        spent = self.spent()
        pair = Pair(spent.day, asker, peer, provider[:MAX_NAME], model[:MAX_NAME], cache)
        if pair not in self._rows:
            if len(self._rows) >= MAX_ROWS:
                pair = self._merged(pair)
            self._rows.add(pair)
        if peer == self._peer:
            spent.add(counts.money, asker)
        known = self._pending.get(pair)
        if known is None:
            self._pending[pair] = counts
        else:
            known.add(counts)

    def spent(self) -> Spent:
        """What this node's own providers cost today."""
        day = self._today()
        if day != self._spent.day:
            self._spent = Spent(day)
            self._rows.clear()
        return self._spent

    def _merged(self, pair: Pair) -> Pair:
        """The row of those that are not told apart."""
        return pair._replace(
            asker=pair.asker and OTHERS,
            peer=pair.peer if pair.peer in ("", self._peer) else OTHERS,
            provider=OTHERS,
            model=OTHERS,
        )

    def _today(self) -> int:
        return int(self._clock() // DAY)

    def _read(self) -> None:
        """What is written of today: the node was restarted. Raises `DatabaseError`."""
        for *fields, money in self._database.rows(
            f"SELECT {', '.join(Pair._fields)}, money FROM usage WHERE day = ?", (self._spent.day,)
        ):
            pair = Pair(*fields)
            self._rows.add(pair)
            if pair.peer == self._peer:
                self._spent.add(money, pair.asker)

    # --- the file

    async def run(self) -> None:
        """Write down what was counted, now and then, until cancelled; the rest is to be written."""
        while True:
            await trio.sleep(WRITE_PERIOD)
            self.write()

    def write(self) -> None:
        """Write down what was counted. Never raises: after a fault it is tried again later."""
        if not self._pending:
            return
        rows = [
            (*pair, *(getattr(counts, name) for name in NAMES))
            for pair, counts in self._pending.items()
        ]
        try:
            with self._database.transaction() as connection:
                connection.executemany(_ADD, rows)
                connection.execute("DELETE FROM usage WHERE day < ?", (self._today() - KEPT_DAYS,))
        except DatabaseError as error:
            if not self._faulty:
                self._faulty = True
                logger.warning("the ledger cannot be written, and is kept in memory: %s", error)
            return
        self._pending, self._faulty = {}, False

    # --- reading

    def sums(self, *by: str, days: int) -> Iterator[tuple[Mapping[str, Any], Counts]]:
        """The counts of the last so many days, today among them, for each value of those fields.

        A field is one of `Pair`, or `served`: 1 for requests of members. Raises `DatabaseError`.
        """
        self.write()
        served = "asker != ''"
        fields = ", ".join(f"{served} AS served" if name == "served" else name for name in by)
        groups = ", ".join(by)
        rows = self._database.rows(
            f"SELECT {fields}, {_SUMS} FROM usage WHERE day > ? GROUP BY {groups}"
            f" ORDER BY {groups}",
            (self._today() - days,),
        )
        for row in rows:
            yield (
                dict(zip(by, row, strict=False)),
                Counts(**dict(zip(NAMES, row[len(by) :], strict=True))),
            )
