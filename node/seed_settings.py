"""What the environment says to `generate_text`: the variables of the router, typed.

They are no keys of `config.toml`: a program sets them between two calls, and each call reads them
again (`config.router_settings`). `docs/configuration.md` is generated from this class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .config_checks import check_multibase
from .config_values import Secret, setting


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """The variables that `generate_text` reads, again at each call."""

    llm_provider: str = setting(
        "",
        "The provider that answers, as if each call named it: it fails rather than being replaced.",
        left_out="the first of the order that can be used",
    )
    llm_model: str = setting(
        "",
        "The model of `local_hf`, and the one that `backend_manager` is asked for.",
        left_out="`local_hf.model`, else `gpt2`; of `backend_manager` `auto`",
    )
    llm_load_balancing: Literal["", "round_robin", "least_loaded", "best_performance"] = setting(
        "", "How `backend_manager` chooses.", left_out="the node's own `mesh.policy`"
    )
    enable_backend_manager: bool = setting(
        False, "May the running node be asked where no provider is named? It is then the first."
    )
    router_cache: bool = setting(
        True, "Keep what was built of a provider, with its connections or its model, for later."
    )
    router_response_cache: bool = setting(True, "Give stored answers, and store answers.")
    router_cache_key: Literal["sha256", "cid"] = setting(
        "sha256", "How the key of a question is written (in the trace, and to a `remote_cache`)."
    )
    router_cache_cid_base: str = setting(
        "base32", "The multibase of a key that is written as a CID.", check=check_multibase
    )
    openrouter_model: str = setting("openai/gpt-4o-mini", "The model of `openrouter`.")
    openrouter_base_url: str = setting("https://openrouter.ai/api/v1", "Where OpenRouter is.")
    openrouter_http_referer: str = setting(
        "", "Told to OpenRouter as `HTTP-Referer`.", left_out="nothing"
    )
    openrouter_app_title: str = setting("", "Told to OpenRouter as `X-Title`.", left_out="nothing")
    codex_cli_model: str = setting(
        "", "The model of `codex_cli`.", left_out="`codex_model`, else the one that Codex prefers"
    )
    codex_model: str = setting("", "The same; `codex_cli_model` goes first.", left_out="as there")
    codex_base_url: str = setting(
        "",
        "A server of OpenAI's dialect that `codex_cli` asks, without a login.",
        left_out="OpenAI's own",
    )
    copilot_sdk_model: str = setting(
        "", "The model of `copilot_sdk`.", left_out="`COPILOT_MODEL`, else `gpt-4o`"
    )
    copilot_sdk_timeout: float = setting(
        0.0,
        "The longest silence of `copilot_sdk`.",
        unit="s",
        left_out="600",
        high=86400.0,
    )
    gemini_model: str = setting(
        "",
        "The model of `gemini_cli`.",
        left_out="`gemini-flash-latest` where there is a key, else the command's own",
    )
    claude_model: str = setting(
        "",
        "The model of `claude_code`.",
        left_out="the first that Anthropic lists where there is a key, else `sonnet`",
    )
    #: Of the variable `openrouter_api_key`.
    openrouter_api_key: Secret | None = field(default=None)
