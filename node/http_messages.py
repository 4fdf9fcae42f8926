"""HTTP/1.1 messages without any I/O: bytes cut into requests, the heads of answers made.

Nothing here waits or knows a socket; `http_server.py` does. Two parsers must agree before a request
is accepted: a strict pattern over the whole head, and llhttp (`httptools`), which alone would let
some things through that other servers read differently (request smuggling).
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Literal
from urllib.parse import parse_qs, unquote

import httptools
import msgspec

#: Fields of a query.
MAX_QUERY_FIELDS = 100

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
#: A field line. The name ends at its colon (no space before it), the value has no control
#: characters but tab, and a line that begins with a space (obs-fold) has no name.
FIELD = _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*+\r\n"
_HEAD = re.compile(rb"[A-Z]++ [\x21\x22\x24-\x7e]++ HTTP/1\.([01])\r\n(?:" + FIELD + rb")*+\r\n")
_OTHER_VERSION = re.compile(rb"[A-Z]++ [\x21-\x7e]++ HTTP/(?!1\.[01])[0-9]\.[0-9]\r\n")
_HOST = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=%]+|\[([0-9A-Fa-f:.]+)\])(?::[0-9]{0,5})?")
_ABSOLUTE = re.compile(r"https?://([^/?]+)(/[^?]*)?(\?.*)?", re.IGNORECASE)

#: Header fields whose repetition is refused: two readers could each believe another one.
_ONCE = {
    *("host", "content-length", "transfer-encoding", "content-type", "expect"),
    *("authorization", "origin"),
}
#: Header fields of an answer that the server writes itself.
_FRAMING = frozenset(("connection", "content-length", "content-type", "transfer-encoding"))
_FIELD_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_UNSAFE_VALUE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n" for s in HTTPStatus}

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may take of us. Sizes in bytes, times in seconds."""

    max_head: int = 64 * 1024
    #: Header fields of one request.
    max_fields: int = 100
    max_body: int = 32 * 1024 * 1024
    #: Pipelined bytes kept while a request is being answered. Beyond it nothing more is read until
    #: the answer is finished, and so a client that leaves is noticed only at the next write.
    max_read_ahead: int = 64 * 1024
    max_connections: int = 1024
    #: From the first byte of a head to its end.
    head_timeout: float = 15.0
    #: From the end of a head to the end of its body.
    body_timeout: float = 60.0
    #: From the start of a connection, or the end of an answer, to the next first byte.
    idle_timeout: float = 120.0
    #: How long a write may stay without progress.
    send_timeout: float = 30.0
    #: How long a closed connection may still send, so that its client can read the last answer.
    linger_timeout: float = 2.0


class RefusedRequest(Exception):
    """These bytes are no request that is taken: answer `status`, then close the connection."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(slots=True)
class Request:
    """A whole request.

    `target` is as sent, `path` decoded and without the query. Header names are in lower case;
    repeated fields are joined with a comma. `keep_alive`: the client would send another request.
    """

    method: str
    target: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    version: Literal["1.0", "1.1"]
    keep_alive: bool
    client_host: str = ""
    body: bytes = field(default=b"", repr=False)


class _Fields:
    """What llhttp finds in a head."""

    __slots__ = ("found", "target")

    def __init__(self) -> None:
        self.target = b""
        self.found: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.found.append((name, value))


# --- the head -----------------------------------------------------------------------------------


def parse_head(head: bytes, limits: Limits, client_host: str = "") -> Request:
    """The request without its body. `head` ends with its empty line.

    Raises `RefusedRequest` for anything that is not plainly a request of HTTP/1.0 or 1.1.
    """
    if head.count(b"\r\n") - 2 > limits.max_fields:
        raise RefusedRequest(431, "too many header fields")
    match = _HEAD.fullmatch(head)
    if match is None:
        if _OTHER_VERSION.match(head):
            raise RefusedRequest(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
        raise RefusedRequest(400, "malformed request head")
    if head.startswith(b"CONNECT "):
        raise RefusedRequest(501, "CONNECT is not supported")
    method, parsed = _parse_with_llhttp(head)
    headers = _join_fields(parsed.found)
    target = parsed.target.decode("ascii")
    path, query, authority = _split_target(method, target)
    old = match[1] == b"0"
    _check_host(headers, authority, required=not old)
    return Request(
        method=method,
        target=target,
        path=path,
        query=query,
        headers=headers,
        version="1.0" if old else "1.1",
        keep_alive=_is_kept_alive(headers.get("connection"), old),
        client_host=client_host,
    )


def _is_kept_alive(connection: str | None, old: bool) -> bool:
    if connection is None:
        return not old
    options = {option.strip() for option in connection.lower().split(",")}
    return "close" not in options and (not old or "keep-alive" in options)


def _parse_with_llhttp(head: bytes) -> tuple[str, _Fields]:
    fields = _Fields()
    parser = httptools.HttpRequestParser(fields)
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        pass  # asks for another protocol, which a server may ignore: the head was read all the same
    except httptools.HttpParserInvalidMethodError:
        raise RefusedRequest(501, "unknown method") from None
    except httptools.HttpParserError as error:
        raise RefusedRequest(400, f"malformed request head: {error}") from None
    # The callbacks come in pieces that httptools joins: be sure that no two fields became one.
    if len(fields.found) != head.count(b"\r\n") - 2:
        raise RefusedRequest(400, "malformed header fields")
    return parser.get_method().decode("ascii"), fields


def _join_fields(found: list[tuple[bytes, bytes]]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for raw_name, raw_value in found:
        name = raw_name.decode("ascii").lower()
        value = raw_value.decode("latin-1").strip(" \t")
        if name in headers:
            if name in _ONCE:
                raise RefusedRequest(400, f"more than one {name} header")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def _split_target(method: str, target: str) -> tuple[str, dict[str, list[str]], str | None]:
    """Path, query and authority of a target: the origin form, the absolute form or `*`."""
    authority = None
    if target == "*" and method == "OPTIONS":
        return "*", {}, None
    if not target.startswith("/"):
        match = _ABSOLUTE.fullmatch(target)
        if match is None:
            raise RefusedRequest(400, "malformed request target")
        authority = match[1]
        target = (match[2] or "/") + (match[3] or "")
    path, mark, rest = target.partition("?")
    try:
        if "%" in path:
            path = unquote(path, errors="strict")
        query = (
            parse_qs(rest, keep_blank_values=True, max_num_fields=MAX_QUERY_FIELDS) if mark else {}
        )
    except ValueError:
        raise RefusedRequest(400, "malformed path or query") from None
    return path, query, authority


def _check_host(headers: dict[str, str], authority: str | None, *, required: bool) -> None:
    """One sound Host where one is due. The authority of an absolute target takes its place."""
    host = headers.get("host")
    if host is None:
        if required:
            raise RefusedRequest(400, "the Host header is missing")
    elif not _is_host(host):
        raise RefusedRequest(400, "malformed Host header")
    if authority is not None:
        if not _is_host(authority):
            raise RefusedRequest(400, "malformed request target")
        headers["host"] = authority


@functools.lru_cache(maxsize=64)
def _is_host(text: str) -> bool:
    match = _HOST.fullmatch(text)
    if match is None or match[1] is None:
        return match is not None
    try:
        ipaddress.IPv6Address(match[1])
    except ValueError:
        return False
    return True


# --- the head of an answer ----------------------------------------------------------------------


def answer_head(
    status: int, content_type: str, headers: Sequence[tuple[str, str]], framing: str
) -> bytes:
    """The head of an answer. `framing` are the whole lines that say where its body ends.

    Values are sent as UTF-8. Raises `ValueError` for a status that is not final, for a field that
    could end its line (header injection), and for one that the server writes itself.
    """
    if not 200 <= status <= 599:
        raise ValueError(f"not the status of an answer: {status}")
    head = _STATUS_LINES.get(status) or f"HTTP/1.1 {status} \r\n"
    values = ""
    if content_type:
        values = content_type
        head += f"content-type: {content_type}\r\n"
    for name, value in headers:
        if not _may_be_set(name):
            raise ValueError(f"not a header field for a handler to set: {name!r}")
        values += value
        head += f"{name}: {value}\r\n"
    if _UNSAFE_VALUE.search(values):
        for name, value in (("content-type", content_type), *headers):
            if _UNSAFE_VALUE.search(value):
                raise ValueError(f"the header {name} would hold a control character")
    return f"{head}{framing}\r\n".encode()


@functools.lru_cache(maxsize=256)  # they are always the same few
def _may_be_set(name: str) -> bool:
    return _FIELD_NAME.fullmatch(name) is not None and name.lower() not in _FRAMING


def error_body(status: int, message: str) -> bytes:
    """The JSON that says why, in the form clients of model servers know."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return msgspec.json.encode({"error": {"message": message, "type": kind}})
