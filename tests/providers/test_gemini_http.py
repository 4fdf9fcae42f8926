"""`GeminiHttp` against the stub of the vendors, and against a server scripted byte by byte."""

from typing import Any

import pytest
from asking import ask, asked
from fakes_gemini import answer, calls, detail, error, reply
from fakes_http import always, event, json_reply, streamed
from fakes_http import reply as http_reply
from vendor_http import GEMINI

from promptmesh.providers import gemini_http
from promptmesh.providers.base import (
    ContentFiltered,
    EmbedRequest,
    GenerateRequest,
    Health,
    Message,
    ModelOffer,
    ProviderUnavailable,
    RequestRejected,
    Sampling,
    Text,
    Tool,
    ToolCall,
    Usage,
    floats,
)
from promptmesh.providers.gemini_messages import NO_SIGNATURE
from promptmesh.providers.gemini_settings import GeminiSettings
from promptmesh.providers.tokens import CountsTokens, TokenCount


async def test_what_is_asked() -> None:
    async with GEMINI.at_stub() as (server, provider):
        await ask(provider)
    (seen,) = server.of("ok")
    assert seen.request.path == "/m/ok/v1beta/models/stub-model:streamGenerateContent?alt=sse"
    assert seen.request.headers["x-goog-api-key"] == GEMINI.key


async def test_a_model_by_its_whole_name() -> None:
    async with GEMINI.at_stub() as (server, provider):
        await ask(provider, asked(model="models/stub-model"))
        (seen,) = server.of("ok")
    assert "/v1beta/models/stub-model:" in seen.request.path


async def test_the_name_of_a_model_does_not_change_the_place() -> None:
    request = asked(model="../x?a=b#c")
    async with GEMINI.scripted(always(streamed(answer("a")))) as (server, provider):
        await ask(provider, request)
    path = server.requests[0].path
    assert path == "/v1beta/models/..%2Fx%3Fa%3Db%23c:streamGenerateContent?alt=sse"


async def test_options() -> None:
    extra = {"thinking_budget": 0, "user": "of no importance", "seed": None}
    async with GEMINI.scripted(always(streamed(answer("a")))) as (server, provider):
        await ask(provider, asked(extra=extra))
        with pytest.raises(RequestRejected, match="did you mean 'thinking_budget'") as caught:
            await ask(provider, asked(extra={"thinking_budge": 0}))
    assert caught.value.field == "thinking_budge"
    (sent,) = server.requests
    assert sent.json["generationConfig"] == {"thinkingConfig": {"thinkingBudget": 0}}


async def test_no_answer_is_continued() -> None:
    async with GEMINI.at("http://127.0.0.1:9") as provider:
        with pytest.raises(ProviderUnavailable, match="cannot continue"):
            await ask(provider, asked(prefix="Once"))


# --- failures ------------------------------------------------------------------------------------


async def test_a_blocked_prompt() -> None:
    blocked = streamed(event({"promptFeedback": {"blockReason": "SAFETY"}}))
    async with GEMINI.scripted(always(blocked)) as (_, provider):
        with pytest.raises(ContentFiltered, match="blocked the prompt"):
            await ask(provider)


# --- tools ---------------------------------------------------------------------------------------


async def test_a_signature_goes_back_with_its_call() -> None:
    first = streamed(event(reply(calls("now", "signed", id="c1"), finish="STOP")))
    async with GEMINI.scripted(always(first)) as (server, provider):
        told = await ask(provider)
        turns = (
            *asked().messages,
            Message(role="assistant", tool_calls=told.tool_calls),
            Message(role="tool", content=(Text(text="noon"),), tool_call_id="c1"),
        )
        request = GenerateRequest(model="m", messages=turns, tools=(Tool(name="now"),))
        await ask(provider, request)
    (part,) = server.requests[1].json["contents"][1]["parts"]
    assert part["thoughtSignature"] == "signed"
    assert server.connections == 1


async def test_a_model_that_wants_signatures_is_asked_again_with_one() -> None:
    text = "Function call is missing a thought_signature in functionCall parts."
    refusal = json_reply(400, error(400, text, "INVALID_ARGUMENT"))

    async def script(side: Any) -> None:
        await side.request()
        await side.send(refusal)
        while await side.request_or_end():
            await side.send(streamed(answer("noon")))

    call = Message(role="assistant", tool_calls=(ToolCall(id="c1", name="now", arguments="{}"),))
    result = Message(role="tool", content=(Text(text="noon"),), tool_call_id="c1")
    request = GenerateRequest(model="m", messages=(*asked().messages, call, result))
    async with GEMINI.scripted(script) as (server, provider):
        assert (await ask(provider, request)).text == "noon"
        await ask(provider, request)
    sent = [r.json["contents"][1]["parts"][0].get("thoughtSignature") for r in server.requests]
    assert sent == [None, NO_SIGNATURE, NO_SIGNATURE]


async def test_a_model_that_refuses_to_think_less_is_asked_again_as_it_likes() -> None:
    text = "Budget 0 is invalid. This model only works in thinking mode."

    async def script(side: Any) -> None:
        await side.request()
        await side.send(json_reply(400, error(400, text, "INVALID_ARGUMENT")))
        while await side.request_or_end():
            await side.send(streamed(answer("noon")))

    request = asked(sampling=Sampling(max_tokens=9))
    async with GEMINI.scripted(script) as (server, provider):
        assert (await ask(provider, request)).text == "noon"
        await ask(provider, request)
    sent = [r.json["generationConfig"].get("thinkingConfig") for r in server.requests]
    assert sent == [{"thinkingBudget": 0}, None, None]


# --- models and health ---------------------------------------------------------------------------


async def test_models() -> None:
    async with GEMINI.at_stub() as (server, provider):
        assert provider.models() == ()
        assert await provider.check() == Health()
        assert provider.models()[0] == ModelOffer(
            id="stub-model",
            context_length=32768,
            modalities=("text", "image"),
            tools=True,
            egress=True,
        )
        assert [offer.id for offer in provider.models()] == ["stub-model", "stub-model-mini"]
        assert server.requests[0].headers["x-goog-api-key"] == GEMINI.key
        assert not server.seen


async def test_what_is_known_of_configured_models() -> None:
    async with GEMINI.at_stub(models=("stub-model-mini", "hidden")) as (_, provider):
        assert [offer.context_length for offer in provider.models()] == [None, None]
        await provider.check()
        found = {offer.id: offer.context_length for offer in provider.models()}
    assert found == {"stub-model-mini": 32768, "hidden": None}


LIST = {
    "models": [
        {
            "name": "models/gemini-embedding-001",
            "inputTokenLimit": 2048,
            "supportedGenerationMethods": ["embedContent"],
        },
        {
            "name": "models/gemini-2.5-flash-image",
            "supportedGenerationMethods": ["generateContent"],
        },
        {"name": "models/gemini-tts", "supportedGenerationMethods": ["generateContent"]},
        {"name": "models/imagen-9", "supportedGenerationMethods": ["predict"]},
        {"name": "models/old", "inputTokenLimit": -1},
        {
            "name": "models/gemini-flash-latest",
            "inputTokenLimit": 9,
            "supportedGenerationMethods": ["generateContent"],
        },
    ]
}


async def test_what_models_are_for() -> None:
    async with GEMINI.scripted(always(json_reply(200, LIST))) as (_, provider):
        await provider.check()
        found = [(o.id, o.tasks, o.context_length, o.tools) for o in provider.models()]
    assert found == [
        ("gemini-flash-latest", ("generate",), 9, True),
        ("gemini-embedding-001", ("embed",), 2048, False),
        ("old", ("generate",), None, True),
    ]


async def test_a_key_that_is_not_valid() -> None:
    reason = detail("ErrorInfo", reason="API_KEY_INVALID")
    body = error(400, f"API key not valid: {GEMINI.key}", "INVALID_ARGUMENT", reason)
    async with GEMINI.scripted(always(json_reply(400, body))) as (_, provider):
        found = await provider.check()
    assert found.state == "unavailable"
    assert "GEMINI_API_KEY" in found.hint
    assert GEMINI.key not in found.reason


# --- tokens --------------------------------------------------------------------------------------


async def test_tokens_are_counted_for_nothing() -> None:
    async with GEMINI.at_stub() as (server, provider):
        assert isinstance(provider, CountsTokens)
        assert await provider.count_tokens(asked()) == TokenCount(11, True)
        (sent,) = server.requests
        assert not server.seen
    assert sent.path == "/m/ok/v1beta/models/stub-model:countTokens"
    assert sent.json == {
        "generateContentRequest": {
            "model": "models/stub-model",
            "contents": [{"role": "user", "parts": [{"text": "Tell me a tale."}]}],
        }
    }


@pytest.mark.parametrize("body", [b"{}", b"no", b'{"totalTokens": -1}', b'{"totalTokens": "9"}'])
async def test_a_count_that_is_none(body: bytes) -> None:
    async with GEMINI.scripted(always(http_reply(200, body))) as (_, provider):
        with pytest.raises(ProviderUnavailable, match="counted no tokens"):
            await provider.count_tokens(asked())


# --- embeddings ----------------------------------------------------------------------------------


async def test_embeddings_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemini_http, "MAX_BATCH", 2)

    async def script(side: Any) -> None:
        while received := await side.request_or_end():
            texts = [r["content"]["parts"][0]["text"] for r in received.json["requests"]]
            vectors = [{"values": [float(len(text)), 0.5]} for text in texts]
            await side.send(json_reply(200, {"embeddings": vectors}))

    request = EmbedRequest(model="e", inputs=("a", "bb", "eight888"), dimensions=2)
    async with GEMINI.scripted(script) as (server, provider):
        found = await provider.embed(request)
    assert [floats(each.vector) for each in found] == [(1.0, 0.5), (2.0, 0.5), (8.0, 0.5)]
    assert found[2].usage == Usage(prompt_tokens=2, exact=False)
    assert [len(r.json["requests"]) for r in server.requests] == [2, 1]
    assert server.requests[0].path == "/v1beta/models/e:batchEmbedContents"
    assert server.requests[0].json["requests"][0] == {
        "model": "models/e",
        "content": {"parts": [{"text": "a"}]},
        "outputDimensionality": 2,
    }


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"embeddings": []},
        {"embeddings": [{"values": []}]},
        {"embeddings": [{"values": [1e300]}]},
        {"embeddings": [{"values": [1]}, {"values": [2]}]},
    ],
)
async def test_embeddings_that_are_none(body: Any) -> None:
    request = EmbedRequest(model="e", inputs=("a",))
    async with GEMINI.scripted(always(json_reply(200, body))) as (_, provider):
        with pytest.raises(ProviderUnavailable, match="sent no embeddings"):
            await provider.embed(request)


async def test_embeddings_of_tokens() -> None:
    async with GEMINI.at("http://127.0.0.1:9") as provider:
        with pytest.raises(ProviderUnavailable, match="not of tokens"):
            await provider.embed(EmbedRequest(model="e", inputs=((1, 2),)))


# --- settings ------------------------------------------------------------------------------------


def settings(**fields: Any) -> GeminiSettings:
    return GeminiSettings(**fields)


def test_which_way() -> None:
    both = {"GOOGLE_API_KEY": " first ", "GEMINI_API_KEY": "second"}
    assert settings(environment=both).key == "first"
    assert settings(environment={**both, "GOOGLE_API_KEY": ""}).key == "second"
    assert settings(environment=both, api_key="own").key == "own"
    assert settings(environment=both).way == "http"
    assert settings(environment=both, mode="cli").way == "cli"
    assert settings().way == "cli"
    with pytest.raises(ValueError, match="GEMINI_API_KEY"):
        _ = settings(mode="http").way


def test_where() -> None:
    assert settings().url == "https://generativelanguage.googleapis.com"
    there = {"GOOGLE_GEMINI_BASE_URL": "http://127.0.0.1:1"}
    assert settings(environment=there).url == "http://127.0.0.1:1"
    assert settings(environment=there, base_url="http://127.0.0.1:2").url == "http://127.0.0.1:2"
    with pytest.raises(ValueError, match="base_url: expected a URL"):
        _ = settings(base_url="ftp://a").url


def test_a_key_is_not_shown() -> None:
    said = settings(api_key=GEMINI.key, environment={"GEMINI_API_KEY": GEMINI.key})
    assert GEMINI.key not in repr(said)
    with pytest.raises(ValueError, match="no key has") as caught:
        _ = settings(api_key="two words").key
    assert "two words" not in str(caught.value)
