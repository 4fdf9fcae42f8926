"""What an answer's HTTP headers say of the cache: `Age`, `ETag` and `Cache-Status` (RFC 9211).

The same for every dialect. The `x-promptmesh-*` headers say it in our own words.
"""

from __future__ import annotations

from ..providers.base import CacheStatus, Origin

#: How the cache dealt with a request, in the words of RFC 9211, 2.
_HANDLED: dict[CacheStatus, str] = {
    "hit-local": "hit",
    "hit-mesh": "hit",
    "miss": "fwd=miss",
    "coalesced": "fwd=miss; collapsed",
    "bypass": "fwd=bypass",
}


def cache_headers(
    origin: Origin, key: str, *, cid: str | None = None, refresh: bool = False
) -> list[tuple[str, str]]:
    """The headers of an answer to a question with that key.

    `cid`: of the answer, where it is known by now. `refresh`: it was asked to be computed anew.
    """
    cid = cid or origin.cid
    headers = [
        ("cache-status", _cache_status(origin, key, stored=cid is not None, refresh=refresh))
    ]
    if cid is not None:
        headers.append(("etag", f'"{cid}"'))
    if origin.age is not None:
        headers.append(("age", str(int(origin.age))))
    return headers


def _cache_status(origin: Origin, key: str, *, stored: bool, refresh: bool) -> str:
    handled = _HANDLED[origin.cache]
    if refresh and origin.cache == "miss":
        handled = "fwd=request"
    status = f"promptmesh; {handled}"
    if stored and handled != "hit":
        status += "; stored"
    if origin.ttl is not None:
        status += f"; ttl={int(origin.ttl)}"
    # A key is of hexadecimal digits or of a multibase: nothing in it needs to be escaped.
    if origin.cache != "bypass":
        status += f'; key="{key}"'
    return status + ("; detail=mesh" if origin.cache == "hit-mesh" else "")
