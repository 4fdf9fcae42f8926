"""What a model name means."""

import pytest

from promptmesh.mesh.candidates import Source
from promptmesh.node.names import Names
from promptmesh.providers.base import GenerateRequest, ModelNotFound, ModelOffer, Privacy


def source(node: str, provider: str, model: str, **more: bool) -> Source:
    offer = ModelOffer(id=model, egress=more.get("egress", False))
    own, available = more.get("own", False), more.get("available", True)
    return Source(f"12D3-{node}", node, provider, provider, offer, own, available)


SOURCES = [
    source("a", "echo", "echo", own=True),
    source("a", "ollama", "llama3:8b", own=True),
    source("b", "vllm", "org/model"),
    source("b", "ollama", "llama3:8b"),
    source("b", "openrouter", "org/model", egress=True),
]


def asked(name: str, provider: str | None = None, privacy: Privacy = "any") -> GenerateRequest:
    return GenerateRequest(model=name, messages=(), provider=provider, privacy=privacy)


def resolve(name: str, provider: str | None = None, privacy: Privacy = "any") -> GenerateRequest:
    return Names(lambda: SOURCES).resolve(asked(name, provider, privacy))


@pytest.mark.parametrize(
    ("name", "model", "provider", "peer"),
    [
        ("org/model", "org/model", None, None),
        ("llama3:8b", "llama3:8b", None, None),
        ("vllm/org/model", "org/model", "vllm", None),
        ("b:vllm/org/model", "org/model", "vllm", "12D3-b"),
        ("12D3-b:vllm/org/model", "org/model", "vllm", "12D3-b"),
        ("b:llama3:8b", "llama3:8b", None, "12D3-b"),
        ("nobody/has-this", "nobody/has-this", None, None),
    ],
)
def test_a_name_means(name: str, model: str, provider: str | None, peer: str | None) -> None:
    request = resolve(name)
    assert (request.model, request.provider, request.peer) == (model, provider, peer)


def test_auto_passes_over_what_is_unavailable_where_something_else_is_there() -> None:
    broken = source("a", "ollama", "llama3:8b", own=True, available=False)
    echo = source("a", "echo", "echo", own=True)
    assert Names(lambda: [broken, echo]).resolve(asked("auto")).model == "echo"
    assert Names(lambda: [broken]).resolve(asked("auto")).model == "llama3:8b"


def test_auto_takes_an_own_free_model_first_and_echo_last() -> None:
    assert resolve("auto").model == "llama3:8b"
    assert resolve("auto", provider="vllm").model == "org/model"
    assert resolve("auto", provider="echo").model == "echo"


def test_auto_keeps_to_the_privacy_asked_for() -> None:
    with pytest.raises(ModelNotFound):
        resolve("auto", provider="openrouter", privacy="mesh")
    with pytest.raises(ModelNotFound):
        resolve("auto", provider="vllm", privacy="local")


def test_models_lists_own_offers_first() -> None:
    models = Names(lambda: reversed(SOURCES)).models()
    assert list(models) == ["echo", "llama3:8b", "org/model"]
    assert [s.node for s in models["llama3:8b"]] == ["a", "b"]


def test_auto_that_is_pinned_to_nothing_says_what_there_is() -> None:
    with pytest.raises(ModelNotFound, match=r"provider `zeta`; there is a:echo, a:ollama, b:"):
        resolve("auto", provider="zeta")


def test_auto_with_nothing_to_ask_says_what_to_do() -> None:
    with pytest.raises(ModelNotFound, match="configure a provider"):
        Names(lambda: []).resolve(asked("auto"))
