"""Servers that count the tokens of a prompt, each in its own way."""

from collections.abc import Callable
from typing import Any

import pytest
from fakes_http import Received, Script, ScriptedServer, ServerSide, json_reply, scripted_server

from promptmesh.providers.base import GenerateRequest, Image, Message, Text, Tool
from promptmesh.providers.openai_compatible import OpenAICompatible, OpenAICompatibleSettings
from promptmesh.providers.tokens import TokenCount, estimate

TEXT = "How many tokens is this?"
REQUEST = GenerateRequest(model="m", messages=(Message(role="user", content=(Text(text=TEXT),)),))
NONE_THERE = json_reply(404, {"error": "no such path"})
Answer = Callable[[Received], bytes]


def vllm(received: Received) -> bytes:
    if received.path != "/tokenize":
        return NONE_THERE
    messages = received.json["messages"]
    return json_reply(200, {"count": 10 + len(messages), "max_model_len": 4096, "tokens": []})


def llama_cpp(received: Received) -> bytes:
    asked = received.json
    if received.path == "/apply-template":
        return json_reply(200, {"prompt": "<s>" + asked["messages"][0]["content"]})
    if received.path == "/tokenize":
        return json_reply(200, {"tokens": list(range(len(asked.get("content", ""))))})
    return NONE_THERE


def old_sglang(received: Received) -> bytes:
    if received.path == "/tokenize" and "prompt" in received.json:
        return json_reply(200, {"tokens": [1] * 6, "count": 6})
    return json_reply(422, {"detail": "field required"})


def ollama(received: Received) -> bytes:
    return NONE_THERE


def nonsense(received: Received) -> bytes:
    return json_reply(200, {"count": "many"})


def by(answer: Answer) -> Script:
    async def script(side: ServerSide) -> None:
        while (received := await side.request_or_end()) is not None:
            await side.send(answer(received))

    return script


def provider_of(server: ScriptedServer, **fields: Any) -> OpenAICompatible:
    fields = {"name": "s", "base_url": server.base_url, **fields}
    return OpenAICompatible(OpenAICompatibleSettings(**fields))


@pytest.mark.parametrize(
    ("answer", "counted", "paths"),
    [
        (vllm, TokenCount(11, True), ["/tokenize"]),
        (llama_cpp, TokenCount(len("<s>" + TEXT), True), ["/apply-template", "/tokenize"]),
        (old_sglang, TokenCount(10, False), ["/tokenize"]),
        (ollama, estimate(REQUEST), []),
        (nonsense, estimate(REQUEST), []),
    ],
)
async def test_each_server_is_asked_in_its_own_way(
    answer: Answer, counted: TokenCount, paths: list[str]
) -> None:
    async with scripted_server(by(answer)) as server:
        provider = provider_of(server, api_key="secret")
        assert await provider.count_tokens(REQUEST) == counted
        asked = len(server.requests)
        assert all(r.headers["authorization"] == "Bearer secret" for r in server.requests)
        # What it answered to is asked for at once the next time, and what it has not, not at all.
        assert await provider.count_tokens(REQUEST) == counted
        again = [received.path for received in server.requests[asked:]]
        assert again == paths
        await provider.aclose()


async def test_tools_and_the_beginning_of_the_answer_are_counted() -> None:
    async with scripted_server(by(vllm)) as server:
        provider = provider_of(server)
        request = GenerateRequest(
            model="m", messages=REQUEST.messages, tools=(Tool(name="t"),), prefix="It is"
        )
        assert await provider.count_tokens(request) == (12, True)
        (received,) = server.requests
        assert received.json["model"] == "m"
        assert received.json["tools"][0]["function"]["name"] == "t"
        assert received.json["messages"][-1] == {"role": "assistant", "content": "It is"}
        await provider.aclose()


async def test_an_image_is_not_sent_to_be_counted() -> None:
    async with scripted_server(by(vllm)) as server:
        provider = provider_of(server)
        message = Message(role="user", content=(Image(url="data:image/png;base64,AAAA"),))
        request = GenerateRequest(model="m", messages=(message,))
        assert await provider.count_tokens(request) == estimate(request)
        assert not server.requests
        await provider.aclose()


async def test_a_server_that_is_down_gives_the_estimate() -> None:
    async with scripted_server(by(vllm)) as server:
        url = server.base_url
    provider = OpenAICompatible(OpenAICompatibleSettings(name="s", base_url=url))
    assert await provider.count_tokens(REQUEST) == estimate(REQUEST)
    await provider.aclose()


async def test_a_public_server_is_not_asked() -> None:
    settings = OpenAICompatibleSettings(name="s", base_url="https://api.example.com/v1")
    provider = OpenAICompatible(settings)
    assert await provider.count_tokens(REQUEST) == estimate(REQUEST)
    await provider.aclose()
