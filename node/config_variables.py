"""The names of the environment variables that set a key. They are read in `config`."""

from __future__ import annotations

#: The seed's names of variables -> our key. They are read with each prefix.
SEED_VARIABLES = {
    "LLM_LOAD_BALANCING": "mesh.policy",
    "LLM_MODEL": "local_hf.model",
    "ROUTER_RESPONSE_CACHE": "cache.reuse",
    "ROUTER_CACHE_KEY": "cache.key",
    "ROUTER_CACHE_CID_BASE": "cache.cid_base",
}
PREFIX = "PROMPTMESH_"
#: The prefixes under which programs written for others set the same, the strongest first.
SEED_PREFIXES = ("IPFS_ACCELERATE_PY_", "ipfs_accelerate_py_", "IPFS_DATASETS_PY_")
#: Variables of OpenRouter that have no prefix either.
UNPREFIXED = ("OPENROUTER_API_KEY", "OPENROUTER_HTTP_REFERER", "OPENROUTER_APP_TITLE")


def variables_of(key: str) -> list[str]:
    """The environment variables that set a key, the strongest first."""
    seed = [name for name, target in SEED_VARIABLES.items() if target == key]
    own = PREFIX + key.replace(".", "_").upper()
    return [own, *(prefix + name for prefix in (PREFIX, *SEED_PREFIXES) for name in seed)]


def router_variables(name: str) -> list[str]:
    """The environment variables that set a field of `RouterSettings`, the strongest first."""
    upper = name.upper()
    bare = [upper] if upper in UNPREFIXED else []
    return [prefix + upper for prefix in (PREFIX, *SEED_PREFIXES)] + bare
