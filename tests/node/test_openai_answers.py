"""Answers as the OpenAI dialect writes them: a stream and a whole say the same."""

import json
from typing import Any

from promptmesh.node.openai_answers import StreamEncoder, encode_whole, origin_headers
from promptmesh.providers.base import (
    Chunk,
    Completion,
    CompletionBuilder,
    Origin,
    ToolCall,
    ToolCallDelta,
    Usage,
)

ORIGIN = Origin(peer="12D3", node="alpha", provider="echo", model="m", policy="round_robin")


def events(encoder: StreamEncoder, chunks: list[Chunk]) -> list[Any]:
    raw = encoder.first() + b"".join(encoder.chunk(chunk) for chunk in chunks)
    blocks = raw.decode().split("\n\n")
    assert blocks.pop() == ""
    data = [block.removeprefix("data: ") for block in blocks]
    assert data.pop() == "[DONE]"
    return [json.loads(d) for d in data]


CHUNKS = [
    Chunk(reasoning="hmm"),
    Chunk(text='He said "hi"\n'),
    Chunk(text="\u2028🌍", logprobs=({"token": "x", "logprob": -0.5},)),
    Chunk(tool_calls=(ToolCallDelta(index=0, id="c1", name="f", arguments='{"a"'),)),
    Chunk(tool_calls=(ToolCallDelta(index=0, arguments=":1}"),)),
    Chunk(finish_reason="tool_calls", usage=Usage(prompt_tokens=3, completion_tokens=4), cid="baf"),
]


def test_a_stream_adds_up_to_the_whole() -> None:
    encoder = StreamEncoder(ORIGIN, "req-1", 1, include_usage=True)
    seen = events(encoder, CHUNKS)
    deltas = [e["choices"][0]["delta"] for e in seen if e["choices"]]
    assert deltas[0]["role"] == "assistant"
    assert "".join(d.get("content", "") for d in deltas) == 'He said "hi"\n\u2028🌍'
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "hmm"
    arguments = [c["function"]["arguments"] for d in deltas for c in d.get("tool_calls", [])]
    assert "".join(arguments) == '{"a":1}'
    assert [e["choices"][0]["finish_reason"] for e in seen if e["choices"]][-1] == "tool_calls"
    assert seen[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert all(e["usage"] is None for e in seen[:-1])
    assert seen[-2]["promptmesh"]["cid"] == "baf"

    builder = CompletionBuilder()
    for chunk in CHUNKS:
        builder.add(chunk)
    whole = json.loads(encode_whole(builder.completion(), ORIGIN, "req-1", 1, "baf"))
    message = whole["choices"][0]["message"]
    assert message["content"] == 'He said "hi"\n\u2028🌍'
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a":1}'}
    assert whole["promptmesh"]["cid"] == "baf"
    assert whole["usage"] == seen[-1]["usage"]


def test_usage_is_sent_only_where_asked_for() -> None:
    seen = events(StreamEncoder(ORIGIN, "r", 1, include_usage=False), CHUNKS)
    assert all("usage" not in e for e in seen)


def test_tool_calls_alone_have_no_content() -> None:
    completion = Completion(
        tool_calls=(ToolCall(id="c", name="f", arguments="{}"),), finish_reason="tool_calls"
    )
    whole = json.loads(encode_whole(completion, ORIGIN, "r", 1, None))
    assert whole["choices"][0]["message"]["content"] is None
    assert "cid" not in whole["promptmesh"]


def test_headers_say_who_answered_and_are_safe() -> None:
    headers = dict(origin_headers(Origin(node="žluť\r\nx: y", attempts=2), "r", "baf"))
    assert headers["x-promptmesh-attempts"] == "2"
    assert headers["x-promptmesh-cid"] == "baf"
    assert headers["x-promptmesh-node"].isascii()
    assert not {"\r", "\n"} & set(headers["x-promptmesh-node"])
