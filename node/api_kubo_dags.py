"""`dag/*` of the Kubo RPC."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

import trio

from ..cache import car, dags
from ..cache.blocks import MAX_BLOCK
from ..cache.cid import Codec, cid_bytes
from ..cache.dags import PathError, resolve, walk
from ..cache.links import link_text
from .api_kubo_blocks import check_hash, check_size, codec_named
from .api_kubo_call import Call, Command, Failed, path_of
from .api_kubo_pins import PinCommands

CAR = "application/vnd.ipld.car"
#: Bytes of a value that are read: dag-json is longer than the block that it makes.
MAX_SENT = 2 * MAX_BLOCK


class DagCommands:
    """The commands about what is in blocks."""

    def __init__(self, *, pins: PinCommands, max_body: int) -> None:
        self._pins = pins
        self._max_body = max_body

    def commands(self) -> Mapping[str, Command]:
        return {
            "dag/put": self.put,
            "dag/get": self.get,
            "dag/resolve": self.resolve,
            "dag/export": self.export,
            "dag/import": self.import_,
        }

    async def put(self, call: Call) -> None:
        """Keep values. The options are those of current clients and of those before Kubo 0.10."""
        stored_as = codec_named(call.text("store-codec") or call.text("format", "dag-cbor"))
        sent_as = codec_named(call.text("input-codec") or call.text("input-enc", "dag-json"))
        check_hash(call, "hash")
        emitted = []
        for part in call.files("object data"):
            if len(part.data) > MAX_SENT:
                raise Failed(f"{len(part.data)} bytes of {sent_as}; {MAX_SENT} is the most")
            convert = partial(_converted, sent_as, part.data, stored_as)
            block = await dags.aside(convert, len(part.data))
            check_size(block)
            cid = cid_bytes(block, stored_as)
            await call.keep(cid, block)
            if call.flag("pin", False):
                await self._pins.pin(call, cid, recursive=True)
            emitted.append({"Cid": {"/": link_text(cid)}})
        await call.emit(*emitted)

    async def get(self, call: Call) -> None:
        form = codec_named(call.text("output-codec", "dag-json"))
        found = await _found(call)
        try:
            await call.send(dags.encode(form, found.value))
        except ValueError as error:
            raise Failed(f"cannot be written as {form}: {error}") from error

    async def resolve(self, call: Call) -> None:
        found = await _found(call)
        await call.emit({"Cid": {"/": link_text(found.cid)}, "RemPath": "/".join(found.inside)})

    async def export(self, call: Call) -> None:
        root = await call.named(call.argument("root"))
        await call.stream(_guarded(car_of(call.fetch, root)), content_type=CAR)

    async def import_(self, call: Call) -> None:
        """Keep the blocks of CAR files, and pin their roots."""
        limits = car.Limits(bytes=self._max_body)
        roots: dict[bytes, None] = {}
        count = size = 0
        for part in call.files("path"):
            try:
                read = await dags.aside(partial(car.read, part.data, limits), len(part.data))
            except car.CarError as error:
                raise Failed(f"import failed: {error}") from error
            for cid, block in read.blocks.items():
                await call.keep(cid, block)
                await trio.lowlevel.checkpoint()
            roots |= dict.fromkeys(read.roots)
            count += len(read.blocks)
            size += sum(map(len, read.blocks.values()))
        emitted = [await self._pinned(call, root) for root in roots]
        if call.flag("stats", False):
            emitted.append({"Stats": {"BlockCount": count, "BlockBytesCount": size}})
        await call.emit(*emitted)

    async def _pinned(self, call: Call, root: bytes) -> dict[str, Any]:
        problem = ""
        if call.flag("pin-roots", True):
            try:
                await self._pins.pin(call, root, recursive=True)
            except Failed as error:
                problem = str(error)
        return {"Root": {"Cid": {"/": link_text(root)}, "PinErrorMsg": problem}}


async def car_of(
    fetch: dags.Fetch, root: bytes, *, deep: bool = True
) -> AsyncGenerator[bytes, None]:
    """A CAR file of a block and, if `deep`, all below it. Raises `PathError`, and as `fetch`."""
    begin = car.header([root])
    async with aclosing(walk(fetch, root, deep=deep)) as blocks:
        async for cid, block in blocks:
            yield begin + car.section(cid, block)
            begin = b""


async def _guarded(pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(pieces):
        try:
            async for piece in pieces:
                yield piece
        except PathError as error:
            raise Failed(str(error)) from error


async def _found(call: Call) -> dags.Found:
    try:
        return await resolve(call.fetch, path_of(call.argument("ref")))
    except PathError as error:
        raise Failed(str(error)) from error


def _converted(sent_as: Codec, data: bytes, stored_as: Codec) -> bytes:
    try:
        return dags.encode(stored_as, dags.decode(sent_as, data))
    except (ValueError, RecursionError) as error:
        raise Failed(f"not {sent_as} that can be kept as {stored_as}: {error}") from error
