"""The provider with its real worker process, on a model of a few kilobytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes_hf import (
    END,
    Hosted,
    chat,
    hosted,
    make_tiny_model,
    make_tokenizer,
    read,
    worker_environment_for_tests,
)

from promptmesh.providers.base import (
    Answering,
    Completion,
    CompletionBuilder,
    ContextTooLong,
    GenerateError,
    GenerateRequest,
    Health,
    Message,
    ProviderUnavailable,
    RequestRejected,
    ResponseFormat,
    StreamInterrupted,
    Text,
)
from promptmesh.providers.hf_load import LoadError
from promptmesh.providers.local_hf import LocalHF, LocalHFSettings
from promptmesh.providers.local_hf_worker import failure

#: Leaves only small letters to be said: what a model without sense says is then plain text.
LETTERS = {
    str(make_tokenizer().token_to_id(letter)): 30.0 for letter in "abcdefghijklmnopqrstuvwxyz"
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("hf") / "tiny", context=2048)


def settings(folder: Path, **fields: Any) -> LocalHFSettings:
    environment = worker_environment_for_tests()
    return LocalHFSettings(model=str(folder), environment=environment, max_batch=8, **fields)


@pytest.fixture(scope="module")
def host(folder: Path) -> Iterator[Hosted]:
    with hosted(LocalHF(settings(folder))) as running:
        running.read(chat("tiny", "Are you there?", max_tokens=1))
        yield running


def text_of(host: Hosted, text: str, **fields: Any) -> Completion:
    return host.read(chat("tiny", text, **fields))[1].completion()


def greedy(host: Hosted, text: str, **fields: Any) -> Completion:
    return text_of(host, text, temperature=0, logit_bias=LETTERS, **fields)


def settled_stats(host: Hosted) -> dict[str, int]:
    """The counters once nothing runs and they have stayed the same for longer than they may take
    to be told."""

    async def settle() -> dict[str, int]:
        before: dict[str, int] = {}
        while (now := host.provider.stats()) != before or now["active"]:
            before = now
            await trio.sleep(1.2)
        return now

    return host.run(settle)


def test_the_offer(host: Hosted) -> None:
    (offer,) = host.provider.models()
    assert offer.id == "tiny"
    assert offer.context_length == 2048
    assert offer.can_continue
    assert offer.repeatable
    assert not offer.tools
    assert not offer.egress
    assert offer.numerics == "float32/cpu/sdpa/batch-invariant"
    assert offer.engine is not None
    assert offer.engine.startswith("transformers/")
    assert offer.weights is not None
    assert offer.weights.startswith("sha256:")
    assert host.run(host.provider.check) == Health()


def test_the_pieces_are_the_whole_and_the_usage_is_true(host: Hosted) -> None:
    # So many that they come in some pieces also where this process has to wait its turn.
    pieces, builder = host.read(
        chat("tiny", "Hello", temperature=0, logit_bias=LETTERS, max_tokens=500)
    )
    completion = builder.completion()
    assert len(pieces) > 5
    assert "".join(pieces) == completion.text
    assert completion.text.isalpha()
    assert completion.finish_reason == "length"
    assert completion.usage.completion_tokens == 500
    # <|start|> user \n H e l l o ..., by the tiny tokenizer.
    longer = greedy(host, "Hello!!!", max_tokens=1)
    assert longer.usage.prompt_tokens == completion.usage.prompt_tokens + 3
    assert completion.usage.exact


def test_a_prompt_is_counted_as_its_answer_counts_it(host: Hosted) -> None:
    before = settled_stats(host)
    for text in ("Hello", "Hello!!!", "once upon a time, naïve 🌍"):
        request = chat("tiny", text, max_tokens=1)
        counted = host.run(host.provider.count_tokens, request)
        assert counted == (host.read(request)[1].completion().usage.prompt_tokens, True)
    assert settled_stats(host)["requests"] == before["requests"] + 3, "to count is no request"
    with pytest.raises(ContextTooLong):
        host.run(host.provider.count_tokens, chat("tiny", "x" * 10**6))
    message = Message(role="tool", content=(Text(text="x"),), tool_call_id="1")
    refused = GenerateRequest(model="tiny", messages=(message,))
    with pytest.raises(RequestRejected, match="no tools here"):
        host.run(host.provider.count_tokens, refused)


def test_an_end_token_is_the_true_end(host: Hosted) -> None:
    completion = text_of(host, "Hello", temperature=0, logit_bias={str(END): 1000.0})
    assert completion.finish_reason == "stop"
    assert completion.text == ""
    assert completion.usage.completion_tokens == 1


def test_a_stop_string_ends_the_answer_before_it(host: Hosted) -> None:
    whole = greedy(host, "Stop", max_tokens=60)
    stop = whole.text[20:24]
    cut = greedy(host, "Stop", max_tokens=60, stop=("@@", stop))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.usage.completion_tokens < 60
    other = greedy(host, "Stop", max_tokens=60, stop=("@@",))
    assert (other.text, other.finish_reason) == (whole.text, "length")


def test_a_seed_says_the_same_again(host: Hosted) -> None:
    def seeded(seed: int | None) -> str:
        return text_of(host, "Say", temperature=1.5, seed=seed, max_tokens=20).text

    assert seeded(1) == seeded(1)
    assert len({seeded(1), seeded(2), seeded(None), seeded(None)}) == 4


def test_log_probabilities_cover_the_text(host: Hosted) -> None:
    completion = greedy(host, "Logs", max_tokens=12, logprobs=True, top_logprobs=2)
    assert "".join(entry["token"] for entry in completion.logprobs) == completion.text
    assert len(completion.logprobs) == 12
    for entry in completion.logprobs:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert len(entry["top_logprobs"]) == 2
        assert entry["logprob"] <= 0


def test_many_at_once_say_what_each_says_alone(host: Hosted) -> None:
    prompts = [f"Prompt {'x' * number}" for number in range(12)]
    alone = [greedy(host, prompt, max_tokens=24) for prompt in prompts]
    together: dict[str, Completion] = {}

    async def ask(prompt: str) -> None:
        request = chat("tiny", prompt, temperature=0, logit_bias=LETTERS, max_tokens=24)
        together[prompt] = (await read(host.provider, request))[1].completion()

    async def ask_all() -> None:
        async with trio.open_nursery() as nursery:
            for prompt in prompts:
                nursery.start_soon(ask, prompt)

    host.run(ask_all)
    assert [together[prompt] for prompt in prompts] == alone
    assert len({completion.text for completion in alone}) > 6


def test_leaving_stops_the_model(host: Hosted) -> None:
    before = settled_stats(host)

    async def leave() -> None:
        async with host.provider.open(
            chat("tiny", "Go on", temperature=0, logit_bias=LETTERS, max_tokens=1900)
        ) as answering:
            await anext(answering.chunks)

    host.run(leave)
    after = settled_stats(host)
    assert after["requests"] == before["requests"] + 1
    assert after["cancelled"] == before["cancelled"] + 1
    assert after["finished"] == before["finished"]
    assert after["active"] == 0
    assert 0 < after["tokens"] - before["tokens"] < 1900


def test_a_slow_reader_gets_all_at_once_and_slows_nobody(host: Hosted) -> None:
    async def read_late() -> list[str]:
        finished = host.provider.stats()["finished"]
        request = chat("tiny", "Slow", temperature=0, logit_bias=LETTERS, max_tokens=100)
        async with host.provider.open(request) as answering:
            while host.provider.stats()["finished"] == finished:  # noqa: ASYNC110 - no event
                await trio.sleep(0.01)
            return [chunk.text async for chunk in answering.chunks]

    pieces = host.run(read_late)
    assert len(pieces) == 2
    assert pieces[0] == greedy(host, "Slow", max_tokens=100).text


def test_a_prompt_that_does_not_fit_harms_nobody(host: Hosted) -> None:
    async def both() -> Completion:
        request = chat("tiny", "Long", temperature=0, logit_bias=LETTERS, max_tokens=300)
        async with host.provider.open(request) as answering:
            with pytest.raises(ContextTooLong) as caught:
                await read(host.provider, chat("tiny", "word " * 3000))
            assert caught.value.field == "messages"
            with pytest.raises(ContextTooLong) as caught:
                await read(host.provider, chat("tiny", "word", max_tokens=2048))
            assert caught.value.field == "max_tokens"
            return await answering.completion()

    assert host.run(both).usage.completion_tokens == 300


def test_what_the_model_cannot_do_is_refused_by_field(host: Hosted) -> None:
    request = chat("tiny", "Hello")
    with pytest.raises(RequestRejected) as caught:
        host.read(
            type(request)(
                model="tiny",
                messages=request.messages,
                response_format=ResponseFormat(type="json_object"),
            )
        )
    assert caught.value.field == "response_format"


def test_without_max_tokens_it_goes_on_to_the_end_of_the_context(host: Hosted) -> None:
    completion = greedy(host, "word " * 395)
    assert completion.finish_reason == "length"
    assert completion.usage.total_tokens == 2048


async def add_all(answering: Answering, builder: CompletionBuilder) -> None:
    async for chunk in answering.chunks:
        builder.add(chunk)


def test_kill_9_in_the_middle_of_an_answer(host: Hosted) -> None:
    restarts = host.provider.stats()["restarts"]

    async def killed() -> StreamInterrupted:
        request = chat("tiny", "Die", temperature=0, logit_bias=LETTERS, max_tokens=1900)
        builder = CompletionBuilder()
        async with host.provider.open(request) as answering:
            builder.add(await anext(answering.chunks))
            assert host.provider.pid is not None
            os.kill(host.provider.pid, signal.SIGKILL)
            with pytest.raises(StreamInterrupted) as caught:
                await add_all(answering, builder)
        assert caught.value.partial == builder.text
        return caught.value

    whole = greedy(host, "Die", max_tokens=1900).text
    error = host.run(killed)
    assert "SIGKILL" in str(error)
    assert error.partial
    assert whole.startswith(error.partial)
    # It waits until the model is there again.
    assert greedy(host, "Die", max_tokens=5).text == whole[:5]
    assert host.provider.stats()["restarts"] == restarts + 1


NODE = """
    import sys, trio
    from fakes_hf import worker_environment_for_tests
    from promptmesh.providers.local_hf import LocalHF, LocalHFSettings

    async def main():
        provider = LocalHF(
            LocalHFSettings(model=sys.argv[1], environment=worker_environment_for_tests())
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(provider.run)
            while provider.pid is None:
                await trio.sleep(0.05)
            print(provider.pid, flush=True)
            await trio.sleep_forever()

    trio.run(main)
"""


def is_there(pid: int) -> bool:
    """Also false for one that has ended and was not buried yet: its parent was killed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_the_worker_ends_when_the_node_is_killed(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    node = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(NODE), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    with node:
        assert node.stdout is not None
        pid = int(node.stdout.readline())
        assert is_there(pid)
        node.kill()
    deadline = time.monotonic() + 60
    while is_there(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_there(pid)


def test_a_model_of_the_hub_is_called_by_its_id(folder: Path, tmp_path: Path) -> None:
    """As it lies in the hub's cache once it was downloaded, with the hub out of reach."""
    cached = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(folder, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    environment = {**worker_environment_for_tests(), "HF_HOME": str(tmp_path)}
    notes = tmp_path / "notes"
    provider = LocalHF(
        LocalHFSettings(model="owner/tiny", environment=environment, cache_dir=str(notes))
    )
    with hosted(provider) as running:
        assert running.read(chat("owner/tiny", "Hello", max_tokens=2))[1].finished
        (offer,) = running.provider.models()
    assert offer.id == "owner/tiny"
    assert offer.weights is not None
    # What took time to find out is there for the next start.
    facts = json.loads((notes / "local_hf.json").read_text())
    assert [key.split()[0] for key in facts] == ["sha256", "repeatable"]


# --- models that cannot be had ------------------------------------------------------------------


def test_a_node_without_torch_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    )
    environment = {**worker_environment_for_tests(), "PYTHONPATH": str(tmp_path)}
    provider = LocalHF(LocalHFSettings(model="./any", environment=environment))
    with hosted(provider) as running:
        with pytest.raises(ProviderUnavailable, match="torch is not installed"):
            running.read(chat("./any", "Hello"))
        health = running.run(provider.check)
    assert health.state == "unavailable"
    assert health.reason == "torch is not installed"
    assert health.hint == "pip install 'promptmesh[hf]'"


@pytest.mark.parametrize(
    ("error", "reason", "hint"),
    [
        (LoadError("no folder", "make one"), "no folder", "make one"),
        (ImportError("old"), "torch or transformers cannot be used: old", "--upgrade"),
        (ZeroDivisionError("odd"), "ZeroDivisionError: odd", ""),
    ],
)
def test_why_a_model_cannot_be_had(error: Exception, reason: str, hint: str) -> None:
    told = failure(error)
    assert told.reason == reason
    assert hint in told.hint


def test_a_hub_that_is_switched_off_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from promptmesh.providers.hf_frames import Load
    from promptmesh.providers.hf_load import load
    from promptmesh.providers.hf_weights import Notebook

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    order = Load(model="owner/nothing", device="cpu", dtype="auto", threads=1, max_batch=1)
    with pytest.raises(LoadError, match="owner/nothing") as caught:
        load(order, Notebook(None), lambda stage: None)
    assert "HF_HUB_OFFLINE" in caught.value.hint
    assert not isinstance(caught.value, GenerateError)
