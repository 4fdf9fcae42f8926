"""The `config.toml` that `promptmesh init` writes: what most people change, mostly as comments."""

from __future__ import annotations

import json

_TEMPLATE = """\
# promptmesh's configuration. Every key is optional. `promptmesh config` shows all of them and where
# each value comes from. Environment variables and flags stand over this file.

[node]
{name}

[http]
# listen = "127.0.0.1:7411"

[mesh]
policy = "best_performance"         # or round_robin, least_loaded
# listen = ["/ip4/0.0.0.0/tcp/7412"]
# bootstrap = []                    # multiaddrs with /p2p/PEERID, beside what `join` stored
# mdns = true                       # find peers on the local network

[cache]
# max_bytes = 1_000_000_000
# reuse = "deterministic"           # or always, never

[local_hf]                          # the model that this node runs itself
{model}

# Any server that speaks the OpenAI dialect: Ollama, vLLM, llama.cpp, LM Studio...
# [[providers]]
# kind = "openai_compatible"
# name = "ollama"
# base_url = "http://127.0.0.1:11434/v1"
# api_key_env = "OLLAMA_KEY"        # the variable that holds the key, never the key
# slots = 4
# share = true                      # may peers use it?
"""


def starting_config(*, name: str = "", model: str = "") -> str:
    """The text of a new `config.toml`, with the node's name and model where they are given."""
    return _TEMPLATE.format(
        name=f"name = {_text(name)}"
        if name
        else '# name = "alpha"                  # how others see this node',
        model=f"model = {_text(model)}"
        if model
        else '# model = ""                      # a transformers id or a folder',
    )


def _text(value: str) -> str:
    """A TOML string. JSON's is the same for everything that is printable."""
    return json.dumps(value, ensure_ascii=False)
