"""The configuration: the order of its layers, what it refuses and how it says so."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.mesh.policies import Candidate
from promptmesh.node.config import home_path, load_config, wants_colour
from promptmesh.node.config_loading import Flag
from promptmesh.node.config_sections import SECTIONS, Config
from promptmesh.node.config_template import starting_config
from promptmesh.node.config_values import ConfigError, Secret, settings_of
from promptmesh.node.config_variables import variables_of
from promptmesh.node.parts import time_limits
from promptmesh.providers.base import ModelOffer, Price, TimeLimits

PEER = "12D3KooWGRUQyF9z5ZJxkYbW3pB8xYyK8mJm3bS9Fh1m5W8mTzUu"


def load(
    folder: Path,
    text: str = "",
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Flag] | None = None,
) -> Config:
    (folder / "config.toml").write_text(text)
    return load_config(folder, flags, environ or {})


def problems(folder: Path, text: str = "", **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, environ)
    return "\n".join(caught.value.problems)


def test_without_anything_the_defaults_hold(tmp_path: Path) -> None:
    config = load_config(tmp_path / "missing", environ={})
    assert config.http.listen == "127.0.0.1:7411"
    assert (config.http.host, config.http.port) == ("127.0.0.1", 7411)
    assert config.mesh.listen == ("/ip4/0.0.0.0/tcp/7412",)
    assert config.mesh.policy == "round_robin"
    assert config.cache.max_bytes == 1_000_000_000
    assert config.node.name
    assert {source for _, _, source in config.values()} == {"default"}
    assert config == Config(sources={})


#: What each layer says of one key, weakest first, as in the module's first line.
LAYERS = ("file", "seed", "seed, our prefix", "variable", "flag")


@pytest.mark.parametrize(
    "present",
    [subset for n in range(len(LAYERS) + 1) for subset in itertools.combinations(LAYERS, n)],
    ids=lambda subset: "+".join(subset) or "none",
)
def test_the_strongest_layer_wins(tmp_path: Path, present: tuple[str, ...]) -> None:
    environ = {}
    # The prefixes of still other programs come after these.
    known = variables_of("local_hf.model")[:3]
    for layer, variable in zip(LAYERS[1:4], reversed(known), strict=True):
        if layer in present:
            environ[variable] = layer
    text = '[local_hf]\nmodel = "file"\n' if "file" in present else ""
    flags: dict[str, Flag] = {"local_hf.model": ("--model", "flag")} if "flag" in present else {}
    config = load(tmp_path, text, environ, flags)
    strongest = max(present, key=LAYERS.index, default="")
    assert config.local_hf.model == strongest
    sources = {
        "": "default",
        "file": "config.toml",
        "seed": "IPFS_ACCELERATE_PY_LLM_MODEL",
        "seed, our prefix": "PROMPTMESH_LLM_MODEL",
        "variable": "PROMPTMESH_LOCAL_HF_MODEL",
        "flag": "--model",
    }
    assert config.sources.get("local_hf.model", "default") == sources[strongest]


@pytest.mark.parametrize("prefix", ["PROMPTMESH_", "IPFS_ACCELERATE_PY_"])
def test_the_seeds_variables(tmp_path: Path, prefix: str) -> None:
    environ = {
        prefix + "LLM_LOAD_BALANCING": "least_loaded",
        prefix + "LLM_MODEL": "gpt2",
        prefix + "ROUTER_RESPONSE_CACHE": "0",
        prefix + "ROUTER_CACHE_KEY": "cid",
        prefix + "ROUTER_CACHE_CID_BASE": "base58btc",
        prefix + "LLM_PROVIDER": "is read elsewhere",
    }
    config = load(tmp_path, "", environ)
    assert config.mesh.policy == "least_loaded"
    assert config.local_hf.model == "gpt2"
    assert config.cache.reuse == "never"
    assert (config.cache.key, config.cache.cid_base) == ("cid", "base58btc")
    assert config.warnings == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [("KEY", "md5"), ("CID_BASE", "base7"), ("CID_BASE", "identity"), ("CID_BASE", "BASE32")],
)
def test_a_form_of_key_that_cannot_be_made_is_an_error(
    tmp_path: Path, name: str, value: str
) -> None:
    with pytest.raises(ConfigError, match=f"ROUTER_CACHE_{name}"):
        load(tmp_path, "", {f"IPFS_ACCELERATE_PY_ROUTER_CACHE_{name}": value})


def test_the_seeds_cache_switched_on_changes_nothing(tmp_path: Path) -> None:
    environ = {"IPFS_ACCELERATE_PY_ROUTER_RESPONSE_CACHE": "1"}
    assert load(tmp_path, '[cache]\nreuse = "always"', environ).cache.reuse == "always"
    assert load(tmp_path, "", environ).cache.reuse == "deterministic"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("mesh.mdns", "off", False),
        ("mesh.mdns", "YES", True),
        ("cache.max_bytes", "5_000", 5000),
        ("deadlines.gap", " 2.5 ", 2.5),
        (
            "mesh.listen",
            "/ip4/127.0.0.1/tcp/1, /ip6/::1/tcp/2",
            ("/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/2"),
        ),
        ("local_hf.threads", "3", 3),
        ("http.listen", "[::1]:0", "[::1]:0"),
        ("mesh.policy", "best_performance", "best_performance"),
    ],
)
def test_a_variable_for_every_kind_of_value(
    tmp_path: Path, key: str, text: str, value: object
) -> None:
    variable = variables_of(key)[0]
    config = load(tmp_path, "", {variable: text})
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == value
    assert config.sources[key] == variable


def test_an_empty_variable_counts_as_not_set(tmp_path: Path) -> None:
    assert load(tmp_path, "", {"PROMPTMESH_MESH_POLICY": ""}).sources == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[mesh]\npolcy = "x"', "unknown key mesh.polcy; did you mean mesh.policy?"),
        ("[mseh]\n", "unknown section [mseh]; did you mean mesh?"),
        ("[zzz]\n", "unknown section [zzz]"),
        ("mesh = 1", "mesh: expected a table, written [mesh]"),
        ("[mesh]\nmdns = 1", "mesh.mdns: expected true or false, not 1"),
        ("[cache]\nmax_bytes = true", "cache.max_bytes: expected a whole number of bytes"),
        ("[cache]\nmax_bytes = -1", "at least 0, not -1"),
        ("[cache]\nttl = nan", "cache.ttl: expected a number of seconds"),
        ('[mesh]\npolicy = "fastest"', "one of round_robin, least_loaded, best_performance"),
        ('[mesh]\nlisten = "x"', "mesh.listen: expected a list of texts"),
        ('[mesh]\nlisten = ["/ip4/1.2.3/tcp/1"]', "not IPv4"),
        ('[mesh]\nlisten = ["/ip4/1.2.3.4/udp/1"]', "such as /ip4/0.0.0.0/tcp/7412"),
        ('[mesh]\nbootstrap = ["/ip4/1.2.3.4/tcp/1"]', "/p2p/ with the peer's id is missing"),
        ('[node]\nname = "a:b"', "without spaces, ':' and '/'"),
        ('[node]\nname = "a\\u001bb"', "node.name: expected a text"),
        ("[http]\nlisten = 'here'", "expected HOST:PORT"),
        ("[http]\nlisten = '127.0.0.1:99999'", "expected HOST:PORT"),
        ("[local_hf]\nmemory_fraction = 2", "from 0.01 to 1, not 2"),
        ("[mesh", "is not valid TOML"),
        ("providers = 1", "each written [[providers]]"),
        ("[providers]\nkind = 'echo'", "each written [[providers]]"),
        ("[[providers]]\nname = 'x'", "the key `kind` is missing"),
        ("[[providers]]\nkind = 'x'\nprice = 1", "price: expected a table with `prompt`"),
        ("[[providers]]\nkind = 'x'\nprice = {}", "price: expected a table with `prompt`"),
        ("[[providers]]\nkind = 'x'\nprice = {prompt = -1}", "US dollars for a million"),
        ("[[providers]]\nkind = 'x'\nprice = {input = 1}", "US dollars for a million"),
        ("[[providers]]\nkind = 'x'\nprices = {m = 1}", "prices: expected a table of such"),
        ("[[providers]]\nkind = 'x'\nslots = 0", "slots: expected a whole number from 1"),
        ("[[providers]]\nkind = 'x'\napi_key = 'sk-secret'", "api_key_env"),
        ("[[providers]]\nkind = 'x'\n[[providers]]\nkind = 'x'", "the name 'x' is taken"),
        (
            "[local_hf]\nmodel = 'm'\n[[providers]]\nkind = 'local_hf'",
            "the name 'local_hf' is taken",
        ),
    ],
)
def test_a_wrong_file_is_said(tmp_path: Path, text: str, said: str) -> None:
    text = problems(tmp_path, text)
    assert said in text
    assert str(tmp_path / "config.toml") in text
    assert "sk-secret" not in text


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    text = problems(tmp_path, "[mesh]\nmdns = 3\n[cache]\nreuse = 4", PROMPTMESH_HTTP_LISTEN="x")
    assert "mesh.mdns" in text
    assert "cache.reuse" in text
    assert "PROMPTMESH_HTTP_LISTEN (http.listen)" in text


@pytest.mark.parametrize("address", ["0.0.0.0:7411", "192.168.1.2:1", "[::]:7411"])
def test_others_may_not_reach_the_http_interface(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match=r"--http \(http.listen\).*other machines"):
        load(tmp_path, flags={"http.listen": ("--http", address)})


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_config(tmp_path, environ={})
    (tmp_path / "config.toml").write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(ConfigError, match="is larger than"):
        load_config(tmp_path, environ={})
    (tmp_path / "config.toml").unlink()
    (tmp_path / "config.toml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path, environ={})


def test_a_variable_that_sets_nothing_is_a_warning(tmp_path: Path) -> None:
    config = load(tmp_path, "", {"PROMPTMESH_MESH_POLCY": "x", "PROMPTMESH_HOME": "y"})
    assert config.warnings == (
        "the variable PROMPTMESH_MESH_POLCY sets nothing; did you mean PROMPTMESH_MESH_POLICY?",
    )


VLLM = """
[[providers]]
kind = "openai_compatible"
name = "vllm"
base_url = "http://127.0.0.1:9000/v1"
api_key_env = "VLLM_KEY"
headers = { authorization = "Bearer hidden" }
proxy = "http://me:hidden@127.0.0.1/"
models = ["fake-model"]
slots = 8
[[providers]]
kind = "echo"
"""


def test_the_tables_of_providers(tmp_path: Path) -> None:
    config = load(tmp_path, VLLM, {"VLLM_KEY": "sk-secret"})
    vllm, echo = config.providers
    assert (vllm.kind, vllm.name, vllm.slots) == ("openai_compatible", "vllm", 8)
    assert vllm.api_key == Secret("sk-secret")
    assert set(vllm.options) == {"base_url", "headers", "models", "proxy"}
    assert not vllm.share  # somebody pays for it
    assert (echo.name, echo.share, echo.slots, echo.options) == ("echo", True, None, {})
    shown = {key: (value, source) for key, value, source in config.values()}
    assert shown["providers.vllm.slots"] == (8, "config.toml")
    assert shown["providers.vllm.share"] == (False, "default")
    assert shown["providers.vllm.models"] == (["fake-model"], "config.toml")


def test_a_provider_of_another_package_is_shared_when_told_so(tmp_path: Path) -> None:
    text = "[[providers]]\nkind = 'theirs'\n"
    assert not load(tmp_path, text).providers[0].share
    assert load(tmp_path, text + "share = true").providers[0].share


def test_openrouter_looks_for_its_usual_key(tmp_path: Path) -> None:
    text = "[[providers]]\nkind = 'openrouter'\n"
    (provider,) = load(tmp_path, text, {"OPENROUTER_API_KEY": "k"}).providers
    assert provider.api_key is not None
    assert not provider.share


def test_a_paid_provider_is_shared_when_told_so(tmp_path: Path) -> None:
    text = "[[providers]]\nkind = 'x'\napi_key_env = 'K'\nshare = true"
    assert load(tmp_path, text, {"K": "k"}).providers[0].share


PRICED = """[[providers]]
kind = "x"
price = {prompt = 0.5, completion = 2}
[providers.prices]
"org/large" = {completion = 15.5}
"""


def test_prices(tmp_path: Path) -> None:
    config = load(tmp_path, PRICED)
    (provider,) = config.providers
    assert provider.price == Price(prompt=0.5, completion=2)
    assert provider.prices == {"org/large": Price(completion=15.5)}
    assert not provider.share  # it costs something
    shown = {key: value for key, value, _ in config.values()}
    assert shown["providers.x.price"] == {"prompt": 0.5, "completion": 2}
    free = "[[providers]]\nkind = 'echo'\nprice = {prompt = 0}"
    assert load(tmp_path, free).providers[0].share


TIMES = """[deadlines.peers]
gpu-box = {first_token = 300}
[local_hf]
model = "org/small"
deadlines = {gap = 5}
[[providers]]
kind = "x"
deadlines = {first_token = 30, gap = 2.5}
"""


def test_providers_and_peers_have_times_of_their_own(tmp_path: Path) -> None:
    config = load(tmp_path, TIMES)
    assert config.deadlines.peers == {"gpu-box": TimeLimits(first_token=300)}
    assert config.local_hf.deadlines == TimeLimits(gap=5)
    assert config.providers[0].deadlines == TimeLimits(first_token=30, gap=2.5)
    shown = {key: value for key, value, _ in config.values()}
    assert shown["deadlines.peers"] == {"gpu-box": {"first_token": 300}}

    def limits(provider: str, *, node: str = "", own: bool = True) -> TimeLimits | None:
        offer = ModelOffer(id="m")
        candidate = Candidate(peer="id", node=node, provider=provider, offer=offer, own=own)
        return time_limits(config, candidate)

    assert limits("x") == TimeLimits(first_token=30, gap=2.5)
    assert limits("local_hf") == limits("local_hf_embed") == TimeLimits(gap=5)
    assert limits("ollama") is None  # as one that was found
    assert limits("x", node="gpu-box", own=False) == TimeLimits(first_token=300)
    assert limits("x", node="other", own=False) is None


@pytest.mark.parametrize("wrong", ["{}", "{first = 1}", "{gap = 0}", "{gap = -1}", "{gap = 1e6}"])
def test_a_time_that_is_none_is_refused(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ConfigError, match="`first_token` and `gap` in seconds"):
        load(tmp_path, f"[[providers]]\nkind = 'x'\ndeadlines = {wrong}")


def test_a_limit_of_money_says_what_it_does_not_count(tmp_path: Path) -> None:
    text = "[limits]\nmax_cost_per_day = 1.5\n[[providers]]\nkind = 'x'\napi_key_env = 'K'\n"
    (warning,) = load(tmp_path, text, {"K": "k"}).warnings
    assert "providers.x has a key and no `price`" in warning
    assert not load(tmp_path, text + "price = {prompt = 1}", {"K": "k"}).warnings


def test_keys_never_show(tmp_path: Path) -> None:
    config = load(tmp_path, VLLM, {"VLLM_KEY": "sk-secret"})
    key = config.providers[0].api_key
    assert key is not None
    assert key.reveal() == "sk-secret"
    assert "sk-secret" not in repr(config) + str(key) + f"{key}"
    assert "sk-secret" not in repr(list(config.values()))
    assert "hidden" not in repr(list(config.values()))


def test_a_missing_key_is_a_warning(tmp_path: Path) -> None:
    config = load(tmp_path, VLLM)
    assert config.providers[0].api_key is None
    assert config.warnings == (
        "the variable VLLM_KEY is not set, which should hold the key of providers.vllm",
    )


def test_where_the_folder_is(tmp_path: Path) -> None:
    assert home_path(str(tmp_path), {"PROMPTMESH_HOME": "/elsewhere"}) == tmp_path
    assert home_path(None, {"PROMPTMESH_HOME": str(tmp_path)}) == tmp_path
    assert home_path("here", {}) == Path.cwd() / "here"
    assert home_path(None, {}).name == "promptmesh"


def test_colour() -> None:
    assert wants_colour({})
    assert not wants_colour({"NO_COLOR": "1"})
    assert not wants_colour({"TERM": "dumb"})


@pytest.mark.parametrize("model", ["", "org/model", 'C:\\a "b" \u00e9'])
def test_the_file_that_init_writes_is_valid(tmp_path: Path, model: str) -> None:
    config = load(tmp_path, starting_config(name="alpha", model=model))
    assert (config.node.name, config.local_hf.model) == ("alpha", model)
    assert config.mesh.policy == "best_performance"
    assert set(config.sources) <= {"node.name", "local_hf.model", "mesh.policy"}


def test_every_comment_of_the_file_that_init_writes_is_a_valid_key(tmp_path: Path) -> None:
    lines = starting_config().splitlines()
    opened = [
        line.removeprefix("# ") if " = " in line or line.startswith("# [[") else line
        for line in lines
    ]
    config = load(tmp_path, "\n".join(opened), {"OLLAMA_KEY": "k"})
    assert config.node.name == "alpha"
    assert config.providers[0].name == "ollama"
    assert config.http.listen == "127.0.0.1:7411"


SETTINGS = [each for name, type_ in SECTIONS.items() for each in settings_of(name, type_)]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.text(max_size=5), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def outcome(convert: Callable[[Any], Any], value: object) -> tuple[Any, str | None]:
    """What it gives, or the sentence of its refusal."""
    try:
        return convert(value), None
    except ValueError as error:
        return None, str(error)


@given(st.sampled_from(SETTINGS), VALUES)
def test_any_value_is_taken_or_refused_with_a_sentence(setting: Any, value: object) -> None:
    taken, refusal = outcome(setting.convert, value)
    assert refusal or setting.convert(taken) == taken
    assert refusal is None or re.search("expected|other machines|missing", refusal)


@given(st.sampled_from(SETTINGS), st.text(max_size=30))
def test_any_variable_is_taken_or_refused(setting: Any, text: str) -> None:
    taken, refusal = outcome(setting.parse, text)
    assert refusal or setting.convert(taken) == taken


def test_each_setting_is_documented_and_its_default_valid() -> None:
    for each in SETTINGS:
        assert each.about.doc, each.key
        if each.default is not None:
            assert each.convert(each.default) == each.default
