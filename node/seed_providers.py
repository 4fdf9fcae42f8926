"""The providers of the Python API by name, and in which order they are tried.

A `Plan` says what would answer, and with which model, without building anything: no connection, no
process, no import of another package's provider.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..providers.base import Price
from ..providers.plugins import load_plugin, plugins
from ..providers.variables import environment_of
from .config import child_environment
from .config_providers import SUBSCRIPTION_KINDS, ProviderConfig
from .config_sections import Config
from .home import NOT_RUNNING, Home
from .seed_registered import registered, registered_names, serial
from .seed_settings import RouterSettings
from .seed_vendors import VENDORS, obstacle

if TYPE_CHECKING:
    from .own_providers import OwnProvider
    from .pricing import Purse

#: Other names of the same.
ALIASES = {
    "codex": "codex_cli",
    "copilot": "copilot_cli",
    "gemini": "gemini_cli",
    "claude": "claude_code",
    "hf": "local_hf",
    "huggingface": "local_hf",
}
#: Tried one after the other where no provider is named. The servers of `config.toml` stand before
#: `local_hf`, in their order there.
ORDER = (
    "backend_manager",
    "openrouter",
    "codex_cli",
    "copilot_cli",
    "copilot_sdk",
    "gemini_cli",
    "claude_code",
    "local_hf",
)
#: Never tried where no provider is named.
ONLY_BY_NAME = ("echo", "openai_compatible")
#: The first model server that is configured, or was found.
ANY_SERVER = "openai_compatible"
#: What those are called that are found (`providers/local_servers.py`).
SERVERS = frozenset({"vllm", "sglang", "ollama", "llama_cpp", "lm_studio"})

MAX_TOKENS, LOCAL_MAX_TOKENS = 256, 128
#: The model of `local_hf` where nothing says another.
LOCAL_MODEL = "gpt2"


class Unusable(Exception):
    """This provider cannot be used now; the message says why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What would answer."""

    name: str
    kind: str
    model: str
    max_tokens: int = MAX_TOKENS
    #: It spends somebody's money, and how much where that is known.
    paid: bool = False
    price: Price | None = None
    #: Builds it; None: what answers is an object of the program (`plain`), or the running node.
    build: Callable[[Purse], OwnProvider] | None = None
    #: Makes the object of the program.
    plain: Callable[[], Any] | None = None
    #: Equal plans have equal keys, and share what was built.
    key: tuple[object, ...] = field(default=())


@dataclass
class NodeWishes:
    """How the running node is to be asked, for a call or by what a program keeps of it."""

    load_balancing_strategy: str = ""
    enable_health_checks: bool = False


def plain_name(name: str) -> str:
    """The name as it is looked for. Raises `ValueError` for none."""
    found = name.strip().lower()
    if not found:
        raise ValueError("the name of a provider is empty")
    return ALIASES.get(found, found)


@dataclass(frozen=True)
class Planner:
    """Makes plans. `manager`: is a backend manager of the program there?"""

    config: Config
    settings: RouterSettings
    home: Home
    manager: Any = None
    #: Model servers that were found on this machine.
    found: Sequence[ProviderConfig] = ()

    def order(self) -> Iterator[str]:
        """The names to try where none is given."""
        yield from ORDER[:-1]
        yield from (table.name for table in self.config.providers)
        yield ANY_SERVER
        yield ORDER[-1]

    def plan(self, name: str, model: str | None) -> Plan:
        """The plan for a provider. Raises `Unusable`; `ValueError` for a name nobody knows."""
        own = registered(name)
        if own is not None:
            return self._plain(name.strip().lower(), own.factory, model, own.number)
        name = plain_name(name)
        table = next((t for t in self._tables if t.name.lower() == name), None)
        if table is not None:
            return self._configured(table, model)
        if name in SERVERS:
            raise Unusable(f"no {name} {self._not_found}")
        plans: dict[str, Callable[[str | None], Plan]] = {
            "backend_manager": self._node,
            "openrouter": self._openrouter,
            "local_hf": self._local_hf,
            "echo": self._echo,
            **{kind: partial(self._vendor, kind) for kind in VENDORS},
        }
        if name in plans:
            return plans[name](model)
        if name == "openai_compatible":
            return self._any_server(model)
        if name in plugins():
            return self._plain(name, lambda: _plugged(name), model, 0)
        raise ValueError(f"no provider is named {name!r}; there is {', '.join(self._known())}")

    @property
    def _tables(self) -> Sequence[ProviderConfig]:
        return (*self.config.providers, *self.found)

    @property
    def _not_found(self) -> str:
        if not self.config.local_servers.enabled:
            return "is configured, and local_servers.enabled is false"
        return f"answers on the ports {', '.join(self.config.local_servers.ports)}"

    def _known(self) -> list[str]:
        tables = [table.name for table in self.config.providers]
        return sorted({*ORDER, *ONLY_BY_NAME, *tables, *registered_names(), *plugins()})

    def auto(self, name: str, model: str | None) -> Plan:
        """The same for one that nobody named: some are used only where that is wanted."""
        if (
            name == "backend_manager"
            and not self.settings.enable_backend_manager
            and self.manager is None
            and registered(name) is None
        ):
            raise Unusable("not enabled (PROMPTMESH_ENABLE_BACKEND_MANAGER=1 enables it)")
        if name == ANY_SERVER:
            # Those of the configuration stand in the order by their own names.
            if not self.found:
                raise Unusable(f"no model server {self._not_found}")
            return self._configured(self.found[0], model)
        return self.plan(name, model)

    # --- each of them

    def _plain(self, name: str, make: Callable[[], Any], model: str | None, number: int) -> Plan:
        return Plan(
            name=name, kind="plain", model=model or name, plain=make, key=(name, "plain", number)
        )

    def _node(self, model: str | None) -> Plan:
        if self.manager is not None and not isinstance(self.manager, NodeWishes):
            # One of the program's own, which is asked as any of its providers.
            return self._plain("backend_manager", lambda: self.manager, model, serial(self.manager))
        if self.home.running() is None:
            raise Unusable(NOT_RUNNING)
        wishes = self.manager or NodeWishes()
        policy = wishes.load_balancing_strategy or self.settings.llm_load_balancing
        return Plan(
            name="backend_manager",
            kind="backend_manager",
            model=model or self.settings.llm_model or "auto",
            key=("backend_manager", policy, wishes.enable_health_checks),
        )

    def _openrouter(self, model: str | None) -> Plan:
        said = self.settings
        if said.openrouter_api_key is None:
            raise Unusable("no key: set OPENROUTER_API_KEY (https://openrouter.ai/keys)")
        options = {
            "base_url": said.openrouter_base_url,
            "http_referer": said.openrouter_http_referer,
            "app_title": said.openrouter_app_title,
        }
        table = ProviderConfig(
            kind="openrouter",
            name="openrouter",
            share=False,
            api_key=said.openrouter_api_key,
            options={name: value for name, value in options.items() if value},
        )
        return self._built(table, model or said.openrouter_model, tuple(options.values()))

    def _echo(self, model: str | None) -> Plan:
        table = ProviderConfig(
            kind="echo", name="echo", share=False, options={"models": [model or "echo"]}
        )
        return self._built(table, model or "echo", (model,))

    def _vendor(self, kind: str, model: str | None) -> Plan:
        vendor, said = VENDORS[kind], self.settings
        table = ProviderConfig(
            kind=kind,
            name=kind,
            share=False,
            api_key=vendor.api_key(said),
            options=vendor.options(said),
        )
        return self._may_be_usable(table, model or vendor.model(said))

    def _may_be_usable(self, table: ProviderConfig, model: str) -> Plan:
        """Of a kind that may be a vendor's. Raises `Unusable`."""
        environment = child_environment()
        reason = obstacle(table.kind, environment, table.options)
        if reason and table.api_key is None:
            raise Unusable(reason)
        # Another key, another login: another one.
        seen = environment_of(table.kind, environment) if table.kind in VENDORS else {}
        return self._built(table, model, (*map(str, table.options.items()), *seen.items()))

    def _configured(self, table: ProviderConfig, model: str | None) -> Plan:
        models = table.options.get("models")
        default = models[0] if isinstance(models, list | tuple) and models else ""
        return self._may_be_usable(table, model or default)

    def _any_server(self, model: str | None) -> Plan:
        for table in self._tables:
            if table.kind == ANY_SERVER:
                return self._configured(table, model)
        path = self.home.config_path
        raise Unusable(f"no model server {self._not_found}; add one as [[providers]] in {path}")

    def _built(self, table: ProviderConfig, model: str, more: tuple[object, ...]) -> Plan:
        return Plan(
            name=table.name,
            kind=table.kind,
            model=model,
            paid=table.api_key is not None or table.kind in SUBSCRIPTION_KINDS,
            price=table.prices.get(model, table.price),
            build=lambda purse: self._build(purse, providers=(table,)),
            key=(table.name, table.kind, table.api_key, *more),
        )

    def _local_hf(self, model: str | None) -> Plan:
        missing = [m for m in ("torch", "transformers") if importlib.util.find_spec(m) is None]
        if missing:
            raise Unusable(
                f"{' and '.join(missing)} not installed: type pip install 'promptmesh[hf]'"
            )
        from ..providers.hf_settings import LocalHFSettings

        wanted = model or self.settings.llm_model or self.config.local_hf.model or LOCAL_MODEL
        local = replace(self.config.local_hf, model=wanted, embedding_model="")
        return Plan(
            name="local_hf",
            kind="local_hf",
            model=LocalHFSettings(model=wanted).model_id,
            max_tokens=LOCAL_MAX_TOKENS,
            build=lambda purse: self._build(purse, providers=(), local_hf=local),
            key=("local_hf", wanted),
        )

    def _build(self, purse: Purse, **changes: Any) -> OwnProvider:
        """Raises `SettingsError`."""
        from .own_providers import build_providers

        without = replace(self.config.local_hf, model="", embedding_model="")
        config = replace(self.config, **{"local_hf": without, **changes})
        (built,) = build_providers(config, child_environment(), self.home.path, purse)
        return built


def _plugged(name: str) -> Any:
    """What the entry point of that name makes. Raises whatever that does."""
    plugin = load_plugin(name)
    if plugin is None:
        raise ValueError("its package was removed")
    return plugin()
