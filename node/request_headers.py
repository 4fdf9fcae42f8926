"""What a request's HTTP headers say beside its body: `x-promptmesh-*` and `Cache-Control`.

A header stands over the same field of the body, since a proxy or a client library can add headers
where it cannot change a body.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import msgspec

from ..providers.base import CacheControl, ModelRequest, RequestRejected, TimeLimits


class HasHeaders(Protocol):
    """A request whose headers have lower-case names."""

    @property
    def headers(self) -> Mapping[str, str]: ...


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise ValueError
    return number


def _yes_or_no(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError
    return text.lower() in ("true", "1")


#: What a converter expects, where that is not a number that is not negative.
_EXPECTED: dict[Callable[[str], Any], str] = {int: "a whole number", _yes_or_no: "true or false"}
#: Header -> (field, its type).
_REQUEST: dict[str, tuple[str, Callable[[str], Any]]] = {
    "x-promptmesh-provider": ("provider", str),
    "x-promptmesh-peer": ("peer", str),
    "x-promptmesh-policy": ("policy", str),
    "x-promptmesh-privacy": ("privacy", str),
    "x-promptmesh-max-cost": ("max_cost", _not_negative),
    "x-promptmesh-prefer": ("prefer", str),
    "x-promptmesh-priority": ("priority", str),
    "x-promptmesh-hedge": ("hedge", _yes_or_no),
    "x-promptmesh-deadline-s": ("deadline", _not_negative),
}
_CACHE: dict[str, tuple[str, Callable[[str], Any]]] = {
    "x-promptmesh-cache-mode": ("mode", str),
    "x-promptmesh-cache-ttl": ("ttl", _not_negative),
    "x-promptmesh-cache-max-age": ("max_age", _not_negative),
    "x-promptmesh-cache-scope": ("scope", str),
    "x-promptmesh-cache-namespace": ("namespace", str),
    "x-promptmesh-cache-min-agreement": ("min_agreement", int),
}
_LIMITS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "x-promptmesh-connect-s": ("connect", _not_negative),
    "x-promptmesh-first-token-s": ("first_token", _not_negative),
    "x-promptmesh-gap-s": ("gap", _not_negative),
}
_PREFIX = "x-promptmesh-"

_Struct = TypeVar("_Struct", bound=msgspec.Struct)
_Request = TypeVar("_Request", bound=ModelRequest)


def with_headers(request: _Request, http: HasHeaders) -> _Request:
    """The request with what its headers say. Raises `RequestRejected` that names the header."""
    headers = http.headers
    control = headers.get("cache-control")
    if control is None and not any(name.startswith(_PREFIX) for name in headers):
        return request
    cache = _changes(headers, _CACHE) | (_cache_control(control) if control else {})
    changes = _changes(headers, _REQUEST)
    if cache:
        changes["cache"] = _replaced(request.cache, cache, CacheControl)
    if limits := _changes(headers, _LIMITS):
        changes["limits"] = _replaced(request.limits or TimeLimits(), limits, TimeLimits)
    return _replaced(request, changes, type(request))


def forbid_storing(http: HasHeaders) -> bool:
    """Do the headers say that nothing of the request may be stored?"""
    control = _cache_control(http.headers.get("cache-control", ""))
    return "bypass" in (control.get("mode"), http.headers.get("x-promptmesh-cache-mode"))


def _changes(
    headers: Mapping[str, str], known: dict[str, tuple[str, Callable[[str], Any]]]
) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for header, (field, convert) in known.items():
        value = headers.get(header)
        if value is not None:
            try:
                changes[field] = convert(value)
            except ValueError:
                expected = _EXPECTED.get(convert, "a number that is not negative")
                raise RequestRejected(
                    f"{header}: {value!r} is not {expected}", field=header
                ) from None
    return changes


def _cache_control(value: str) -> dict[str, Any]:
    """The request directives of RFC 9111, 5.2.1, that mean something for answers."""
    changes: dict[str, Any] = {}
    for directive in value.lower().split(","):
        name, _, argument = directive.strip().partition("=")
        if name == "no-store":
            changes["mode"] = "bypass"
        elif name == "no-cache" and changes.get("mode") != "bypass":
            changes["mode"] = "refresh"
        elif name == "only-if-cached" and "mode" not in changes:
            changes["mode"] = "only"
        elif name == "max-age" and argument.isdecimal():
            changes["max_age"] = float(argument[:12])
    return changes


def _replaced(value: _Struct, changes: dict[str, Any], type_: type[_Struct]) -> _Struct:
    # `replace` checks no types, and a header is a stranger's text.
    changed = msgspec.structs.replace(value, **changes)
    try:
        return msgspec.convert(msgspec.to_builtins(changed), type_)
    except msgspec.ValidationError as error:
        raise RequestRejected(f"a header is wrong: {error}") from None
