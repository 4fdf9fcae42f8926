"""Embeddings of a server of the OpenAI dialect, against a real one that the test scripts."""

import base64
import json
import math
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fakes_http import (
    Script,
    ScriptedServer,
    ServerSide,
    always,
    json_reply,
    reply,
    scripted_server,
)
from hypothesis import given
from hypothesis import strategies as st

from promptmesh.providers.base import (
    ContextTooLong,
    DeadlineExceeded,
    Embedding,
    EmbedRequest,
    GenerateError,
    Input,
    ProviderRefused,
    ProviderUnavailable,
    RequestRejected,
    Usage,
)
from promptmesh.providers.openai_compatible import OpenAICompatible, OpenAICompatibleSettings
from promptmesh.providers.openai_embeddings import longest_reply, read_embeddings
from promptmesh.providers.openai_errors import ErrorReader

KEY = "sk-abcdef0123456789"
ONE = EmbedRequest(model="m", inputs=("hello",))
TWO = EmbedRequest(model="m", inputs=("hello", "wide world"))


@asynccontextmanager
async def served(
    *scripts: Script, **fields: Any
) -> AsyncIterator[tuple[ScriptedServer, OpenAICompatible]]:
    async with scripted_server(*scripts) as server:
        values = {"name": "tei", "base_url": server.base_url, "api_key": KEY} | fields
        provider = OpenAICompatible(OpenAICompatibleSettings(**values))
        try:
            yield server, provider
        finally:
            await provider.aclose()


async def embed(script: Script, request: EmbedRequest = ONE) -> Sequence[Embedding]:
    async with served(script) as (_, provider):
        return await provider.embed(request)


async def failure(script: Script, request: EmbedRequest = ONE, **fields: Any) -> GenerateError:
    async with served(script, **fields) as (_, provider):
        with pytest.raises(GenerateError) as raised:
            await provider.embed(request)
    return raised.value


def vector(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


def text_of(*numbers: float) -> str:
    return base64.b64encode(vector(*numbers)).decode()


def listed(*embeddings: Any, usage: Any = None) -> dict[str, Any]:
    data = [{"object": "embedding", "embedding": e, "index": i} for i, e in enumerate(embeddings)]
    return {"object": "list", "data": data, "model": "m"} | ({"usage": usage} if usage else {})


# --- what is asked, and what comes ----------------------------------------------------------------


async def test_vectors_are_asked_for_and_read_in_base64() -> None:
    usage = {"prompt_tokens": 3, "total_tokens": 3}
    script = always(json_reply(200, listed(text_of(0.1, -2.5), usage=usage)))
    async with served(script) as (server, provider):
        found = await provider.embed(ONE)
    assert found == [Embedding(vector=vector(0.1, -2.5), usage=Usage(prompt_tokens=3))]
    sent = server.requests[0]
    assert (sent.method, sent.path) == ("POST", "/v1/embeddings")
    assert sent.json == {"model": "m", "input": "hello", "encoding_format": "base64"}
    assert sent.headers["authorization"] == f"Bearer {KEY}"


async def test_all_of_a_request_is_sent() -> None:
    request = EmbedRequest(
        model="m",
        inputs=((1, 2), (3,)),
        dimensions=1,
        dialect="openai",
        extra={"input_type": "query", "model": "other"},
    )
    script = always(json_reply(200, listed(text_of(1), text_of(2))))
    async with served(script) as (server, provider):
        found = await provider.embed(request)
    assert server.requests[0].json == {
        "model": "m",
        "input": [[1, 2], [3]],
        "dimensions": 1,
        "encoding_format": "base64",
        "input_type": "query",
    }
    # What was sent as tokens is counted, whatever the server says.
    assert [e.usage for e in found] == [Usage(prompt_tokens=2), Usage(prompt_tokens=1)]


async def test_numbers_that_come_unasked_are_the_same_vector() -> None:
    numbers = listed([0.1, 1, -0.0, 1e-45])
    (found,) = await embed(always(json_reply(200, numbers)))
    assert found.vector == vector(0.1, 1, -0.0, 1e-45)


async def test_a_server_that_refuses_base64_is_asked_for_numbers_from_then_on() -> None:
    async def script(side: ServerSide) -> None:
        while (got := await side.request_or_end()) is not None:
            if "encoding_format" in got.json:
                said = {"error": {"message": "encoding_format: base64 is not supported"}}
                await side.send(json_reply(400, said))
            else:
                await side.send(json_reply(200, listed([1.0])))

    async with served(script) as (server, provider):
        for _ in range(2):
            assert (await provider.embed(ONE))[0].vector == vector(1)
        assert len(server.requests) == 3


async def test_another_refusal_is_not_taken_for_that_one() -> None:
    error = await failure(always(json_reply(400, {"error": {"message": "input: too odd"}})))
    assert type(error) is RequestRejected
    always_base64 = always(json_reply(400, {"error": {"message": "base64 is bad"}}))
    assert type(await failure(always_base64)) is RequestRejected  # after the second try


async def test_the_index_gives_the_order() -> None:
    body = listed([1.0], [2.0])
    body["data"].reverse()
    found = await embed(always(json_reply(200, body)), TWO)
    assert [e.vector for e in found] == [vector(1), vector(2)]
    for item in body["data"]:
        del item["index"]
    found = await embed(always(json_reply(200, body)), TWO)
    assert [e.vector for e in found] == [vector(2), vector(1)]


async def test_the_tokens_of_a_batch_are_shared_out_and_add_up() -> None:
    request = EmbedRequest(model="m", inputs=("", "a" * 10, "b" * 1000, "c"))
    body = listed([1.0], [1.0], [1.0], [1.0], usage={"prompt_tokens": 257})
    found = await embed(always(json_reply(200, body)), request)
    assert [e.usage.prompt_tokens for e in found] == [0, 3, 253, 1]
    assert not any(e.usage.exact for e in found)
    (alone,) = await embed(always(json_reply(200, listed([1.0]))))
    assert alone.usage == Usage(prompt_tokens=1, exact=False)  # the server counts nothing


# --- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        listed([1.0]),
        listed([1.0], [1.0], [1.0]),
        listed([1.0], [1.0, 2.0]),
        listed([], []),
        listed([1.0], [1e39]),
        listed(text_of(1.0), text_of(math.nan)),
        listed(text_of(1.0), text_of(math.inf)),
        listed(text_of(1.0), text_of(math.inf, -math.inf)),
        listed(text_of(1.0), "AAAA"),
        listed("", ""),
        listed("*", "*"),
        listed([1.0] * 4097, [1.0] * 4097),
        {"data": [{"embedding": [1.0], "index": 0}, {"embedding": [1.0], "index": 0}]},
        {"data": [{"embedding": [1.0], "index": 0}, {"embedding": [1.0], "index": 2}]},
        {"data": [{"embedding": [1.0], "index": 0}, {"embedding": [1.0], "index": -1}]},
        {"data": [{"embedding": ["1"]}, {"embedding": [1.0]}]},
        {"data": None},
        {},
        [],
    ],
)
async def test_what_is_not_one_good_vector_for_each_input_is_no_answer(body: Any) -> None:
    error = await failure(always(json_reply(200, body)), TWO)
    assert type(error) is ProviderUnavailable
    assert "tei" in error.message


async def test_an_error_with_status_200() -> None:
    said = {"error": {"message": "maximum context length is 512 tokens", "code": 400}}
    assert type(await failure(always(json_reply(200, said)))) is ContextTooLong


async def test_errors_are_those_of_chats() -> None:
    said = {"error": {"message": f"no such key {KEY}"}}
    error = await failure(always(json_reply(401, said)))
    assert type(error) is ProviderRefused
    assert KEY not in error.message
    busy = await failure(always(json_reply(429, {}, "Retry-After: 7")))
    assert (type(busy), busy.retry_after) == (ProviderRefused, 7)


async def test_a_reply_without_end_is_given_up() -> None:
    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(reply(200, b" " * (longest_reply(ONE) + 1)))
        await side.wait_closed()

    error = await failure(script)
    assert "longer than" in error.message


async def test_a_server_that_says_nothing_is_too_late() -> None:
    async def script(side: ServerSide) -> None:
        await side.request()
        await side.wait_closed()

    assert type(await failure(script, read_timeout=0.05)) is DeadlineExceeded


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
ITEM = st.fixed_dictionaries(
    {"embedding": JSON | st.lists(st.floats(width=32), max_size=3)}, optional={"index": JSON}
)
REPLIES = (
    st.fixed_dictionaries({"data": st.lists(ITEM, max_size=3)}, optional={"usage": JSON}) | JSON
)


@given(st.binary(max_size=200) | REPLIES.map(lambda value: json.dumps(value).encode()))
def test_only_good_vectors_or_generate_errors_come_of_any_bytes(body: bytes) -> None:
    try:
        found = read_embeddings(body, TWO, ErrorReader("tei", ()))
    except GenerateError:
        return
    assert len(found) == 2
    for embedding in found:
        numbers = struct.unpack(f"<{len(embedding.vector) // 4}f", embedding.vector)
        assert numbers
        assert all(map(math.isfinite, numbers))


FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(FLOAT32, min_size=1, max_size=20))
def test_any_vector_comes_byte_for_byte_in_both_encodings(numbers: list[float]) -> None:
    for form in (text_of(*numbers), numbers):
        body = json.dumps(listed(form)).encode()
        (found,) = read_embeddings(body, ONE, ErrorReader("tei", ()))
        assert found.vector == vector(*numbers)


@given(st.lists(st.text(max_size=30), min_size=1, max_size=20), st.integers(1, 10_000))
def test_the_shares_of_a_batch_add_up(inputs: list[Input], total: int) -> None:
    body = json.dumps(listed(*[[1.0]] * len(inputs), usage={"prompt_tokens": total})).encode()
    request = EmbedRequest(model="m", inputs=tuple(inputs))
    found = read_embeddings(body, request, ErrorReader("tei", ()))
    assert sum(e.usage.prompt_tokens for e in found) == total
    assert all(e.usage.prompt_tokens >= 0 for e in found)


# --- which of its models --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "told",
    [
        {"architecture": {"output_modalities": ["embeddings"]}},  # OpenRouter
        {"capabilities": ["embed"]},  # Infinity
        {"type": "embedding"},  # Together
        {"type": "embeddings"},  # LM Studio
    ],
)
async def test_what_servers_say_of_embedding_models(told: Any) -> None:
    models = {"data": [{"id": "text"}, {"id": "vectors"} | told]}
    async with served(always(json_reply(200, models))) as (_, provider):
        await provider.check()
        text, vectors = provider.models()
    assert (text.tasks, text.tools) == (("generate",), True)
    assert (vectors.tasks, vectors.tools) == (("embed",), False)


@pytest.mark.parametrize(
    "told",
    [
        {"architecture": {"output_modalities": ["text", "embeddings"]}},
        {"capabilities": ["completion", "embedding"]},
        {"capabilities": {"completion_chat": True}},
        {"capabilities": []},
        {"type": 7},
        {"type": "chat"},
    ],
)
async def test_what_else_they_say_makes_no_embedding_model(told: Any) -> None:
    async with served(always(json_reply(200, {"data": [{"id": "m"} | told]}))) as (_, provider):
        await provider.check()
        assert [offer.tasks for offer in provider.models()] == [("generate",)]


async def test_embedding_models_by_configuration() -> None:
    models = always(json_reply(200, {"data": [{"id": "text"}, {"id": "vectors"}]}))
    async with served(models, embedding_models=("vectors", "unlisted")) as (_, provider):
        assert {o.id: o.tasks[0] for o in provider.models()} == {
            "vectors": "embed",
            "unlisted": "embed",
        }
        assert (await provider.check()).state == "ready"
        assert {o.id: o.tasks[0] for o in provider.models()} == {
            "text": "generate",
            "vectors": "embed",
            "unlisted": "embed",
        }


async def test_a_server_that_lists_nothing_is_well_where_its_models_are_configured() -> None:
    async with served(always(reply(404)), embedding_models=("v",)) as (_, provider):
        assert (await provider.check()).state == "ready"
