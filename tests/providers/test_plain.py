"""Plain classes as providers, and providers of other packages."""

import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from promptmesh.providers.base import (
    GenerateRequest,
    Message,
    ProviderUnavailable,
    RequestRejected,
    Sampling,
    Text,
    Tool,
)
from promptmesh.providers.echo import Echo
from promptmesh.providers.openai_compatible import OpenAICompatible
from promptmesh.providers.options import SettingsError
from promptmesh.providers.plain import PlainProvider, is_provider
from promptmesh.providers.plugins import load_plugin, plugins
from promptmesh.providers.registry import build, kinds


def request(*texts: str, model: str = "own", **fields: Any) -> GenerateRequest:
    roles = ("system", "user") if len(texts) == 2 else ("user",)
    messages = tuple(
        Message(role=role, content=(Text(text=text),))  # type: ignore[arg-type]
        for role, text in zip(roles, texts, strict=True)
    )
    return GenerateRequest(model=model, messages=messages, **fields)


class Told:
    """Answers with what it was told."""

    def generate(self, prompt: str, *, model_name: str | None = None, **kwargs: Any) -> str:
        return f"{prompt}|{model_name}|{sorted(kwargs.items())}"


async def text_of(provider: PlainProvider, asked: GenerateRequest) -> str:
    async with provider.open(asked) as answering:
        completion = await answering.completion()
    assert completion.finish_reason == "stop"
    assert not completion.usage.exact
    return completion.text


async def test_it_is_told_the_prompt_and_what_was_said_of_it() -> None:
    provider = PlainProvider("own", Told())
    assert [offer.id for offer in provider.models()] == ["own"]
    assert await text_of(provider, request("hi")) == "hi|None|[]"
    sampling = Sampling(temperature=0.5, max_tokens=3, stop=("x",))
    said = await text_of(
        PlainProvider("own", Told(), models=["m"]),
        request("be brief", "hi", model="m", sampling=sampling),
    )
    assert said == (
        "system: be brief\n\nuser: hi|m|[('max_tokens', 3), ('stop', ['x']), ('temperature', 0.5)]"
    )


async def test_what_it_cannot_do_is_refused() -> None:
    provider = PlainProvider("own", Told())
    with pytest.raises(RequestRejected):
        await text_of(provider, request("hi", tools=(Tool(name="t"),)))
    with pytest.raises(ProviderUnavailable):
        await text_of(provider, request("hi", prefix="so far"))

    class Coroutine:
        async def generate(self, prompt: str) -> str:
            return prompt

    for wrong in (object(), Coroutine()):
        with pytest.raises(TypeError):
            PlainProvider("own", wrong)
    assert is_provider(Echo())
    assert not is_provider(Told())


async def test_who_leaves_does_not_wait_for_it() -> None:
    began, go_on = threading.Event(), threading.Event()

    class Slow:
        def generate(self, prompt: str, **kwargs: Any) -> str:
            began.set()
            go_on.wait(600)
            return prompt

    provider = PlainProvider("own", Slow())
    try:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(text_of, provider, request("hi"))
                assert await trio.to_thread.run_sync(began.wait, 60)
                nursery.cancel_scope.cancel()
    finally:
        go_on.set()


async def test_a_stream_comes_as_it_is_made() -> None:
    asked: list[int] = []

    class Counts:
        def generate(self, prompt: str, **kwargs: Any) -> str:
            raise AssertionError

        def stream(self, prompt: str, **kwargs: Any) -> Iterator[str]:
            for number in range(3):
                asked.append(number)
                yield str(number)
            raise OSError("gone")

    provider = PlainProvider("own", Counts())
    async with provider.open(request("hi")) as answering:
        chunks = aiter(answering.chunks)
        assert (await anext(chunks)).text == "0"
        assert asked == [0]
        assert (await anext(chunks)).text == "1"
        assert (await anext(chunks)).text == "2"
        with pytest.raises(ProviderUnavailable, match="OSError: gone"):
            await anext(chunks)


# --- providers of other packages ------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that is installed, with two providers, one that is none, and one that is broken."""
    (tmp_path / "other_package.py").write_text(
        textwrap.dedent("""
        class Own:
            def __init__(self, *, greeting="hello"):
                self.greeting = greeting
            def generate(self, prompt, *, model_name=None, **kwargs):
                return f"{self.greeting} {prompt} {model_name}"
        def whole():
            from promptmesh.providers.echo import Echo
            return Echo()
        number = 3
        """)
    )
    info = tmp_path / "other_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[promptmesh.providers]\nother = other_package:Own\nwhole = other_package:whole\n"
        "number = other_package:number\nbroken = no_such_module:Thing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "other_package", raising=False)
    return "other"


async def test_a_table_of_the_configuration_builds_one(package: str) -> None:
    assert set(plugins()) == {"other", "whole", "number", "broken"}
    assert "other_package" not in sys.modules, "to list them imports none"
    assert {"other", "echo", "openrouter"} <= set(kinds())
    provider = build("other", "mine", {"greeting": "hi", "models": ["m"]})
    assert isinstance(provider, PlainProvider)
    assert await text_of(provider, request("you", model="m")) == "hi you m"
    assert isinstance(build("whole", "w", {}), Echo)


def test_what_is_wrong_with_one_is_said(package: str) -> None:
    assert load_plugin("nobody") is None
    for kind, settings, reason in [
        ("other", {"colour": "red"}, "colour"),
        ("number", {}, "is a int"),
        ("broken", {}, "no_such_module"),
        ("othr", {}, "did you mean 'other'"),
    ]:
        with pytest.raises(SettingsError, match=reason):
            build(kind, "mine", settings)


def test_openrouter_is_a_kind() -> None:
    provider = build("openrouter", "or", {"api_key": "sk-or-1", "models": ["a/b"]})
    assert isinstance(provider, OpenAICompatible)
    (offer,) = provider.models()
    assert (offer.id, offer.egress) == ("a/b", True)
    with pytest.raises(SettingsError, match="OPENROUTER_API_KEY"):
        build("openrouter", "or", {})
    with pytest.raises(SettingsError) as caught:
        build("openrouter", "or", {"api_key": "sk or 2"})
    assert "sk or 2" not in str(caught.value)
