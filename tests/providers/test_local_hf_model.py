"""The provider with a real language model: scripts/get-model must have been run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes_hf import Hosted, chat, hosted, read, worker_environment_for_tests

from promptmesh.providers.base import Completion, ContextTooLong, StreamInterrupted
from promptmesh.providers.local_hf import LocalHF, LocalHFSettings
from promptmesh.providers.tokens import estimate

pytestmark = pytest.mark.model

ROOT = Path(__file__).parent.parent.parent
NAME = "SmolLM2-135M-Instruct"
FOLDER = ROOT / ".models" / NAME


@pytest.fixture(scope="module")
def host() -> Iterator[Hosted]:
    if not FOLDER.is_dir():
        pytest.skip(f"{FOLDER} is missing: run scripts/get-model")
    settings = LocalHFSettings(model=str(FOLDER), environment=worker_environment_for_tests())
    with hosted(LocalHF(settings)) as running:
        yield running


def ask(host: Hosted, text: str, **fields: Any) -> tuple[list[str], Completion]:
    pieces, builder = host.read(chat(NAME, text, **{"temperature": 0, **fields}))
    return pieces, builder.completion()


def test_it_knows_the_capital_of_france(host: Hosted) -> None:
    pieces, completion = ask(host, "What is the capital of France?", max_tokens=40)
    assert completion.text == "The capital of France is Paris."
    assert completion.finish_reason == "stop"
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (37, 8)
    assert "".join(pieces) == completion.text
    # Tokens that come while this process waits its turn are one piece.
    assert len(pieces) > 2
    words = ["The", " capital", " of", " France", " is", " Paris", "."]
    assert {*accumulate(map(len, pieces))} <= {*accumulate(map(len, words))}


def test_it_counts_the_tokens_of_a_prompt(host: Hosted) -> None:
    request = chat(NAME, "What is the capital of France?")
    assert host.run(host.provider.count_tokens, request) == (37, True)
    # The template adds a system message and its marks, of which the estimate knows nothing.
    assert 10 <= estimate(request).tokens <= 20


def test_it_goes_on_from_a_prefix(host: Hosted) -> None:
    question = "What is the capital of France?"
    _, whole = ask(host, question, max_tokens=40)
    for cut in ("The capital", "The capital of France is"):
        _, rest = ask(host, question, max_tokens=40, prefix=cut)
        assert cut + rest.text == whole.text


def test_emoji_are_never_cut(host: Hosted) -> None:
    pieces, completion = ask(host, "Say hello in Spanish.", max_tokens=24)
    assert completion.text.startswith("Hola in Spanish! 😊🌍🌍")
    assert not any("\ufffd" in piece for piece in pieces)
    assert completion.finish_reason == "length"
    assert completion.usage.completion_tokens == 24


def test_a_stop_string_and_a_seed_are_honoured(host: Hosted) -> None:
    _, completion = ask(host, "What is the capital of France?", max_tokens=40, stop=("Paris",))
    assert (completion.text, completion.finish_reason) == ("The capital of France is ", "stop")
    drawn = [
        ask(host, "Tell a story.", temperature=1.0, seed=seed, max_tokens=12)[1].text
        for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_batch_says_what_each_says_alone(host: Hosted) -> None:
    """In float32, as the offer promises; with a long prompt beside them that does not fit."""
    questions = [f"Tell me one thing about {x}." for x in ("dogs", "the sea", "music", "Rome")]
    alone = [ask(host, question, max_tokens=16)[1] for question in questions]
    together: dict[str, Completion] = {}

    async def one(question: str) -> None:
        request = chat(NAME, question, temperature=0, max_tokens=16)
        together[question] = (await read(host.provider, request))[1].completion()

    async def too_long() -> None:
        with pytest.raises(ContextTooLong):
            await read(host.provider, chat(NAME, "word " * 9000))

    async def all_at_once() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(too_long)
            for question in questions:
                nursery.start_soon(one, question)

    host.run(all_at_once)
    assert [together[question] for question in questions] == alone
    (offer,) = host.provider.models()
    assert offer.repeatable


def test_leaving_frees_the_model_and_killing_it_is_survived(host: Hosted) -> None:
    async def leave() -> dict[str, int]:
        request = chat(NAME, "Say hello in Spanish.", temperature=0, max_tokens=4000)
        before = host.provider.stats()
        async with host.provider.open(request) as answering:
            await anext(answering.chunks)
        while host.provider.stats()["cancelled"] == before["cancelled"]:  # noqa: ASYNC110 - no event
            await trio.sleep(0.05)
        freed = host.provider.stats()
        # A step takes 50 ms here: what still ran would be seen.
        await trio.sleep(2.5)
        after = host.provider.stats()
        assert after["tokens"] - freed["tokens"] < 10
        return {field: after[field] - before[field] for field in after}

    change = host.run(leave)
    assert (change["cancelled"], change["active"]) == (1, 0)
    assert change["tokens"] < 400

    async def kill() -> str:
        request = chat(NAME, "What is the capital of France?", temperature=0, max_tokens=40)
        async with host.provider.open(request) as answering:
            await anext(answering.chunks)
            assert host.provider.pid is not None
            os.kill(host.provider.pid, signal.SIGKILL)
            with pytest.raises(StreamInterrupted) as caught:
                await answering.completion()
        return caught.value.partial

    assert host.run(kill).startswith("The")
    _, completion = ask(host, "What is the capital of France?", max_tokens=40)
    assert completion.text == "The capital of France is Paris."


def test_get_model_finds_what_is_there_at_once(host: Hosted, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "get-model")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert found.stdout == f".models/{NAME}\n"
    assert found.stderr == ""
    elsewhere = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert elsewhere.stdout == f"{FOLDER}\n"
    half = tmp_path / "half"
    half.mkdir()
    refused = subprocess.run([*command, str(half)], capture_output=True, text=True, timeout=180)
    assert refused.returncode == 1
    assert "not the whole model" in refused.stderr
    assert refused.stdout == ""
