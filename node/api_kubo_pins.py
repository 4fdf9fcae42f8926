"""`pin/*` of the Kubo RPC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing

import trio

from ..cache.dags import PathError, walk
from ..cache.links import link_text, stored
from ..cache.pins import Kind, Pins, PinsFull
from .api_kubo_call import Call, Command, Failed
from .permissions import Permissions

_KINDS = ("recursive", "direct", "indirect", "all")


class PinCommands:
    """The commands about what is kept for ever."""

    def __init__(self, *, pins: Pins, permissions: Permissions) -> None:
        self._pins = pins
        self._permissions = permissions

    def commands(self) -> Mapping[str, Command]:
        return {"pin/add": self.add, "pin/rm": self.remove, "pin/ls": self.list}

    async def add(self, call: Call) -> None:
        recursive = call.flag("recursive", True)
        pinned = []
        for text in call.arguments("ipfs-path"):
            named = await call.named(text)
            await self.pin(call, named, recursive=recursive)
            pinned.append(link_text(named))
        await call.emit({"Pins": pinned})

    async def remove(self, call: Call) -> None:
        removed = []
        for text in call.arguments("ipfs-path"):
            named = await call.named(text)
            may = await self._permissions.may_serve(None, stored(named))
            if not may or not await self._pins.remove(stored(named)):
                raise Failed("not pinned or pinned indirectly")
            removed.append(link_text(named))
        await call.emit({"Pins": removed})

    async def list(self, call: Call) -> None:
        kind = call.text("type", "all")
        if kind not in _KINDS:
            raise Failed(f"invalid type '{kind}', must be one of {{{', '.join(_KINDS)}}}")
        keys: dict[str, dict[str, str]] = {}
        for text in call.arguments("ipfs-path", needed=False):
            named = await call.named(text)
            found = await self.kind(stored(named))
            if found is None or kind not in (found, "all"):
                raise Failed(f"path '/ipfs/{link_text(named)}' is not pinned")
            keys[link_text(named)] = {"Type": found}
        if "arg" not in call.request.query:
            for pin in await self._pins.listing():
                may = await self._permissions.may_serve(None, stored(pin.cid))
                if may and kind in (pin.kind, "all"):
                    keys[link_text(pin.cid)] = {"Type": pin.kind}
                await trio.lowlevel.checkpoint()  # there may be many
        await call.emit({"Keys": keys})

    async def kind(self, cid: bytes) -> Kind | None:
        """How a block is pinned, if it is and programs may have it."""
        if not await self._permissions.may_serve(None, cid):
            return None
        found = await self._pins.listing(cid)
        return found[0].kind if found else None

    async def pin(self, call: Call, named: bytes, *, recursive: bool) -> None:
        """Pin a block, and what is below it, all of which is fetched. Raises `Failed`."""
        below = []
        try:
            async with aclosing(walk(call.fetch, named, deep=recursive)) as blocks:
                async for cid, _ in blocks:
                    below.append(stored(cid))
        except PathError as error:
            raise Failed(str(error)) from error
        await self.pin_these(named, below, recursive=recursive)

    async def pin_these(
        self, named: bytes, below: Sequence[bytes], *, recursive: bool = True
    ) -> None:
        """Pin a block and those below it, which are here. Raises `Failed`."""
        try:
            kept = await self._pins.add(named, recursive=recursive, below=below)
        except PinsFull as error:
            raise Failed(str(error)) from error
        if not kept:
            raise Failed("the pin could not be written")
