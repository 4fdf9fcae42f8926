"""The stub of the vendors does what its modes say, in each dialect."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import httpx
import pytest
import trio
from faults import PARTIAL, WHOLE, fault_backend
from vendor_replies import COMPLETION_TOKENS, FAILED
from vendors import VendorServer, vendors, vendors_in_a_thread


class Way(NamedTuple):
    """How a client of a dialect asks."""

    path: str
    body: dict[str, Any]
    #: What says that an answer ended because of the limit, and because of a filter.
    ends: tuple[str, str]


ASKED = "Tell me a tale."
_TURN = [{"role": "user", "content": ASKED}]
_PARTS = [{"role": "user", "parts": [{"text": "Today is Monday."}, {"text": ASKED}]}]
WAYS = {
    "chat": Way("/v1/chat/completions", {"messages": _TURN}, ("length", "content_filter")),
    "responses": Way("/v1/responses", {"input": _TURN}, ("max_output_tokens", "content_filter")),
    "messages": Way("/v1/messages", {"messages": _TURN}, ("max_tokens", "refusal")),
    "gemini": Way("/v1beta/models/m:generateContent", {"contents": _PARTS}, ("MAX_", "SAFETY")),
}
each = pytest.mark.parametrize("dialect", WAYS)
both = pytest.mark.parametrize("stream", [True, False])


async def ask(server: VendorServer, mode: str, dialect: str, stream: bool) -> httpx.Response:
    way = WAYS[dialect]
    path, body = way.path, way.body
    if dialect == "gemini" and stream:
        path = path.replace(":generate", ":streamGenerate") + "?alt=sse"
    elif stream:
        body = body | {"stream": True}
    async with httpx.AsyncClient(timeout=60, verify=False) as client:
        return await client.post(server.base(mode) + path, json=body)


@each
@both
@pytest.mark.parametrize(
    ("mode", "text"),
    [
        ("ok", WHOLE),
        ("echo", ASKED),
        ("big-5000", "x" * 5000),
        ("reason", WHOLE),
        ("slow-1", WHOLE),
    ],
)
async def test_an_answer_is_whole(dialect: str, stream: bool, mode: str, text: str) -> None:
    async with vendors() as server:
        reply = await ask(server, mode, dialect, stream)
    assert reply.status_code == 200
    assert text in "".join(_texts(reply, stream))
    assert [(s.dialect, s.left) for s in server.of(mode)] == [(dialect, False)]
    assert f": {COMPLETION_TOKENS}" in reply.text


def _texts(reply: httpx.Response, stream: bool) -> list[str]:
    """The strings of a reply, in their order; each event's once."""
    if not stream:
        return _strings(reply.json())
    lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
    return [text for line in lines for text in _strings(json.loads(line))]


def _strings(value: Any) -> list[str]:
    """All texts in it that are an answer's."""
    if isinstance(value, list):
        return [text for inner in value for text in _strings(inner)]
    if not isinstance(value, dict):
        return []
    own = [value[k] for k in ("text", "content", "delta") if isinstance(value.get(k), str)]
    return own + [text for inner in value.values() for text in _strings(inner)]


@each
@both
async def test_what_ends_an_answer_is_said(dialect: str, stream: bool) -> None:
    async with vendors() as server:
        for mode, why in zip(("truncate", "filter"), WAYS[dialect].ends, strict=True):
            reply = await ask(server, mode, dialect, stream)
            assert PARTIAL in reply.text
            assert why in reply.text
        empty = await ask(server, "empty", dialect, stream)
    assert not "".join(_texts(empty, stream))


@each
@both
async def test_errors(dialect: str, stream: bool) -> None:
    async with vendors() as server:
        for status in (400, 401, 402, 403, 404, 429, 500, 503, 529):
            reply = await ask(server, f"e{status}", dialect, stream)
            assert (reply.status_code, "retry-after" in reply.headers) == (status, False)
            assert reply.json()["error"]["message"]
        reply = await ask(server, "e429-7", dialect, stream)
        assert reply.headers["retry-after"] == "7"
        reply = await ask(server, "context", dialect, stream)
        assert "maximum context length" in reply.text
        codes = [(await ask(server, "flaky-2-503", dialect, stream)).status_code for _ in range(3)]
    assert codes == [503, 503, 200]


@each
@both
async def test_what_breaks_off(dialect: str, stream: bool) -> None:
    async with vendors() as server:
        for mode in ("drop", "reset"):
            with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
                await ask(server, mode, dialect, stream)
        for mode in ("hang", "hanghead", "stall"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, server, mode, dialect, stream)
                (seen,) = await server.asked(mode)
                nursery.cancel_scope.cancel()
            with trio.fail_after(60):
                await seen.over.wait()
            assert seen.left
        broken = await ask(server, "badjson", dialect, stream)
        assert broken.status_code == 200
        assert (await ask(server, "html", dialect, stream)).status_code == 502
        failed = await ask(server, "streamerr", dialect, stream)
        assert (FAILED in failed.text, failed.status_code) == (
            (True, 200) if stream else (False, 500)
        )


@pytest.mark.parametrize(
    ("path", "header", "word"),
    [
        ("/v1/models", "authorization", "owned_by"),
        ("/v1/models", "anthropic-version", "display_name"),
        ("/capi/models", "authorization", "model_picker_enabled"),
        ("/v1beta/models", "x-goog-api-key", "supportedGenerationMethods"),
    ],
)
async def test_lists_of_models(path: str, header: str, word: str) -> None:
    async with vendors() as server, httpx.AsyncClient(timeout=60, verify=False) as client:
        good = await client.get(server.base() + path, headers={header: "1"})
        bad = await client.get(server.base("badkey") + path, headers={header: "1"})
    assert word in good.text
    assert bad.status_code == 401
    assert not server.seen


def test_in_a_thread() -> None:
    with vendors_in_a_thread() as server:
        path = server.base() + WAYS["chat"].path
        assert WHOLE in httpx.post(path, json=WAYS["chat"].body, timeout=60).text
    with pytest.raises(httpx.ConnectError):
        httpx.get(path, timeout=60)


@pytest.mark.parametrize(
    "sent", [b"GET /healthz HTTP/1.1\r\n\r\n", b"\x13/x\n\r\n\r\n", b"\x00" * 24]
)
async def test_strangers_do_no_harm(sent: bytes) -> None:
    """A node, say, that looks for what had the port before."""
    async with vendors() as server, fault_backend() as faulty:
        for port in (server.port, faulty.port):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stranger:
                await stranger.send_all(sent)
                if b"HTTP" in sent:
                    assert b" 404 " in await stranger.receive_some()
        assert (await ask(server, "ok", "chat", stream=False)).status_code == 200
        assert (server.of("healthz"), faulty.seen) == ([], [])
