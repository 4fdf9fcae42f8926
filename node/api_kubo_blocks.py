"""`block/*`, `refs/local` and `repo/*` of the Kubo RPC."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path

import trio

from ..cache.answers import AnswerCache
from ..cache.blocks import MAX_BLOCK, SqliteBlocks
from ..cache.cid import PREFIX, Codec, cid_bytes, cid_of, cid_text
from ..cache.links import link_text, stored, version_0
from .api_kubo_call import Call, Command, Failed, Refused, missing
from .api_kubo_pins import PinCommands
from .permissions import Permissions

#: What older clients call the codecs.
_OLD_NAMES = {"cbor": "dag-cbor", "protobuf": "dag-pb", "json": "dag-json", "v0": "dag-pb"}


class BlockCommands:
    """The commands about blocks as bytes."""

    def __init__(
        self,
        *,
        blocks: SqliteBlocks,
        answers: AnswerCache,
        permissions: Permissions,
        pins: PinCommands,
        path: Path | None,
    ) -> None:
        """`path` is where `cache.sqlite` lies."""
        self._blocks = blocks
        self._answers = answers
        self._permissions = permissions
        self._pins = pins
        self._path = path

    def commands(self) -> Mapping[str, Command]:
        return {
            "block/put": self.put,
            "block/get": self.get,
            "block/stat": self.stat,
            "block/rm": self.remove,
            "refs/local": self.refs,
            "repo/stat": self.repo,
            "repo/gc": self.collect,
        }

    async def put(self, call: Call) -> None:
        """Keep blocks as they are. What is in them is not looked at, as in Kubo."""
        codec, old = _codec(call)
        check_hash(call, "mhtype")
        if call.number("mhlen") not in (None, -1, 32):
            raise Failed("only digests of 32 bytes are kept here")
        emitted = []
        for part in call.files("data"):
            check_size(part.data)
            cid = cid_bytes(part.data, codec)
            await call.keep(cid, part.data)
            named = version_0(cid) if old else cid
            if call.flag("pin", False):
                await self._pins.pin(call, named, recursive=True)
            emitted.append({"Key": link_text(named), "Size": len(part.data)})
        await call.emit(*emitted)

    async def get(self, call: Call) -> None:
        cid = await call.named(call.argument("cid"))
        await call.send(await call.fetch(stored(cid)), content_type="application/vnd.ipld.raw")

    async def stat(self, call: Call) -> None:
        named = await call.named(call.argument("cid"))
        block = await call.fetch(stored(named))
        await call.emit({"Key": link_text(named), "Size": len(block)})

    async def remove(self, call: Call) -> None:
        """Forget blocks; not those that are pinned."""
        force, quiet = call.flag("force", False), call.flag("quiet", False)
        emitted = []
        for text in call.arguments("cid"):
            named = await call.named(text)
            problem = await self._remove(stored(named), force)
            if problem:
                emitted.append({"Hash": link_text(named), "Error": problem})
            elif not quiet:
                emitted.append({"Hash": link_text(named)})
        await call.emit(*emitted)

    async def _remove(self, cid: bytes, force: bool) -> str:
        """Why it was not removed; "" if it was."""
        pinned = await self._pins.kind(cid)
        if pinned:
            return f"pinned: {pinned}"
        # A block that is withheld is not there for programs, also not to be removed.
        there = await self._permissions.may_serve(None, cid) and await self._blocks.has(cid)
        if not there:
            return "" if force else missing(cid)
        await self._answers.remove(cid)
        return ""

    async def refs(self, call: Call) -> None:
        """The CIDs of all blocks that programs may have, as of raw blocks: so does Kubo."""

        async def lines() -> AsyncGenerator[bytes, None]:
            async with aclosing(self._blocks.digests()) as some:
                async for digests in some:
                    cids = [cid_of(digest, "raw") for digest in digests]
                    served = [c for c in cids if await self._permissions.may_serve(None, c)]
                    yield b"".join(
                        b'{"Ref":"%b","Err":""}\n' % cid_text(c).encode() for c in served
                    )
                    await trio.lowlevel.checkpoint()

        await call.stream(lines(), content_type="application/json")

    async def repo(self, call: Call) -> None:
        stat = await self._answers.stat(now=time.time())
        await call.emit(
            {
                "RepoSize": stat.bytes,
                "StorageMax": stat.max_bytes,
                "NumObjects": stat.blocks,
                "RepoPath": str(self._path or ""),
                "Version": "promptmesh",
            }
        )

    async def collect(self, call: Call) -> None:
        """What expired goes, and what is over the budget; Kubo drops all that is not pinned."""
        await self._answers.maintain(time.time())
        await call.emit()


def check_hash(call: Call, option: str) -> None:
    """Raises `Failed` for another hash than sha2-256."""
    if call.text(option, "sha2-256") not in ("", "sha2-256"):
        raise Failed(f"only sha2-256 is kept here, not {call.text(option)}")


def check_size(block: bytes) -> None:
    """Raises `Failed` for a block that nobody would take."""
    if len(block) > MAX_BLOCK:
        raise Failed("produced block is over 2MiB: big blocks can't be exchanged with other peers")


def codec_named(name: str) -> Codec:
    """The codec of that name, new or old. Raises `Failed`."""
    known = _OLD_NAMES.get(name, name)
    if known in PREFIX:
        return known
    raise Failed(f"unknown multicodec {name!r}; known are {', '.join(PREFIX)}")


def _codec(call: Call) -> tuple[Codec, bool]:
    """What the CID is to say, and whether it is to be of version 0."""
    new, old = call.text("cid-codec"), call.text("format")
    if old and new not in ("", "raw", old):
        raise Refused(f'unable to use "format" (deprecated) and a custom "{new}" at the same time')
    return codec_named(old or new or "raw"), old == "v0"
