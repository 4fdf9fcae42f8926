"""The read-only IPFS gateway: a block by its CID, so that anybody can check the bytes.

Follows https://specs.ipfs.tech/http-gateways/trustless-gateway/ for `format=raw`. Only blocks that
this node holds are given; it asks nobody else for them.
"""

from __future__ import annotations

import msgspec

from ..cache.blocks import BlockStore
from ..cache.cid import cid_text, parse_cid, split
from ..cache.dag_json import block_as_json
from .http_server import Request, Responder
from .routes import send_problem

#: What can be asked for by `?format=` or by `Accept`.
_FORMATS = {
    "raw": "application/vnd.ipld.raw",
    "dag-json": "application/vnd.ipld.dag-json",
}


class IpfsApi:
    """The handlers of `/ipfs/*`."""

    def __init__(self, blocks: BlockStore) -> None:
        self._blocks = blocks

    async def block(self, request: Request, responder: Responder, name: str) -> None:
        """`GET /ipfs/CID?format=raw`."""
        try:
            cid = parse_cid(name)
        except ValueError as error:
            await send_problem(responder, 400, f"{name[:100]!r} is no CID: {error}")
            return
        form = _format(request)
        if form is None:
            known = " or ".join(f"?format={name}" for name in _FORMATS)
            await send_problem(responder, 406, f"this gateway gives blocks: ask with {known}")
            return
        block = await self._blocks.get(cid)
        if block is None:
            await send_problem(responder, 404, f"this node does not hold {name}")
            return
        if form == "dag-json":
            if split(cid)[0] != "dag-cbor":
                await send_problem(responder, 406, "only dag-cbor blocks can be read as dag-json")
                return
            block = msgspec.json.encode(block_as_json(block))
        text = cid_text(cid)
        headers = [
            # The bytes of a CID never change.
            ("cache-control", "public, max-age=29030400, immutable"),
            ("etag", f'"{text}.{form}"'),
            ("x-ipfs-path", f"/ipfs/{text}"),
            ("x-content-type-options", "nosniff"),
        ]
        await responder.send(200, block, content_type=_FORMATS[form], headers=headers)


def _format(request: Request) -> str | None:
    asked = request.query.get("format")
    if asked:
        return asked[0] if asked[0] in _FORMATS else None
    accept = request.headers.get("accept", "")
    return next((form for form, type_ in _FORMATS.items() if type_ in accept), None)
