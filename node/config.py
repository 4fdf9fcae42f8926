"""The configuration: defaults < `config.toml` < environment < flags.

`load_config` builds one `Config`, which is then passed down in pieces: a part gets its section.
Each value remembers where it came from (`Config.sources`). Nothing else reads the environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .config_loading import Flag, Loader
from .config_sections import FILE_NAME, Config
from .config_values import ConfigError, Secret, settings_of
from .config_variables import PREFIX, SEED_PREFIXES, SEED_VARIABLES, router_variables
from .seed_settings import RouterSettings

__all__ = [
    "ConfigError",  # what programs of others catch (docs/python.md)
    "child_environment",
    "home_path",
    "library_config",
    "load_config",
    "router_settings",
    "wants_colour",
]


def load_config(
    home: Path,
    flags: Mapping[str, Flag] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """The configuration of the node whose folder `home` is.

    `flags` maps keys, as `http.listen`, to what the command line says. Raises `ConfigError` with
    all that is wrong.
    """
    loader = Loader(home / FILE_NAME, _environment(environ))
    config = loader.load(flags or {})
    if loader.problems:
        raise ConfigError(loader.problems)
    return config


def router_settings(environ: Mapping[str, str] | None = None) -> RouterSettings:
    """What the environment says to `generate_text` now. Raises `ConfigError`."""
    environ = _environment(environ)
    values: dict[str, Any] = {}
    problems = []
    for each in settings_of("router", RouterSettings):
        variable, text = _first_set(router_variables(each.name), environ)
        if text:
            try:
                values[each.name] = each.parse(text)
            except ValueError as error:
                problems.append(f"{variable}: {error}")
    if problems:
        raise ConfigError(problems)
    _, key = _first_set(router_variables("openrouter_api_key"), environ)
    return RouterSettings(**values, openrouter_api_key=Secret(key) if key else None)


def _first_set(variables: Iterable[str], environ: Mapping[str, str]) -> tuple[str, str]:
    """The first of them that is not empty, and its value."""
    found = ((name, environ.get(name, "").strip()) for name in variables)
    return next((each for each in found if each[1]), ("", ""))


def library_config(home: Path) -> Config:
    """The configuration for `generate_text`, which reads the seed's variables by itself, at each
    call. Raises `ConfigError`."""
    seed = {prefix + name for name in SEED_VARIABLES for prefix in (PREFIX, *SEED_PREFIXES)}
    return load_config(home, environ={k: v for k, v in os.environ.items() if k not in seed})


def home_path(flag: str | None = None, environ: Mapping[str, str] | None = None) -> Path:
    """The node's folder: `--home`, else PROMPTMESH_HOME, else the platform's place for such."""
    chosen = flag or _environment(environ).get(f"{PREFIX}HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_data_dir("promptmesh", appauthor=False))


def wants_colour(environ: Mapping[str, str] | None = None) -> bool:
    """False where the environment asks for plain text (https://no-color.org)."""
    environ = _environment(environ)
    return not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def child_environment() -> Mapping[str, str]:
    """This process's environment, for the processes it starts."""
    return dict(os.environ)


def _environment(environ: Mapping[str, str] | None) -> Mapping[str, str]:
    return os.environ if environ is None else environ
