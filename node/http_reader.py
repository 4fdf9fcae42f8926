"""Cutting the bytes of a connection into requests: heads, bodies by length or in chunks.

The body is cut out by its declared length or by our own decoder of chunks, never by llhttp: it does
not say where a message ends, and so cannot be stopped before a pipelined one.
"""

from __future__ import annotations

import re
from typing import Literal

from .http_messages import FIELD, Limits, RefusedRequest, Request, parse_head

#: Longest line that announces a chunk, with its extension; longest trailers; sum of extensions.
MAX_CHUNK_LINE = 256
MAX_TRAILERS = 8 * 1024
MAX_CHUNK_EXTENSIONS = 16 * 1024

Phase = Literal["idle", "head", "body"]

#: What no head may hold, seen before its end has come: control characters, LF without CR, CR
#: without LF (the last byte may be a CR whose LF is still on the way).
_FORBIDDEN = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?![\n]|\Z)")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;([\t\x20-\x7e\x80-\xff]*))?")
_PART_OF_CHUNK_LINE = re.compile(
    rb"[0-9A-Fa-f]{0,15}(?:(?<=[0-9A-Fa-f])[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?\r?)?"
)
_TRAILER = re.compile(FIELD)


class ChunkedBody:
    """Decodes a chunked body: takes what it can from the front of a buffer."""

    def __init__(self, max_body: int) -> None:
        self._max_body = max_body
        self._body = bytearray()
        #: Bytes of this chunk still to come; None: a line of a size comes next.
        self._left: int | None = None
        self._last = False
        self._extensions = 0
        self._trailers = 0

    def take(self, buffer: bytearray) -> bytes | None:
        """The whole body, or None: more is needed. Raises `RefusedRequest`."""
        while not self._last:
            if self._left is None:
                if not self._take_size(buffer):
                    return None
            elif not self._take_data(buffer, self._left):
                return None
        return bytes(self._body) if self._take_trailers(buffer) else None

    def _take_size(self, buffer: bytearray) -> bool:
        end = buffer.find(b"\r\n", 0, MAX_CHUNK_LINE + 2)
        if end < 0:
            if len(buffer) > MAX_CHUNK_LINE + 1 or not _PART_OF_CHUNK_LINE.fullmatch(buffer):
                raise RefusedRequest(400, "malformed chunk size")
            return False
        match = _CHUNK_LINE.fullmatch(buffer, 0, end)
        if match is None:
            raise RefusedRequest(400, "malformed chunk size")
        size = int(match[1], 16)
        self._extensions += len(match[2] or b"")
        if self._extensions > MAX_CHUNK_EXTENSIONS:
            raise RefusedRequest(400, "too many chunk extensions")
        if len(self._body) + size > self._max_body:
            raise RefusedRequest(413, f"the body is larger than {self._max_body} bytes")
        del buffer[: end + 2]
        self._left = size
        self._last = size == 0
        return True

    def _take_data(self, buffer: bytearray, left: int) -> bool:
        if left:
            piece = buffer[:left]
            self._body += piece
            del buffer[:left]
            self._left = left - len(piece)
            if self._left:
                return False
        if buffer[:2] != b"\r\n":
            if not b"\r\n".startswith(buffer[:2]):
                raise RefusedRequest(400, "malformed chunk: its data is longer than its size")
            return False
        del buffer[:2]
        self._left = None
        return True

    def _take_trailers(self, buffer: bytearray) -> bool:
        """Pass over the trailers; they are checked and dropped."""
        while not buffer.startswith(b"\r\n"):
            end = buffer.find(b"\r\n")
            if self._trailers + (len(buffer) if end < 0 else end) > MAX_TRAILERS:
                raise RefusedRequest(431, "the trailers are too large")
            if end < 0:
                return False
            if not _TRAILER.fullmatch(buffer, 0, end + 2):
                raise RefusedRequest(400, "malformed trailer")
            del buffer[: end + 2]
            self._trailers += end + 2
        del buffer[:2]
        return True


class RequestReader:
    """Cuts what a client sends into requests. A refusal is final: feed nothing more."""

    def __init__(self, limits: Limits, client_host: str = "") -> None:
        self._limits = limits
        self._client_host = client_host
        self._buffer = bytearray()
        #: So many bytes of the buffer hold no end of a head and nothing forbidden.
        self._scanned = 0
        #: The request whose body is being read.
        self._request: Request | None = None
        self._length = 0
        self._chunks: ChunkedBody | None = None
        self._expects_continue = False

    @property
    def buffered(self) -> int:
        """Bytes fed and not yet used."""
        return len(self._buffer)

    @property
    def phase(self) -> Phase:
        """Which part of a request comes next, or is on its way."""
        if self._request is not None:
            return "body"
        return "head" if self._buffer else "idle"

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._buffer += data

    def next_request(self) -> Request | None:
        """The next whole request, or None: more is needed. Raises `RefusedRequest`."""
        request = self._request
        if request is None:
            head = self._take_head()
            if head is None:
                return None
            request = self._request = parse_head(head, self._limits, self._client_host)
            self._begin_body(request)
        body = self._take_body()
        if body is None:
            return None
        request.body = body
        self._request = None
        self._expects_continue = False
        return request

    def take_expectation(self) -> bool:
        """True once, if the client waits for `100 Continue` before it sends its body."""
        expects, self._expects_continue = self._expects_continue, False
        return expects

    def _take_head(self) -> bytes | None:
        buffer = self._buffer
        while buffer.startswith(b"\r\n"):  # empty lines before a request are passed over
            del buffer[:2]
        end = buffer.find(b"\r\n\r\n", max(0, self._scanned - 3))
        if end < 0:
            if buffer:
                self._check_part_of_head()
            return None
        if end + 4 > self._limits.max_head:
            raise RefusedRequest(431, "the request head is too large")
        head = bytes(buffer[: end + 4])
        del buffer[: end + 4]
        self._scanned = 0
        return head

    def _check_part_of_head(self) -> None:
        """Refuse what cannot become a head at once: its sender may be waiting for an answer."""
        buffer = self._buffer
        if _FORBIDDEN.search(buffer, max(0, self._scanned - 1)) or not (
            65 <= buffer[0] <= 90 or buffer == b"\r"
        ):
            raise RefusedRequest(400, "malformed request head")
        if len(buffer) > self._limits.max_head:
            if b"\r\n" in buffer:
                raise RefusedRequest(431, "the request head is too large")
            raise RefusedRequest(414, "the request target is too long")
        self._scanned = len(buffer)

    def _begin_body(self, request: Request) -> None:
        headers = request.headers
        length = headers.get("content-length")
        coding = headers.get("transfer-encoding")
        self._length = 0
        self._chunks = None
        if coding is not None:
            if length is not None:
                raise RefusedRequest(400, "both Content-Length and Transfer-Encoding")
            if coding.lower() != "chunked" or request.version == "1.0":
                raise RefusedRequest(400, "the only Transfer-Encoding is chunked, of HTTP/1.1")
            self._chunks = ChunkedBody(self._limits.max_body)
        elif length is not None:
            if not (length.isascii() and length.isdigit() and len(length) <= 19):
                raise RefusedRequest(400, "malformed Content-Length")
            self._length = int(length)
            if self._length > self._limits.max_body:
                raise RefusedRequest(413, f"the body is larger than {self._limits.max_body} bytes")
        expect = headers.get("expect")
        if expect is not None and request.version == "1.1":
            if expect.lower() != "100-continue":
                raise RefusedRequest(417, "the only expectation is 100-continue")
            self._expects_continue = True

    def _take_body(self) -> bytes | None:
        if self._chunks is not None:
            return self._chunks.take(self._buffer)
        if not self._length:
            return b""
        if len(self._buffer) < self._length:
            return None
        body = bytes(self._buffer[: self._length])
        del self._buffer[: self._length]
        return body
