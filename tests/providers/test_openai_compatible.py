"""`OpenAICompatible` against a real server that the test scripts byte by byte."""

import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from fakes_http import (
    CHUNKED_HEAD,
    DONE,
    LAST_CHUNK,
    USAGE,
    Script,
    ScriptedServer,
    ServerSide,
    always,
    answer,
    chunk,
    delta,
    event,
    json_reply,
    reply,
    scripted_server,
    streamed,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from promptmesh.providers.base import (
    Chunk,
    Completion,
    DeadlineExceeded,
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
from promptmesh.providers.openai_compatible import OpenAICompatible, OpenAICompatibleSettings
from promptmesh.providers.registry import Runs

KEY = "sk-abcdef0123456789"
REQUEST = GenerateRequest(
    model="m", messages=(Message(role="user", content=(Text(text="hi there"),)),)
)


@asynccontextmanager
async def provider_for(server: ScriptedServer, **fields: Any) -> AsyncIterator[OpenAICompatible]:
    values = {"name": "vllm", "base_url": server.base_url, "api_key": KEY} | fields
    provider = OpenAICompatible(OpenAICompatibleSettings(**values))
    try:
        yield provider
    finally:
        await provider.aclose()


@asynccontextmanager
async def served(
    *scripts: Script, **fields: Any
) -> AsyncIterator[tuple[ScriptedServer, OpenAICompatible]]:
    async with scripted_server(*scripts) as server, provider_for(server, **fields) as provider:
        yield server, provider


async def ask(provider: Provider, request: GenerateRequest = REQUEST) -> Completion:
    async with provider.open(request) as answering:
        return await answering.completion()


async def failure(*scripts: Script, **fields: Any) -> GenerateError:
    async with served(*scripts, **fields) as (_, provider):
        try:
            await ask(provider)
        except GenerateError as error:
            return error
    raise AssertionError("there was an answer")


# --- answers -------------------------------------------------------------------------------------


async def test_answer() -> None:
    data = always(streamed(answer("hel", "lo")))
    async with served(data) as (server, provider), provider.open(REQUEST) as answering:
        assert answering.origin == Origin(provider="vllm", model="m")
        assert await answering.completion() == Completion(
            text="hello",
            finish_reason="stop",
            usage=Usage(prompt_tokens=3, completion_tokens=2),
        )
    sent = server.requests[0]
    assert (sent.method, sent.path) == ("POST", "/v1/chat/completions")
    assert sent.headers["authorization"] == f"Bearer {KEY}"
    assert sent.json["messages"] == [{"role": "user", "content": "hi there"}]
    assert (sent.json["model"], sent.json["stream"]) == ("m", True)


async def test_no_key_and_headers_of_ones_own() -> None:
    headers = {"HTTP-Referer": "https://me", "X-Title": "mesh"}
    data = always(streamed(answer("a")))
    async with served(data, api_key=None, headers=headers) as (server, provider):
        await ask(provider)
    sent = server.requests[0].headers
    assert "authorization" not in sent
    assert (sent["http-referer"], sent["x-title"]) == ("https://me", "mesh")


async def test_chunks_come_as_they_arrive_merged_by_read() -> None:
    more = trio.Event()

    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(CHUNKED_HEAD)
        await side.send(chunk(event(delta("a"))))
        await more.wait()
        await side.send(
            chunk(event(delta("b"))) + chunk(event(delta("c"))) + chunk(event(delta(finish="stop")))
        )
        await side.send(chunk(event(USAGE)) + chunk(DONE) + LAST_CHUNK)

    async with served(script) as (_, provider), provider.open(REQUEST) as answering:
        chunks = aiter(answering.chunks)
        assert await anext(chunks) == Chunk(text="a")
        more.set()
        assert await anext(chunks) == Chunk(text="bc")
        assert (await anext(chunks)).finish_reason == "stop"
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)


async def test_split_at_every_byte() -> None:
    async def script(side: ServerSide) -> None:
        while await side.request_or_end():
            await side.send_bytewise(streamed(answer("hel", "lö")))

    async with served(script) as (server, provider):
        for _ in range(2):
            assert (await ask(provider)).text == "hellö"
        assert server.connections == 1


async def test_server_that_does_not_stream() -> None:
    whole = {
        "choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }
    async with served(always(json_reply(200, whole))) as (server, provider):
        for _ in range(2):
            got = await ask(provider)
            assert (got.text, got.usage.exact) == ("hello", True)
        assert server.connections == 1


async def test_usage_is_estimated_where_the_server_counts_nothing() -> None:
    body = event(delta("a")) + event(delta("b")) + event(delta(finish="stop")) + DONE
    async with served(always(streamed(body))) as (_, provider):
        usage = (await ask(provider)).usage
    assert (usage.completion_tokens, usage.exact) == (2, False)
    assert usage.prompt_tokens > 0


async def test_usage_is_estimated_for_a_whole_answer() -> None:
    whole = {"choices": [{"message": {"content": "word " * 20}, "finish_reason": "stop"}]}
    async with served(always(json_reply(200, whole))) as (_, provider):
        usage = (await ask(provider)).usage
    assert (usage.completion_tokens, usage.exact) == (21, False)


# --- the connection ------------------------------------------------------------------------------


async def test_connection_is_used_again() -> None:
    async with served(always(streamed(answer("a")))) as (server, provider):
        for _ in range(3):
            await ask(provider)
        assert server.connections == 1


async def test_connection_is_used_again_although_the_end_comes_late() -> None:
    """uvicorn ends the body by a write of its own, after the last event."""

    async def script(side: ServerSide) -> None:
        while await side.request_or_end():
            await side.send(CHUNKED_HEAD + chunk(answer("a")))
            await wait_all_tasks_blocked()
            await side.send(LAST_CHUNK)

    async with served(script) as (server, provider):
        for _ in range(2):
            await ask(provider)
        assert server.connections == 1


async def test_connection_is_used_again_after_a_refusal() -> None:
    async with served(always(json_reply(429, {"error": "busy"}))) as (server, provider):
        for _ in range(2):
            with pytest.raises(ProviderUnavailable):
                await ask(provider)
        assert server.connections == 1


async def test_stale_connection_is_not_seen() -> None:
    async def first(side: ServerSide) -> None:
        await side.request()
        await side.send(streamed(answer("one")))
        await side.request()

    async with served(first, always(streamed(answer("two")))) as (server, provider):
        assert (await ask(provider)).text == "one"
        assert (await ask(provider)).text == "two"
        assert server.connections == 2


@pytest.mark.parametrize("head", [b"", CHUNKED_HEAD, CHUNKED_HEAD + chunk(event(delta("a")))])
async def test_cancelling_closes_the_connection(head: bytes) -> None:
    reading = trio.Event()
    left = trio.Event()

    async def script(side: ServerSide) -> None:
        await side.request()
        if head:
            await side.send(head)
        reading.set()
        await side.wait_closed()
        left.set()

    async with served(script) as (_, provider):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, provider)
            await reading.wait()
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await left.wait()


async def test_leaving_early_closes_the_connection() -> None:
    left = trio.Event()

    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(CHUNKED_HEAD, chunk(event(delta("a"))))
        await side.wait_closed()
        left.set()

    async with served(script) as (_, provider):
        async with provider.open(REQUEST) as answering:
            assert await anext(aiter(answering.chunks)) == Chunk(text="a")
        await left.wait()


# --- failures ------------------------------------------------------------------------------------


async def test_refusal_as_an_error_of_the_vocabulary() -> None:
    data = json_reply(429, {"error": {"message": "slow down"}}, "Retry-After: 7")
    error = await failure(always(data))
    assert type(error) is ProviderRefused
    assert error.retry_after == 7
    assert str(error) == "vllm answered 429: slow down"
    data = json_reply(400, {"error": {"message": "bad", "param": "top_p"}})
    error = await failure(always(data))
    assert type(error) is RequestRejected
    assert error.field == "top_p"


async def test_refusal_whose_explanation_breaks_off() -> None:
    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(b"HTTP/1.1 500 Oh\r\nContent-Length: 100\r\n\r\nout of mem")

    assert str(await failure(script)) == "vllm answered 500: out of mem"


async def test_refusal_whose_explanation_does_not_come(autojump_clock: MockClock) -> None:
    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(b"HTTP/1.1 500 Oh\r\nContent-Length: 100\r\n\r\n")
        await side.wait_closed()

    assert str(await failure(script)) == "vllm answered 500"


async def test_refusal_whose_explanation_does_not_end() -> None:
    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(b"HTTP/1.1 500 Oh\r\n\r\n")
        with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
            await side.send(*[b"no " * 1000] * 100_000)

    assert str(await failure(script)).startswith("vllm answered 500: no no")


async def test_key_is_never_in_an_error_or_a_repr(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    headers = {"X-Key": "very-secret"}
    said = f"Incorrect API key provided: {KEY}, very-secret"
    for status in (400, 401, 404, 429, 500):
        data = json_reply(status, {"error": {"message": said, "code": KEY}})
        error = await failure(always(data), headers=headers)
        assert "Incorrect API key" in str(error)
        assert KEY not in repr(error) + str(error)
        assert "very-secret" not in str(error)
    error = await failure(always(streamed(event({"error": said}))))
    assert KEY not in str(error)
    shown = repr(OpenAICompatibleSettings(name="n", base_url="u", api_key=KEY, headers=headers))
    assert KEY not in shown + caplog.text
    assert "very-secret" not in shown


async def test_web_page_instead_of_an_answer() -> None:
    error = await failure(always(reply(200, "<html></html>", "Content-Type: text/html")))
    assert type(error) is ProviderUnavailable
    assert "ends in /v1" in str(error)


async def test_nothing_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, not listening: nobody else gets the port
        port = free.getsockname()[1]
        async with provider_for(ScriptedServer(port)) as provider:
            with pytest.raises(ProviderUnavailable) as caught:
                await ask(provider)
            assert str(caught.value) == (
                f"vllm: cannot connect to 127.0.0.1:{port}: connection refused"
            )
            health = await provider.check()
    assert health.state == "unavailable"
    assert "connection refused" in health.reason
    assert f"127.0.0.1:{port}" in health.hint


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 2", b"SSH-2.0\r\n", CHUNKED_HEAD + b"zz\r\n"])
async def test_broken_before_the_answer(data: bytes) -> None:
    async def script(side: ServerSide) -> None:
        await side.request()
        if data:
            await side.send(data)

    assert type(await failure(script)) is ProviderUnavailable


@pytest.mark.parametrize("tail", [b"", LAST_CHUNK, chunk(DONE) + LAST_CHUNK, b"zz\r\n"])
async def test_broken_in_the_answer(tail: bytes) -> None:
    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(CHUNKED_HEAD + chunk(event(delta("a"))))
        if tail:
            await side.send(tail)

    error = await failure(script)
    assert type(error) is StreamInterrupted
    assert error.partial == "a"
    assert "vllm" in str(error)


async def test_what_came_before_the_break_is_given() -> None:
    data = always(streamed(event(delta("a")) + b"data: {\n\n"))
    async with served(data) as (_, provider), provider.open(REQUEST) as answering:
        chunks = aiter(answering.chunks)
        assert await anext(chunks) == Chunk(text="a")
        for _attempt in range(2):
            with pytest.raises(StreamInterrupted):
                await anext(chunks)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", DeadlineExceeded),
        (CHUNKED_HEAD, DeadlineExceeded),
        (CHUNKED_HEAD + chunk(event(delta("a"))), StreamInterrupted),
    ],
)
async def test_silence(data: bytes, kind: type[GenerateError], autojump_clock: MockClock) -> None:
    async def script(side: ServerSide) -> None:
        await side.request()
        if data:
            await side.send(data)
        await side.wait_closed()

    error = await failure(script, read_timeout=7.0)
    assert type(error) is kind
    assert "7 s" in str(error)


async def test_request_is_sent_again_without_what_the_server_refused() -> None:
    async def script(side: ServerSide) -> None:
        while (got := await side.request_or_end()) is not None:
            if "stream_options" in got.json:
                await side.send(json_reply(400, {"detail": "stream_options: not permitted"}))
            elif "max_tokens" in got.json:
                said = "Unsupported parameter: use 'max_completion_tokens' instead."
                await side.send(json_reply(400, {"error": {"message": said}}))
            else:
                await side.send(streamed(answer("a")))

    limited = GenerateRequest(model="m", messages=REQUEST.messages, sampling=Sampling(max_tokens=5))
    async with served(script) as (server, provider):
        assert (await ask(provider, limited)).text == "a"
        assert len(server.requests) == 3
        assert server.requests[-1].json["max_completion_tokens"] == 5
        await ask(provider, limited)  # it has learnt
        assert len(server.requests) == 4


async def test_request_is_not_sent_again_for_ever() -> None:
    said = {"detail": "stream_options and max_completion_tokens: not permitted"}
    async with served(always(json_reply(400, said))) as (server, provider):
        with pytest.raises(RequestRejected):
            await ask(provider)
        assert len(server.requests) == 3


async def test_continuing_an_answer() -> None:
    started = GenerateRequest(model="m", messages=REQUEST.messages, prefix="Once")
    data = always(streamed(answer("a")))
    async with served(data, models=("m",)) as (server, provider):
        assert not provider.models()[0].can_continue
        with pytest.raises(ProviderUnavailable, match="cannot continue"):
            await ask(provider, started)
        assert server.requests == []
    async with served(data, models=("m",), continuation="continue_final_message") as (
        server,
        provider,
    ):
        assert provider.models()[0].can_continue
        await ask(provider, started)
    assert server.requests[0].json["continue_final_message"] is True


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=80), max_size=3), st.sampled_from(["raw", "chunked", "events"]))
def test_only_generate_errors_leave(pieces: list[bytes], form: str) -> None:
    async def script(side: ServerSide) -> None:
        while await side.request_or_end():
            if form == "chunked":
                await side.send(CHUNKED_HEAD)
            for piece in filter(None, pieces):
                framed = b"data: " + piece + b"\n\n" if form == "events" else piece
                await side.send(piece if form == "raw" else chunk(framed))
            return

    async def main() -> None:
        async with served(script) as (_, provider):
            with pytest.raises(GenerateError):
                await ask(provider)

    trio.run(main)


# --- models and health ---------------------------------------------------------------------------


def test_it_is_a_provider_that_runs() -> None:
    settings = OpenAICompatibleSettings(name="n", base_url="http://h/v1")
    provider: Provider = OpenAICompatible(settings)
    assert isinstance(provider, Runs)
    assert provider.name == "n"


def offer(**fields: Any) -> ModelOffer:
    return ModelOffer(**({"tools": True} | fields))


LIST = {
    "object": "list",
    "data": [
        {"id": "a", "object": "model", "created": 1, "max_model_len": 4096},
        {
            "id": "b",
            "context_length": 8192,
            "architecture": {"input_modalities": ["text", "image"], "tokenizer": "x"},
        },
        {"id": "c", "meta": {"n_ctx_train": 2048}},
        {"id": "d", "max_model_len": "many", "meta": None},
        {"id": "e", "status": {"value": "loaded", "args": ["llama-server"]}},
        {"id": "f", "status": {"value": "unloaded"}},
        {"id": "g", "status": "loaded"},
    ],
}
LEARNT = (
    offer(id="a", context_length=4096),
    offer(id="b", context_length=8192, modalities=("text", "image")),
    offer(id="c", context_length=2048),
    offer(id="d"),
    offer(id="e", loaded=True),
    offer(id="f", loaded=False),
    offer(id="g"),
)


async def test_models_are_learnt() -> None:
    async with served(always(json_reply(200, LIST))) as (server, provider):
        assert provider.models() == ()
        assert (await provider.check()).state == "ready"
        assert provider.models() == LEARNT
    assert server.requests[0].path == "/v1/models"
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"


async def test_configured_models_learn_their_details() -> None:
    data = always(json_reply(200, LIST))
    fields = {"models": ("c", "z"), "tools": False, "modalities": ("text", "audio")}
    async with served(data, **fields) as (_, provider):
        assert [m.id for m in provider.models()] == ["c", "z"]
        await provider.check()
        assert provider.models() == (
            ModelOffer(id="c", context_length=2048, modalities=("text", "audio")),
            ModelOffer(id="z", modalities=("text", "audio")),
        )


@pytest.mark.parametrize(
    ("base_url", "egress", "expected"),
    [
        ("http://127.0.0.1:1/v1", None, False),
        ("https://openrouter.ai/api/v1", None, True),
        ("https://gpu.example.com/v1", False, False),
        ("http://localhost:1/v1", True, True),
    ],
)
def test_egress(base_url: str, egress: bool | None, expected: bool) -> None:
    settings = OpenAICompatibleSettings(name="n", base_url=base_url, models=("m",), egress=egress)
    assert OpenAICompatible(settings).models()[0].egress is expected


@pytest.mark.parametrize(
    ("data", "state", "reason", "hint"),
    [
        (json_reply(401, {"error": f"bad key {KEY}"}), "unavailable", "401: bad key ***", "key"),
        (json_reply(403, {}), "unavailable", "403", "key"),
        (json_reply(503, {"error": {"message": "Loading model"}}), "starting", "Loading", "wait"),
        (json_reply(404, {"detail": "Not Found"}), "unavailable", "404", "/v1"),
        (json_reply(500, {}), "unavailable", "500", "/v1"),
        (reply(200, "<html>"), "unavailable", "cannot be read", "base_url"),
        (reply(200, "[" * 5000), "unavailable", "cannot be read", "base_url"),
        (json_reply(200, {"data": [{}]}), "unavailable", "cannot be read", "base_url"),
        (b"SSH-2.0\r\n", "unavailable", "not valid HTTP", "base_url"),
        (json_reply(200, {}), "ready", "", ""),
        (json_reply(200, [{"id": "m"}]), "ready", "", ""),
    ],
)
async def test_health(data: bytes, state: str, reason: str, hint: str) -> None:
    async with served(always(data)) as (_, provider):
        health = await provider.check()
    assert health.state == state
    assert reason in health.reason
    assert hint in health.hint
    assert KEY not in health.reason


async def test_server_that_lists_no_models_is_ready_if_they_are_configured() -> None:
    async with served(always(json_reply(404, {})), models=("m",)) as (_, provider):
        assert (await provider.check()).state == "ready"
        assert [m.id for m in provider.models()] == ["m"]


async def test_list_of_models_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promptmesh.providers.model_list.MAX_MODEL_LIST", 100)
    async with served(always(json_reply(200, LIST))) as (_, provider):
        health = await provider.check()
    assert "longer than 100 bytes" in health.reason


async def test_health_of_a_hanging_server(autojump_clock: MockClock) -> None:
    async def script(side: ServerSide) -> None:
        await side.request()
        await side.wait_closed()

    async with served(script) as (_, provider):
        began = trio.current_time()
        health = await provider.check()
        assert trio.current_time() - began < 2
    assert health.state == "unavailable"
    assert "within 2 s" in health.reason


async def test_one_late_list_is_no_verdict_on_a_server_that_was_well(
    autojump_clock: MockClock,
) -> None:
    late: list[bool] = []

    async def script(side: ServerSide) -> None:
        while await side.request_or_end():
            if late.pop(0):
                await side.wait_closed()
            else:
                await side.send(json_reply(200, LIST))

    async with scripted_server(script, limit=10) as server, provider_for(server) as provider:
        states = []
        late += [False, True, False, True, True, False]
        while late:
            states.append((await provider.check()).state)
    assert states == ["ready", "ready", "ready", "ready", "unavailable", "ready"]


@pytest.mark.parametrize(("status", "count"), [(200, 30), (503, 30), (401, 2), (404, 2), (500, 2)])
async def test_server_that_refused_is_not_asked_all_the_time(
    status: int, count: int, autojump_clock: MockClock
) -> None:
    async with served(always(json_reply(status, {}))) as (server, provider):
        for _ in range(30):
            state = (await provider.check()).state
            assert (state == "ready") is (status == 200)
            await trio.sleep(0.4)
        assert len(server.requests) == count


@pytest.mark.parametrize(("status", "times"), [(200, [0, 300, 600]), (401, [0, 10, 20])])
async def test_public_server_is_asked_seldom(
    status: int, times: list[float], autojump_clock: MockClock
) -> None:
    """A name on the internet that leads here."""
    asked: list[float] = []

    async def script(side: ServerSide) -> None:
        while await side.request_or_end():
            asked.append(trio.current_time() - began)
            await side.send(json_reply(status, LIST))
            if len(asked) == len(times):
                nursery.cancel_scope.cancel()

    class Resolver(trio.abc.HostnameResolver):
        async def getaddrinfo(self, host: Any, port: Any, *rest: Any) -> Any:
            assert host == b"api.example.com"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

        async def getnameinfo(self, *args: Any) -> Any:
            raise NotImplementedError

    trio.socket.set_custom_hostname_resolver(Resolver())
    began = trio.current_time()
    async with scripted_server(script, limit=1000) as server:
        url = f"http://api.example.com:{server.port}/v1"
        async with provider_for(server, base_url=url) as provider, trio.open_nursery() as nursery:
            nursery.start_soon(provider.run)
            while True:
                await provider.check()
                await trio.sleep(1)
    assert asked == pytest.approx(times, abs=1.1)


async def test_run_keeps_the_models_fresh(autojump_clock: MockClock) -> None:
    asked: list[float] = []

    async def script(side: ServerSide) -> None:
        while await side.request_or_end():
            asked.append(trio.current_time() - began)
            if len(asked) == 9:
                nursery.cancel_scope.cancel()
                return
            status = 503 if len(asked) in (1, 2, 3, 4, 5, 8) else 200
            await side.send(json_reply(status, {"data": [{"id": f"m{len(asked)}"}]}))

    began = trio.current_time()
    async with scripted_server(script, limit=1000) as server:
        async with provider_for(server) as provider, trio.open_nursery() as nursery:
            nursery.start_soon(provider.run)
        assert [m.id for m in provider.models()] == ["m7"]
        assert server.connections == 1
    assert asked == pytest.approx([0, 1, 3, 7, 15, 25, 55, 85, 86], abs=0.01)


async def test_run_closes_the_connections_at_its_end() -> None:
    left = trio.Event()
    asked = trio.Event()

    async def script(side: ServerSide) -> None:
        await side.request()
        await side.send(json_reply(200, LIST))
        asked.set()
        await side.wait_closed()
        left.set()

    async with scripted_server(script) as server:
        settings = OpenAICompatibleSettings(name="n", base_url=server.base_url)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(OpenAICompatible(settings).run)
            await asked.wait()
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await left.wait()
