"""`generate_text` and its kin, from plain, asyncio and trio programs."""

import asyncio
import gc
import itertools
import os
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from daemons import until
from fakes_openrouter import Vendor, vendor

import promptmesh
from promptmesh import (
    LLMProvider,
    RouterDeps,
    agenerate_text,
    astream_text,
    clear_llm_router_caches,
    generate_text,
    get_backend_manager,
    get_default_router_deps,
    get_last_generation_trace,
    get_llm_provider,
    register_llm_provider,
    set_default_router_deps,
    stream_text,
)
from promptmesh.node import config, seed_remote
from promptmesh.node.config_values import ConfigError
from promptmesh.node.config_variables import router_variables
from promptmesh.node.router_deps import RouterCache
from promptmesh.providers.base import (
    Answering,
    Chunk,
    DeadlineExceeded,
    GenerateRequest,
    Origin,
    ProviderUnavailable,
    StreamInterrupted,
    Usage,
)
from promptmesh.providers.echo import Echo

names = (f"own-{number}" for number in itertools.count())


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if re.match("(?i)promptmesh_|ipfs_|openrouter_|copilot_|google_|gemini_|anthropic_", name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PROMPTMESH_LOCAL_SERVERS_ENABLED", "false")
    # No program of a vendor is installed.
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))


@pytest.fixture
def deps(tmp_path: Path) -> Iterator[RouterDeps]:
    with RouterDeps(home=tmp_path / "home") as found:
        set_default_router_deps(found)
        yield found
        set_default_router_deps(None)


@pytest.fixture
def openrouter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vendor]:
    with vendor() as running:
        monkeypatch.setenv("OPENROUTER_API_KEY", "sk-or-secret")
        monkeypatch.setenv("IPFS_ACCELERATE_PY_OPENROUTER_BASE_URL", running.url)
        yield running


class Own:
    """A class as the programs of others have them."""

    def __init__(self, text: str = "own") -> None:
        self.text = text
        self.calls: list[dict[str, Any]] = []

    def generate(self, prompt: str, *, model_name: str | None = None, **kwargs: Any) -> str:
        self.calls.append({"prompt": prompt, "model_name": model_name, **kwargs})
        return f"{self.text}: {prompt} {len(self.calls)}"


def registered(own: object) -> str:
    name = next(names)
    register_llm_provider(name, lambda: own)
    return name


def trace() -> dict[str, Any]:
    found = get_last_generation_trace()
    assert found is not None
    return found


# --- providers of the program ---------------------------------------------------------------------


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


def test_equal_questions_are_asked_once_and_unequal_ones_are_not(deps: RouterDeps) -> None:
    own = Own()
    name = registered(own)
    assert generate_text("hi", provider=name) == generate_text("hi", provider=name)
    assert trace()["cache"] == "hit-local"
    assert deps.router_cache[f"llm_response::{trace()['key']}"] == trace()["cid"]
    for different in ({"temperature": 0.7}, {"max_tokens": 9}, {"x": 1}, {"x": 2}, {"top_p": 0.5}):
        generate_text("hi", provider=name, **different)
        assert trace()["cache"] == "miss", different
    # What says nothing about the answer does not count.
    generate_text("hi", provider=name, timeout=50)
    assert trace()["cache"] == "hit-local"


def test_two_classes_of_one_name_do_not_share_answers(deps: RouterDeps) -> None:
    name = registered(Own("first"))
    assert generate_text("hi", provider=name) == "first: hi 1"
    register_llm_provider(name, lambda: Own("second"))
    assert generate_text("hi", provider=name) == "second: hi 1"
    assert generate_text("hi", provider_instance=Own("third"), provider=name) == "third: hi 1"
    assert generate_text("hi", provider_instance=Own("fourth"), provider=name) == "fourth: hi 1"


def test_answers_of_a_class_end_with_its_program(deps: RouterDeps) -> None:
    name = registered(Own())
    generate_text("hi", provider=name)
    deps.close()
    assert generate_text("hi", provider=name) == "own: hi 2"


@pytest.mark.parametrize("variable", ["PROMPTMESH_", "IPFS_ACCELERATE_PY_", "ipfs_accelerate_py_"])
def test_the_response_cache_is_turned_off_between_two_calls(
    deps: RouterDeps, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = registered(Own())
    generate_text("hi", provider=name)
    monkeypatch.setenv(f"{variable}ROUTER_RESPONSE_CACHE", "0")
    assert generate_text("hi", provider=name) == "own: hi 2"
    assert generate_text("hi", provider=name, use_cache=True) == "own: hi 1"
    monkeypatch.delenv(f"{variable}ROUTER_RESPONSE_CACHE")
    assert generate_text("hi", provider=name) == "own: hi 1"
    assert generate_text("hi", provider=name, use_cache=False) == "own: hi 3"


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


def test_what_is_shared_outlives_the_call_that_began_it(
    deps: RouterDeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of objects that are made for each call the answer is shared, and with it one of them."""
    monkeypatch.setenv("PROMPTMESH_ROUTER_CACHE", "0")
    left = threading.Event()

    class Works(Echo):
        works = False

        async def run(self) -> None:
            self.works = True
            try:
                await trio.sleep_forever()
            finally:
                self.works = False

        @asynccontextmanager
        async def open(self, request: GenerateRequest) -> Any:  # type: ignore[override]
            yield Answering(Origin(), self.answer())

        async def answer(self) -> AsyncIterator[Chunk]:
            yield Chunk(text="one")
            await trio.to_thread.run_sync(left.wait, 60)
            await trio.testing.wait_all_tasks_blocked()
            yield Chunk(text=" two" if self.works else " broken")
            yield Chunk(finish_reason="stop", usage=Usage())

    name = next(names)
    register_llm_provider(name, Works)
    first, second = (stream_text("hi", provider=name) for _ in range(2))
    assert next(first) == next(second) == "one"
    assert trace()["cache"] == "coalesced"
    first.close()  # type: ignore[attr-defined]
    left.set()
    assert list(second) == [" two"]


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


def test_wrong_calls_are_refused(deps: RouterDeps) -> None:
    name = registered(Own())
    wrong: list[tuple[type[Exception], dict[str, Any]]] = [
        (ValueError, {"provider": "nobody"}),
        (ValueError, {"max_tokens": 0}),
        (ValueError, {"max_tokens": 1, "max_new_tokens": 2}),
        (TypeError, {"max_tokens": "many"}),
        (ValueError, {"temperature": -1}),
        (ValueError, {"temperature": float("nan")}),
        (ValueError, {"timeout": 0}),
        (TypeError, {"stop": [1]}),
        (TypeError, {"stream": True}),
        (TypeError, {"provider_instance": object()}),
        (TypeError, {"provider": "echo", "colour": "red"}),
        (TypeError, {"provider": "local_hf", "repetition": 1.1}),
    ]
    for error, arguments in wrong:
        with pytest.raises(error):
            generate_text("hi", **{"provider": name, **arguments})
    with pytest.raises(ValueError, match="empty"):
        generate_text("", provider=name)
    with pytest.raises(ValueError, match="surrogates"):
        generate_text("\ud800", provider=name)
    with pytest.raises(TypeError):
        generate_text(b"hi", provider=name)  # type: ignore[arg-type]


# --- the order ------------------------------------------------------------------------------------


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


def test_the_tokens_of_a_prompt(deps: RouterDeps, openrouter: Vendor) -> None:
    counted = promptmesh.count_tokens("one two three", provider="echo")
    assert counted == (8, False)
    assert promptmesh.count_tokens("one two three") == counted
    assert not any(body.get("stream") for body in openrouter.bodies), "no answer was asked for"
    assert trio.run(partial(promptmesh.acount_tokens, "one two three", provider="echo")) == counted
    with pytest.raises(ValueError, match="nobody"):
        promptmesh.count_tokens("one", provider="nobody")


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


def test_a_cut_answer_is_no_answer(deps: RouterDeps, openrouter: Vendor) -> None:
    openrouter.cut = True
    pieces = stream_text("a b c", provider="openrouter")
    assert next(pieces).startswith("c")
    with pytest.raises(StreamInterrupted):
        list(pieces)
    with pytest.raises(StreamInterrupted):
        generate_text("a b c", provider="openrouter")
    openrouter.cut = False
    assert generate_text("a b c", provider="openrouter") == "c b a "
    assert len(openrouter.bodies) == 3, "nothing of it was stored"


def test_a_call_ends_after_its_timeout(deps: RouterDeps, openrouter: Vendor) -> None:
    generate_text("a", provider="openrouter")  # what is opened once takes time of its own
    openrouter.hang = True
    with pytest.raises(RuntimeError, match=r"no whole answer within 2 s"):
        generate_text("a b", provider="openrouter", timeout=2)
    assert openrouter.left.wait(60)


def test_what_came_before_the_timeout_is_in_the_error(deps: RouterDeps) -> None:
    over = threading.Event()

    class Stalls:
        def generate(self, prompt: str, **kwargs: Any) -> str:
            raise NotImplementedError

        def stream(self, prompt: str, **kwargs: Any) -> Iterator[str]:
            yield "Once"
            over.wait()

    generate_text("a", provider="echo")  # what is opened once takes time of its own
    with pytest.raises(DeadlineExceeded) as caught:
        generate_text("a", provider_instance=Stalls(), timeout=2)
    over.set()
    assert caught.value.partial == "Once"


def test_providers_are_reused_by_handle(deps: RouterDeps, openrouter: Vendor) -> None:
    provider = get_llm_provider("openrouter")
    assert isinstance(provider, LLMProvider)
    assert provider is get_llm_provider("OpenRouter")
    assert provider.generate("a b", max_tokens=9) == "b a "
    assert generate_text("c d", provider_instance=provider) == "d c "
    assert trace()["provider"] == "openrouter"
    found = get_llm_provider()
    assert found is provider, "it is the first that can be used"


def test_no_more_is_spent_than_a_day_allows(deps: RouterDeps, tmp_path: Path) -> None:
    """A dollar a token: an answer of 256 is expected to cost 260 with its prompt."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text(
        "[limits]\nmax_cost_per_day = 261\n[[providers]]\nkind = 'echo'\nname = 'dear'\n"
        "price = {prompt = 1000000, completion = 1000000}\n"
    )
    assert generate_text("a", provider="dear") == "a"
    with pytest.raises(RuntimeError, match=r"\$259\.00 of .*max_cost_per_day"):
        generate_text("b", provider="dear")
    assert generate_text("a", provider="dear") == "a", "what is stored costs nothing"
    assert generate_text("b", provider="dear", max_tokens=3) == "b"


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_cancelled_calls_leave_nothing_behind(deps: RouterDeps, openrouter: Vendor) -> None:
    openrouter.hang = True

    async def one(number: int) -> None:
        with trio.move_on_after(0.05):
            await agenerate_text(f"a {number}", provider="openrouter", use_cache=number % 2 == 0)

    async def many(numbers: range) -> None:
        async with trio.open_nursery() as nursery:
            for number in numbers:
                nursery.start_soon(one, number)

    async def settled() -> bool:
        return openrouter.open == 0 and open_files() <= most

    most = 1000
    await many(range(20))
    await until(settled, "the server sees that they left")
    most = open_files() + 5
    for start in range(20, 220, 20):
        await many(range(start, start + 20))
    await until(settled, "no connection is left open")
    openrouter.hang = False
    assert await agenerate_text("a b", provider="openrouter") == "b a "


# --- what is shared -------------------------------------------------------------------------------


def test_answers_are_the_nodes_own(deps: RouterDeps, openrouter: Vendor, tmp_path: Path) -> None:
    generate_text("a b", provider="openrouter")
    cid = trace()["cid"]
    with RouterDeps(home=tmp_path / "home") as other:
        openrouter.status = 500
        assert generate_text("a b", provider="openrouter", deps=other) == "b a "
        assert (trace()["cache"], trace()["cid"]) == ("hit-local", cid)


def test_a_node_that_reuses_nothing_reuses_nothing(deps: RouterDeps, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text('[cache]\nreuse = "never"\n')
    name = registered(Own())
    assert [generate_text("hi", provider=name) for _ in range(2)] == ["own: hi 1", "own: hi 2"]


def test_in_its_own_loop_a_call_that_blocks_is_refused(deps: RouterDeps) -> None:
    """It would wait for itself for ever."""

    class Nested(Echo):
        def open(self, request: GenerateRequest) -> Any:
            generate_text("again", provider="echo")

    with pytest.raises(RuntimeError, match="own loop"):
        generate_text("hi", provider_instance=Nested())
    assert generate_text("hi", provider="echo") == "hi"


def test_a_remote_cache_is_asked_and_told(deps: RouterDeps, tmp_path: Path) -> None:
    class Remote(dict[str, str]):
        def set(self, key: str, value: str) -> None:
            self[key] = value

    deps.remote_cache = remote = Remote()
    name = registered(Own())
    generate_text("hi", provider=name)
    assert remote == {f"llm_response::{trace()['key']}": "own: hi 1"}
    with RouterDeps(home=tmp_path / "b", remote_cache=remote) as other:
        assert generate_text("hi", provider=name, deps=other) == "own: hi 1"
        assert trace()["cache"] == "hit-remote"
        assert list(stream_text("hi", provider=name, deps=other)) == ["own: hi 1"]


def test_a_remote_cache_that_hangs_is_a_miss(
    deps: RouterDeps, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    over = threading.Event()

    class Hangs:
        def get(self, key: str) -> None:
            over.wait(60)

        def set(self, key: str, value: str) -> None:
            over.wait(60)

    monkeypatch.setattr(seed_remote, "WAIT", 0.1)
    deps.remote_cache = Hangs()
    try:
        assert generate_text("a", provider=registered(Own())) == "own: a 1"
    finally:
        over.set()
    assert "did not answer within 0.1 s" in caplog.text


def test_a_remote_cache_that_hangs_keeps_no_answer_back(deps: RouterDeps) -> None:
    over = threading.Event()

    class Hangs(dict[str, str]):
        def set(self, key: str, value: str) -> None:
            over.wait(60)

    deps.remote_cache = Hangs()
    try:
        assert generate_text("a", provider=registered(Own()), timeout=1) == "own: a 1"
    finally:
        over.set()


def test_a_remote_cache_that_fails_is_a_miss(
    deps: RouterDeps, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def get(self, key: str) -> str:
            raise OSError("down")

        set = get

    deps.remote_cache = Broken()
    name = registered(Own())
    assert generate_text("a", provider=name) == "own: a 1"
    assert generate_text("b", provider=name) == "own: b 2"
    assert deps.get_cached_or_remote("x") is None
    deps.set_cached_and_remote("x", 1)
    assert deps.get_cached("x") == 1
    warnings = [r for r in caplog.records if r.levelname == "WARNING" and "seed_remote" in r.name]
    assert len(warnings) == 1


def test_keys_are_written_as_asked(deps: RouterDeps, monkeypatch: pytest.MonkeyPatch) -> None:
    name = registered(Own())
    generate_text("hi", provider=name)
    assert re.fullmatch("[0-9a-f]{64}", trace()["key"])
    monkeypatch.setenv("IPFS_ACCELERATE_PY_ROUTER_CACHE_KEY", "cid")
    generate_text("hi", provider=name)
    assert trace()["key"].startswith("bafyrei")
    monkeypatch.setenv("IPFS_ACCELERATE_PY_ROUTER_CACHE_CID_BASE", "base58btc")
    generate_text("hi", provider=name)
    assert trace()["key"].startswith("z")
    # Never another kind of key instead of one that is not understood.
    monkeypatch.setenv("IPFS_ACCELERATE_PY_ROUTER_CACHE_KEY", "md5")
    with pytest.raises(ConfigError, match="IPFS_ACCELERATE_PY_ROUTER_CACHE_KEY"):
        generate_text("hi", provider=name)


def test_clearing_forgets_providers_and_answers(deps: RouterDeps, openrouter: Vendor) -> None:
    made: list[Own] = []
    name = next(names)
    register_llm_provider(name, lambda: made.append(Own()) or made[-1])  # type: ignore[func-returns-value]
    deps.set_cached("mine", 1)
    deps.router_cache[7] = "seven"  # type: ignore[index]
    generate_text("a b", provider="openrouter")
    generate_text("hi", provider=name)
    clear_llm_router_caches()
    assert deps.get_cached("mine") == 1
    generate_text("a b", provider="openrouter")
    generate_text("hi", provider=name)
    assert (len(made), len(openrouter.bodies)) == (2, 2)
    generate_text("a b", provider="openrouter")
    assert trace()["cache"] == "hit-local"


def test_the_container(deps: RouterDeps) -> None:
    assert deps.set_cached("a", 1) == deps.get_cached("a") == 1
    assert deps.get_or_create("b", lambda: 2) == deps.get_or_create("b", lambda: 3) == 2
    assert len(deps.router_cache) == 2
    assert deps.get_cached("c") is None
    manager = deps.get_backend_manager(load_balancing_strategy="least_loaded")
    assert deps.get_backend_manager() is deps.backend_manager is manager
    assert deps.get_accelerate_manager(purpose="x") is None
    deps.accelerate_managers["x"] = manager
    assert deps.get_accelerate_manager(purpose="x") is manager
    with pytest.raises(ValueError, match="fastest"):
        get_backend_manager(load_balancing_strategy="fastest")
    assert get_default_router_deps() is deps
    set_default_router_deps(None)
    assert get_default_router_deps() is get_default_router_deps() is not deps


def test_two_may_clear_at_once() -> None:
    class Forgotten(RouterCache):
        """Another thread forgets what is looked for, just after it was found."""

        def __getitem__(self, key: str) -> Any:
            found = super().__getitem__(key)
            super().__delitem__(key)
            return found

    deps = RouterDeps(router_cache=Forgotten())
    deps.set_cached("llm_response::x", 1)
    deps.clear()
    assert not deps.router_cache


def test_a_thing_is_made_once_for_all_threads() -> None:
    deps, made = RouterDeps(), []

    def slow() -> object:
        made.append(1)
        time.sleep(0.05)
        return object()

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: deps.get_or_create("x", slow), range(8)))
    assert (len(made), len(found)) == (1, 1)


def test_after_a_failure_a_thing_is_still_made_once() -> None:
    deps, made = RouterDeps(), []
    failing, waits, twice = threading.Event(), threading.Event(), threading.Event()

    def make() -> object:
        made.append(1)
        if len(made) == 1:
            failing.set()
            waits.wait(30)
            raise OSError("not yet")
        if len(made) == 3:
            twice.set()
        twice.wait(0.2)  # for nobody, if all is well
        return object()

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(deps.get_or_create, "x", make)
        assert failing.wait(30)
        second = pool.submit(deps.get_or_create, "x", make)
        waits.set()
        with pytest.raises(OSError, match="not yet"):
            first.result(30)
        third = pool.submit(deps.get_or_create, "x", make)
        assert second.result(30) is third.result(30)
    assert len(made) == 2


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


def test_a_folder_that_cannot_be_used_costs_only_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "identity.key").mkdir()
    with RouterDeps(home=tmp_path) as deps:
        assert generate_text("hi", provider="echo", deps=deps) == "hi"
        assert generate_text("hi", provider="echo", deps=deps) == "hi"
        assert trace()["cache"] == "hit-local"
    assert "answers are not kept" in caplog.text


# --- callers of all kinds -------------------------------------------------------------------------


def test_many_threads_at_once(deps: RouterDeps) -> None:
    own = Own()
    name = registered(own)
    before = threading.active_count()
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda n: generate_text(f"q{n % 40}", provider=name), range(200)))
    assert [text.split()[1] for text in texts] == [f"q{n % 40}" for n in range(200)]
    assert len(own.calls) == 40, "each was asked once"
    assert threading.active_count() < before + 40


def test_within_a_running_asyncio_loop(deps: RouterDeps) -> None:
    """As in a notebook: the sync call in the loop's own thread, and the async ones."""
    name = registered(Own())

    async def program() -> None:
        assert generate_text("a", provider=name) == "own: a 1"
        assert await agenerate_text("b", provider=name) == "own: b 2"
        assert trace()["cache"] == "miss"
        assert [piece async for piece in astream_text("x y", provider="echo")] == ["x", " y"]
        with pytest.raises(RuntimeError, match="not installed"):
            await agenerate_text("c", provider="codex")
        both = await asyncio.gather(*(agenerate_text(p, provider=name) for p in "cd"))
        assert {text[:6] for text in both} == {"own: c", "own: d"}

    asyncio.run(program())


async def test_within_trio(deps: RouterDeps) -> None:
    name = registered(Own())
    assert generate_text("a", provider=name) == "own: a 1"
    assert await agenerate_text("b", provider=name) == "own: b 2"
    assert [piece async for piece in astream_text("x y", provider="echo")] == ["x", " y"]
    with pytest.raises(ValueError, match="nobody"):
        await agenerate_text("c", provider="nobody")


async def test_a_cancelled_trio_task_stops_the_work(deps: RouterDeps, openrouter: Vendor) -> None:
    openrouter.hang = True
    with trio.fail_after(180):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agenerate_text, "a b")
            assert await trio.to_thread.run_sync(openrouter.begun.wait, 60)
            nursery.cancel_scope.cancel()
        assert await trio.to_thread.run_sync(openrouter.left.wait, 60)


def test_a_cancelled_asyncio_task_stops_the_work(deps: RouterDeps, openrouter: Vendor) -> None:
    openrouter.hang = True

    async def program() -> None:
        task = asyncio.ensure_future(agenerate_text("a b"))
        assert await asyncio.to_thread(openrouter.begun.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(openrouter.left.wait, 60)

    asyncio.run(program())


async def test_a_stream_that_is_left_stops_the_work(deps: RouterDeps, openrouter: Vendor) -> None:
    openrouter.hang = True
    async with aclosing(astream_text("a b")) as pieces:  # type: ignore[type-var]
        async for piece in pieces:
            assert piece.startswith("b")
            break
    assert await trio.to_thread.run_sync(openrouter.left.wait, 60)
    openrouter.left.clear()
    stream = stream_text("a c")
    assert next(stream).startswith("c")
    del stream
    gc.collect()
    assert await trio.to_thread.run_sync(openrouter.left.wait, 60)


def test_closing_cancels_what_runs_and_a_later_call_begins_anew(
    deps: RouterDeps, openrouter: Vendor
) -> None:
    openrouter.hang = True
    others = set(threading.enumerate())
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(generate_text, "a b", provider="openrouter")
        assert openrouter.begun.wait(60)
        deps.close()
        with pytest.raises(RuntimeError):
            call.result(60)
    assert openrouter.left.wait(60)
    left = set(threading.enumerate()) - others
    assert not [thread for thread in left if thread.name == "promptmesh"]
    openrouter.hang = False
    assert generate_text("a b", provider="openrouter") == "b a "


# --- the names ------------------------------------------------------------------------------------


def test_all_names_are_there() -> None:
    for name in promptmesh.__all__:
        assert getattr(promptmesh, name) is not None
        assert name in dir(promptmesh)
    assert promptmesh.llm_router_available
    with pytest.raises(AttributeError):
        promptmesh.nothing  # noqa: B018


def test_every_prefix_and_the_strongest_first() -> None:
    for setting in ("llm_model", "openrouter_model", "router_cache"):
        known = router_variables(setting)
        assert len(known) == 4
        values = dict.fromkeys(known, "1")
        assert str(getattr(config.router_settings(values), setting)) in ("1", "True")
    both = {"PROMPTMESH_LLM_MODEL": "a", "IPFS_DATASETS_PY_LLM_MODEL": "b"}
    assert config.router_settings(both).llm_model == "a"
    assert config.router_settings({"OPENROUTER_API_KEY": "k"}).openrouter_api_key is not None
    assert "'k'" not in repr(config.router_settings({"OPENROUTER_API_KEY": "k"}))
    with pytest.raises(ConfigError, match="LLM_LOAD_BALANCING"):
        config.router_settings({"IPFS_ACCELERATE_PY_LLM_LOAD_BALANCING": "fastest"})
