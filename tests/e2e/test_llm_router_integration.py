"""The router as its users have it, and all that its specification shows.

`tests/seed/llm-router.md` is that specification, word for word. Each of its blocks is run here with
the import line changed to `from promptmesh import ...` and nothing else.
"""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from cli_programs import CLIS
from daemons import ROOT, Daemon, mesh, until
from doc_blocks import Block, all_blocks
from fakes_copilot import playing_copilot
from fakes_hf import make_tiny_model
from fakes_openrouter import Vendor, vendor
from vendors import vendors_in_a_thread

from promptmesh import (
    LLMProvider,
    RouterDeps,
    agenerate_text,
    clear_llm_router_caches,
    generate_text,
    get_backend_manager,
    get_last_generation_trace,
    get_llm_provider,
    llm_router_available,
    register_llm_provider,
    set_default_router_deps,
    stream_text,
)
from promptmesh.node.config_values import settings_of
from promptmesh.node.config_variables import UNPREFIXED, router_variables
from promptmesh.node.seed_settings import RouterSettings
from promptmesh.providers.variables import VARIABLES

SEED = (ROOT / "tests" / "seed" / "llm-router.md").read_text()

#: Blocks that do not end well yet: the line that marks them, the error, and why.
EXPECTED: dict[str, tuple[type[Exception], str]] = {
    # Wrapper classes of another code base, which promptmesh does not have.
    "OpenAICodexCLIIntegration": (ImportError, "OpenAICodexCLIIntegration"),
}


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vendor]:
    """A program's environment: a vendor that it has a key for, and a node's folder."""
    before = dict(os.environ)
    for name in list(os.environ):
        if re.match("(?i)promptmesh_|ipfs_|openrouter_", name):
            del os.environ[name]
    os.environ["PROMPTMESH_HOME"] = str(tmp_path / "home")
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["PROMPTMESH_LOCAL_SERVERS_ENABLED"] = "false"
    monkeypatch.chdir(tmp_path)
    with vendor() as running, vendors_in_a_thread() as vendors:
        programs = tmp_path / "programs"
        programs.mkdir()
        playing_copilot(programs)
        os.environ["PATH"] = f"{programs}:{CLIS / 'bin'}:{before['PATH']}"
        os.environ["COPILOT_PROVIDER_BASE_URL"] = "http://127.0.0.1:1/m/ok"
        os.environ["PROMPTMESH_CODEX_BASE_URL"] = vendors.base() + "/v1"
        os.environ["IPFS_ACCELERATE_PY_CODEX_MODEL"] = "gpt-3.5-turbo"
        os.environ["GOOGLE_API_KEY"] = "AIza-1"
        os.environ["GOOGLE_GEMINI_BASE_URL"] = vendors.base()
        os.environ["ANTHROPIC_API_KEY"] = "sk-ant-1"
        os.environ["ANTHROPIC_BASE_URL"] = vendors.base()
        os.environ["OPENROUTER_API_KEY"] = "sk-or-1"
        os.environ["PROMPTMESH_OPENROUTER_BASE_URL"] = running.url
        with RouterDeps() as deps:
            set_default_router_deps(deps)
            yield running
            set_default_router_deps(None)
    os.environ.clear()
    os.environ.update(before)


@asynccontextmanager
async def node(tmp_path: Path) -> AsyncIterator[Daemon]:
    """A node that the program finds."""
    async with mesh(tmp_path, {"here": '[[providers]]\nkind = "echo"\n'}) as (running,):
        os.environ["PROMPTMESH_HOME"] = str(running.home)
        await running.wait_for_model("echo")
        yield running


def python_blocks() -> list[Block]:
    return [block for block in all_blocks(SEED) if block.language == "python"]


def translated(code: str) -> str:
    """The block with its import lines changed."""
    return re.sub(r"(?m)^from ipfs_accelerate_py[\w.]* import", "from promptmesh import", code)


def expected(block: Block) -> tuple[type[Exception], str] | None:
    return next((error for mark, error in EXPECTED.items() if mark in block.text), None)


@pytest.mark.e2e
@pytest.mark.parametrize("block", python_blocks(), ids=lambda block: f"line{block.line}")
async def test_each_block_of_the_specification(
    block: Block, environment: Vendor, tmp_path: Path
) -> None:
    code = translated(block.text)
    assert "ipfs_accelerate_py" not in re.sub("#.*", "", code).lower().replace(
        '"ipfs_accelerate_py_', '"'
    ), "nothing of the old package is imported"
    # A block that shows one call only stands below those that import it.
    names: dict[str, Any] = {"generate_text": generate_text}
    run = partial(exec, compile(code, f"llm-router.md:{block.line}", "exec"), names)
    error = expected(block)
    if error is not None:
        with pytest.raises(error[0], match=error[1]):
            run()
    elif 'provider="backend_manager"' in code:
        async with node(tmp_path):
            await trio.to_thread.run_sync(run)
        assert names["response"] == "Your prompt"
    elif 'provider="local_hf"' in code:
        # Of the name that the block says, a real model of a few kilobytes.
        await trio.to_thread.run_sync(make_tiny_model, tmp_path / "gpt2")
        await trio.to_thread.run_sync(run)
        assert names["response"]
    else:
        run()
        answers = [v for k, v in names.items() if re.fullmatch(r"response\d?", k)]
        assert all(isinstance(answer, str) and answer for answer in answers)


def test_what_the_table_of_errors_names_is_there() -> None:
    for mark in EXPECTED:
        assert mark in SEED
    assert len(python_blocks()) == 19
    assert sum(expected(block) is not None for block in python_blocks()) == 1


def test_each_variable_of_the_specification_is_read() -> None:
    known = {
        n for each in settings_of("router", RouterSettings) for n in router_variables(each.name)
    }
    known |= {*router_variables("openrouter_api_key"), *UNPREFIXED, *VARIABLES["gemini_cli"]}
    known |= set(VARIABLES["claude_code"])
    said = set(re.findall(r"\b(?:[A-Z]+_)+(?:API_KEY|MODEL)\b|IPFS_ACCELERATE_PY_[A-Z_]+", SEED))
    assert len(said) > 10
    assert said <= known


@pytest.mark.e2e
def test_the_example_runs(environment: Vendor) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "docs" / "examples" / "llm_router_example.py"],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    lines = dict(re.split(r":\s+", line, maxsplit=1) for line in done.stdout.splitlines())
    assert lines["own provider"] == "HELLO MESH "
    assert lines["streamed"] == "['PIECE ', 'BY ', 'PIECE ']"
    assert lines["asked again"].startswith("hit-local bafyrei")
    assert lines["after clearing"] == "miss"
    assert lines["many at once"] == "['ONE ', 'TWO ', 'THREE ']"
    assert lines["answered by"] == "openrouter"


def test_the_example_may_be_imported() -> None:
    runpy.run_path(str(ROOT / "docs" / "examples" / "llm_router_example.py"))


# --- the running node -----------------------------------------------------------------------------


@pytest.mark.e2e
async def test_a_node_is_asked_and_asks_the_mesh(environment: Vendor, tmp_path: Path) -> None:
    echo = '[[providers]]\nkind = "echo"\nname = "far"\nmodels = ["far-model"]\n'
    async with mesh(tmp_path, {"here": "", "there": echo}) as (here, _):
        os.environ["PROMPTMESH_HOME"] = str(here.home)
        await here.wait_for_model("far-model")
        assert await agenerate_text("hello mesh", provider="backend_manager") == "hello mesh"
        trace = get_last_generation_trace()
        assert trace is not None
        assert (trace["node"], trace["model"], trace["cache"]) == ("there", "far-model", "miss")
        assert trace["cid"].startswith("bafyrei")
        # Where it is wanted it is the first to be asked, and streams.
        os.environ["IPFS_ACCELERATE_PY_ENABLE_BACKEND_MANAGER"] = "1"

        def program() -> list[str]:
            return list(stream_text("a b c", model_name="far-model"))

        assert "".join(await trio.to_thread.run_sync(program)) == "a b c"
        # Its errors are errors here.
        with pytest.raises(RuntimeError, match="nowhere"):
            await agenerate_text("x", provider="backend_manager", model_name="nowhere")
        with pytest.raises(RuntimeError, match="told to fail"):
            await agenerate_text("x [[echo fail=unavailable]]", provider="backend_manager")
    with pytest.raises(RuntimeError, match="promptmesh up"):
        await agenerate_text("hello", provider="backend_manager")


@pytest.mark.e2e
async def test_the_strategy_reaches_the_node(environment: Vendor, tmp_path: Path) -> None:
    """The variable changes which policy decides, and so does a manager's own."""
    async with node(tmp_path) as running:
        for policy in ("least_loaded", "best_performance", "round_robin"):
            os.environ["IPFS_ACCELERATE_PY_LLM_LOAD_BALANCING"] = policy
            await agenerate_text(f"by {policy}", provider="backend_manager")
            trace = get_last_generation_trace()
            assert trace is not None
            assert trace["policy"] == policy
            # The node remembers it under the id that the trace has.
            assert policy in str(await running.json(f"/mesh/v1/requests/{trace['request_id']}"))
        manager = get_backend_manager(load_balancing_strategy="least_loaded")
        with RouterDeps(backend_manager=manager) as deps:
            await agenerate_text("by its own", provider="backend_manager", deps=deps)
            trace = get_last_generation_trace()
            assert trace is not None
            assert trace["policy"] == "least_loaded"


# --- the model of the machine ---------------------------------------------------------------------


@pytest.mark.e2e
async def test_a_local_model_outlives_the_call_that_was_too_short(
    environment: Vendor, tmp_path: Path
) -> None:
    make = partial(make_tiny_model, tmp_path / "tiny")
    os.environ["PROMPTMESH_LLM_MODEL"] = str(await trio.to_thread.run_sync(make))
    others = psutil.Process().children()
    with pytest.raises(RuntimeError, match=r"within 0\.5 s \(local_hf: .*tiny"):
        await agenerate_text("Once", provider="hf", timeout=0.5)
    await agenerate_text("Once", provider="hf", max_tokens=3)
    trace = get_last_generation_trace()
    assert trace is not None
    assert (trace["provider"], trace["model"], trace["cache"]) == ("local_hf", "tiny", "miss")
    (worker,) = workers = _children(others)
    await agenerate_text("upon", provider="huggingface", max_tokens=3)
    assert _children(others) == workers, "the same process answered"
    clear_llm_router_caches()

    async def ended() -> bool:
        return worker not in _children(others)

    await until(ended, "its process has ended")
    # It is begun anew for the next.
    assert await agenerate_text("Once", provider="hf", max_tokens=3)


def _children(others: list[psutil.Process]) -> list[psutil.Process]:
    """The processes that this one has started, but for those that were there before."""
    return [child for child in psutil.Process().children() if child not in others]


# --- the specification's own test -----------------------------------------------------------------


def test_imports_and_registry(environment: Vendor) -> None:
    assert llm_router_available

    class TestProvider:
        def generate(self, prompt: str, *, model_name: str | None = None, **kwargs: Any) -> str:
            return f"Test response to: {prompt}"

    register_llm_provider("test_provider", lambda: TestProvider())
    provider = get_llm_provider("test_provider")
    assert isinstance(provider, LLMProvider)
    assert provider.generate("test prompt") == "Test response to: test prompt"
    assert generate_text("x", provider="test_provider") == "Test response to: x"


def test_container() -> None:
    deps = RouterDeps()
    deps.set_cached("test_key", "test_value")
    assert deps.get_cached("test_key") == "test_value"
    assert deps.get_or_create("new_key", lambda: "created_value") == "created_value"
