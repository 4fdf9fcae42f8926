"""What calls of the Python API share: answers, what was built, and what a `RouterDeps` holds."""

import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
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
    RouterDeps,
    clear_llm_router_caches,
    generate_text,
    get_backend_manager,
    get_default_router_deps,
    register_llm_provider,
    set_default_router_deps,
    stream_text,
)
from promptmesh.node import seed_remote
from promptmesh.node.config_values import ConfigError
from promptmesh.node.router_deps import RouterCache
from promptmesh.providers.base import (
    Answering,
    Chunk,
    GenerateRequest,
    Origin,
    Usage,
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


def test_a_remote_cache_that_hangs_keeps_no_answer_back(
    deps: RouterDeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    class Hangs(dict[str, str]):
        def set(self, key: str, value: str) -> None:
            over.wait(120)

    monkeypatch.setattr(seed_remote, "WAIT", 120)
    generate_text("a", provider="echo")  # what is opened once takes time of its own
    deps.remote_cache = Hangs()
    try:
        # It is given when its time is over.
        assert generate_text("a", provider=registered(Own()), timeout=3) == "own: a 1"
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
            waits.wait(60)
            raise OSError("not yet")
        if len(made) == 3:
            twice.set()
        twice.wait(0.2)  # for nobody, if all is well
        return object()

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(deps.get_or_create, "x", make)
        assert failing.wait(60)
        second = pool.submit(deps.get_or_create, "x", make)
        waits.set()
        with pytest.raises(OSError, match="not yet"):
            first.result(60)
        third = pool.submit(deps.get_or_create, "x", make)
        assert second.result(60) is third.result(60)
    assert len(made) == 2


def test_a_folder_that_cannot_be_used_costs_only_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "identity.key").mkdir()
    with RouterDeps(home=tmp_path) as deps:
        assert generate_text("hi", provider="echo", deps=deps) == "hi"
        assert generate_text("hi", provider="echo", deps=deps) == "hi"
        assert trace()["cache"] == "hit-local"
    assert "answers are not kept" in caplog.text
