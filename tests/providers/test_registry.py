"""Providers from tables of the configuration."""

import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
import pytest

from promptmesh.providers import registry
from promptmesh.providers.base import Provider, RequestRejected
from promptmesh.providers.echo import Echo, EchoSettings
from promptmesh.providers.openai_compatible import OpenAICompatible
from promptmesh.providers.options import SettingsError, read_options
from promptmesh.providers.registry import Runs, build, kinds, options_fault, options_of, register

URL = "http://127.0.0.1:9000/v1"


def test_kinds() -> None:
    assert kinds() == sorted(kinds())
    assert {"echo", "local_hf", "openai_compatible", "openrouter"} < set(kinds())


def test_echo() -> None:
    provider = build("echo", "e", {"models": ["a"], "first_s": 1})
    assert isinstance(provider, Echo)
    assert provider.name == "e"
    assert [m.id for m in provider.models()] == ["a"]
    assert not isinstance(provider, Runs)


def test_openai_compatible() -> None:
    settings = {"base_url": URL, "api_key": "k", "models": ["m"], "headers": {"X-A": "b"}}
    provider = build("openai_compatible", "vllm", settings)
    assert isinstance(provider, OpenAICompatible)
    assert isinstance(provider, Runs)
    assert provider.name == "vllm"
    assert [m.id for m in provider.models()] == ["m"]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("ehco", {}, "provider 'p': no kind 'ehco'; did you mean 'echo'?"),
        (
            "x",
            {},
            "provider 'p': no kind 'x'; there is ",
        ),
        (
            "openai_compatible",
            {"base_ur": URL},
            "provider 'p' (openai_compatible): no setting 'base_ur'; did you mean 'base_url'?",
        ),
        (
            "openai_compatible",
            {},
            "provider 'p' (openai_compatible): Object missing required field `base_url`",
        ),
        (
            "openai_compatible",
            {"base_url": "127.0.0.1:9000"},
            "provider 'p' (openai_compatible): base_url: expected a URL such as "
            "http://127.0.0.1:8000/v1",
        ),
        (
            "openai_compatible",
            {"base_url": URL, "read_timeout": "8"},
            "provider 'p' (openai_compatible): read_timeout: Expected `float`, got `str`",
        ),
        (
            "openai_compatible",
            {"base_url": URL, "read_timeout": 0},
            "provider 'p' (openai_compatible): read_timeout: Expected `float` > 0",
        ),
        (
            "openai_compatible",
            {"base_url": URL, "models": ["a", 3]},
            "provider 'p' (openai_compatible): models[1]: Expected `str`, got `int`",
        ),
        (
            "openai_compatible",
            {"base_url": URL, "name": "q"},
            "provider 'p' (openai_compatible): no setting 'name'",
        ),
        ("echo", {"fail": "badly"}, "provider 'p' (echo): fail: Invalid enum value 'badly'"),
    ],
)
def test_wrong_settings(kind: str, settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        build(kind, "p", settings)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "settings",
    [
        {"base_url": URL, "api_key": "hunter2\n"},
        {"base_url": URL, "headers": {"X-Key": "hunter2\r\n"}},
        {"base_url": URL, "headers": ["hunter2"]},
        {"base_url": "http://user:hunter2@host/v1"},
        {"base_url": URL, "api_key": ["hunter2"]},
    ],
)
def test_secrets_are_not_repeated(settings: Mapping[str, Any]) -> None:
    with pytest.raises(SettingsError) as caught:
        build("openai_compatible", "p", settings)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_kind_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_factories", {})

    def factory(name: str, settings: Mapping[str, Any]) -> Provider:
        return Echo(EchoSettings(name=f"my-{name}"))

    register("mine", factory)
    assert kinds() == ["mine"]
    assert build("mine", "x", {}).name == "my-x"


class Effort(msgspec.Struct, frozen=True):
    reasoning_effort: Literal["low", "high"] | None = None
    budget: int = 0


@pytest.mark.parametrize(
    ("extra", "fault"),
    [
        ({}, ""),
        ({"reasoning_effort": "high", "budget": 3}, ""),
        # What says nothing: no value, or nothing that bears on the answer.
        ({"reasoning_efort": None, "user": "me", "stream_options": {}}, ""),
        ({"reasoning_efort": "high"}, "no option 'reasoning_efort'; did you mean 'reasoning_"),
        ({"top_a": 1}, "no option 'top_a'; there is budget, reasoning_effort"),
        ({"reasoning_effort": "hi"}, "reasoning_effort: Invalid enum value 'hi'"),
        ({"budget": "3"}, "budget: Expected `int`, got `str`"),
    ],
)
def test_options_are_checked(
    extra: Mapping[str, Any], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_factories", {})
    monkeypatch.setattr(registry, "_options", {})
    register("mine", lambda name, settings: Echo(EchoSettings(name=name)), options=lambda: Effort)
    assert options_of("mine") is Effort
    assert options_fault("mine", extra).startswith(fault)
    assert bool(options_fault("mine", extra)) == bool(fault)
    if not fault:
        said = {name: extra[name] for name in Effort.__struct_fields__ if name in extra}
        assert read_options(Effort, extra) == Effort(**said)
        return
    with pytest.raises(RequestRejected, match=re.escape(fault)) as caught:
        read_options(Effort, extra)
    assert caught.value.field == next(iter(extra))


@pytest.mark.parametrize("kind", ["echo", "local_hf"])
def test_a_kind_without_options_takes_none(kind: str) -> None:
    assert options_fault(kind, {"top_a": 1}) == "no option 'top_a'"
    assert options_fault(kind, {"user": "me"}) == ""


@pytest.mark.parametrize("kind", ["openai_compatible", "openrouter", "of-another-package"])
def test_a_server_of_the_dialect_takes_any_field(kind: str) -> None:
    assert options_of(kind) is None
    assert options_fault(kind, {"top_a": 1}) == ""


def test_import_is_cheap() -> None:
    """Neither torch, nor httpx, nor any provider is imported before one is built."""
    code = (
        "import sys; import promptmesh.providers.registry as r; "
        "r.build('openai_compatible', 'p', {'base_url': 'https://h/v1'}); "
        "print(sorted({'torch', 'transformers', 'httpx', 'libp2p'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
