"""The sections of the configuration: typed values, each with its default, unit and documentation.

`docs/configuration.md` is generated from these classes.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..cache.kubo_address import endpoint
from ..providers.base import Policy, Prefer, Price, TimeLimits
from .addresses import check_dialable, check_listen
from .config_values import Secret, setting

MAX_NAME = 63


def host_name() -> str:
    """The host's name, made fit to name a node."""
    return re.sub(r"[^\w.-]+", "-", socket.gethostname().partition(".")[0])[:MAX_NAME] or "node"


def check_name(text: str) -> str:
    """A name that fits into PEER-NAME:PROVIDER/MODEL. Raises `ValueError`."""
    if not 0 < len(text) <= MAX_NAME or re.search(r"[\s:/]", text):
        raise ValueError(f"expected 1 to {MAX_NAME} characters without spaces, ':' and '/'")
    return text


def check_trusted(text: str) -> str:
    """`all`, `me`, a peer id or a node's name. Raises `ValueError`."""
    return check_name(text)


def split_host_port(text: str) -> tuple[str, int]:
    """`127.0.0.1:7411` or `[::1]:7411` taken apart. Raises `ValueError`."""
    host, colon, port = text.rpartition(":")
    if not host or not colon or not re.fullmatch(r"\d{1,5}", port) or int(port) > 65535:
        raise ValueError("expected HOST:PORT, such as 127.0.0.1:7411")
    return host.removeprefix("[").removesuffix("]"), int(port)


def check_http_listen(text: str) -> str:
    """An address that only this machine reaches. Raises `ValueError`."""
    host, _ = split_host_port(text)
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise ValueError(
            f"expected an address of this machine such as 127.0.0.1, not {host!r}"
        ) from None
    if not loopback:
        raise ValueError(
            "other machines could reach this address, and whoever reaches it could spend your "
            "models and keys. The HTTP interface listens on 127.0.0.1 or [::1] only; other "
            "machines run a node of their own (`promptmesh invite`)"
        )
    return text


def check_multibase(text: str) -> str:
    """A base that CIDs can be written in. Raises `ValueError`."""
    from ..cache.cid import cid_of, cid_text

    try:
        cid_text(cid_of(bytes(32)), text)
    except ValueError as error:
        raise ValueError(f"expected a multibase such as base58btc: {error}") from None
    return text


def check_port(text: str) -> str:
    """The number of a port. Raises `ValueError`."""
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise ValueError("expected a port from 1 to 65535")
    return text


def check_kubo_api(text: str) -> str:
    """The address of a Kubo's RPC, or nothing. Raises `ValueError`."""
    if text:
        endpoint(text)
    return text


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
class LocalHFConfig:
    """The model that this node runs itself, by transformers and torch."""

    model: str = setting(
        "", "A transformers id or a folder; empty for none.", left_out="no model of its own"
    )
    embedding_model: str = setting(
        "",
        "A transformers id or a folder of a model that makes embeddings; it runs in a process of "
        "its own, as the provider `local_hf_embed`.",
        left_out="none",
    )
    device: str = setting("auto", "`auto`, `cpu`, `cuda`, `cuda:1`...: where it runs.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "The numbers it computes with. `auto`: float32 on a CPU, where greedy answers are then the "
        "same alone and in a batch, and the model's own on a GPU.",
    )
    threads: int | None = setting(
        None,
        "Processor threads.",
        left_out="one for each processor, or `OMP_NUM_THREADS`",
        low=1,
        high=1024,
    )
    max_context: int | None = setting(
        None,
        "The longest prompt and answer together.",
        unit="tokens",
        left_out="what the model was made for, as far as memory allows",
        low=16,
    )
    max_batch: int = setting(16, "Requests computed at once.", low=1, high=1024)
    max_waiting: int | None = setting(
        None,
        "Requests that wait until it is free.",
        left_out="`limits.max_waiting`",
        high=65536,
    )
    memory_fraction: float | None = setting(
        None,
        "The share of the free memory that running requests may take.",
        left_out="what `max_batch` requests need, at most a quarter of a CPU's free memory and 0.6 "
        "of a GPU's",
        low=0.01,
        high=1,
    )
    share: bool = setting(True, "May peers use it?")
    deadlines: TimeLimits | None = setting(  # noqa: RUF009 (makes a dataclass field)
        None,
        "Its own, as `{first_token = 300, gap = 30}`.",
        unit="seconds",
        left_out="`[deadlines]`",
    )


@dataclass(frozen=True, kw_only=True)
class LocalServersConfig:
    """Model servers on this machine that are found without being configured."""

    enabled: bool = setting(
        True,
        "Look for them, at the start and while the node runs. A server that has a table of its own "
        "(`[[providers]]` with its `base_url`) is not looked for.",
    )
    ports: tuple[str, ...] = setting(
        ("8000", "30000", "11434", "8080", "1234"),
        "The ports of 127.0.0.1 that are looked at: those of vLLM, SGLang, Ollama, llama.cpp and "
        "LM Studio.",
        check=check_port,
    )
    share: bool = setting(True, "May peers use what is found?")


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


@dataclass(frozen=True, kw_only=True)
class ProviderConfig:
    """An LLM server, or another source of answers, that this node offers. One table each."""

    kind: str = setting(doc="What it is, such as `openai_compatible`.", check=check_name)
    name: str = setting(doc="Its name in PROVIDER/MODEL.", left_out="its kind", check=check_name)
    share: bool = setting(
        doc="May peers use it?",
        left_out="yes; no where a key pays (`api_key_env`), a `price` says that it costs, its kind "
        "spends a subscription (as `codex_cli`), or is one of another package",
    )
    slots: int | None = setting(
        None, "Requests it takes at once.", left_out="the kind's own default", low=1, high=4096
    )
    max_waiting: int | None = setting(
        None,
        "Requests that wait until it is free.",
        left_out="`limits.max_waiting`",
        high=65536,
    )
    requests_per_minute: int | None = setting(
        None,
        "Requests that may begin in any 60 s. Providers with the same key share their limits.",
        left_out="as many as come",
        low=1,
    )
    tokens_per_minute: int | None = setting(
        None,
        "Tokens of the prompts and answers of all requests that began in any 60 s.",
        left_out="as many as come",
        low=1,
    )
    requests_at_once: int | None = setting(
        None,
        "Requests under way with one key, where several providers have it; `slots` are each "
        "one's own.",
        left_out="as many as their `slots`",
        low=1,
    )
    when_limited: Literal["wait", "refuse"] = setting(
        "wait",
        "What becomes of a request at such a limit: it waits in the queue for its turn, or is "
        "refused, so that another provider is asked.",
    )
    member_requests_per_minute: int | None = setting(
        None,
        "Requests that each other member may have here in any 60 s. More are refused.",
        left_out="as many as all",
        low=1,
    )
    member_tokens_per_minute: int | None = setting(
        None,
        "Tokens that each other member may have here in any 60 s.",
        left_out="as many as all",
        low=1,
    )
    api_key_env: str = setting(
        "", "The environment variable that holds its key. Never the key itself.", left_out="no key"
    )
    price: Price | None = setting(  # noqa: RUF009 (makes a dataclass field)
        None,
        "What it charges, as `{prompt = 0.5, completion = 1.5}`.",
        unit="US dollars for a million tokens",
        left_out="nothing; where a key pays, not known",
    )
    prices: dict[str, Price] = setting(  # noqa: RUF009 (makes a dataclass field)
        factory=dict,
        doc='The same of single models, as `{"MODEL" = {prompt = 3, completion = 15}}`.',
        left_out="`price`",
    )
    deadlines: TimeLimits | None = setting(  # noqa: RUF009 (makes a dataclass field)
        None,
        "Its own, as `{first_token = 300, gap = 30}`. How long connecting to a server may take is "
        "its kind's business (`connect_timeout`).",
        unit="seconds",
        left_out="`[deadlines]`",
    )
    api_key: Secret | None = None
    #: The keys that only its kind understands, such as `base_url`.
    options: Mapping[str, Any] = field(default_factory=dict)


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
