"""A further store behind this node's own: a block is looked for here first, then there.

What is kept here, pinned or deleted is so there too, in the background and in order: nobody waits
for it. A block goes there only if it may leave this node. While the further store fails it is left
alone, and changes wait; those that the queue has no room for are of this node only.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Protocol

import trio

from .blocks import BlockStore, Change, SqliteBlocks, StoreSize
from .cid import PREFIX, cid_text
from .kubo import KuboError
from .record_bounds import RecordError
from .records import links

logger = logging.getLogger(__name__)

#: Changes that wait.
MAX_WAITING = 4096
#: Seconds that a store which failed is left alone.
PAUSE = 30.0
#: Seconds between two looks at whom it tells.
LOOK_PERIOD = 300.0
#: Times that a change is tried; then it is given up.
TRIES = 3

State = Literal["away", "public", "ready"]


class FurtherStore(BlockStore, Protocol):
    """A store in another program (`kubo.KuboBlocks`)."""

    @property
    def url(self) -> str: ...

    @property
    def problem(self) -> str:
        """What failed last; empty while it works."""
        ...

    async def exposure(self) -> str:
        """Why it may be on the public network; empty if it shows that it is not.

        Raises `KuboError` if it cannot be asked.
        """
        ...


class PublicStore(Exception):
    """The further store may be on the public network. The message is a whole sentence."""


@dataclass(frozen=True, slots=True)
class FurtherState:
    """How the further store is doing."""

    url: str
    state: State
    #: Why it is away, or what shows that it may be public; also where that is wanted.
    problem: str
    #: Changes that wait for it.
    waiting: int


class LayeredBlocks:
    """A `BlockStore` of two, whose `size` is that of the first. Nothing goes on unless `run` does.

    The further one is used after it has shown that it is private, or if `publish` is set: what is
    in a daemon on the public network, all the world can read.
    """

    def __init__(
        self,
        first: SqliteBlocks,
        further: FurtherStore,
        *,
        may_leave: Callable[[bytes], Awaitable[bool]],
        publish: bool = False,
        pin: bool = False,
    ) -> None:
        """`may_leave`: may a block go to other programs? `pin`: pin each answer there."""
        self._first = first
        self._further = further
        self._may_leave = may_leave
        self._publish = publish
        self._pin = pin
        self._state: State = "away"
        self._exposure = ""
        #: When it is next looked at, by trio's clock.
        self._look_at = float("-inf")
        self._waiting: deque[tuple[Change, bytes, int]] = deque()
        self._work = trio.Event()
        self._full = False
        first.on_change = self._changed

    def state(self) -> FurtherState:
        """How the further store is doing."""
        problem = self._further.problem or self._exposure
        return FurtherState(self._further.url, self._state, problem, len(self._waiting))

    # --- the store ------------------------------------------------------------------------------

    async def put(self, cid: bytes, block: bytes) -> bool:
        return await self._first.put(cid, block)

    async def get(self, cid: bytes) -> bytes | None:
        block = await self._first.get(cid)
        if block is None:
            block = await self.beyond(cid)
            if block is not None:
                await self._first.keep(cid, block)
        return block

    async def has(self, cid: bytes) -> bool:
        return await self._first.has(cid) or (
            self._state == "ready" and await self._further.has(cid)
        )

    async def delete(self, cid: bytes) -> bool:
        return await self._first.delete(cid)

    async def pin(self, cid: bytes, pinned: bool = True) -> bool:
        if pinned:
            await self.get(cid)
        return await self._first.pin(cid, pinned)

    async def size(self) -> StoreSize:
        return await self._first.size()

    async def beyond(self, cid: bytes) -> bytes | None:
        """The block from the further store, which is not kept here; None while that fails."""
        if self._state != "ready":
            return None
        block = await self._further.get(cid)
        if self._further.problem:
            self._leave_alone()
        return block

    async def bring(self, cid: bytes) -> bool:
        """Keep here what the further store has of an answer. Is the root here now?"""
        root = await self.get(cid)
        if root is None:
            return False
        with suppress(RecordError):  # a block that is no answer has no leaves that we know of
            for leaf in links(root):
                await self.get(leaf)
        return True

    async def pin_there(self, blocks: Sequence[tuple[bytes, bytes]]) -> None:
        """Put blocks into the further store now, and pin the first one with all it links to.

        Raises `KuboError`, which says why not.
        """
        await self._look()
        if self._state != "ready":
            problem = self._refusal() if self._state == "public" else self.state().problem
            raise KuboError(problem)
        for cid, block in blocks:
            if not await self._further.put(cid, block):
                raise KuboError(self._further.problem)
        if not await self._further.pin(blocks[0][0]):
            raise KuboError(self._further.problem or "it did not pin what it had just taken")

    # --- whom it tells --------------------------------------------------------------------------

    async def start(self) -> None:
        """Look at the further store once. Raises `PublicStore` for one that may not be used."""
        await self._look()
        if self._state == "public":
            raise PublicStore(self._refusal())

    def _refusal(self) -> str:
        return (
            f"the Kubo at {self._further.url} may be on the public network ({self._exposure}): "
            "what is in it, all the world can read. Set kubo.publish = true if that is what you "
            "want"
        )

    async def _look(self) -> None:
        try:
            self._exposure = await self._further.exposure()
        except KuboError as error:
            if self._look_at == float("-inf"):
                logger.warning("the Kubo at %s is not there: %s", self._further.url, error)
            self._exposure = str(error)
            self._leave_alone()
            return
        self._look_at = trio.current_time() + LOOK_PERIOD
        state: State = "ready" if self._publish or not self._exposure else "public"
        if state != self._state:
            self._say(state)
        self._state = state

    def _say(self, state: State) -> None:
        if state == "ready":
            network = "public: all can read what goes there" if self._exposure else "private"
            logger.info("answers also go to the Kubo at %s (%s)", self._further.url, network)
        else:
            logger.error("the Kubo at %s is not used: %s", self._further.url, self._exposure)

    def _leave_alone(self) -> None:
        self._state = "away"
        self._look_at = trio.current_time() + PAUSE

    # --- in the background ----------------------------------------------------------------------

    def _changed(self, change: Change, cid: bytes) -> None:
        if len(self._waiting) >= MAX_WAITING:
            if not self._full:
                logger.warning("the Kubo lags behind: some answers do not go there")
            self._full = True
            return
        self._full = False
        self._waiting.append((change, cid, 1))
        self._work.set()

    async def run(self) -> None:
        """Bring there what changes here, until cancelled."""
        while True:
            with trio.move_on_at(self._look_at):
                await self._work.wait()
            if trio.current_time() >= self._look_at:
                await self._look()
            if self._state == "ready":
                await self._bring()
            else:
                await trio.sleep_until(self._look_at)

    async def _bring(self) -> None:
        while self._waiting and self._state == "ready":
            change, cid, tried = self._waiting.popleft()
            await self._apply(change, cid)
            if self._further.problem:
                self._leave_alone()
                if tried < TRIES:
                    self._waiting.appendleft((change, cid, tried + 1))
                else:
                    logger.info("%s of %s is given up", change, cid_text(cid))
        if not self._waiting:
            self._work = trio.Event()

    async def _apply(self, change: Change, cid: bytes) -> None:
        if change == "unpin":
            await self._further.pin(cid, False)
        elif change == "delete":
            await self._further.delete(cid)
        elif await self._may_leave(cid):
            if change == "pin":
                await self._further.pin(cid)
            else:
                await self._copy(cid)

    async def _copy(self, cid: bytes) -> None:
        block = await self._first.get(cid)
        if block is None:  # it has gone meanwhile, or never was: a transaction failed
            return
        stored = await self._further.put(cid, block)
        if stored and self._pin and cid.startswith(PREFIX["dag-cbor"]):
            # Behind its leaves, which were written together with it.
            self._changed("pin", cid)
