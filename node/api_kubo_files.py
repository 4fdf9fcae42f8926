"""`add` and `cat` of the Kubo RPC: files, with the CIDs that Kubo gives them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import trio

from ..cache import unixfs
from ..cache.links import link_text, stored
from ..cache.unixfs import NotAFile
from .api_kubo_blocks import check_hash
from .api_kubo_call import Call, Command, Failed
from .api_kubo_pins import PinCommands
from .multipart import Part

#: Options of Kubo's that would make another file of it than what is written here.
_UNKNOWN = ("trickle", "wrap-with-directory", "nocopy", "inline", "preserve-mode", "preserve-mtime")
_CHUNKER = f"size-{unixfs.LEAF}"


class FileCommands:
    """The commands about files."""

    def __init__(self, *, pins: PinCommands) -> None:
        self._pins = pins

    def commands(self) -> Mapping[str, Command]:
        return {"add": self.add, "cat": self.cat}

    async def add(self, call: Call) -> None:
        version, raw_leaves = _form(call)
        only_hash, pin = call.flag("only-hash", False), call.flag("pin", True)
        emitted = []
        for part in call.files("path"):
            if part.content_type in ("application/x-directory", "application/symlink"):
                raise Failed("only files are added here, no directories and links")
            if "/" in (part.filename or "").strip("/"):
                raise Failed(f"a file in a directory: {part.filename!r}; only files are added here")
            emitted.append(await self._add(call, part, version, raw_leaves, not only_hash, pin))
        await call.emit(*emitted)

    async def _add(
        self, call: Call, part: Part, version: int, raw_leaves: bool, keep: bool, pin: bool
    ) -> dict[str, Any]:
        cids = []
        for built in unixfs.build(part.data, version=version, raw_leaves=raw_leaves):
            cids.append(stored(built.cid))
            if keep:
                await call.keep(cids[-1], built.block)
            # A file is many blocks, and other requests wait.
            await trio.lowlevel.checkpoint()
        if keep and pin:
            await self._pins.pin_these(built.cid, cids)
        text = link_text(built.cid)
        name = (part.filename or "").strip("/") or text
        return {"Name": name, "Hash": text, "Size": str(built.size)}

    async def cat(self, call: Call) -> None:
        offset, length = call.number("offset") or 0, call.number("length")
        if offset < 0:
            raise Failed("cannot specify negative offset")
        if length is not None and length < 0:
            raise Failed("cannot specify negative length")
        files = [await _sized(call, text) for text in call.arguments("ipfs-path")]
        left = max(0, sum(size for _, size in files) - offset)
        taken = left if length is None else min(length, left)
        await call.stream(_read(call, files, offset, taken), length=taken)


async def _sized(call: Call, text: str) -> tuple[bytes, int]:
    """The CID of a file, and its size. Raises `Failed`."""
    cid = stored(await call.named(text))
    try:
        return cid, unixfs.file_size(cid, await call.fetch(cid))
    except NotAFile as error:
        raise Failed(str(error)) from error


async def _read(
    call: Call, files: list[tuple[bytes, int]], offset: int, left: int
) -> AsyncGenerator[bytes, None]:
    """`left` bytes of the files one after another, from the offset on."""
    try:
        for cid, size in files:
            taken = min(left, max(0, size - offset))
            if taken:
                read = unixfs.read(call.fetch, cid, offset=offset, length=taken)
                async with aclosing(read) as pieces:
                    async for piece in pieces:
                        yield piece
            left -= taken
            offset = max(0, offset - size)
    except NotAFile as error:
        raise Failed(str(error)) from error


def _form(call: Call) -> tuple[int, bool]:
    """The version of the CIDs, and whether leaves are raw. Raises `Failed` for other files."""
    check_hash(call, "hash")
    asked = [name for name in _UNKNOWN if call.flag(name, False)]
    if asked:
        raise Failed(f"{asked[0]} is not known here")
    if call.text("chunker", _CHUNKER) not in ("", _CHUNKER):
        raise Failed(f"the only chunker here is {_CHUNKER}")
    version = call.number("cid-version") or 0
    if version not in (0, 1):
        raise Failed(f"unknown CID version: {version}")
    return version, call.flag("raw-leaves", version == 1)
