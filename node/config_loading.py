"""Reading the layers of the configuration: the file, the variables and the flags, each checked."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .config_providers import KNOWN_KINDS, SUBSCRIPTION_KINDS, ProviderConfig
from .config_sections import FILE_NAME, SECTIONS, Config
from .config_values import Secret, settings_of
from .config_variables import PREFIX, variables_of

#: A configuration of a hundred providers has about 20 kB.
MAX_FILE_BYTES = 1 << 20
MAX_PROVIDERS = 100

#: What a flag says: (the flag, its value).
Flag = tuple[str, object]


class Loader:
    """Reads the layers, one above the other, and collects what is wrong with each."""

    def __init__(self, path: Path, environ: Mapping[str, str]) -> None:
        self._path = path
        self._environ = environ
        self._settings = {
            each.key: each for name, type_ in SECTIONS.items() for each in settings_of(name, type_)
        }
        self._values = {key: each.default for key, each in self._settings.items()}
        self._sources: dict[str, str] = {}
        self._warnings: list[str] = []
        self.problems: list[str] = []

    def load(self, flags: Mapping[str, Flag]) -> Config:
        """The configuration; of use only if there are no `problems`."""
        table = self._read_file()
        tables = table.pop("providers", [])
        self._take_file(table)
        self._take_environment()
        for key, (flag, value) in flags.items():
            self._set(key, flag, self._settings[key].convert, value)
        providers = tuple(self._take_providers(tables))
        self._warn_of_unknown_variables(providers)
        sections = {
            name: type_(**{s.name: self._values[s.key] for s in settings_of(name, type_)})
            for name, type_ in SECTIONS.items()
        }
        return Config(
            **sections,
            providers=providers,
            sources=self._sources,
            warnings=tuple(self._warnings),
        )

    def _set(self, key: str, source: str, convert: Callable[[Any], Any], value: object) -> None:
        try:
            self._values[key] = convert(value)
            self._sources[key] = source
        except ValueError as error:
            self._problem(source, key, str(error))

    def _problem(self, source: str, key: str, text: str) -> None:
        where = f"{self._path}: {key}" if source == FILE_NAME else f"{source} ({key})"
        self.problems.append(f"{where}: {text}")

    # --- the file -------------------------------------------------------------------------------

    def _read_file(self) -> dict[str, Any]:
        import tomllib

        try:
            with self._path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                raise ValueError(f"is larger than {MAX_FILE_BYTES} bytes")
            return tomllib.loads(data.decode())
        except FileNotFoundError:
            return {}
        except UnicodeDecodeError:
            self.problems.append(f"{self._path}: is not UTF-8 text")
        except tomllib.TOMLDecodeError as error:
            self.problems.append(f"{self._path}: is not valid TOML: {error}")
        except ValueError as error:
            self.problems.append(f"{self._path}: {error}")
        except OSError as error:
            self.problems.append(f"{self._path}: cannot be read: {error.strerror}")
        return {}

    def _take_file(self, table: dict[str, Any]) -> None:
        for section, content in table.items():
            if section not in SECTIONS:
                hint = _did_you_mean(section, [*SECTIONS, "providers"])
                self.problems.append(f"{self._path}: unknown section [{section}]{hint}")
            elif not isinstance(content, dict):
                self._problem(FILE_NAME, section, f"expected a table, written [{section}]")
            else:
                self._take_section(section, content)

    def _take_section(self, section: str, content: dict[str, Any]) -> None:
        for name, value in content.items():
            key = f"{section}.{name}"
            if key in self._settings:
                self._set(key, FILE_NAME, self._settings[key].convert, value)
            else:
                hint = _did_you_mean(key, self._settings)
                self.problems.append(f"{self._path}: unknown key {key}{hint}")

    # --- the environment ------------------------------------------------------------------------

    def _take_environment(self) -> None:
        for key, each in self._settings.items():
            for variable in variables_of(key):
                # An empty variable counts as not set: that is how compose files leave one out.
                text = self._environ.get(variable, "")
                if text and variable.endswith("ROUTER_RESPONSE_CACHE"):
                    text = "never" if text.strip().lower() in ("0", "false", "no", "off") else ""
                if text:
                    self._set(key, variable, each.parse, text)
                    break

    def _warn_of_unknown_variables(self, providers: Iterable[ProviderConfig]) -> None:
        known = {name for key in self._settings for name in variables_of(key)}
        known |= {provider.api_key_env for provider in providers}
        ours = tuple(f"{PREFIX}{section.upper()}_" for section in SECTIONS)
        for name in self._environ:
            if name.startswith(ours) and name not in known:
                hint = _did_you_mean(name, known)
                self._warnings.append(f"the variable {name} sets nothing{hint}")

    # --- the providers --------------------------------------------------------------------------

    def _take_providers(self, tables: object) -> Iterator[ProviderConfig]:
        if not isinstance(tables, list) or len(tables) > MAX_PROVIDERS:
            text = f"expected at most {MAX_PROVIDERS} tables, each written [[providers]]"
            self._problem(FILE_NAME, "providers", text)
            return
        # The local models are providers as well.
        names = {"local_hf"} if self._values["local_hf.model"] else set()
        if self._values["local_hf.embedding_model"]:
            names.add("local_hf_embed")
        for number, table in enumerate(tables, 1):
            before = len(self.problems)
            where = f"providers (number {number})"
            if not isinstance(table, dict):
                self._problem(FILE_NAME, where, "expected a table, written [[providers]]")
                continue
            values = self._provider_values(where, table)
            if len(self.problems) > before:
                continue
            if values["name"] in names:
                text = f"the name {values['name']!r} is taken: give each a `name` of its own"
                self._problem(FILE_NAME, where, text)
            names.add(values["name"])
            limits = ("limits.max_cost_per_day", "limits.max_member_cost_per_day")
            limited = any(self._values[limit] is not None for limit in limits)
            if limited and values.get("api_key_env") and not values.keys() & {"price", "prices"}:
                self._warnings.append(
                    f"providers.{values['name']} has a key and no `price`: what it costs is not "
                    "counted, and no limit of a day holds for it"
                )
            yield self._provider(values, table)

    def _provider_values(self, where: str, table: dict[str, Any]) -> dict[str, Any]:
        """Its common keys, checked. Without `name` and `share` they follow from the others."""
        values: dict[str, Any] = {}
        for each in settings_of("providers", ProviderConfig):
            if each.name in table:
                try:
                    values[each.name] = each.convert(table[each.name])
                except ValueError as error:
                    self._problem(FILE_NAME, f"{where}: {each.name}", str(error))
        if "kind" not in table:
            self._problem(FILE_NAME, where, "the key `kind` is missing")
        if "api_key" in table:
            text = "keys do not belong into a file: name the variable that holds it (api_key_env)"
            self._problem(FILE_NAME, f"{where}: api_key", text)
        values.setdefault("name", values.get("kind", ""))
        if values.get("kind") == "openrouter":
            values.setdefault("api_key_env", "OPENROUTER_API_KEY")
        kind = values.get("kind")
        pays = values.get("api_key_env") or _costs(values) or kind in SUBSCRIPTION_KINDS
        values.setdefault("share", kind in KNOWN_KINDS and not pays)
        return values

    def _provider(self, values: dict[str, Any], table: dict[str, Any]) -> ProviderConfig:
        prefix = f"providers.{values['name']}"
        self._sources |= {f"{prefix}.{name}": FILE_NAME for name in table}
        variable = values.get("api_key_env", "")
        key = self._environ.get(variable) if variable else None
        if variable and not key:
            self._warnings.append(
                f"the variable {variable} is not set, which should hold the key of {prefix}"
            )
        options = {name: value for name, value in table.items() if name not in values}
        return ProviderConfig(**values, api_key=Secret(key) if key else None, options=options)


def _costs(values: Mapping[str, Any]) -> bool:
    """Has a provider with these keys a price that is not zero?"""
    prices = [values.get("price"), *values.get("prices", {}).values()]
    return any(price.prompt or price.completion for price in prices if price is not None)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""
