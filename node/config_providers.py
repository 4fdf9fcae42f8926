"""The sections of what answers at this node: its own model, servers found here, and providers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..providers.base import Price, TimeLimits
from .config_checks import check_name, check_port
from .config_values import Secret, setting

#: Kinds that spend somebody's subscription, whether or not a variable holds a key.
SUBSCRIPTION_KINDS = frozenset(
    {"codex_cli", "copilot_cli", "copilot_sdk", "gemini_cli", "claude_code"}
)
#: Kinds of ours. What one of another package does with a prompt, and what that costs, nobody knows.
KNOWN_KINDS = frozenset({"echo", "openai_compatible", "openrouter"}) | SUBSCRIPTION_KINDS


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
