"""What a setting may hold, and how a file, a variable or a flag says it.

`setting(...)` declares a field of a configuration section with its documentation; `settings_of`
lists the fields of a section as `Setting`s, which check values and describe themselves.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import msgspec

from ..providers.base import Price, TimeLimits

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")
#: Values that are written as a table of numbers.
_TABLES = (Price, TimeLimits)
#: A text of the configuration may not be longer: no name, address or path is.
MAX_TEXT = 4096


class ConfigError(Exception):
    """The configuration is wrong. `problems` says all of it: where, which key, what is expected."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Secret:
    """A text that shows itself only when asked to, so that no log or table gives it away."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The text itself."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(...)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


@dataclass(frozen=True)
class _About:
    """What the declaration of a setting says beside its type and default."""

    doc: str
    unit: str
    left_out: str
    low: float
    high: float
    check: Callable[[str], str] | None


def setting(
    default: Any = dataclasses.MISSING,
    doc: str = "",
    *,
    factory: Any = dataclasses.MISSING,
    unit: str = "",
    left_out: str = "",
    low: float = 0,
    high: float = math.inf,
    check: Callable[[str], str] | None = None,
) -> Any:
    """Declare a field of a section.

    `unit` and the range `low` to `high` are for numbers; `check` looks at a text, or at each text
    of a list, and raises `ValueError`; `left_out` tells people what the default means.
    """
    about = _About(doc, unit, left_out, low, high, check)
    return dataclasses.field(default=default, default_factory=factory, metadata={"about": about})


@dataclass(frozen=True)
class Setting:
    """One key of the configuration."""

    key: str
    name: str
    type: Any
    default: Any
    about: _About

    def convert(self, value: object) -> Any:
        """A value of TOML or of a flag as this setting holds it. Raises `ValueError`."""
        try:
            converted = _converted(value, self._plain_type)
        except TypeError:
            raise ValueError(f"expected {self.expected}, not {_shown(value)}") from None
        if isinstance(converted, int | float) and not isinstance(converted, bool):
            if not self.about.low <= converted <= self.about.high:
                raise ValueError(f"expected {self.expected}, not {_shown(value)}")
        elif self.about.check is not None and isinstance(converted, str | tuple):
            texts = (converted,) if isinstance(converted, str) else converted
            self._check(self.about.check, texts)
        return converted

    def parse(self, text: str) -> Any:
        """A value as an environment variable says it: a list is separated by commas."""
        try:
            value = _parsed(text.strip(), self._plain_type)
        except ValueError:
            raise ValueError(f"expected {self.expected}, not {_shown(text)}") from None
        return self.convert(value)

    def _check(self, check: Callable[[str], str], texts: tuple[str, ...]) -> None:
        for text in texts:
            try:
                check(text)
            except ValueError as error:
                raise ValueError(f"{_shown(text)}: {error}") from None

    @property
    def _plain_type(self) -> Any:
        """The type without the `| None` of one that may be left out."""
        if get_origin(self.type) is not types.UnionType:
            return self.type
        return next(each for each in get_args(self.type) if each is not types.NoneType)

    @property
    def expected(self) -> str:
        """What may be written, in words."""
        plain = self._plain_type
        if get_origin(plain) is Literal:
            return "one of " + ", ".join(get_args(plain))
        words = {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}
        if plain in _TABLES:
            *names, last = (f"`{name}`" for name in plain.__struct_fields__)
            return f"a table with {', '.join(names)} and {last} in {self.about.unit}"
        if get_origin(plain) is dict:
            return "a table of such tables"
        if plain not in words:
            return "a list of texts"
        unit = f" of {self.about.unit}" if self.about.unit else ""
        return words[plain] + unit + (self._range if plain in (int, float) else "")

    @property
    def _range(self) -> str:
        low, high = f"{self.about.low:g}", f"{self.about.high:g}"
        return f", at least {low}" if math.isinf(self.about.high) else f" from {low} to {high}"


def settings_of(section: str, type_: Any) -> tuple[Setting, ...]:
    """The settings that a section's dataclass declares."""
    hints = typing.get_type_hints(type_)
    return tuple(
        Setting(
            key=f"{section}.{field.name}",
            name=field.name,
            type=hints[field.name],
            default=_default(field),
            about=field.metadata["about"],
        )
        for field in dataclasses.fields(type_)
        if "about" in field.metadata
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _converted(value: object, type_: Any) -> Any:
    """The value if it is of that type. Raises `TypeError`."""
    if get_origin(type_) is Literal:
        if value in get_args(type_):
            return value
    elif get_origin(type_) is tuple:
        if isinstance(value, list | tuple) and all(_is_text(each) for each in value):
            return tuple(value)
    elif type_ in _TABLES:
        return _table(value, type_)
    elif get_origin(type_) is dict:
        if isinstance(value, dict) and all(_is_text(name) for name in value):
            kind = get_args(type_)[1]
            return {name: _table(each, kind) for name, each in value.items()}
    elif type_ is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif (type_ is str and _is_text(value)) or (type_ in (int, bool) and type(value) is type_):
        return value
    raise TypeError


def plain(value: Any) -> Any:
    """A value as TOML writes it."""
    if isinstance(value, _TABLES):
        numbers = {name: getattr(value, name) for name in value.__struct_fields__}
        return {name: number for name, number in numbers.items() if number is not None}
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def _table(value: object, type_: Any) -> Any:
    """Numbers by their names. Raises `TypeError`."""
    if isinstance(value, dict) and value and value.keys() <= set(type_.__struct_fields__):
        numbers = {name: _converted(each, float) for name, each in value.items()}
        if min(numbers.values()) >= 0:
            try:
                return msgspec.convert(numbers, type_)
            except msgspec.ValidationError:
                pass
    raise TypeError


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()


def _parsed(text: str, type_: Any) -> object:
    if type_ is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise ValueError
        return text.lower() in _TRUE
    if type_ in (int, float):
        return type_(text)
    if get_origin(type_) is tuple:
        return tuple(each.strip() for each in text.split(",") if each.strip())
    return text


def _shown(value: object) -> str:
    """A wrong value for a message: as TOML writes it, and never much of it."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
