"""Three daemons with the real language model on one of them."""

import json
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import trio
from daemons import MODEL, REAL_MODEL, STOP_S, Daemon, mesh, until

pytestmark = [pytest.mark.e2e, pytest.mark.model]

NAME = MODEL.name
FRANCE = "What is the capital of France?"


async def stats(daemon: Daemon) -> dict[str, Any]:
    """The counters of its model."""
    (provider,) = await daemon.json("/mesh/v1/providers")
    counters: dict[str, Any] = provider["stats"]
    return counters


def text_of(events: Sequence[dict[str, Any]]) -> str:
    return "".join(c["delta"].get("content", "") for event in events for c in event["choices"])


def worker_of(daemon: Daemon) -> psutil.Process:
    """The process of its model."""
    (worker,) = psutil.Process(daemon.pid).children()
    return worker


async def test_the_walking_mesh(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": "", "b": "", "c": REAL_MODEL}) as (a, b, c):
        await a.wait_for_model(NAME)
        await b.wait_for_model(NAME)

        # A prompt to A, answered by C, streamed.
        async with a.stream(FRANCE, NAME, temperature=0, max_tokens=40) as stream:
            events = [event async for event in stream]
        assert "Paris" in text_of(events)
        assert len(events) > 4, "it came token by token"
        origin = events[-1]["promptmesh"]
        assert (origin["node"], origin["provider"], origin["cache"]) == ("c", "local_hf", "miss")
        assert events[-1]["choices"][0]["finish_reason"] == "stop"

        # The same to B: a hit of the mesh, with the same CID and the same text.
        async def known_to_b() -> bool:
            only = {"cache-control": "only-if-cached"}
            answer = await b.chat(FRANCE, NAME, temperature=0, max_tokens=40, headers=only)
            return answer.status_code == 200

        await until(known_to_b, "b knows of the answer")
        ask_again = await b.cli(
            "ask", FRANCE, "-m", NAME, "--temperature", "0", "--max-tokens", "40", "--json"
        )
        again = json.loads(ask_again)
        assert (again["text"], again["cid"]) == (text_of(events), origin["cid"])
        assert again["cache"] in ("hit-mesh", "hit-local")
        raw = await b.get(f"/ipfs/{origin['cid']}", params={"format": "raw"})
        assert b"Paris" in raw.content

        await the_openai_package_works(a)
        await a_client_that_leaves_stops_the_model(a, c)


async def the_openai_package_works(node: Daemon) -> None:
    """The official client, streamed and not."""
    client = openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0)
    ask: Any = partial(
        client.chat.completions.create,
        model=NAME,
        messages=[{"role": "user", "content": FRANCE}],
        temperature=0,
        max_tokens=12,
    )

    def streamed() -> tuple[str, int]:
        chunks = list(ask(stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert chunks[-1].usage is not None
        return text, chunks[-1].usage.completion_tokens

    whole = await trio.to_thread.run_sync(ask)
    assert "Paris" in whole.choices[0].message.content
    assert await trio.to_thread.run_sync(streamed) == (
        whole.choices[0].message.content,
        whole.usage.completion_tokens,
    )
    models = await trio.to_thread.run_sync(client.models.list)
    assert [model.id for model in models] == [NAME]
    with pytest.raises(openai.NotFoundError, match=NAME):
        await trio.to_thread.run_sync(partial(ask, model="gpt-9"))
    client.close()


async def a_client_that_leaves_stops_the_model(near: Daemon, far: Daemon) -> None:
    async with near.stream("Tell a long story.", NAME, max_tokens=2000) as stream:
        await anext(stream)
        assert (await stats(far))["active"] == 1

    async def idle() -> bool:
        return bool((await stats(far))["active"] == 0)

    await until(idle, "the model stops")
    made = (await stats(far))["tokens"]
    await trio.sleep(0.5)  # to see that nothing goes on, there is nothing to wait for
    assert (await stats(far))["tokens"] == made < 2000


async def test_ctrl_c_while_the_model_generates(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": REAL_MODEL}) as (a,):
        await a.wait_for_model(NAME)
        worker = worker_of(a)
        async with a.stream("Tell a long story.", NAME, max_tokens=2000) as stream:
            await anext(stream)
            a.signal(signal.SIGINT)
            assert await a.wait_exit(STOP_S) == 0
        assert not worker.is_running()
        assert not (a.home / "node.json").exists()


async def test_a_crash_of_the_model_is_not_the_end_of_the_node(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": REAL_MODEL}) as (a,):
        await a.wait_for_model(NAME)
        worker = worker_of(a)
        async with a.stream("Tell a long story.", NAME, max_tokens=2000) as stream:
            await anext(stream)
            worker.kill()
            events = await stream.until_error()
        error = events[-1]["error"]
        assert (error["code"], error["partial"]) == ("stream_interrupted", text_of(events[:-1]))

        async def answers_again() -> bool:
            answer = await a.chat(FRANCE, NAME, temperature=0, max_tokens=12)
            assert answer.status_code == 200 or answer.headers["retry-after"], answer.text
            return answer.status_code == 200 and "Paris" in answer.text

        await until(answers_again, "a new worker answers")


async def test_the_model_ends_with_its_node_however_that_ends(tmp_path: Path) -> None:
    async with mesh(tmp_path, {"a": REAL_MODEL}) as (a,):
        await a.wait_for_model(NAME)
        worker = worker_of(a)
        os.kill(a.pid, signal.SIGKILL)

        async def gone() -> bool:
            return not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE

        await until(gone, "the worker ends")
