"""Failures as HTTP: which status, which body, in the OpenAI form."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from ..providers.base import (
    CacheOnlyMiss,
    ContentFiltered,
    ContextTooLong,
    DeadlineExceeded,
    GenerateError,
    ModelNotFound,
    ProviderUnavailable,
    RequestRejected,
)

#: The most specific class first. A provider's failure is a 503 where it said when to come back.
_STATUS: tuple[tuple[type[GenerateError], int], ...] = (
    (ModelNotFound, 404),
    (RequestRejected, 400),
    (CacheOnlyMiss, 504),
    (DeadlineExceeded, 504),
    (ProviderUnavailable, 502),
    (GenerateError, 502),
)
#: The names that clients of the OpenAI dialect look for, where they differ from ours.
_OPENAI_CODES: dict[type[GenerateError], str] = {
    ContextTooLong: "context_length_exceeded",
    ContentFiltered: "content_filter",
}


def status_of(error: GenerateError) -> int:
    """The HTTP status of a failure."""
    if error.retry_after is not None and not isinstance(error, RequestRejected | DeadlineExceeded):
        return 503
    return next(status for kind, status in _STATUS if isinstance(error, kind))


def error_fields(error: GenerateError) -> dict[str, Any]:
    """The `error` object of a body or of an event."""
    at_fault = isinstance(error, RequestRejected)
    fields: dict[str, Any] = {
        "message": error.message,
        "type": "invalid_request_error" if at_fault else "server_error",
        "param": error.field,
        "code": _OPENAI_CODES.get(type(error), error.code),
    }
    if error.partial:
        fields["partial"] = error.partial
    return fields


def error_body(error: GenerateError) -> bytes:
    """The body of an answer that failed before it began."""
    return msgspec.json.encode({"error": error_fields(error)})


def error_headers(error: GenerateError) -> list[tuple[str, str]]:
    """`Retry-After`, where the failure says when to come back."""
    if error.retry_after is None:
        return []
    return [("retry-after", str(max(1, math.ceil(error.retry_after))))]


def error_event(error: GenerateError) -> bytes:
    """The event that ends a stream that broke. No `[DONE]` follows: it is not whole."""
    return b"data: " + error_body(error) + b"\n\n"
