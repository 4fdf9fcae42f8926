"""`generate_text` and its kin, from plain, asyncio and trio programs."""

import asyncio
import gc
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from daemons import until
from fakes_openrouter import Vendor
from fakes_python import (
    Own,
    default_deps,
    openrouter_here,
    own_environment,
    registered,
    trace,
)

import promptmesh
from promptmesh import (
    RouterDeps,
    agenerate_text,
    astream_text,
    generate_text,
    stream_text,
)
from promptmesh.node import config
from promptmesh.node.config_values import ConfigError
from promptmesh.node.config_variables import router_variables
from promptmesh.providers.base import (
    DeadlineExceeded,
    GenerateRequest,
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


def test_the_tokens_of_a_prompt(deps: RouterDeps, openrouter: Vendor) -> None:
    counted = promptmesh.count_tokens("one two three", provider="echo")
    assert counted == (8, False)
    assert promptmesh.count_tokens("one two three") == counted
    assert not any(body.get("stream") for body in openrouter.bodies), "no answer was asked for"
    assert trio.run(partial(promptmesh.acount_tokens, "one two three", provider="echo")) == counted
    with pytest.raises(ValueError, match="nobody"):
        promptmesh.count_tokens("one", provider="nobody")


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


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_cancelled_calls_leave_nothing_behind(deps: RouterDeps, openrouter: Vendor) -> None:
    # All that stays open is opened by now, however slow the machine is.
    assert await agenerate_text("c d", provider="openrouter") == "d c "
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


def test_in_its_own_loop_a_call_that_blocks_is_refused(deps: RouterDeps) -> None:
    """It would wait for itself for ever."""

    class Nested(Echo):
        def open(self, request: GenerateRequest) -> Any:
            generate_text("again", provider="echo")

    with pytest.raises(RuntimeError, match="own loop"):
        generate_text("hi", provider_instance=Nested())
    assert generate_text("hi", provider="echo") == "hi"


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
