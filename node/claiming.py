"""What this node says of its answers: the claims that wait, and their signing.

An answer that it computed is claimed at once. A copy of somebody else's is claimed while few have
it, so that it is not lost with them; that has time until a batch is full.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import trio

from ..cache.answer_rows import StoredAnswer
from ..cache.claim_index import ClaimIndex
from ..cache.claims import MAX_ENTRIES, ClaimLog, Entry, unseal
from ..cache.keys import mesh_key
from ..cache.namespaces import Namespaces
from ..providers.base import ModelRequest
from .claim_network import Link

#: Sources of an answer that are enough: who then gets a copy does not say so.
ENOUGH_SOURCES = 3
#: Seconds that a copy waits for a batch to be full.
PATIENCE = 300.0
#: Seconds after which it is looked whether something is due, if nothing is new.
LOOK = 10.0
#: Copies that wait; of more, the oldest are not claimed.
MAX_COPIES = 4096
#: Signed batches that wait; of more, the oldest are not told but only given to who asks.
MAX_SIGNED = 4096


class Group(NamedTuple):
    """Claims of one namespace."""

    tag: bytes
    entries: Sequence[Entry]


class Claiming:
    """The claims of this node that nobody was told of yet."""

    def __init__(
        self, link: Link, *, log: ClaimLog, index: ClaimIndex, namespaces: Namespaces
    ) -> None:
        self._link = link
        self._log = log
        self._index = index
        self._namespaces = namespaces
        #: By namespace tag and CID: several questions may have one answer.
        self._unsigned: dict[bytes, dict[str, list[Entry]]] = {}
        #: Batches that are signed, and so kept to be asked for, and not told yet.
        self._signed: deque[tuple[bytes, Group]] = deque(maxlen=MAX_SIGNED)
        #: Copies, and when each came.
        self._copies: deque[tuple[float, bytes, Entry]] = deque(maxlen=MAX_COPIES)
        self._news = trio.Event()

    # --- what comes in

    def announce(self, key: bytes, request: ModelRequest, stored: StoredAnswer) -> None:
        """Tell the others that this node has the answer to that key."""
        namespace = self._namespaces.of(request.cache.namespace)
        if namespace is None or stored.stored_at is None or stored.expires_at is None:
            return
        held = stored.source != self._link.peer
        entry = Entry(
            mesh_key(namespace.secret, key),
            stored.cid.raw,
            stored.size,
            int(stored.stored_at),
            int(stored.expires_at),
            held,
        )
        if held:
            self._copies.append((self._link.clock(), namespace.tag, entry))
            if len(self._copies) < MAX_ENTRIES:
                return
        else:
            waiting = self._unsigned.setdefault(namespace.tag, {})
            waiting.setdefault(stored.cid_text, []).append(entry)
        self._news.set()

    def claim_for(self, cid: str) -> bytes | None:
        """The signed claim of an answer that was just announced, for the peer that asked for it."""
        for tag, entries in self._unsigned.items():
            if cid in entries:
                group = Group(tag, entries.pop(cid)[:MAX_ENTRIES])
                envelope = self.sign(group)
                if envelope is not None:
                    self._signed.append((envelope, group))
                    self._news.set()
                return envelope
        return None

    def say_again(self) -> None:
        """Tell everybody all that holds, in full batches of a new epoch."""
        for envelope in self._log.renew(self._link.clock()):
            batch = unseal(envelope).batch
            self._signed.append((envelope, Group(batch.namespace, batch.entries)))
        self._news.set()

    def live(self) -> list[tuple[bytes, Entry]]:
        """All that this node claims now, each with the tag of its namespace."""
        return self._log.live(self._link.clock())

    # --- what goes out

    async def wait(self) -> None:
        """Wait until there is something to tell, or to look at."""
        with trio.move_on_after(LOOK):
            await self._news.wait()
        self._news = trio.Event()

    def wake(self) -> None:
        """There is more to tell."""
        self._news.set()

    def sign_waiting(self) -> None:
        """Sign what waits, in batches as full as they can be: who asks can have it then."""
        while (group := self._take()) is not None:
            envelope = self.sign(group)
            if envelope is not None:
                self._signed.append((envelope, group))

    def take_signed(self) -> tuple[bytes, Group] | None:
        """The next batch to be told."""
        return self._signed.popleft() if self._signed else None

    def give_back(self, signed: tuple[bytes, Group]) -> None:
        """It is not its turn yet."""
        self._signed.appendleft(signed)

    def sign(self, group: Group) -> bytes | None:
        """A numbered batch of them, signed; None if nothing is left of them."""
        return self._log.seal(group.entries, namespace=group.tag, now=self._link.clock())

    def _take(self) -> Group | None:
        """The next claims to be signed, of one namespace; what has room is filled with copies."""
        for tag in list(self._unsigned):
            waiting = self._unsigned[tag]
            entries: list[Entry] = []
            while waiting and len(entries) < MAX_ENTRIES:
                cid, same = next(iter(waiting.items()))
                room = MAX_ENTRIES - len(entries)
                entries += same[:room]
                if len(same) > room:
                    waiting[cid] = same[room:]
                else:
                    del waiting[cid]
            if not waiting:
                del self._unsigned[tag]
            if entries:
                return Group(tag, entries + self._take_copies(tag, MAX_ENTRIES - len(entries)))
        return self._take_due_copies()

    def _take_due_copies(self) -> Group | None:
        """Copies, where there is a full batch of them or they have waited long enough."""
        while self._copies:
            since, tag, _ = self._copies[0]
            if len(self._copies) < MAX_ENTRIES and self._link.clock() - since < PATIENCE:
                break
            if entries := self._take_copies(tag, MAX_ENTRIES):
                return Group(tag, entries)
        return None

    def _take_copies(self, tag: bytes, limit: int) -> list[Entry]:
        """Copies of that namespace that few have; those that many have are dropped."""
        now = self._link.clock()
        taken: list[Entry] = []
        for _ in range(len(self._copies)):
            if len(taken) >= limit:
                break
            copy = self._copies.popleft()
            if copy[1] != tag:
                self._copies.append(copy)
            elif self._index.sources(copy[2].key, copy[2].cid, now) < ENOUGH_SOURCES:
                taken.append(copy[2])
        return taken
