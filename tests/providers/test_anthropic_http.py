"""`AnthropicHttp` against the stub of the vendors, and against replies written by the test."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from fakes_http import Script, ScriptedServer, always, json_reply, reply, scripted_server
from faults import PARTIAL, WHOLE
from vendor_replies import COMPLETION_TOKENS, PROMPT_TOKENS
from vendors import VendorServer, vendors

from promptmesh.providers.anthropic_http import AnthropicHttp
from promptmesh.providers.anthropic_messages import ClaudeOptions
from promptmesh.providers.base import (
    Completion,
    ContextTooLong,
    GenerateError,
    GenerateRequest,
    Message,
    ModelOffer,
    Origin,
    Provider,
    ProviderRefused,
    ProviderUnavailable,
    RequestRejected,
    Sampling,
    StreamInterrupted,
    Text,
    Usage,
)
from promptmesh.providers.claude_settings import ClaudeSettings
from promptmesh.providers.registry import Runs

KEY = "sk-ant-abcdef0123456789"
REQUEST = GenerateRequest(
    model="stub-model", messages=(Message(role="user", content=(Text(text="hi there"),)),)
)


@asynccontextmanager
async def provider_at(base_url: str, **fields: Any) -> AsyncIterator[AnthropicHttp]:
    values = {"name": "claude", "base_url": base_url, "api_key": KEY} | fields
    provider = AnthropicHttp(ClaudeSettings(**values))
    try:
        yield provider
    finally:
        await provider.aclose()


@asynccontextmanager
async def at_vendor(
    mode: str = "ok", **fields: Any
) -> AsyncIterator[tuple[VendorServer, AnthropicHttp]]:
    with trio.fail_after(20):
        async with vendors() as server, provider_at(server.base(mode), **fields) as provider:
            yield server, provider


@asynccontextmanager
async def scripted(
    *scripts: Script, **fields: Any
) -> AsyncIterator[tuple[ScriptedServer, AnthropicHttp]]:
    async with scripted_server(*scripts) as server, provider_at(server.origin, **fields) as found:
        yield server, found


async def ask(provider: Provider, request: GenerateRequest = REQUEST) -> Completion:
    async with provider.open(request) as answering:
        return await answering.completion()


async def failure(mode: str) -> GenerateError:
    async with at_vendor(mode) as (_, provider):
        try:
            await ask(provider)
        except GenerateError as error:
            return error
    raise AssertionError("there was an answer")


async def test_answer() -> None:
    async with at_vendor() as (server, provider), provider.open(REQUEST) as answering:
        assert answering.origin == Origin(provider="claude", model="stub-model")
        assert await answering.completion() == Completion(
            text=WHOLE,
            finish_reason="stop",
            usage=Usage(prompt_tokens=PROMPT_TOKENS, completion_tokens=COMPLETION_TOKENS),
        )
    (asked,) = server.of("ok")
    headers = asked.request.headers
    assert (headers["x-api-key"], headers["anthropic-version"]) == (KEY, "2023-06-01")
    assert "authorization" not in headers
    assert asked.request.path == "/m/ok/v1/messages"
    assert asked.request.json["messages"][0]["content"] == [{"type": "text", "text": "hi there"}]


async def test_gateway_with_a_token_and_headers() -> None:
    fields: dict[str, Any] = {
        "api_key": None,
        "environment": {"ANTHROPIC_AUTH_TOKEN": KEY},
        "headers": {"X-Team": "red"},
    }
    async with vendors() as server, provider_at(server.base() + "/v1/", **fields) as provider:
        await ask(provider)
    (asked,) = server.of("ok")
    assert asked.request.headers["authorization"] == f"Bearer {KEY}"
    assert asked.request.headers["x-team"] == "red"
    assert "x-api-key" not in asked.request.headers
    assert asked.request.path == "/m/ok/v1/messages"


@pytest.mark.parametrize(
    ("mode", "finish", "text", "reasoning"),
    [
        ("reason", "stop", WHOLE, "How do tales begin?"),
        ("truncate", "length", PARTIAL, ""),
        ("filter", "content_filter", PARTIAL, ""),
        ("big-9000", "stop", "x" * 9000, ""),
        ("echo", "stop", "hi there", ""),
    ],
)
async def test_answers(mode: str, finish: str, text: str, reasoning: str) -> None:
    async with at_vendor(mode) as (_, provider):
        got = await ask(provider)
    assert (got.finish_reason, got.text, got.reasoning) == (finish, text, reasoning)


async def test_server_that_counts_nothing() -> None:
    async with at_vendor("nousage") as (_, provider):
        assert not (await ask(provider)).usage.exact


@pytest.mark.parametrize(
    ("mode", "kind", "words"),
    [
        ("e400", RequestRejected, "field that is wrong"),
        ("e401", ProviderRefused, "check the key"),
        ("e402", ProviderRefused, "no credit"),
        ("e403", ProviderRefused, "may this key"),
        ("e404", ProviderRefused, "stub-model"),
        ("e413", ContextTooLong, "413"),
        ("context", ContextTooLong, "too long"),
        ("badkey", ProviderRefused, "check the key"),
        ("e500", ProviderUnavailable, "500"),
        ("e529", ProviderUnavailable, "Overloaded"),
        ("html", ProviderUnavailable, "502"),
        ("badjson", ProviderUnavailable, "cannot be read"),
        ("empty", ProviderUnavailable, "empty answer"),
        ("drop", StreamInterrupted, "broke off"),
        ("reset", StreamInterrupted, "broke off"),
        ("streamerr", StreamInterrupted, "the engine has died"),
    ],
)
async def test_failures(mode: str, kind: type[GenerateError], words: str) -> None:
    got = await failure(mode)
    assert type(got) is kind
    assert words in str(got)
    assert KEY not in str(got)
    if kind is StreamInterrupted:
        assert got.partial == PARTIAL


async def test_too_often() -> None:
    assert (await failure("e429-7")).retry_after == 7.0


@pytest.mark.parametrize("mode", ["hang", "stall"])
async def test_leaving_ends_the_work(mode: str) -> None:
    async with at_vendor(mode) as (server, provider):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, provider)
            (asked,) = await server.asked(mode)
            nursery.cancel_scope.cancel()
        await asked.over.wait()
    assert asked.left


async def test_field_that_a_model_refuses_is_left_out() -> None:
    refusal = {
        "type": "error",
        "error": {
            "type": "invalid_request_error",
            "message": "`temperature` is deprecated for this model.",
        },
    }
    whole = {"type": "message", "content": [{"type": "text", "text": "a"}]}
    good = json_reply(200, whole | {"stop_reason": "end_turn"})

    async def script(side: Any) -> None:
        while (received := await side.request_or_end()) is not None:
            refused = "temperature" in received.json
            await side.send(json_reply(400, refusal) if refused else good)

    request = GenerateRequest(
        model="m", messages=REQUEST.messages, sampling=Sampling(temperature=0.2)
    )
    async with scripted(script) as (server, provider):
        assert (await ask(provider, request)).text == "a"
        assert (await ask(provider, request)).text == "a"
    assert ["temperature" in r.json for r in server.requests] == [True, False, False]


# --- options -------------------------------------------------------------------------------------


async def test_options_of_the_table_and_of_a_request() -> None:
    usual = ClaudeOptions(effort="low", thinking=2000)
    request = GenerateRequest(
        model="m", messages=REQUEST.messages, dialect="openai", extra={"effort": "max", "user": "u"}
    )
    async with at_vendor(options=usual, max_tokens=100) as (server, provider):
        await ask(provider)
        await ask(provider, request)
        wrong = GenerateRequest(model="m", messages=REQUEST.messages, extra={"efort": "low"})
        with pytest.raises(RequestRejected, match="did you mean 'effort'"):
            await ask(provider, wrong)
    usual_body, other_body = (asked.request.json for asked in server.of("ok"))
    assert usual_body["output_config"] == {"effort": "low"}
    assert usual_body["max_tokens"] == 2100
    assert other_body["output_config"] == {"effort": "max"}
    assert other_body["thinking"]["budget_tokens"] == 2000


# --- models and health ---------------------------------------------------------------------------


def listed(*models: dict[str, Any]) -> Script:
    return always(json_reply(200, {"data": list(models), "has_more": False}))


async def test_models() -> None:
    script = listed(
        {
            "type": "model",
            "id": "claude-opus-4-6",
            "max_input_tokens": 200_000,
            "max_tokens": 4000,
            "capabilities": {"image_input": {"supported": False}},
        },
        {"type": "model", "id": "claude-sonnet-4-5", "display_name": "Claude"},
    )
    async with scripted(script) as (server, provider):
        assert provider.models() == ()
        assert (await provider.check()).state == "ready"
        opus, sonnet = provider.models()
    assert opus == ModelOffer(id="claude-opus-4-6", context_length=200_000, tools=True, egress=True)
    assert (sonnet.context_length, sonnet.modalities) == (None, ("text", "image"))
    assert (sonnet.can_continue, sonnet.egress) == (True, True)
    assert server.requests[0].path == "/v1/models?limit=1000"


async def test_an_answer_is_no_longer_than_the_model_can() -> None:
    async def script(side: Any) -> None:
        while (received := await side.request_or_end()) is not None:
            if received.method == "GET":
                await side.send(json_reply(200, {"data": [{"id": "m", "max_tokens": 4000}]}))
            else:
                assert received.json["max_tokens"] == 4000
                await side.send(reply(529))

    async with scripted(script) as (_, provider):
        await provider.check()
        request = GenerateRequest(model="m", messages=REQUEST.messages)
        with pytest.raises(ProviderUnavailable):
            await ask(provider, request)


async def test_configured_models() -> None:
    async with at_vendor(models=("mine", "stub-model")) as (_, provider):
        assert [offer.id for offer in provider.models()] == ["mine", "stub-model"]
        assert (await provider.check()).state == "ready"
        assert [offer.id for offer in provider.models()] == ["mine", "stub-model"]


@pytest.mark.parametrize(
    ("mode", "state", "hint"),
    [("badkey", "unavailable", "check the key"), ("e500", "unavailable", "it ends before /v1")],
)
async def test_unwell(mode: str, state: str, hint: str) -> None:
    async with at_vendor(mode) as (server, provider):
        health = await provider.check()
    assert health.state == state
    assert hint in health.hint
    assert KEY not in repr(health)
    assert not server.seen  # it asked for no answer


async def test_nobody_there() -> None:
    async with provider_at("http://127.0.0.1:9") as provider:
        assert (await provider.check()).state == "unavailable"
        with pytest.raises(ProviderUnavailable, match="connection refused"):
            await ask(provider)


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"data": 3}', b'{"data": [{}]}'])
async def test_list_that_cannot_be_read(body: bytes) -> None:
    async with scripted(always(reply(200, body))) as (_, provider):
        assert "cannot be read" in (await provider.check()).reason


async def test_it_is_a_provider_that_runs() -> None:
    async with at_vendor() as (_, provider):
        assert isinstance(provider, Runs)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(provider.run)
            while not provider.models():  # noqa: ASYNC110 (nothing tells)
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()


# --- the key -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"base_url": "ftp://x", "api_key": KEY}, "base_url"),
        ({"api_key": "two words"}, "api_key"),
        ({"environment": {"ANTHROPIC_AUTH_TOKEN": "two\nlines"}}, "ANTHROPIC_AUTH_TOKEN"),
        ({}, "ANTHROPIC_API_KEY"),
    ],
)
def test_wrong_settings(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        AnthropicHttp(ClaudeSettings(**({"name": "claude"} | fields)))
    assert "words" not in str(caught.value)


async def test_key_is_in_no_log_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    body = {"type": "error", "error": {"type": "authentication_error", "message": f"bad {KEY}"}}
    async with scripted(always(json_reply(401, body))) as (_, provider):
        with pytest.raises(ProviderUnavailable) as caught:
            await ask(provider)
        health = await provider.check()
    settings = ClaudeSettings(name="claude", api_key=KEY)
    assert KEY not in caplog.text + str(caught.value) + json.dumps(str(health)) + repr(settings)
