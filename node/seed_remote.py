"""A cache of the program's own, the `remote_cache` of its `RouterDeps`. A fault of it is a miss."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import trio

from .seed_ask import RESPONSE

logger = logging.getLogger(__name__)

#: A thread cannot be cancelled; it is left to finish. (The type stubs know the older name only.)
_LEAVE_BEHIND: dict[str, Any] = {"abandon_on_cancel": True}
#: Calls of it at once, and seconds that one may take.
CALLS, WAIT = 4, 10.0


class RemoteCaches:
    """Asks and tells them in threads, as they may block."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(CALLS)
        self._told = False

    async def get(self, remote: Any, key: str) -> str | None:
        """The answer to the question of that key."""
        found = await self._call(lambda: remote.get(RESPONSE + key))
        return found if isinstance(found, str) else None

    async def set(self, remote: Any, key: str, text: str) -> None:
        """Tell it a new one."""
        await self._call(lambda: remote.set(RESPONSE + key, text))

    async def _call(self, call: Callable[[], Any]) -> Any:
        try:
            with trio.move_on_after(WAIT):
                return await trio.to_thread.run_sync(call, limiter=self._limiter, **_LEAVE_BEHIND)
            self._failed(f"it did not answer within {WAIT:g} s")
        except Exception as error:  # Whatever it raises: told once, and then a miss.
            self._failed(f"{type(error).__name__}: {error}")
        return None

    def _failed(self, reason: str) -> None:
        log = logger.debug if self._told else logger.warning
        self._told = True
        log("the remote cache failed: %s", reason)
