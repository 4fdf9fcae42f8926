"""The configuration and its sections: typed values, each with its default, unit and documentation.

`docs/configuration.md` is generated from these classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..providers.base import Policy, Prefer, TimeLimits
from .addresses import check_dialable, check_listen
from .config_checks import (
    check_http_listen,
    check_kubo_api,
    check_multibase,
    check_name,
    check_trusted,
    host_name,
    split_host_port,
)
from .config_providers import LocalHFConfig, LocalServersConfig, ProviderConfig
from .config_values import plain, setting, settings_of

#: The file in the node's folder.
FILE_NAME = "config.toml"


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """This node."""

    name: str = setting(
        factory=host_name,
        doc="The node's name, by which others see it and may ask it.",
        left_out="the host's name",
        check=check_name,
    )
    json_logs: bool = setting(False, "Write the log as JSON lines.")


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """The HTTP interface for programs on this machine."""

    listen: str = setting(
        "127.0.0.1:7411",
        "Where it listens, as HOST:PORT. Only addresses of this machine are allowed; port 0 takes "
        "any free one.",
        check=check_http_listen,
    )

    @property
    def host(self) -> str:
        return split_host_port(self.listen)[0]

    @property
    def port(self) -> int:
        return split_host_port(self.listen)[1]


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The other nodes, and how one is chosen among them."""

    enabled: bool = setting(True, "Take part in the mesh. If not, this node works alone.")
    listen: tuple[str, ...] = setting(
        ("/ip4/0.0.0.0/tcp/7412",),
        "The multiaddrs on which peers reach this node.",
        check=check_listen,
    )
    bootstrap: tuple[str, ...] = setting(
        (),
        "Multiaddrs with /p2p/PEERID to begin at, beside those that `promptmesh join` stored.",
        check=check_dialable,
    )
    mdns: bool = setting(True, "Find peers of this mesh on the local network.")
    relay: bool = setting(
        False,
        "Pass on the connections of members that cannot reach each other, such as those behind "
        "routers. Wanted of one or two nodes that everybody can reach (`docs/nat.md`).",
    )
    policy: Policy = setting(  # noqa: RUF009 (makes a dataclass field)
        "round_robin",
        "Who answers a request that several can answer: everyone in turn, the one with the most "
        "free slots, or the one expected to finish first. `promptmesh init` writes "
        "`best_performance`.",
    )
    hedge: bool = setting(
        False,
        "Ask a second candidate where the first token comes later than 95 % of those before it, "
        "and take the first that comes. At most 5 % more requests; never where somebody pays.",
    )
    prefer: Prefer = setting(  # noqa: RUF009 (makes a dataclass field)
        "free",
        "Who comes first, whatever the policy: free providers before paid ones (`free`); among the "
        "free ones this node's own, while they have a free slot (`own`); or nobody (`any`).",
    )


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The stored answers."""

    max_bytes: int = setting(
        1_000_000_000, "What they may take on disk; the longest unused go first.", unit="bytes"
    )
    reuse: Literal["deterministic", "always", "never"] = setting(
        "deterministic",
        "Which requests get a stored answer: those whose answer is the same each time "
        "(temperature 0 or a seed), all, or none. The two variables take 0 for `never`.",
    )
    ttl: float = setting(30 * 24 * 3600.0, "How long an answer is kept.", unit="seconds", low=1)
    key: Literal["sha256", "cid"] = setting(
        "sha256",
        "How the key of a question is written where it is shown (`Cache-Status`): its hash in "
        "hexadecimal, or the CID of the canonical request.",
    )
    cid_base: str = setting(
        "base32", "The multibase of such a CID, such as `base58btc`.", check=check_multibase
    )
    trust: tuple[str, ...] = setting(
        ("all",),
        "Whose stored answers are used: `all` members', only those of the peers that are listed "
        "by id or by their node's name, or with `me` only this node's own. An id is surer than a "
        "name, which every member chooses for itself.",
        check=check_trusted,
    )
    min_agreement: int = setting(
        1,
        "So many trusted nodes must have computed the same answer before one that is stored at "
        "another node is used.",
        low=1,
        high=1000,
    )


@dataclass(frozen=True, kw_only=True)
class KuboConfig:
    """A Kubo daemon as a further store of answers, by its RPC."""

    api: str = setting(
        "",
        "Its address, as in Kubo's `Addresses.API` (`/ip4/127.0.0.1/tcp/5001`) or as a URL; empty "
        "for none. Needs the extra `promptmesh[kubo]`.",
        left_out="none is used",
        check=check_kubo_api,
    )
    timeout: float = setting(
        2.0, "The longest that a question to it may take.", unit="seconds", low=0.1, high=60
    )
    pin: bool = setting(False, "Pin there each answer that goes there, so that it stays.")
    publish: bool = setting(
        False,
        "Use it although it may be on the public network. Whatever goes there, all the world can "
        "read, and nobody can take it back.",
    )


@dataclass(frozen=True, kw_only=True)
class DeadlinesConfig:
    """How long a request may take before the next candidate is tried, or it fails."""

    connect: float = setting(5.0, "To reach a peer.", unit="seconds", low=0.1)
    first_token: float = setting(
        120.0, "To the first token, waiting for a free slot included.", unit="seconds", low=0.1
    )
    gap: float = setting(60.0, "Between one token and the next.", unit="seconds", low=0.1)
    whole: float = setting(600.0, "To the end of the answer.", unit="seconds", low=0.1)
    peers: dict[str, TimeLimits] = setting(  # noqa: RUF009 (makes a dataclass field)
        factory=dict,
        doc="Other ones for single peers, by id or by their node's name, as "
        "`{gpu-box = {first_token = 300}}`.",
        unit="seconds",
        left_out="none",
    )


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """What is refused because it is too much."""

    max_body: int = setting(
        32 << 20, "The largest body of an HTTP request.", unit="bytes", low=1024
    )
    max_connections: int = setting(1024, "HTTP connections at once.", low=1, high=65536)
    max_waiting: int = setting(
        256,
        "Requests that wait for a slot, per provider. One more takes the place of a less urgent "
        "one, or is refused.",
        high=65536,
    )
    max_cost_per_day: float | None = setting(
        None,
        "What this node's providers that have a `price` may cost in a day (UTC), whoever asks.",
        unit="US dollars",
        left_out="as much as is asked",
    )
    max_member_cost_per_day: float | None = setting(
        None,
        "How much of it other members may spend.",
        unit="US dollars",
        left_out="as much as `max_cost_per_day`",
    )


SECTIONS: dict[str, Any] = {
    "node": NodeConfig,
    "http": HttpConfig,
    "mesh": MeshConfig,
    "cache": CacheConfig,
    "kubo": KuboConfig,
    "local_hf": LocalHFConfig,
    "local_servers": LocalServersConfig,
    "deadlines": DeadlinesConfig,
    "limits": LimitsConfig,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration, and where each value came from."""

    node: NodeConfig = field(default_factory=NodeConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    kubo: KuboConfig = field(default_factory=KuboConfig)
    local_hf: LocalHFConfig = field(default_factory=LocalHFConfig)
    local_servers: LocalServersConfig = field(default_factory=LocalServersConfig)
    deadlines: DeadlinesConfig = field(default_factory=DeadlinesConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    providers: tuple[ProviderConfig, ...] = ()
    #: `mesh.policy` -> `default`, the file's name, the variable or the flag.
    sources: Mapping[str, str] = field(default_factory=dict)
    #: Sentences about what is not wrong but probably not meant.
    warnings: tuple[str, ...] = ()

    def values(self) -> Iterator[tuple[str, Any, str]]:
        """(key, value, source) of each setting, for people; keys and headers stay hidden."""
        for section, type_ in SECTIONS.items():
            for each in settings_of(section, type_):
                value = plain(getattr(getattr(self, section), each.name))
                yield each.key, value, self.sources.get(each.key, "default")
        for provider in self.providers:
            yield from self._provider_values(provider)

    def _provider_values(self, provider: ProviderConfig) -> Iterator[tuple[str, Any, str]]:
        prefix = f"providers.{provider.name}"
        for each in settings_of(prefix, ProviderConfig):
            value = plain(getattr(provider, each.name))
            yield each.key, value, self.sources.get(each.key, "default")
        for name, value in provider.options.items():
            yield (
                f"{prefix}.{name}",
                _without_secrets(value),
                self.sources.get(f"{prefix}.{name}", FILE_NAME),
            )


def _without_secrets(value: Any) -> Any:
    """A provider's own setting for people: `headers` and the user in a URL may be keys."""
    if isinstance(value, dict):
        return dict.fromkeys(value, "...")
    return re.sub(r"//[^/]*@", "//...@", value) if isinstance(value, str) else value
