"""Model servers of this machine, by their answers: vLLM, SGLang, Ollama, llama.cpp, LM Studio.

A port is asked for its list of models first, by `GET`, and for nothing more unless it gives one:
whatever else listens there sees one harmless question.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import trio

from .http_answer import read_body
from .http_client import HttpClient, open_client
from .http_reply import HttpFailure, NotConnected
from .openai_models import read_models

#: Seconds for all that is asked of one port; a server that is loading a model may take its time.
TIME = 1.5
#: Bytes of a list of models, and of an answer that only shows who it is.
MAX_LIST, MAX_PROBE = 1024 * 1024, 64 * 1024
#: Whose name is `owned_by` in the list of models.
OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama_cpp", "library": "ollama"}
#: Asked of one that does not say: a path, and a field that the answer has (docs of each server).
PROBES = (
    ("/api/version", "version", "ollama"),
    ("/props", "default_generation_settings", "llama_cpp"),
    ("/get_model_info", "model_path", "sglang"),
    ("/version", "version", "vllm"),
    ("/api/v0/models", "data", "lm_studio"),
)
#: A node of a mesh lists models, too, and is no server of one.
NODE = ("/mesh/v1/status", "peer")
#: What one is called that speaks the dialect, and is none of these.
UNKNOWN = "server"


class Found(NamedTuple):
    """A model server: what it is called, where it listens, and its models."""

    kind: str
    port: int
    models: tuple[str, ...]

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


class Looked(NamedTuple):
    """What was at a port."""

    found: Found | None = None
    #: Something listens there.
    taken: bool = False


async def look(port: int) -> Looked:
    """What is at that port of 127.0.0.1. Takes at most `TIME`."""
    client = open_client(f"http://127.0.0.1:{port}", {}, connect_timeout=TIME, read_timeout=TIME)
    looked = Looked(taken=True)
    with trio.move_on_after(TIME):
        try:
            looked = Looked(await _identify(client, port), taken=True)
        except NotConnected:
            looked = Looked()
        except HttpFailure:
            pass  # It speaks something else, or is no model server now: `taken` says it.
    with trio.CancelScope(shield=True, deadline=trio.current_time() + 0.5):
        await client.aclose()
    return looked


async def _identify(client: HttpClient, port: int) -> Found | None:
    body = await _get(client, "/v1/models", MAX_LIST)
    if body is None or b'"data"' not in body:
        return None
    try:
        models = tuple(read_models(body))
    except ValueError:
        return None
    if await _has(client, *NODE):
        return None
    return Found(await _kind(client, body), port, models)


async def _kind(client: HttpClient, body: bytes) -> str:
    for owner in _owners(body):
        if owner in OWNERS:
            return OWNERS[owner]
    for path, field, kind in PROBES:
        if await _has(client, path, field):
            return kind
    return UNKNOWN


def _owners(body: bytes) -> list[str]:
    listed = msgspec.json.decode(body)
    entries = listed.get("data") if isinstance(listed, dict) else None
    return [
        str(entry.get("owned_by")).lower() for entry in entries or () if isinstance(entry, dict)
    ]


async def _has(client: HttpClient, path: str, field: str) -> bool:
    body = await _get(client, path, MAX_PROBE)
    try:
        said: Any = msgspec.json.decode(body) if body else None
    except msgspec.DecodeError:
        return False
    return isinstance(said, dict) and field in said


async def _get(client: HttpClient, path: str, limit: int) -> bytes | None:
    """The body of a 200 in JSON; None for any other answer. Raises `HttpFailure`."""
    async with client.request("GET", path) as reply:
        if reply.status != 200 or "json" not in reply.headers.get("content-type", ""):
            return None
        return await read_body(reply, limit)
