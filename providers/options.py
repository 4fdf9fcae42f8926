"""What a provider was set to, and what a request asks of it alone: tables read as types.

What is wrong is named, and where there is one, the word that was probably meant.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec

from .base import TRANSPORT, RequestRejected
from .http_address import Address, parse_base_url

T = TypeVar("T")

#: A time limit that somebody set, in seconds.
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]


class SettingsError(ValueError):
    """Settings that no provider can be built from; names the one that is wrong."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


def read_settings(
    type_: type[T],
    settings: Mapping[str, Any],
    *,
    name: str | None = None,
    what: str = "setting",
) -> T:
    """Typed settings from a table. Raises `SettingsError` that names the key.

    `type_` is a msgspec struct or a dataclass; a `name` is added where it has that field.
    """
    info: Any = msgspec.inspect.type_info(type_)
    fields = [field.encode_name for field in info.fields]
    known = [field for field in fields if field != "name"]
    for key in settings:
        if key not in known:
            raise SettingsError(f"no {what} {key!r}{meant(key, known)}", key)
    values = dict(settings)
    if name is not None and "name" in fields:
        values["name"] = name
    try:
        return msgspec.convert(values, type_)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$.")
        key = path.rstrip("`")
        raise SettingsError(f"{key}: {reason}" if key else reason, key or None) from None


def read_options(type_: type[T], extra: Mapping[str, Any]) -> T:
    """The options of a request, from its `extra`. Raises `RequestRejected` that names the field.

    Fields that do not bear on the answer, and those without a value, say nothing to a provider.
    """
    said = {name: v for name, v in extra.items() if v is not None and name not in TRANSPORT}
    try:
        return read_settings(type_, said, what="option")
    except SettingsError as error:
        raise RequestRejected(str(error), field=error.key) from None


def checked_key(key: str, name: str = "api_key") -> str:
    """A key, or none. Raises `ValueError` that names the setting, and does not repeat the key."""
    if key and not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ValueError(f"{name}: it has characters that no key has, such as a space")
    return key


def checked_base_url(url: str) -> Address:
    """The setting `base_url` taken apart. Raises `ValueError` that names it."""
    try:
        return parse_base_url(url)
    except ValueError as error:
        raise ValueError(f"base_url: {error}") from None


def meant(word: str, known: Sequence[str]) -> str:
    """What was probably meant, or what there is."""
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is {', '.join(sorted(known))}" if known else ""
