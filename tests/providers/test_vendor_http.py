"""What holds for Anthropic's and Google's models by HTTP alike, against the stub of the vendors."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import trio
from asking import ask, asked
from fakes_http import always, json_reply, reply
from faults import PARTIAL, WHOLE
from vendor_http import CLAUDE, GEMINI, HttpVendor
from vendor_replies import COMPLETION_TOKENS, PROMPT_TOKENS

from promptmesh.providers.base import (
    Completion,
    ContextTooLong,
    GenerateError,
    Origin,
    ProviderRefused,
    ProviderUnavailable,
    RequestRejected,
    StreamInterrupted,
    Usage,
)
from promptmesh.providers.registry import Runs

pytestmark = pytest.mark.parametrize("vendor", [CLAUDE, GEMINI], ids=lambda vendor: vendor.name)


async def test_answer(vendor: HttpVendor[Any]) -> None:
    async with vendor.at_stub() as (server, provider), provider.open(asked()) as answering:
        assert answering.origin == Origin(provider=vendor.name, model="stub-model")
        assert await answering.completion() == Completion(
            text=WHOLE,
            finish_reason="stop",
            usage=Usage(prompt_tokens=PROMPT_TOKENS, completion_tokens=COMPLETION_TOKENS),
        )
    (seen,) = server.of("ok")
    assert "authorization" not in seen.request.headers
    assert vendor.key in seen.request.headers.values()
    assert vendor.key not in seen.request.path


@pytest.mark.parametrize(
    ("mode", "finish", "text", "reasoning"),
    [
        ("reason", "stop", WHOLE, "How do tales begin?"),
        ("truncate", "length", PARTIAL, ""),
        ("filter", "content_filter", PARTIAL, ""),
        ("big-9000", "stop", "x" * 9000, ""),
        ("echo", "stop", "Tell me a tale.", ""),
    ],
)
async def test_answers(
    vendor: HttpVendor[Any], mode: str, finish: str, text: str, reasoning: str
) -> None:
    async with vendor.at_stub(mode) as (_, provider):
        got = await ask(provider)
    assert (got.finish_reason, got.text, got.reasoning) == (finish, text, reasoning)


async def test_server_that_counts_nothing(vendor: HttpVendor[Any]) -> None:
    async with vendor.at_stub("nousage") as (_, provider):
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
        ("e429", ProviderRefused, "Rate limit"),
        ("e500", ProviderUnavailable, "500"),
        ("e503", ProviderUnavailable, "503"),
        ("e529", ProviderUnavailable, "529"),
        ("html", ProviderUnavailable, "502"),
        ("badjson", ProviderUnavailable, "cannot be read"),
        ("empty", ProviderUnavailable, "empty answer"),
        ("drop", StreamInterrupted, "broke off"),
        ("reset", StreamInterrupted, "broke off"),
        ("streamerr", StreamInterrupted, "the engine has died"),
    ],
)
async def test_failures(
    vendor: HttpVendor[Any], mode: str, kind: type[GenerateError], words: str
) -> None:
    got = await vendor.failure(mode)
    assert type(got) is kind
    assert words in str(got)
    if kind is StreamInterrupted:
        assert got.partial == PARTIAL


async def test_how_long_to_wait(vendor: HttpVendor[Any]) -> None:
    assert (await vendor.failure("e429-7")).retry_after == 7
    assert (await vendor.failure("e429")).retry_after == 2
    assert (await vendor.failure("e503-3")).retry_after == 3


@pytest.mark.parametrize("mode", ["hang", "stall"])
async def test_leaving_ends_the_work(vendor: HttpVendor[Any], mode: str) -> None:
    async with vendor.at_stub(mode) as (server, provider):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, provider)
            (seen,) = await server.asked(mode)
            nursery.cancel_scope.cancel()
        await seen.over.wait()
    assert seen.left


# --- models and health ---------------------------------------------------------------------------


async def test_configured_models(vendor: HttpVendor[Any]) -> None:
    async with vendor.at_stub(models=("mine", "stub-model")) as (_, provider):
        assert [offer.id for offer in provider.models()] == ["mine", "stub-model"]
        assert (await provider.check()).state == "ready"
        assert [offer.id for offer in provider.models()] == ["mine", "stub-model"]


@pytest.mark.parametrize("mode", ["badkey", "e500"])
async def test_unwell(vendor: HttpVendor[Any], mode: str) -> None:
    async with vendor.at_stub(mode) as (server, provider):
        health = await provider.check()
    assert health.state == "unavailable"
    assert ("check the key" in health.hint) is (mode == "badkey")
    assert vendor.key not in repr(health)
    assert not server.seen  # it asked for no answer


async def test_nobody_there(vendor: HttpVendor[Any]) -> None:
    async with vendor.at("http://127.0.0.1:9") as provider:
        found = await provider.check()
        assert (found.state, "refused" in found.reason) == ("unavailable", True)
        with pytest.raises(ProviderUnavailable, match="connection refused"):
            await ask(provider)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'{"data": 3, "models": 7}',
        b'{"data": [{}], "models": [{"name": 5}]}',
    ],
)
async def test_list_that_cannot_be_read(vendor: HttpVendor[Any], body: bytes) -> None:
    async with vendor.scripted(always(reply(200, body))) as (_, provider):
        assert "cannot be read" in (await provider.check()).reason


async def test_it_is_a_provider_that_runs(vendor: HttpVendor[Any]) -> None:
    async with vendor.at_stub() as (_, provider):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(provider.run)
            while not provider.models():  # noqa: ASYNC110 (nothing tells)
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert isinstance(provider, Runs)


# --- the key -------------------------------------------------------------------------------------


async def test_key_is_in_no_log_and_no_error(
    vendor: HttpVendor[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    said = {"code": 401, "message": f"bad {vendor.key}", "status": "UNAUTHENTICATED"}
    body = {"type": "error", "error": {"type": "authentication_error", **said}}
    async with vendor.scripted(always(json_reply(401, body))) as (_, provider):
        with pytest.raises(ProviderUnavailable, match="bad") as caught:
            await ask(provider)
        health = await provider.check()
    assert vendor.key not in caplog.text + str(caught.value) + repr(health)
