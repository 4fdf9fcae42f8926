"""The parts of a `multipart/form-data` body: how IPFS clients send files. No I/O.

Source of the form: RFC 7578 over RFC 2046. The body has arrived whole and is bounded; here the
number of parts and the size of their heads are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote_plus

#: Parts of a body, and bytes of the head of one.
MAX_PARTS = 64
MAX_HEAD = 8 * 1024
#: Lines of the data that begin like the boundary.
MAX_MISSES = 1000

#: RFC 2046, 5.1.1; the last character is no space.
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]")
_PARAMETER = re.compile(
    r";[ \t]*([\w*\-]+)[ \t]*=[ \t]*(?:\"((?:[^\"\\\r\n]|\\.)*)\"|([^\s;\"]*))[ \t]*"
)
_REST_OF_LINE = re.compile(rb"(--[ \t]{0,64}(?:\r\n|\Z))|[ \t]{0,64}\r\n")
_FIELD = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
#: Encodings that leave the bytes as they are.
_PLAIN = ("", "binary", "8bit", "7bit")


class MultipartError(ValueError):
    """Not such a body. The message says why."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part. `filename` is None where none was sent."""

    name: str
    filename: str | None
    content_type: str
    data: bytes = field(repr=False)


def parse(content_type: str, body: bytes) -> list[Part]:
    """The parts in order. Raises `MultipartError`."""
    kind, parameters = _value(content_type)
    if kind != "multipart/form-data":
        raise MultipartError("the body is not multipart/form-data")
    boundary = parameters.get("boundary", "")
    if not _BOUNDARY.fullmatch(boundary):
        raise MultipartError("multipart/form-data without a sound boundary")
    return [_part(body, start, end) for start, end in _places(boundary.encode(), body)]


def _places(boundary: bytes, body: bytes) -> Iterator[tuple[int, int]]:
    """Where each part begins and ends."""
    begun: int | None = None
    for count, (start, end, closing) in enumerate(_lines(b"--" + boundary, body)):
        if begun is not None:
            yield begun, start
        if closing:
            return
        if count == MAX_PARTS:
            raise MultipartError(f"more than {MAX_PARTS} parts")
        begun = end
    raise MultipartError("the body ends before its closing boundary")


def _lines(mark: bytes, body: bytes) -> Iterator[tuple[int, int, bool]]:
    """The lines between parts: where the break before them begins, where they end, is it the last.

    By `find`: a pattern over the whole takes 100 times as long.
    """
    at = -2 if body.startswith(mark) else body.find(b"\r\n" + mark)
    misses = 0
    while at != -1:
        found = _REST_OF_LINE.match(body, at + 2 + len(mark))
        if found:
            yield max(at, 0), found.end(), found[1] is not None
        else:
            misses += 1
            if misses > MAX_MISSES:
                raise MultipartError("the boundary is no good: lines of the data begin like it")
        at = body.find(b"\r\n" + mark, max(at, -1) + 1)


def _part(body: bytes, start: int, end: int) -> Part:
    if body.startswith(b"\r\n", start):
        head, data = b"", start + 2
    else:
        close = body.find(b"\r\n\r\n", start, min(end, start + MAX_HEAD))
        if close < 0:
            raise MultipartError("the head of a part has no end, or is too long")
        head, data = body[start:close], close + 4
    if data > end:
        raise MultipartError("a part that ends within its head")
    fields = _fields(head)
    if fields.get("content-transfer-encoding", "").lower() not in _PLAIN:
        raise MultipartError("a part in another encoding than binary")
    _, disposition = _value(fields.get("content-disposition", ""))
    kind, _ = _value(fields.get("content-type", ""))
    filename = disposition.get("filename")
    return Part(
        name=disposition.get("name", ""),
        # Clients quote it as in a query, and so does Kubo read it.
        filename=None if filename is None else unquote_plus(filename),
        content_type=kind,
        data=body[data:end],
    )


def _fields(head: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        lines = head.decode().split("\r\n") if head else []
    except UnicodeDecodeError:
        raise MultipartError("the head of a part is not UTF-8") from None
    for line in lines:
        match = _FIELD.fullmatch(line)
        if match is None or match[1].lower() in found:
            raise MultipartError("the head of a part is malformed")
        found[match[1].lower()] = match[2].strip()
    return found


def _value(text: str) -> tuple[str, dict[str, str]]:
    """A field's value and its parameters, names in lower case."""
    kind, _, _ = text.partition(";")
    rest = text[len(kind) :]
    parameters: dict[str, str] = {}
    at = 0
    while at < len(rest):
        match = _PARAMETER.match(rest, at)
        if match is None or match[1].lower() in parameters:
            raise MultipartError(f"malformed parameters: {rest[:100]!r}")
        quoted = match[2]
        value = match[3] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
        parameters[match[1].lower()] = value
        at = match.end()
    return kind.strip().lower(), parameters
