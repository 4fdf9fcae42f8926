"""The seam with a real language model: an answer broken off after each of its pieces.

scripts/get-model must have been run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple

import msgspec
import pytest
import trio
from fakes_hf import Hosted, chat, hosted, read, worker_environment_for_tests

from promptmesh.mesh.backends import BackendManager
from promptmesh.mesh.candidates import LocalBackend
from promptmesh.mesh.frames import Load
from promptmesh.mesh.peers import PeerTable
from promptmesh.providers.base import (
    Answering,
    Chunk,
    Completion,
    CompletionBuilder,
    Embedding,
    EmbedRequest,
    GenerateRequest,
    Health,
    ModelOffer,
    Origin,
    ProviderUnavailable,
)
from promptmesh.providers.local_hf import LocalHF, LocalHFSettings

pytestmark = pytest.mark.model

NAME = "SmolLM2-135M-Instruct"
FOLDER = Path(__file__).parent.parent.parent / ".models" / NAME
#: A question with a short answer, which is cut after each of its pieces, and the most tokens of it.
PROMPT, MOST = "What is the capital of France?", 40


@pytest.fixture(scope="module")
def host() -> Iterator[Hosted]:
    if not FOLDER.is_dir():
        pytest.skip(f"{FOLDER} is missing: run scripts/get-model")
    settings = LocalHFSettings(model=str(FOLDER), environment=worker_environment_for_tests())
    with hosted(LocalHF(settings)) as running:
        running.read(chat(NAME, "hi", max_tokens=1))  # it is loaded then
        yield running


class Breaking:
    """The model under another name, which breaks off after so many pieces."""

    def __init__(
        self,
        name: str,
        provider: LocalHF,
        offer: Callable[[ModelOffer], ModelOffer],
        after: int | None = None,
    ) -> None:
        self.name = name
        self.asked: list[GenerateRequest] = []
        self._provider = provider
        self._offer = offer
        self._after = after

    def models(self) -> Sequence[ModelOffer]:
        return [self._offer(offer) for offer in self._provider.models()]

    async def check(self) -> Health:
        return await self._provider.check()

    async def embed(self, request: EmbedRequest) -> Sequence[Embedding]:
        return await self._provider.embed(request)

    @asynccontextmanager
    async def open(self, request: GenerateRequest) -> AsyncIterator[Answering]:
        self.asked.append(request)
        async with self._provider.open(request) as answering:
            answering.chunks = self._chunks(answering.chunks)
            yield answering

    async def _chunks(self, chunks: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
        number = 0
        async for chunk in chunks:
            if number == self._after:
                raise ProviderUnavailable("the GPU fell off")
            number += 1
            yield chunk

    def backend(self, load: Load) -> LocalBackend:
        return LocalBackend(
            provider=self, name=self.name, kind="local_hf", shared=True, load=lambda priority: load
        )


async def ask(
    first: Breaking, second: Breaking, request: GenerateRequest
) -> tuple[Completion, Origin]:
    backends = [first.backend(Load(slots=9)), second.backend(Load(slots=9, running=1))]
    manager = BackendManager(
        local=lambda: backends,
        peers=PeerTable("me"),
        policy="least_loaded",
        peer_id="me",
        node="mine",
        rng=Random(1),
    )
    builder, origin = CompletionBuilder(), Origin()
    async with manager.open(request) as answering:
        async for chunk in answering.chunks:
            builder.add(chunk)
            origin = chunk.origin or origin
    return builder.completion(), origin


def only_restarts(offer: ModelOffer) -> ModelOffer:
    return msgspec.structs.replace(offer, can_continue=False)


@pytest.mark.parametrize("way", ["continue", "restart"])
def test_the_seam(host: Hosted, way: str) -> None:
    request = chat(NAME, PROMPT, temperature=0, max_tokens=MOST)
    # The log probabilities count the tokens, so that it is known how many are left.
    sampling = msgspec.structs.replace(request.sampling, logprobs=True, top_logprobs=2)
    request = msgspec.structs.replace(request, sampling=sampling)
    pieces, builder = host.read(request)

    async def all_at_once() -> None:
        async with trio.open_nursery() as nursery:
            for after in range(1, len(pieces)):
                seam = Seam(host.provider, request, pieces[:after], builder.completion())
                nursery.start_soon(seam.check, way)

    host.run(all_at_once)


def no_numbers(completion: Completion) -> Completion:
    tokens = tuple({"token": entry["token"]} for entry in completion.logprobs)
    return msgspec.structs.replace(completion, logprobs=tokens)


class Seam(NamedTuple):
    """The answer to a request, and the pieces of it before it breaks off."""

    provider: LocalHF
    request: GenerateRequest
    before: Sequence[str]
    whole: Completion

    async def check(self, way: str) -> None:
        offer = only_restarts if way == "restart" else (lambda offer: offer)
        first = Breaking("first", self.provider, offer, len(self.before))
        second = Breaking("second", self.provider, offer)
        got, origin = await ask(first, second, self.request)
        before = "".join(self.before)
        assert origin.provider == "second"
        assert got.finish_reason in ("stop", "length")
        restarted = second.asked[0].prefix == ""
        assert restarted or way == "continue"
        if restarted:  # a rest of no tokens cannot be asked for
            # Beside others the last digit of a probability may be another one.
            assert no_numbers(got) == no_numbers(self.whole)
            assert (second.asked[0].prefix, origin.begun_by) == ("", "")
            return
        assert second.asked[0].prefix == before
        assert origin.begun_by == "mine:first"
        # Exactly what the model gives after that text, and nothing of that twice.
        rest = (await read(self.provider, second.asked[0]))[1].completion()
        assert got.text == before + rest.text
        assert not got.usage.exact
        assert got.text == self.whole.text
