"""The errors of servers of the OpenAI dialect, in our words.

Servers agree neither on the form of an error's body nor on the status, so both are looked at. What
another provider could answer is `ProviderUnavailable`, and `ProviderRefused` where this one works
and said no (4xx). That includes 404 for a model: this server does not have it, others may, and
`ModelNotFound` would end the search for them.
"""

from __future__ import annotations

import email.utils
import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC
from typing import Any

import msgspec

from .base import (
    ContentFiltered,
    ContextTooLong,
    GenerateError,
    ProviderRefused,
    ProviderUnavailable,
    RequestRejected,
)

#: Longer ones are cut.
MAX_MESSAGE = 500
#: Seconds. A server that wants more is asked again then.
MAX_RETRY_AFTER = 24 * 3600.0
#: Seconds, where a server says that it is asked too often, and not when it may be asked again.
TOO_OFTEN = 2.0
#: Seconds after which one is asked again whose quota of a day is used up, at the soonest.
DAY_USED_UP = 1800.0

_CONTEXT = re.compile(
    r"context_length_exceeded|exceed_context_size|context (length|window|size|limit)"
    r"|maximum context|max(imum)?[_ ]model[_ ]len|too many (input )?tokens"
    r"|(prompt|input)( is)? too long|reduce the length|string_above_max_length|token limit"
    r"|prompt[_ ](budget|tokens_exceeded)|token count .{0,60}exceeds",
    re.IGNORECASE,
)
_FILTERED = re.compile(
    r"content[_ ](filter|policy|management)|responsibleaipolicy|moderation|was flagged"
    r"|safety (system|filter)",
    re.IGNORECASE,
)
_KEY = re.compile(r"api[_ -]?key|invalid_authentication|unauthori[sz]ed", re.IGNORECASE)
_NO_MODEL = re.compile(
    r"model_not_found|no models? (is |are )?loaded|models?\b.{0,200}\b(not found|does not exist)"
    r"|model\b.{0,200}\bmay not exist|not_found_error model:",
    re.IGNORECASE | re.DOTALL,
)
_NO_CREDIT = re.compile(r"insufficient_quota|credit balance|API usage limits", re.IGNORECASE)
#: The statuses that Anthropic's errors stand for, where one comes inside a stream.
_STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}


class ServerError(msgspec.Struct, frozen=True, kw_only=True):
    """What a server says of a failure."""

    message: str = ""
    #: `type` and `code`, in whatever words the server has.
    kind: str = ""
    #: The request's field that is at fault.
    field: str | None = None
    #: An HTTP status given in the body, as in an error in the middle of a stream; 0 for none.
    status: int = 0
    #: Seconds after which it may be asked again, where the body says so.
    retry_after: float | None = None


def read_error(body: bytes) -> ServerError:
    """Read an error's body: one of the usual JSON forms, or plain text."""
    try:
        value = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        text = body.decode("utf-8", "replace").strip()
        return ServerError() if text.startswith("<") else ServerError(message=_one_line(text))
    return error_of(value)


def error_of(value: Any) -> ServerError:
    """The same from a decoded value, such as the `error` of an event."""
    if isinstance(value, dict):
        for key in ("error", "detail"):
            if value.get(key):
                return error_of(value[key])
        return _error_of_object(value)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        first = value[0]
        if first.get("error"):  # Google's stream of JSON, which is a list
            return error_of(first["error"])
        # FastAPI's list of what is wrong with which field
        place = first.get("loc")
        field = ".".join(str(p) for p in place[1:]) if isinstance(place, list) else None
        return ServerError(message=_one_line(str(first.get("msg", first))), field=field or None)
    return ServerError(message=_one_line(value if isinstance(value, str) else ""))


def _error_of_object(value: dict[str, Any]) -> ServerError:
    code = value.get("code")
    number = int(code) if isinstance(code, str) and re.fullmatch(r"\d{3}", code) else code
    status = number if type(number) is int and 400 <= number < 600 else 0
    details = value.get("metadata")
    told = (value.get("type"), value.get("status"), None if status else code)
    words = [str(word) for word in told if isinstance(word, (str, int))]
    if isinstance(details, dict) and details.get("flagged_input") is not None:
        words.append("was flagged")  # OpenRouter's moderation, which is a 403
    more, wait = _google_details(value.get("details"))
    message = value.get("message")
    field = value.get("param")
    return ServerError(
        message=_one_line(message if isinstance(message, str) else ""),
        kind=_one_line(" ".join(words + more)),
        field=field if isinstance(field, str) else None,
        status=status,
        retry_after=wait,
    )


def _google_details(details: Any) -> tuple[list[str], float | None]:
    """The reasons and used up quotas in Google's `details`, and for how long it wants peace."""
    words: list[str] = []
    wait = None
    for each in details if isinstance(details, list) else ():
        if not isinstance(each, dict):
            continue
        violations = each.get("violations")
        quotas = violations if isinstance(violations, list) else []
        found = [each.get("reason"), *(q.get("quotaId") for q in quotas if isinstance(q, dict))]
        words += [word for word in found if isinstance(word, str)]
        if delay := re.fullmatch(r"(\d{1,9}(?:\.\d+)?)s", str(each.get("retryDelay"))):
            wait = min(float(delay[1]), MAX_RETRY_AFTER)
    return words, wait


def _one_line(text: str) -> str:
    line = " ".join(text[: 4 * MAX_MESSAGE].split())
    line = "".join(c for c in line if c.isprintable())
    return line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 3] + "..."


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait by `Retry-After`: a number, or a date to compare with `now` (Unix time).

    OpenAI and Azure say it more exactly in a header of their own.
    """
    exact = headers.get("retry-after-ms", "").strip()
    text = exact or headers.get("retry-after", "").strip()
    try:
        seconds = float(text) / (1000 if exact else 1)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(text)
            seconds = date.replace(tzinfo=date.tzinfo or UTC).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER) if math.isfinite(seconds) else None


class ErrorReader:
    """Turns the failures of one server into `GenerateError`s that never hold one of its keys."""

    def __init__(
        self,
        name: str,
        secrets: Iterable[str],
        *,
        base_url: str = "it usually ends in /v1",
        key: str = "check the key: `api_key_env` names its variable",
    ) -> None:
        """`base_url` says what that setting usually looks like; `key` what to do where the server
        does not know who asks."""
        self.name = name
        self.key_hint = key
        #: For a server that seems to be another one than was meant.
        self.place_hint = f"is base_url right? {base_url}"
        # The longest first: one may be a part of another.
        self._secrets = sorted((s for s in secrets if len(s) >= 4), key=len, reverse=True)

    def redact(self, text: str) -> str:
        """The text without the keys: servers like to repeat what they were sent."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def read(self, body: bytes) -> ServerError:
        """What a body says, without the keys."""
        for secret in self._secrets:  # Before anything is cut, so that no part of one is left.
            body = body.replace(secret.encode(), b"***")
        return read_error(body)

    def reply(
        self, status: int, headers: Mapping[str, str], error: ServerError, now: float
    ) -> GenerateError:
        """The failure that a reply with an error status is. `now` is Unix time."""
        if 300 <= status < 400:
            place = _one_line(self.redact(headers.get("location", "")))
            hint = f"redirects to {place}; give that as base_url" if place else "redirects"
            return ProviderRefused(f"{self.name} {hint}")
        said = f"{self.name} answered {status}" + (f": {error.message}" if error.message else "")
        if request_id := headers.get("request-id"):  # by which the vendor finds it
            said += f" (request {_one_line(request_id[:80])})"
        wait = retry_after(headers, now)
        wait = error.retry_after if wait is None else wait
        if wait is None and status == 429 and "insufficient_quota" not in error.kind:
            wait = TOO_OFTEN
        return self._failure(status, said, error, wait)

    def event(self, error: ServerError) -> GenerateError:
        """The failure that an error in a reply with status 200 is."""
        reason = error.message or error.kind or "no reason given"
        status = error.status or _STATUSES.get(error.kind, 0)
        said = f"{self.name} reported an error: {reason}"
        return self._failure(status, said, error, error.retry_after)

    def _failure(
        self, status: int, message: str, error: ServerError, wait: float | None = None
    ) -> GenerateError:
        kind, hint = _classify(status, error, self.place_hint, self.key_hint)
        if "PerDay" in error.kind:
            # Google names some seconds even so; asked that often it answers the same all day.
            wait, hint = max(wait or 0.0, DAY_USED_UP), " (the day's quota is used up)"
        field = error.field if issubclass(kind, RequestRejected) else None
        return kind(
            self.redact(message) + hint,
            retry_after=wait,
            field=field and self.redact(field),
            again=status >= 500 and wait is None,
        )


def blames_key(status: int, error: ServerError) -> bool:
    """Does the server not know the key? Google says so by 400."""
    said = f"{error.kind} {error.message}"
    return status == 401 or (status in (400, 422) and _KEY.search(said) is not None)


def _classify(
    status: int, error: ServerError, place: str, key: str
) -> tuple[type[GenerateError], str]:
    """Which error it is, and what to add to its message. Status 0: the server told none."""
    kind, hint = _kind(status, error, place, key)
    # It said no. A 408 is none: there, the server gave up waiting.
    if kind is ProviderUnavailable and 400 <= status < 500 and status != 408:
        return ProviderRefused, hint
    return kind, hint


def _kind(status: int, error: ServerError, place: str, key: str) -> tuple[type[GenerateError], str]:
    if status == 401:
        return ProviderUnavailable, f" ({key})"
    # A 5xx is the server's fault, whatever its message mentions, unless its code says otherwise.
    said = error.kind if status >= 500 else f"{error.kind} {error.message}"
    if status == 402 or _NO_CREDIT.search(said):
        return ProviderRefused, " (the account has no credit left)"
    if status not in (404, 405, 408, 409, 425, 429):
        if _FILTERED.search(said):
            return ContentFiltered, ""
        if status == 413 or (status != 403 and _CONTEXT.search(said)):
            return ContextTooLong, ""
    if status in (400, 422):
        if blames_key(status, error):
            return ProviderUnavailable, f" ({key})"
        elsewhere = _NO_MODEL.search(said) or "FAILED_PRECONDITION" in said
        return (ProviderUnavailable if elsewhere else RequestRejected), ""
    if status == 403:
        return ProviderUnavailable, " (may this key use this model?)"
    if status in (404, 405) and not _NO_MODEL.search(said):
        return ProviderUnavailable, f" ({place})"
    return ProviderUnavailable, ""
