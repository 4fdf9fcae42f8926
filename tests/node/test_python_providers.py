"""The providers of the Python API: those of the program, and in which order they are asked."""

import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from fakes_openrouter import Vendor
from fakes_python import (
    Own,
    default_deps,
    names,
    openrouter_here,
    own_environment,
    registered,
    trace,
)

from promptmesh import (
    LLMProvider,
    RouterDeps,
    generate_text,
    get_backend_manager,
    get_llm_provider,
    register_llm_provider,
    stream_text,
)
from promptmesh.node.config_values import ConfigError
from promptmesh.providers.base import (
    Answering,
    Chunk,
    GenerateRequest,
    Origin,
    ProviderUnavailable,
    StreamInterrupted,
)
from promptmesh.providers.echo import Echo


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    own_environment(monkeypatch)


@pytest.fixture
def deps(tmp_path: Path) -> Iterator[RouterDeps]:
    with default_deps(tmp_path / "home") as found:
        yield found


@pytest.fixture
def openrouter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vendor]:
    with openrouter_here(monkeypatch) as running:
        yield running


def test_a_registered_class_answers_and_is_told_what_was_asked(deps: RouterDeps) -> None:
    own = Own()
    name = registered(own)
    assert generate_text("hi", provider=name.upper(), model_name="m", max_new_tokens=7, x=1) == (
        "own: hi 1"
    )
    assert own.calls == [
        {
            "prompt": "hi",
            "model_name": "m",
            "max_tokens": 7,
            "temperature": 0.2,
            "timeout": 120.0,
            "x": 1,
        }
    ]
    generate_text("hi", provider=name)
    assert own.calls[1]["model_name"] is None
    assert own.calls[1]["max_tokens"] == 256
    assert trace()["provider"] == trace()["model"] == name


def test_two_classes_of_one_name_do_not_share_answers(deps: RouterDeps) -> None:
    name = registered(Own("first"))
    assert generate_text("hi", provider=name) == "first: hi 1"
    register_llm_provider(name, lambda: Own("second"))
    assert generate_text("hi", provider=name) == "second: hi 1"
    assert generate_text("hi", provider_instance=Own("third"), provider=name) == "third: hi 1"
    assert generate_text("hi", provider_instance=Own("fourth"), provider=name) == "fourth: hi 1"


def test_the_factory_is_called_once_or_each_time(
    deps: RouterDeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Own] = []
    name = next(names)
    register_llm_provider(name, lambda: made.append(Own()) or made[-1])  # type: ignore[func-returns-value]
    assert not made
    for prompt in "abc":
        generate_text(prompt, provider=name)
    assert get_llm_provider(name) is made[0]
    assert len(made) == 1
    monkeypatch.setenv("PROMPTMESH_ROUTER_CACHE", "0")
    generate_text("d", provider=name)
    assert len(made) == 2
    assert get_llm_provider(name, use_cache=False) is made[2]
    assert get_llm_provider(name, use_cache=True) is made[0]


def test_a_class_that_fails_is_told_of_with_its_reason(deps: RouterDeps) -> None:
    class Broken:
        def generate(self, prompt: str, **kwargs: Any) -> str:
            raise KeyError("the key")

    with pytest.raises(RuntimeError, match="KeyError: 'the key'") as caught:
        generate_text("hi", provider=registered(Broken()))
    assert isinstance(caught.value.__cause__, KeyError)
    assert "KeyError" in trace()["error"]
    with pytest.raises(RuntimeError, match="NoneType and no text"):
        generate_text("hi", provider_instance=type("N", (), {"generate": lambda s, p, **k: None})())


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(3), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["factory", "generate", "open", "chunks"])
def test_a_mistake_of_one_class_is_no_others_affair(
    deps: RouterDeps, where: str, error: BaseException
) -> None:
    begun, over = threading.Event(), threading.Event()

    class Waits:
        def generate(self, prompt: str, **kwargs: Any) -> str:
            begun.set()
            assert over.wait(60)
            return "done"

    class Plain:
        def generate(self, prompt: str, **kwargs: Any) -> str:
            raise error

    class Whole(Echo):
        @asynccontextmanager
        async def open(self, request: GenerateRequest) -> Any:  # type: ignore[override]
            if where == "open":
                raise error
            yield Answering(Origin(), self.fail())

        async def fail(self) -> AsyncIterator[Chunk]:
            raise error
            yield

    def make() -> object:
        if where == "factory":
            raise error
        return Plain() if where == "generate" else Whole()

    name = next(names)
    register_llm_provider(name, make)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(generate_text, "hi", provider_instance=Waits())
        assert begun.wait(60)
        with pytest.raises(ProviderUnavailable, match=f"{name} .*{type(error).__name__}"):
            generate_text("hi", provider=name)
        over.set()
        assert other.result(60) == "done"


def test_a_class_that_breaks_off_has_not_answered(deps: RouterDeps) -> None:
    class Breaks:
        def generate(self, prompt: str, **kwargs: Any) -> str:
            raise NotImplementedError

        def stream(self, prompt: str, **kwargs: Any) -> Iterator[str]:
            yield "Once"
            raise OSError("the line is dead")

    with pytest.raises(StreamInterrupted, match="the line is dead") as caught:
        generate_text("hi", provider_instance=Breaks())
    assert caught.value.partial == "Once"


def test_what_a_provider_does_beside_is_done_once(deps: RouterDeps) -> None:
    running: list[int] = []
    both = threading.Barrier(3)
    over = threading.Event()

    class Works(Echo):
        async def run(self) -> None:
            running.append(1)
            try:
                await trio.sleep_forever()
            finally:
                running.pop()

        @asynccontextmanager
        async def open(self, request: GenerateRequest) -> Any:  # type: ignore[override]
            await trio.testing.wait_all_tasks_blocked()
            await trio.to_thread.run_sync(both.wait, 60)
            await trio.to_thread.run_sync(over.wait, 60)
            async with super().open(request) as answering:
                yield answering

    works = Works()
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(generate_text, text, provider_instance=works) for text in "ab"]
        both.wait(60)
        assert len(running) == 1
        over.set()
        assert [call.result(60) for call in calls] == ["a", "b"]


def test_a_class_with_stream_is_streamed(deps: RouterDeps) -> None:
    class Streams:
        def generate(self, prompt: str, **kwargs: Any) -> str:
            raise AssertionError("it can stream")

        def stream(self, prompt: str, **kwargs: Any) -> Iterator[str]:
            yield from prompt.split()

    name = registered(Streams())
    assert list(stream_text("a b c", provider=name)) == ["a", "b", "c"]
    assert generate_text("d e", provider=name) == "de"


def test_wrong_registrations_are_refused() -> None:
    for empty in ("", "  "):
        with pytest.raises(ValueError, match="empty"):
            register_llm_provider(empty, Own)
    with pytest.raises(TypeError):
        register_llm_provider("x", "no factory")
    with pytest.raises(TypeError):
        register_llm_provider(3, Own)  # type: ignore[arg-type]


def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def test_nothing_usable_lists_each_and_why(
    deps: RouterDeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_transformers(monkeypatch)
    with pytest.raises(RuntimeError) as caught:
        generate_text("hi")
    text = str(caught.value)
    for said in (
        "backend_manager: not enabled",
        "openrouter: no key",
        "codex_cli: not ",
        "copilot_cli: not ",
        "copilot_sdk: not ",
        "gemini_cli: not ",
        "claude_code: not ",
        "openai_compatible: no model server ",
        "local_hf: torch and transformers not installed",
    ):
        assert said in text
    with pytest.raises(RuntimeError, match="openrouter: no key"):
        get_llm_provider()


def test_a_named_provider_is_never_replaced(
    deps: RouterDeps, openrouter: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generate_text("a b") == "b a "
    for name in ("codex", "codex_cli", "copilot_cli", "copilot_sdk", "claude"):
        with pytest.raises(RuntimeError, match="not installed"):
            generate_text("hi", provider=name)
        with pytest.raises(RuntimeError, match="not installed"):
            get_llm_provider(name)
    monkeypatch.setenv("IPFS_DATASETS_PY_LLM_PROVIDER", "claude_code")
    with pytest.raises(RuntimeError, match="claude_code cannot be used"):
        generate_text("hi")
    with pytest.raises(RuntimeError, match="claude_code"):
        get_llm_provider()
    monkeypatch.setenv("PROMPTMESH_LLM_PROVIDER", "nobody")
    with pytest.raises(ValueError, match="nobody"):
        generate_text("hi")


def test_the_next_is_asked_and_the_trace_says_so(
    deps: RouterDeps, openrouter: Vendor, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text('[[providers]]\nkind = "echo"\nname = "mine"\n')
    openrouter.status = 500
    assert generate_text("hello") == "hello"
    told = trace()
    assert (told["provider"], told["model"]) == ("mine", "echo")
    (failed,) = told["failed"]
    assert failed["provider"] == "openrouter"
    assert failed["model"] == "openai/gpt-4o-mini"
    assert "500" in failed["error"]
    assert "codex_cli" in told["skipped"]
    # Whoever chose openrouter gets no other.
    with pytest.raises(ProviderUnavailable, match="500"):
        generate_text("hello", provider="openrouter")
    # A request that is at fault is at fault everywhere.
    openrouter.status = 400
    with pytest.raises(RuntimeError, match="400"):
        generate_text("hello again")


def test_a_model_server_that_runs_here_is_used(
    deps: RouterDeps, openrouter: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match=r"no model server is configured, and local_servers"):
        generate_text("one two", provider="openai_compatible")
    port = openrouter.url.split(":")[2].split("/")[0]
    monkeypatch.delenv("OPENROUTER_API_KEY")
    monkeypatch.setenv("PROMPTMESH_LOCAL_SERVERS_ENABLED", "true")
    monkeypatch.setenv("PROMPTMESH_LOCAL_SERVERS_PORTS", port)
    with RouterDeps(home=deps.home) as other:
        # It answers any question as LM Studio does.
        for provider in ("openai_compatible", None, "lm_studio"):
            assert generate_text("one two", provider=provider, deps=other) == "two one "
            assert trace()["provider"] == "lm_studio"
            assert trace()["model"] == "openai/gpt-4o-mini"
        with pytest.raises(RuntimeError, match=f"no ollama answers on the ports {port}"):
            generate_text("one two", provider="ollama", deps=other)


def test_an_option_goes_to_whom_takes_it(
    deps: RouterDeps, openrouter: Vendor, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text('[[providers]]\nkind = "echo"\nname = "mine"\n')
    assert generate_text("a b", transforms=["middle-out"]) == "b a "
    assert openrouter.bodies[0]["transforms"] == ["middle-out"]
    assert trace()["skipped"]["mine"] == "no option 'transforms'"
    openrouter.status = 500
    with pytest.raises(RuntimeError, match="mine: no option 'transforms'"):
        generate_text("hello again", transforms=["middle-out"])


def test_openrouter_is_told_what_the_variables_say(
    deps: RouterDeps, openrouter: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENROUTER_HTTP_REFERER", "https://example.org")
    monkeypatch.setenv("OPENROUTER_APP_TITLE", "an example")
    monkeypatch.setenv("ipfs_accelerate_py_OPENROUTER_MODEL", "some/model")
    generate_text("a b", provider="openrouter", max_tokens=5, system="be brief", top_p=0.5)
    headers, body = openrouter.headers[0], openrouter.bodies[0]
    assert headers["authorization"] == "Bearer sk-or-secret"
    assert headers["http-referer"] == "https://example.org"
    assert headers["x-title"] == "an example"
    assert body["model"] == "some/model"
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert (body["temperature"], body["top_p"]) == (0.2, 0.5)
    assert 5 in (body.get("max_tokens"), body.get("max_completion_tokens"))
    # Its own options go along, and another key is another client.
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-or-other")
    generate_text("a b", provider="openrouter", transforms=["middle-out"])
    assert openrouter.headers[1]["authorization"] == "Bearer sk-or-other"
    assert openrouter.bodies[1]["transforms"] == ["middle-out"]
    assert "sk-or" not in repr(trace())


def test_providers_are_reused_by_handle(deps: RouterDeps, openrouter: Vendor) -> None:
    provider = get_llm_provider("openrouter")
    assert isinstance(provider, LLMProvider)
    assert provider is get_llm_provider("OpenRouter")
    assert provider.generate("a b", max_tokens=9) == "b a "
    assert generate_text("c d", provider_instance=provider) == "d c "
    assert trace()["provider"] == "openrouter"
    found = get_llm_provider()
    assert found is provider, "it is the first that can be used"


def test_a_factory_that_asks_for_itself_is_told_so(deps: RouterDeps) -> None:
    name = next(names)
    register_llm_provider(name, lambda: get_llm_provider(name))
    with pytest.raises(RecursionError):
        get_llm_provider(name)
    with pytest.raises(ProviderUnavailable, match="RecursionError"):
        generate_text("hi", provider=name, timeout=30)


def test_a_manager_of_the_program_is_asked(deps: RouterDeps) -> None:
    deps.backend_manager = own = Own("manager")
    assert generate_text("hi", provider="backend_manager") == "manager: hi 1"
    # Who put it there wants it asked.
    assert generate_text("ho") == "manager: ho 2"
    assert len(own.calls) == 2


def test_another_manager_is_told_from_the_one_before(
    deps: RouterDeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it may stand at the same place in memory."""
    monkeypatch.setenv("PROMPTMESH_ROUTER_CACHE", "0")
    monkeypatch.setattr("promptmesh.node.seed_providers.id", lambda _: 7, raising=False)
    for text in ("first", "second"):
        deps.backend_manager = Own(text)
        assert generate_text("hi", provider="backend_manager") == f"{text}: hi 1"


def test_the_manager_of_a_container_asks_the_node_of_its_folder(
    deps: RouterDeps, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.toml").write_text("nonsense")
    with RouterDeps(home=tmp_path / "other") as other:
        manager = other.get_backend_manager()
        for call in (manager.generate, partial(generate_text, provider_instance=manager)):
            with pytest.raises(ConfigError, match="other"):
                call("hi")


def test_without_a_node_it_says_how_to_start_one(deps: RouterDeps) -> None:
    with pytest.raises(RuntimeError, match="promptmesh up"):
        generate_text("hi", provider="backend_manager")
    with pytest.raises(RuntimeError, match="promptmesh up"):
        get_backend_manager().generate("hi")
