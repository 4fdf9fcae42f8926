"""What a client would rather have: `Accept` of RFC 9110, 12.5.1."""

from __future__ import annotations

from collections.abc import Sequence

#: Media ranges that are looked at.
MAX_RANGES = 32


def preferred(accept: str, offered: Sequence[str]) -> str | None:
    """The offered media type that the client likes best, the first of equals; None: none of them.

    The most specific range that fits a type says how much it is liked. Parameters other than `q`
    are the type's own business.
    """
    ranges = [_range(text) for text in accept.split(",")[:MAX_RANGES]]
    best, liked = None, 0.0
    for media in offered:
        quality = _quality(media, ranges)
        if quality > liked:
            best, liked = media, quality
    return best


def _quality(media: str, ranges: Sequence[tuple[str, float]]) -> float:
    kind = media.partition("/")[0]
    for wanted in (media, f"{kind}/*", "*/*"):
        found = [quality for name, quality in ranges if name == wanted]
        if found:
            return max(found)
    return 0.0


def _range(text: str) -> tuple[str, float]:
    media, *parameters = (part.strip().lower() for part in text.split(";"))
    quality = 1.0
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                quality = float(value)
            except ValueError:
                quality = 0.0
    return media, quality if 0 <= quality <= 1 else 0.0
