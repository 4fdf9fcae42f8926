"""What a model name means."""

import pytest

from promptmesh.mesh.candidates import Source
from promptmesh.node.names import Names
from promptmesh.providers.base import GenerateRequest, ModelOffer, Privacy


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


def test_models_lists_own_offers_first() -> None:
    models = Names(lambda: reversed(SOURCES)).models()
    assert list(models) == ["echo", "llama3:8b", "org/model"]
    assert [s.node for s in models["llama3:8b"]] == ["a", "b"]
